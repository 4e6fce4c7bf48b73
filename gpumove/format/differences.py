"""Chunks as differences to what was predicted for them: sub, round, adam and momentum. Decides nothing.

Encoders and decoders go through the same blocks and the same arithmetic; docs/codecs.md specifies the bytes.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Sequence
from functools import partial

import numpy as np

from gpumove.errors import IntegrityError
from gpumove.format import kernels, native, predict
from gpumove.format.arithmetic import require_ieee
from gpumove.format.entropy import Take
from gpumove.format.kernels import CENTRED, FLOATS, PLAIN, UNSIGNED, Words
from gpumove.format.lanes import RAW, shape_of
from gpumove.format.layouts import layout_for, sample
from gpumove.format.planes import Difference, Reader, Writer, encode_stream
from gpumove.format.predict import BFLOAT16, FLAGS, FLOAT16, FLOAT32, FORMULAS, GRADIENT, MAX_REPEATS, WIDTHS, Step

SAMPLE = (16, 128)
"""Runs and elements of each by which the lanes of one chunk are chosen: the choice costs some per cent of coding it."""

_HEADER = struct.Struct("<4B")
_LENGTH = struct.Struct("<I")
_ADAM_BELOW = 16


def _subtract(bases: Sequence[Words], words: Words, out: Words) -> None:
    np.subtract(words, bases[0], out=out)


def _add(bases: Sequence[Words], differences: Words, out: Words) -> None:
    np.add(differences, bases[0], out=out)


_TO_PREDECESSOR = Difference(native.PREDECESSOR, _subtract, _add)


def encode_sub(new: Words, old: Words) -> memoryview:
    """The difference of the bits to the predecessor's."""
    layout = layout_for(sample(new, *SAMPLE) - sample(old, *SAMPLE), CENTRED)
    return encode_stream(new, layout, _TO_PREDECESSOR, [old])


