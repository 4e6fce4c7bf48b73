"""What an optimizer step makes of the state before it, as arithmetic on bits. Knows no stream and no chunk.

A prediction has to come out the same, bit for bit, wherever it is made. So every line below is one IEEE operation of
binary32 (or binary64, where said) on whole arrays, rounded once, in this order; docs/codecs.md repeats them as a
specification. What torch does is followed where it was measured: its CPU kernels fuse ``lerp``, ``addcmul`` and ``add``
with a factor, so these are computed in binary64 here and rounded once.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from gpumove.format import kernels
from gpumove.format.kernels import Words

Floats = NDArray[np.float32]

FLOAT32, BFLOAT16, FLOAT16 = range(3)
DTYPES = {"float32": FLOAT32, "bfloat16": BFLOAT16, "float16": FLOAT16}
WIDTHS = (4, 2, 2)

DECAY, GRADIENT, SQUARE, SQUARES, STEP, FIT = range(1, 7)
BUFFER, DESCENT, NESTEROV, FIT_BUFFER = range(17, 21)

EACH, BFLOAT16_GRADIENT = 1, 2
"""Flags: every operation is rounded to the state's own 16-bit type; the gradient is rounded to bfloat16."""
FLAGS = EACH | BFLOAT16_GRADIENT
MAX_REPEATS = 32

PIECE = 1 << 17
"""Elements per pass: few enough to stay in the cache, enough that two threads seldom meet at the interpreter's lock."""


class Step(NamedTuple):
    """One prediction: a formula and its numbers. ``dtypes`` are those of its bases, the first being the old self."""

    formula: int
    dtypes: tuple[int, ...]
    scalars: tuple[float, ...]
    flags: int = 0
    repeats: int = 0


class _Frame:
    """The arrays of one pass, as float32, and the rounding of the state's type."""

    def __init__(self, step: Step, bases: Sequence[Words]) -> None:
        self.count = bases[0].size
        self.scalars = [np.float32(s) for s in step.scalars]
        self.repeats, self.flags = step.repeats, step.flags
        self.dtype = step.dtypes[0]
        self._each = bool(step.flags & EACH)
        self.bases = [load(bits, dtype, f"base{n}") for n, (bits, dtype) in enumerate(zip(bases, step.dtypes))]

    def new(self, name: str) -> Floats:
        return kernels.scratch(f"frame {name}", self.count, np.float32)

    def round(self, values: Floats) -> Floats:
        """To the state's own type and back, where every operation is rounded to it."""
        if self._each and self.dtype != FLOAT32:
            narrow = kernels.scratch("narrow", self.count, np.uint16)
            store(values, self.dtype, narrow)
            np.copyto(values, load(narrow, self.dtype, "narrowed"))
        return values


def load(bits: Words, dtype: int, name: str) -> Floats:
    """Bits as float32. What is float32 already is not copied."""
    if dtype == FLOAT32:
        return bits.view(np.float32)
    out = kernels.scratch(f"load {name}", bits.size, np.float32)
    if dtype == FLOAT16:
        np.copyto(out, bits.view(np.float16))
        return out
    wide = out.view(np.uint32)
    np.copyto(wide, bits)
    np.left_shift(wide, 16, out=wide)
    return out


def store(values: Floats, dtype: int, out: Words) -> None:
    """The bits of float32 values, rounded to nearest even; in 16 bits there is one NaN: machines differ in theirs."""
    if dtype == FLOAT32:
        np.copyto(out, values.view(np.uint32))
        return
    if dtype == FLOAT16:
        np.copyto(out.view(np.float16), values, casting="same_kind")
    else:
        kernels.round_bfloat16(values.view(np.uint32), out)
    nans = np.isnan(values)
    if nans.any():
        np.copyto(out, out.dtype.type(0x7FFF), where=nans)


