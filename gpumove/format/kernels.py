"""The loops over elements, as flat functions on numpy arrays. Knows no format, no chunk.

The native core replaces most of them where it is built, and what is stored is the same: these are the reference, and
what runs elsewhere. Everything works on blocks of about 1 MiB: what one loop leaves, the next finds in the cache. What
a loop needs for itself comes from ``scratch``, which a thread keeps: a fresh megabyte costs more in page faults than
most loops take.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
from numpy.typing import NDArray

from gpumove.format import native

Words = NDArray[Any]
"""Elements as unsigned integers of their width."""
Octets = NDArray[np.uint8]

BLOCK_BYTES = 1 << 20
PLAIN, FLOATS, CENTRED = range(3)
"""What is done to words before they are cut: nothing; sign and exponent apart; differences moved by CENTRES."""
PLANE, SPARSE, QUADS = 1, 2, 3
"""Kinds of packed bytes."""
CENTRES = {width: int.from_bytes(b"\x80" * width, "little") for width in (1, 2, 4, 8)}
"""Added to a difference, its bytes are digits that lie around 0x80: small steps either way change the lowest only."""
UNSIGNED: dict[int, Any] = {1: np.dtype("<u1"), 2: np.dtype("<u2"), 4: np.dtype("<u4"), 8: np.dtype("<u8")}


class _Slots(threading.local):
    def __init__(self) -> None:
        self.arrays: dict[str, Octets] = {}


_slots = _Slots()


def scratch(name: str, count: int, dtype: np.dtype[Any] | type) -> Words:
    """This thread's array of that name; its content is what the last user left. Never keep it across calls."""
    nbytes = count * np.dtype(dtype).itemsize
    held = _slots.arrays.get(name)
    if held is None or held.nbytes < nbytes:
        held = _slots.arrays[name] = np.empty(max(nbytes, 1 << 12), np.uint8)
    found: Words = held[:nbytes].view(dtype)
    return found


def words(data: Any, width: int) -> Words:
    """A buffer as unsigned integers, without a copy where its address allows."""
    found: Words = np.frombuffer(data, UNSIGNED[width])
    return found if found.flags.aligned else found.copy()


@contextmanager
def writable(out: memoryview, width: int) -> Iterator[Words]:
    """A buffer to fill, as words; by way of a copy where its address does not allow it."""
    found: Words = np.frombuffer(out, UNSIGNED[width])
    if found.flags.aligned:
        yield found
        return
    aligned = np.empty_like(found)
    yield aligned
    found[:] = aligned


def low_half(block: Words, out: Words) -> None:
    """The lower half of every word."""
    np.copyto(out, block, casting="unsafe")


def high_half(block: Words, out: Words) -> None:
    """The upper half of every word."""
    np.right_shift(block, 8 * out.itemsize, out=out, dtype=block.dtype, casting="unsafe")


def join_halves(low: Words | int, high: Words | int, out: Words) -> None:
    """Words from their halves; a half that is one constant is a plain integer."""
    shift = 4 * out.itemsize
    if isinstance(high, int):
        np.copyto(out, low)
        if high:
            np.bitwise_or(out, out.dtype.type(high << shift), out=out)
        return
    np.copyto(out, high)
    np.left_shift(out, shift, out=out)
    if isinstance(low, int):
        if low:
            np.bitwise_or(out, out.dtype.type(low), out=out)
    else:
        np.bitwise_or(out, low, out=out)


def split_float(top: NDArray[np.uint16], exponent: Octets, rest: Octets) -> None:
    """The upper 16 bits of floats with 8 exponent bits: the exponent, and the sign over the upper mantissa bits."""
    half = scratch("split_float", top.size, np.uint16)
    np.right_shift(top, 7, out=half)
    np.copyto(exponent, half, casting="unsafe")
    np.right_shift(half, 1, out=half)
    np.copyto(rest, half, casting="unsafe")
    np.bitwise_and(rest, 0x80, out=rest)
    mantissa = scratch("split_float8", top.size, np.uint8)
    np.copyto(mantissa, top, casting="unsafe")
    np.bitwise_and(mantissa, 0x7F, out=mantissa)
    np.bitwise_or(rest, mantissa, out=rest)


def join_float(exponent: Octets | int, rest: Octets | int, out: NDArray[np.uint16]) -> None:
    """The inverse of ``split_float``."""
    if isinstance(rest, int):
        out.fill((rest * 0x101) & 0x807F)
    else:
        np.copyto(out, rest)
        np.multiply(out, 0x101, out=out)
        np.bitwise_and(out, 0x807F, out=out)
    if isinstance(exponent, int):
        np.bitwise_or(out, exponent << 7, out=out)
        return
    upper = scratch("join_float", out.size, np.uint16)
    np.copyto(upper, exponent)
    np.left_shift(upper, 7, out=upper)
    np.bitwise_or(out, upper, out=out)


def fold(plane: Octets, out: Octets) -> bool:
    """Seven bits per byte: the last eighth of the bytes goes into the free top bits of the seven others.

    False, and nothing in ``out``, if a top bit is set.
    """
    if native.core is not None:
        return native.core.fold(plane, out)
    if plane.max() > 0x7F:
        return False
    part = plane.size // 8
    out[:] = plane[: plane.size - part]
    last, bits = plane[plane.size - part :], scratch("fold", part, np.uint8)
    for n in range(7 if part else 0):
        np.left_shift(last, 7 - n, out=bits)
        np.bitwise_and(bits, 0x80, out=bits)
        piece = out[n * part : (n + 1) * part]
        np.bitwise_or(piece, bits, out=piece)
    return True