def decode_sub(stored: memoryview, out: memoryview, bases: Sequence[memoryview]) -> None:
    """Fill ``out``."""
    width = stored[0] if len(stored) else 0
    if width not in UNSIGNED or len(out) % width:
        raise IntegrityError(f"differences of {width}-byte words cannot make {len(out)} bytes")
    (old,) = _base_words(bases, [width], len(out) // width)
    with kernels.writable(out, width) as words:
        reader = Reader(stored, words.size, width)
        for n in range(reader.shape.blocks):
            a, b = reader.shape.bounds(n)
            reader.block(n, words[a:b], _TO_PREDECESSOR, [old[a:b]])


def _base_words(bases: Sequence[memoryview], widths: Sequence[int], count: int) -> list[Words]:
    if [len(base) for base in bases] != [count * width for width in widths]:
        needed, found = [count * width for width in widths], [len(base) for base in bases]
        raise IntegrityError(f"a chunk of {count} elements needs bases of {needed} bytes, not {found}")
    return [kernels.words(base, width) for base, width in zip(bases, widths)]


def _rounded(dtype: int) -> Callable[[Words, Words], None]:
    if dtype == BFLOAT16:
        return kernels.round_bfloat16
    if native.core is not None:
        return partial(native.core.rounded, dtype)
    return lambda wide, out: predict.store(wide.view(np.float32), FLOAT16, out)


def encode_round(new: Words, dtype: str, source: Words) -> memoryview | None:
    """One byte, if every element is the rounding of the float32 source; else None."""
    code = predict.DTYPES[dtype]
    rounded = _rounded(code)
    with predict.quiet():
        for piece in predict.pieces(new.size):
            found = kernels.scratch("rounded", new[piece].size, np.uint16)
            rounded(source[piece], found)
            if not np.array_equal(found, new[piece]):
                return None
    return memoryview(bytes([code]))


def decode_round(stored: memoryview, out: memoryview, bases: Sequence[memoryview]) -> None:
    """Fill ``out``."""
    if len(stored) != 1 or stored[0] not in (BFLOAT16, FLOAT16) or len(out) % 2:
        raise IntegrityError("a rounded chunk with an impossible header")
    (source,) = _base_words(bases, [4], len(out) // 2)
    rounded = _rounded(stored[0])
    with require_ieee(), predict.quiet(), kernels.writable(out, 2) as words:
        for piece in predict.pieces(words.size):
            rounded(source[piece], words[piece])


def codec_of(step: Step) -> str:
    """The codec whose formula this is."""
    return "adam/1" if step.formula < _ADAM_BELOW else "momentum/1"


def residual_of(step: Step, bases: Sequence[Words], new: Words) -> Words:
    """For a sample: the differences to the prediction. Not in blocks, not in scratch."""
    out = np.empty_like(new)
    if native.core is not None:
        width = new.itemsize
        whole = bytes([width, PLAIN, 8, 1, 0, width, RAW, 0])
        native.core.split(whole, _to_prediction(step).packed, new, tuple(bases), (out,), 0)
    else:
        _residual(step, bases, new, out)
    return out


def gradient_of(step: Step, old: Words, new: Words, out: Words) -> None:
    """The gradient as bfloat16 bits, for GRADIENT."""
    if native.core is not None:
        native.core.estimate(old, new, step.scalars[0], out)
        return
    for p in predict.pieces(new.size):
        estimate = predict.estimate_gradient(
            old[p].view(np.float32),
            new[p].view(np.float32),
            np.float32(step.scalars[0]),
            kernels.scratch("estimate", new[p].size, np.float32),
        )
        predict.store(estimate, BFLOAT16, out[p])


def _residual(step: Step, bases: Sequence[Words], words: Words, out: Words) -> None:
    for p in predict.pieces(words.size):
        prediction = kernels.scratch("prediction", words[p].size, words.dtype)
        predict.predict(step, [base[p] for base in bases], prediction)
        np.subtract(words[p], prediction, out=out[p])


def _restored(step: Step, bases: Sequence[Words], residual: Words, out: Words) -> None:
    for p in predict.pieces(out.size):
        prediction = kernels.scratch("prediction", out[p].size, out.dtype)
        predict.predict(step, [base[p] for base in bases], prediction)
        np.add(residual[p], prediction, out=out[p])


def _to_prediction(step: Step) -> Difference:
    packed = native.packed(step.formula, step.flags, step.repeats, step.dtypes, step.scalars)
    return Difference(packed, partial(_residual, step), partial(_restored, step))


def encode_step(step: Step, bases: Sequence[Words], new: Words) -> memoryview:
    """The difference to what the optimizer's rule makes of the bases. The caller has made arithmetic sound."""
    header = _HEADER.pack(step.formula, step.flags, step.repeats, 0) + bytes(step.dtypes)
    header += struct.pack(f"<{len(step.scalars)}f", *step.scalars)
    shape = shape_of(new.size, new.itemsize)
    difference = _to_prediction(step)
    with predict.quiet():
        picked, picked_new = [sample(base, *SAMPLE) for base in bases], sample(new, *SAMPLE)
        gradients: Writer | None = None
        if step.formula == GRADIENT:
            found = np.empty(picked_new.size, np.uint16)
            gradient_of(step, picked[0], picked_new, found)
            gradients = Writer(new.size, layout_for(found, FLOATS), block=shape.block)
            picked.append(found)
        writer = Writer(new.size, layout_for(residual_of(step, picked, picked_new), CENTRED))
        for a, b in map(shape.bounds, range(shape.blocks)):
            inputs = [base[a:b] for base in bases]
            if gradients is not None:
                inputs.append(kernels.scratch("gradients", b - a, np.uint16))
                gradient_of(step, inputs[0], new[a:b], inputs[1])
                gradients.put(inputs[1])
            writer.put(new[a:b], difference, inputs)
    pieces: list[bytes | memoryview] = [header]
    if gradients is not None:
        stream = gradients.finish()
        pieces += [_LENGTH.pack(len(stream)), stream]
    return memoryview(b"".join([*pieces, writer.finish()]))


def _read_step(take: Take, codec: str) -> Step:
    number, flags, repeats, reserved = _HEADER.unpack(take(4))
    formula = FORMULAS.get(number)
    if formula is None or flags & ~FLAGS or repeats > MAX_REPEATS or reserved:
        raise IntegrityError(f"a predicted chunk with an impossible header ({number}, {flags}, {repeats})")
    dtypes = tuple(take(formula.bases))
    scalars = struct.unpack(f"<{formula.scalars}f", take(4 * formula.scalars))
    step = Step(number, dtypes, scalars, flags, repeats)
    if codec_of(step) != codec or any(dtype >= len(WIDTHS) for dtype in dtypes):
        raise IntegrityError(f"a predicted chunk with an impossible header ({number} in {codec}, {dtypes})")
    if number == GRADIENT and dtypes != (FLOAT32, BFLOAT16):
        raise IntegrityError("a gradient of another type than bfloat16")
    return step


def decode_step(codec: str, stored: memoryview, out: memoryview, bases: Sequence[memoryview]) -> None:
    """Fill ``out``."""
    take = Take(stored)
    step = _read_step(take, codec)
    width = WIDTHS[step.dtypes[0]]
    if len(out) % width:
        raise IntegrityError(f"{width}-byte words cannot make {len(out)} bytes")
    count = len(out) // width
    gradients: Reader | None = None
    widths = [WIDTHS[dtype] for dtype in step.dtypes]
    if step.formula == GRADIENT:
        (length,) = _LENGTH.unpack(take(4))
        gradients = Reader(take(length), count, widths.pop())
    arrays, difference = _base_words(bases, widths, count), _to_prediction(step)
    with require_ieee(), predict.quiet(), kernels.writable(out, width) as words:
        reader = Reader(stored[take.at :], count, width)
        if gradients is not None and gradients.shape.block != reader.shape.block:
            raise IntegrityError("two streams of one chunk with blocks of different sizes")
        for n in range(reader.shape.blocks):
            a, b = reader.shape.bounds(n)
            inputs = [base[a:b] for base in arrays]
            if gradients is not None:
                inputs.append(kernels.scratch("gradients", b - a, np.uint16))
                gradients.block(n, inputs[-1])
            reader.block(n, words[a:b], difference, inputs)
