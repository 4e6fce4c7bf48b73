"""Boxes: parts of a tensor in the coordinates of the whole. Plain integer geometry."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import NamedTuple

Ints = tuple[int, ...]
_PAGE = 4096


class Box(NamedTuple):
    """A box in the coordinates of the whole tensor."""

    offset: Ints
    shape: Ints

    def volume(self) -> int:
        """Elements in the box."""
        return math.prod(self.shape)


def cover_problem(shape: Ints, boxes: Sequence[Box]) -> str | None:
    """Say what is wrong if the boxes do not cover a tensor exactly: gaps, overlaps or boxes outside."""
    filled = sorted(b for b in boxes if b.volume())
    for box in filled:
        if any(o < 0 or o + n > s for o, n, s in zip(box.offset, box.shape, shape)) or len(box.shape) != len(shape):
            return f"has a box {box} outside of its shape {list(shape)}"
    active: list[Box] = []
    for box in filled:  # sorted by first offset: only boxes that reach into this row can overlap
        active = [a for a in active if not a.shape or a.offset[0] + a.shape[0] > box.offset[0]]
        for other in active:
            if intersect(box, other) is not None:
                return f"has overlapping boxes {other} and {box}"
        active.append(box)
    missing = math.prod(shape) - sum(b.volume() for b in filled)
    return f"lacks {missing} of its {math.prod(shape)} elements" if missing else None


def intersect(a: Box, b: Box) -> Box | None:
    """The common part of two boxes, or None."""
    start = tuple(max(x, y) for x, y in zip(a.offset, b.offset))
    stop = tuple(min(x + n, y + m) for x, n, y, m in zip(a.offset, a.shape, b.offset, b.shape))
    if any(s >= t for s, t in zip(start, stop)):
        return None
    return Box(start, tuple(t - s for s, t in zip(start, stop)))


def split(box: Box, item_bytes: int, chunk_bytes: int) -> Iterator[tuple[Box, int]]:
    """Cut a box into chunks of at most about ``chunk_bytes``, contiguous in the box's own row-major bytes.

    Yields:
        (chunk, its first byte within the box).
    """
    if not box.shape or box.volume() * item_bytes <= chunk_bytes:
        yield box, 0
        return
    row_bytes = math.prod(box.shape[1:]) * item_bytes
    rows = max(1, chunk_bytes // row_bytes)
    even = _PAGE // math.gcd(row_bytes, _PAGE)
    if rows >= 2 * even:
        rows -= rows % even  # whole pages: the next chunk starts on one too, and can be written from where it lies
    for start in range(0, box.shape[0], rows):
        height = min(rows, box.shape[0] - start)
        run = Box((box.offset[0] + start, *box.offset[1:]), (height, *box.shape[1:]))
        if row_bytes <= chunk_bytes:
            yield run, start * row_bytes
            continue
        inner = Box(run.offset[1:], run.shape[1:])  # one row is too large: cut inside it
        for part, at in split(inner, item_bytes, chunk_bytes):
            yield Box((run.offset[0], *part.offset), (1, *part.shape)), start * row_bytes + at