def unfold(folded: Octets, out: Octets) -> None:
    """The inverse of ``fold``."""
    if native.core is not None:
        native.core.unfold(folded, out)
        return
    part = out.size // 8
    np.bitwise_and(folded, 0x7F, out=out[: out.size - part])
    last, bits = out[out.size - part :], scratch("fold", part, np.uint8)
    last.fill(0)
    for n in range(7 if part else 0):
        np.right_shift(folded[n * part : (n + 1) * part], 7, out=bits)
        np.left_shift(bits, n, out=bits)
        np.bitwise_or(last, bits, out=last)


def round_bfloat16(bits: NDArray[np.uint32], out: NDArray[np.uint16]) -> None:
    """The upper half of float32 bits, rounded to nearest, ties to even, as integers: whatever they may mean."""
    if native.core is not None:
        native.core.rounded(1, bits, out)
        return
    up = scratch("round_bfloat16", bits.size, np.uint32)
    np.right_shift(bits, 16, out=up)
    np.bitwise_and(up, 1, out=up)
    np.add(up, 0x7FFF, out=up)
    np.add(up, bits, out=up)
    np.right_shift(up, 16, out=up)
    np.copyto(out, up, casting="unsafe")


def pack_quads(plane: Octets, background: int, *, limit: int) -> tuple[Any, Any] | None:
    """Four values to a byte, 2 bits each: 0 the background, 1 and 2 one less and one more, 3 all others; and those.

    None if there would be more than ``limit`` others.
    """
    if native.core is not None:
        return native.core.pack(QUADS, plane, background, limit)
    quads = scratch("packed quads", -(-plane.size // 4), np.uint8)
    folded = scratch("quads", 4 * quads.size, np.uint8)
    folded[plane.size :] = 0
    values, sign = folded[: plane.size], scratch("quads sign", plane.size, np.int8)
    np.subtract(plane, background, out=values)
    np.right_shift(values.view(np.int8), 7, out=sign)
    np.add(values, values, out=values)
    np.bitwise_xor(values, sign.view(np.uint8), out=values)
    other = scratch("quads other", plane.size, np.bool_)
    np.greater(values, 2, out=other)
    if np.count_nonzero(other) > limit:
        return None
    others = plane[np.flatnonzero(other)]
    np.minimum(values, 3, out=values)
    packed = folded.view("<u4")
    np.multiply(packed, 0x01041040, out=packed)
    np.right_shift(packed, 24, out=packed)
    np.copyto(quads, packed, casting="unsafe")
    return quads, others


def pack_sparse(plane: Octets, background: int, *, count: int) -> tuple[Any, Any]:
    """A bit for every value, and the ``count`` that are not the background."""
    if native.core is not None:
        found = native.core.pack(SPARSE, plane, background, count)
        assert found is not None
        return found
    other = scratch("sparse", plane.size, np.bool_)
    np.not_equal(plane, background, out=other)
    return np.packbits(other, bitorder="little"), plane[np.flatnonzero(other)]


_OTHER = 0x80
_VALUES = (0, 0xFF, 1, _OTHER)
_QUADS = np.frombuffer(bytes(_VALUES[n >> shift & 3] for n in range(256) for shift in (0, 2, 4, 6)), "<u4")


def spread_quads(quads: Octets, background: int, out: Octets) -> NDArray[np.intp]:
    """The inverse of ``pack_quads``, but for the other values: returns where they are."""
    spread = scratch("quads", quads.size, np.dtype("<u4"))
    np.take(_QUADS, quads, out=spread, mode="wrap")
    np.copyto(out, spread.view(np.uint8)[: out.size])
    others = np.flatnonzero(out == _OTHER)
    np.add(out, background, out=out)
    return others


def spread_sparse(bitmap: Octets, background: int, out: Octets) -> NDArray[np.intp]:
    """The same for ``pack_sparse``."""
    out.fill(background)
    return np.flatnonzero(np.unpackbits(bitmap, count=out.size, bitorder="little").view(np.bool_))


def count_others(plane: Octets, background: int) -> int:
    """Of the values that are not the background."""
    other = scratch("others", plane.size, np.bool_)
    return int(np.count_nonzero(np.not_equal(plane, background, out=other)))


def count_bytes(words: Words, transform: int) -> NDArray[np.float64]:
    """How often every value of every byte occurs in the transformed words, the lowest byte first."""
    width = words.itemsize
    if native.core is not None:
        counts: NDArray[np.uint32] = np.frombuffer(native.core.count(width, transform, words), np.uint32)
        return counts.reshape(width, 256).astype(np.float64)
    if transform == CENTRED:
        words = words + words.dtype.type(CENTRES[width])
    planes = words.view(np.uint8).reshape(-1, width).T.copy()
    if transform == FLOATS:
        top = np.ascontiguousarray(words.view(np.uint16)[width // 2 - 1 :: width // 2])
        split_float(top, exponent=planes[-1], rest=planes[-2])
    return np.array([np.bincount(plane, minlength=256) for plane in planes], np.float64)
