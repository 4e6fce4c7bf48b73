"""The loops over elements, as flat functions on numpy arrays: one place to make faster. Knows no format, no chunk.

Everything works on blocks of about 1 MiB: what one loop leaves, the next finds in the cache. Arrays that a loop needs
for itself come from ``scratch``, which a thread keeps: a fresh megabyte costs more in page faults than most loops take.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
from numpy.typing import NDArray

Words = NDArray[Any]
"""Elements as unsigned integers of their width."""
Octets = NDArray[np.uint8]

BLOCK_BYTES = 1 << 20
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
    flat: Octets = np.frombuffer(data, np.uint8)
    if flat.__array_interface__["data"][0] % width:
        flat = flat.copy()
    found: Words = flat.view(UNSIGNED[width])
    return found


@contextmanager
def writable(out: memoryview, width: int) -> Iterator[Words]:
    """A buffer to fill, as words; by way of a copy where its address does not allow it."""
    flat: Octets = np.frombuffer(out, np.uint8)
    if not flat.__array_interface__["data"][0] % width:
        yield flat.view(UNSIGNED[width])
        return
    aligned = np.empty(flat.size, np.uint8)
    yield aligned.view(UNSIGNED[width])
    flat[:] = aligned


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


def fold(plane: Octets, out: Octets) -> None:
    """Seven bits per byte: the last eighth of the bytes goes into the free top bits of the seven others."""
    part = plane.size // 8
    out[:] = plane[: plane.size - part]
    last, bits = plane[plane.size - part :], scratch("fold", part, np.uint8)
    for n in range(7 if part else 0):
        np.left_shift(last, 7 - n, out=bits)
        np.bitwise_and(bits, 0x80, out=bits)
        piece = out[n * part : (n + 1) * part]
        np.bitwise_or(piece, bits, out=piece)


def unfold(folded: Octets, out: Octets) -> None:
    """The inverse of ``fold``."""
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
    up = scratch("round_bfloat16", bits.size, np.uint32)
    np.right_shift(bits, 16, out=up)
    np.bitwise_and(up, 1, out=up)
    np.add(up, 0x7FFF, out=up)
    np.add(up, bits, out=up)
    np.right_shift(up, 16, out=up)
    np.copyto(out, up, casting="unsafe")


def gather_quads(plane: Octets, background: int, out: Octets, *, limit: int) -> Octets | None:
    """Four values to a byte, 2 bits each: 0 the background, 1 and 2 one less and one more, 3 all others, returned.

    None if there would be more than ``limit`` others; nothing is in ``out`` then.
    """
    folded = scratch("quads", 4 * out.size, np.uint8)
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
    np.copyto(out, packed, casting="unsafe")
    return others


_OTHER = 0x80
_VALUES = (0, 0xFF, 1, _OTHER)
_QUADS = np.frombuffer(bytes(_VALUES[n >> shift & 3] for n in range(256) for shift in (0, 2, 4, 6)), "<u4")


def spread_quads(quads: Octets, background: int, out: Octets) -> NDArray[np.intp]:
    """The inverse, but for the other values: returns where they are."""
    spread = scratch("quads", quads.size, np.dtype("<u4"))
    np.take(_QUADS, quads, out=spread, mode="wrap")
    np.copyto(out, spread.view(np.uint8)[: out.size])
    others = np.flatnonzero(out == _OTHER)
    np.add(out, background, out=out)
    return others


def histogram(plane: Octets) -> NDArray[np.float64]:
    """How often every byte occurs."""
    return np.bincount(plane, minlength=256).astype(np.float64)
