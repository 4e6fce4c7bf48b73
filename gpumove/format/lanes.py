"""Lanes: how words are cut into bytes that are stored each in its own way. Frozen descriptions; planes.py does it.

A lane is some bytes of every word, those of a float's exponent, say. Each has its own entropy: noise is stored as it
is, exponents go through Huffman, and of differences that are nearly always 0 only the others are kept.
"""

from __future__ import annotations

import struct
from functools import lru_cache
from typing import NamedTuple

from gpumove.errors import IntegrityError
from gpumove.format.kernels import BLOCK_BYTES, CENTRED, FLOATS, PLAIN

CONSTANT, RAW, SEVEN, CODED = range(4)
MODES = (CONSTANT, RAW, SEVEN, CODED)


class MisfitError(Exception):
    """For encoders: a top bit is set that the sample did not see."""


class Lane(NamedTuple):
    """``width`` bytes from byte ``start`` of every word. ``background``: the byte that an absent block consists of."""

    start: int
    width: int
    mode: int
    background: int = 0
    rare: bool = False
    """For the writer only: the sample was nearly all background."""
    level: int = 0
    """For the writer only: the zstd level; 0 is Huffman alone."""


class Layout(NamedTuple):
    """How the words of one stream are cut into lanes."""

    width: int
    transform: int
    """FLOATS: sign and exponent of 8 bits are first put into bytes of their own. CENTRED: the words are differences."""
    lanes: tuple[Lane, ...]


class Shape(NamedTuple):
    """Where blocks begin: all but the last have ``block`` words."""

    words: int
    block: int

    @property
    def blocks(self) -> int:
        """How many there are."""
        return -(-self.words // self.block)

    def bounds(self, index: int) -> tuple[int, int]:
        """First word, and the one after the last."""
        return index * self.block, min(self.words, (index + 1) * self.block)


def shape_of(count: int, width: int) -> Shape:
    """The blocks that a writer makes."""
    return Shape(count, BLOCK_BYTES // width)


def size_of(lane: Lane, shape: Shape) -> int:
    """Of a lane whose size does not depend on its content."""
    if lane.mode == CONSTANT:
        return lane.width
    if lane.mode == RAW:
        return lane.width * shape.words
    return sum((b - a) - (b - a) // 8 for a, b in map(shape.bounds, range(shape.blocks)))


class Tree:
    """The lanes as a binary tree: a node is a lane, or two halves."""

    def __init__(self, layout: Layout) -> None:
        self._layout = layout
        self.lanes = {(lane.start, lane.width): n for n, lane in enumerate(layout.lanes)}
        self.floats_at = layout.width - 2 if layout.transform == FLOATS else -1

    def is_float(self, at: int, width: int) -> bool:
        """Whether this node is the half that holds sign and exponent, and is cut."""
        return width == 2 and at == self.floats_at

    def is_sound(self) -> bool:
        """Whether the lanes cover every byte once, in ways that exist."""
        width, transform, lanes = self._layout
        if transform not in (PLAIN, FLOATS, CENTRED) or (transform == FLOATS and width not in (2, 4)):
            return False
        if transform == FLOATS and not {(width - 2, 1), (width - 1, 1)} <= self.lanes.keys():
            return False
        if any(lane.mode not in MODES or (lane.mode == SEVEN and lane.width != 1) for lane in lanes):
            return False
        waiting, seen = [(0, width)], 0
        while waiting:
            at, size = waiting.pop()
            if (at, size) in self.lanes:
                seen += 1
            elif size == 1:
                return False
            else:
                waiting += [(at, size // 2), (at + size // 2, size // 2)]
        return seen == len(lanes)


_FIXED = struct.Struct("<4B")
_LANE = struct.Struct("<4B")


class Plan(NamedTuple):
    """How words of one layout are written, as far as the words do not matter. ``layout``: in the order of storing."""

    layout: Layout
    shape: Shape
    tree: Tree
    head: bytes
    """A stream's first bytes, up to its lanes; the native core takes a layout so, too."""
    header_bytes: int
    starts: tuple[int, ...]
    """Where the lanes begin that are stored as they are; those are first: their places are known, so they are written
    there at once."""
    fixed_bytes: int
    rare: int
    """The set of lanes that are nearly all background."""
    thin: bool
    """Nearly all words are differences that fit into the lowest byte."""


@lru_cache(256)
def plan_of(layout: Layout, shape: Shape) -> Plan:
    """Small chunks are many and alike: to make this anew for each would take as long as to code it."""
    lanes = tuple(sorted(layout.lanes, key=lambda lane: (lane.mode == CODED, -lane.width, lane.start)))
    layout = layout._replace(lanes=lanes)
    head = _FIXED.pack(layout.width, layout.transform, shape.block.bit_length() - 1, len(lanes))
    head += b"".join(_LANE.pack(lane.start, lane.width, lane.mode, lane.background) for lane in lanes)
    sizes = 4 * shape.blocks * sum(lane.mode == CODED for lane in lanes)
    header_bytes = -(-(len(head) + sizes) // 8) * 8
    starts = [header_bytes]
    for lane in lanes:
        starts.append(starts[-1] + (0 if lane.mode == CODED else size_of(lane, shape)))
    rare = sum(1 << n for n, lane in enumerate(lanes) if lane.rare)
    low, *high = sorted(lanes)
    alike = all(lane.rare and lane.background == 0x80 for lane in high)
    thin = layout.transform == CENTRED and low.width == 1 and alike
    return Plan(layout, shape, Tree(layout), head, header_bytes, tuple(starts), starts[-1], rare, thin)


@lru_cache(256)
def read_layout(head: bytes) -> tuple[Layout, Tree]:
    """The layout that a stream begins with.

    Raises:
        IntegrityError: there is no such layout.
    """
    width, transform, _, lanes = _FIXED.unpack_from(head)
    layout = Layout(width, transform, tuple(Lane(*_LANE.unpack_from(head, 4 + 4 * n)) for n in range(lanes)))
    tree = Tree(layout)
    if not tree.is_sound():
        raise IntegrityError("the lanes of a stream do not make up its words")
    return layout, tree