def _fused(factor: np.float32 | Floats, values: Floats, plus: Floats, out: Floats) -> Floats:
    """``factor * values + plus``: the product is exact in binary64, the sum is rounded there and then to binary32."""
    wide, other = (kernels.scratch(name, values.size, np.float64) for name in ("wide", "other"))
    np.copyto(wide, values)
    if isinstance(factor, np.ndarray):
        np.copyto(other, factor)
        np.multiply(wide, other, out=wide)
    else:
        np.multiply(wide, np.float64(factor), out=wide)
    np.copyto(other, plus)
    np.add(wide, other, out=wide)
    np.copyto(out, wide, casting="same_kind")
    return out


def _decay(frame: _Frame) -> Floats:
    """exp_avg without a gradient. Scalars: 1 - beta1, beta1^K."""
    (old,), (weight, power) = frame.bases, frame.scalars
    out = frame.new("out")
    if not frame.repeats:
        return frame.round(np.multiply(old, power, out=out))
    falling = frame.new("falling")
    np.copyto(out, old)
    for _ in range(frame.repeats):
        np.negative(out, out=falling)
        frame.round(_fused(weight, falling, out, out))
    return out


def _gradient(frame: _Frame) -> Floats:
    """exp_avg from the gradient, which is the second base. Scalars: 1 - beta1."""
    (old, gradient), (weight,) = frame.bases, frame.scalars
    rise = np.subtract(gradient, old, out=frame.new("rise"))
    return _fused(weight, rise, old, frame.new("out"))


def estimate_gradient(old: Floats, new: Floats, weight: np.float32, out: Floats) -> Floats:
    """The gradient that took exp_avg from ``old`` to ``new``: old + (new - old) / weight."""
    np.subtract(new, old, out=out)
    np.divide(out, weight, out=out)
    np.add(out, old, out=out)
    return out


def _square(frame: _Frame) -> Floats:
    """exp_avg_sq after one step, bases exp_avg_sq, exp_avg, new exp_avg. Scalars: 1 - beta1, beta2, 1 - beta2."""
    (old, before, after), (weight, beta, rest) = frame.bases, frame.scalars
    gradient = estimate_gradient(before, after, weight, frame.new("gradient"))
    if frame.flags & BFLOAT16_GRADIENT:
        narrow = kernels.scratch("narrow", frame.count, np.uint16)
        store(gradient, BFLOAT16, narrow)
        gradient = load(narrow, BFLOAT16, "gradient")
    kept = frame.round(np.multiply(old, beta, out=frame.new("kept")))
    scaled = np.multiply(gradient, rest, out=frame.new("scaled"))
    return _fused(gradient, scaled, kept, frame.new("out"))


def _squares(frame: _Frame) -> Floats:
    """After several: what Cauchy and Schwarz leave of the gradients. Scalars: beta1^K, 1 - beta1, beta2, beta2^K, c."""
    (old, before, after), (power1, weight, beta, power2, share) = frame.bases, frame.scalars
    mean = np.multiply(before, power1, out=frame.new("mean"))
    np.subtract(after, mean, out=mean)
    np.divide(mean, weight, out=mean)
    out = frame.new("out")
    if frame.repeats:
        np.copyto(out, old)
    else:
        np.multiply(old, power2, out=out)
    for _ in range(frame.repeats):
        frame.round(np.multiply(out, beta, out=out))
    scaled = np.multiply(mean, share, out=frame.new("scaled"))
    np.multiply(scaled, mean, out=scaled)
    return np.add(out, scaled, out=out)


def _step(frame: _Frame) -> Floats:
    """Adam's parameter. Scalars: 1 - lr * decay (or 1), sqrt(1 - beta2^t), eps, -lr / (1 - beta1^t)."""
    (old, mean, square), (keep, correction, eps, size) = frame.bases, frame.scalars
    root = frame.round(np.sqrt(square, out=frame.new("root")))
    frame.round(np.divide(root, correction, out=root))
    frame.round(np.add(root, eps, out=root))
    out = frame.round(np.multiply(old, keep, out=frame.new("out")))
    move = np.multiply(mean, size, out=frame.new("move"))
    np.divide(move, root, out=move)
    return np.add(out, move, out=out)


def _slopes(frame: _Frame, pairs: Sequence[tuple[Floats, Floats]], eps: np.float32) -> list[Floats]:
    """exp_avg / (sqrt(exp_avg_sq) + eps) of each pair."""
    found = []
    for n, (mean, square) in enumerate(pairs):
        slope = np.sqrt(square, out=frame.new(f"slope{n}"))
        np.add(slope, eps, out=slope)
        found.append(np.divide(mean, slope, out=slope))
    return found


def _weighted(frame: _Frame, terms: Sequence[Floats]) -> Floats:
    """The old parameter and each term by its factor, from left to right."""
    out, part = frame.new("out"), frame.new("part")
    np.copyto(out, frame.bases[0])
    for factor, term in zip(frame.scalars, terms):
        np.multiply(term, factor, out=part)
        np.add(out, part, out=out)
    return out


def terms_of(step: Step, bases: Sequence[Words]) -> list[Floats]:
    """What FIT and FIT_BUFFER are linear in; an encoder finds the factors by least squares over these."""
    return _terms(_Frame(step, bases))


def _terms(frame: _Frame) -> list[Floats]:
    old, *rest = frame.bases
    if len(rest) == 2:
        return [*rest, old]
    mean, square, before, square_before = rest
    return [*_slopes(frame, ((mean, square), (before, square_before)), frame.scalars[3]), old]


def _fit(frame: _Frame) -> Floats:
    """The parameter after several steps. Scalars: three factors; for FIT also eps."""
    return _weighted(frame, _terms(frame))


def _buffer(frame: _Frame) -> Floats:
    """SGD's momentum buffer without a gradient. Scalars: momentum^K."""
    return frame.round(np.multiply(frame.bases[0], frame.scalars[0], out=frame.new("out")))


def _descent(frame: _Frame) -> Floats:
    """SGD's parameter, bases parameter and new buffer. Scalars: -lr."""
    (old, buffer), (rate,) = frame.bases, frame.scalars
    return _fused(rate, buffer, old, frame.new("out"))


def _nesterov(frame: _Frame) -> Floats:
    """With the buffer before as third base. Scalars: -lr, momentum, 1 - dampening."""
    (old, buffer, before), (rate, momentum, undamped) = frame.bases, frame.scalars
    gradient = np.multiply(before, momentum, out=frame.new("gradient"))
    np.subtract(buffer, gradient, out=gradient)
    np.divide(gradient, undamped, out=gradient)
    frame.round(_fused(momentum, buffer, gradient, gradient))
    return _fused(rate, gradient, old, frame.new("out"))


class Formula(NamedTuple):
    """How many bases and numbers it takes."""

    bases: int
    scalars: int
    compute: Callable[[_Frame], Floats]


FORMULAS = {
    DECAY: Formula(1, 2, _decay),
    GRADIENT: Formula(2, 1, _gradient),
    SQUARE: Formula(3, 3, _square),
    SQUARES: Formula(3, 5, _squares),
    STEP: Formula(3, 4, _step),
    FIT: Formula(5, 4, _fit),
    BUFFER: Formula(1, 1, _buffer),
    DESCENT: Formula(2, 1, _descent),
    NESTEROV: Formula(3, 3, _nesterov),
    FIT_BUFFER: Formula(3, 3, _fit),
}


def predict(step: Step, bases: Sequence[Words], out: Words) -> None:
    """Fill ``out`` with the bits of the prediction; where it is no finite number, with the old bits.

    For any number of elements; callers pass at most ``PIECE`` at a time, and silence numpy's warnings.
    """
    values = FORMULAS[step.formula].compute(_Frame(step, bases))
    store(values, step.dtypes[0], out)
    if step.dtypes[0] != FLOAT32:  # rounding may have made an infinity
        values = load(out, step.dtypes[0], "rounded")
    finite = np.isfinite(values)
    if not finite.all():
        np.copyto(out, bases[0], where=np.logical_not(finite, out=finite))


def pieces(count: int) -> list[slice]:
    """The passes over a block."""
    return [slice(a, min(count, a + PIECE)) for a in range(0, count, PIECE)]


def quiet() -> Any:
    """Without numpy's warnings: infinities and NaN are ordinary here."""
    return np.errstate(all="ignore")
