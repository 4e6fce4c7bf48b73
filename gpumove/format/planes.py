"""Streams of words as coded lanes: the writer and the reader. Knows nothing of tensors or predecessors.

The bytes are specified in docs/codecs.md.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Sequence
from itertools import accumulate
from typing import Any

import numpy as np

from gpumove.errors import IntegrityError
from gpumove.format import kernels
from gpumove.format.entropy import Take, decode_lane, encode_lane
from gpumove.format.kernels import UNSIGNED, Octets, Words
from gpumove.format.lanes import (
    CENTRED,
    CODED,
    CONSTANT,
    RAW,
    SEVEN,
    Lane,
    Layout,
    MisfitError,
    Shape,
    Tree,
    shape_of,
    stored_bytes,
)

_FIXED = struct.Struct("<4B")
_LANE = struct.Struct("<4B")


class Writer:
    """Takes the blocks of one stream in order. ``block``: their size, if another stream's words go with these."""

    def __init__(self, count: int, layout: Layout, *, block: int = 0) -> None:
        self._layout, self._tree = layout, Tree(layout)
        self._shape = Shape(count, block) if block else shape_of(count, layout.width)
        # What is stored as it is comes first: its place is known, so it is written there at once.
        lanes = sorted(layout.lanes, key=lambda lane: (lane.mode == CODED, -lane.width, lane.start))
        self._order = [layout.lanes.index(lane) for lane in lanes]
        sizes = self._shape.blocks * sum(lane.mode == CODED for lane in lanes)
        self._header_bytes = -(-(4 + 4 * len(lanes) + 4 * sizes) // 8) * 8
        self._at: dict[int, int] = {}
        end = self._header_bytes
        for n in self._order:
            if layout.lanes[n].mode != CODED:
                self._at[n] = end
                end += stored_bytes(layout.lanes[n], self._shape)
        self._fixed_bytes = end
        self._image = np.empty(max(end, count * layout.width) if 4 * end > count * layout.width else end, np.uint8)
        self._coded: dict[int, list[list[Any]]] = {n: [] for n in self._order if layout.lanes[n].mode == CODED}

    def put(self, block: Words) -> None:
        """The next block. Differences are overwritten."""
        if self._layout.transform != CENTRED:
            self._split(block, 0, self._layout.width)
            return
        np.add(block, 0x80, out=block)
        if self._layout.thin and block.max() <= 0xFF:
            low = kernels.scratch("half 0 1", block.size, np.uint8)
            np.copyto(low, block, casting="unsafe")
            for n, lane in enumerate(self._layout.lanes):
                if lane.start == 0:
                    self._emit(n, low)
                else:
                    self._coded[n].append([])
            return
        np.add(block, kernels.CENTRES[self._layout.width] - 0x80, out=block)
        self._split(block, 0, self._layout.width)

    def _split(self, block: Words, at: int, width: int) -> None:
        lane = self._tree.lanes.get((at, width))
        if lane is not None:
            self._emit(lane, block)
            return
        half = width // 2
        low, high = self._target(block.size, at, half), self._target(block.size, at + half, half)
        if self._tree.is_float(at, width):
            kernels.split_float(block, exponent=high, rest=low)
        else:
            kernels.low_half(block, low)
            kernels.high_half(block, high)
        self._split(low, at, half)
        self._split(high, at + half, half)

    def _target(self, count: int, at: int, width: int) -> Words:
        """Where to put a half: if it is a lane that is stored as it is, then where it is stored."""
        n = self._tree.lanes.get((at, width))
        if n is not None and self._layout.lanes[n].mode == RAW and not self._at[n] % width:
            found: Words = self._image[self._at[n] : self._at[n] + count * width].view(UNSIGNED[width])
            return found
        return kernels.scratch(f"half {at} {width}", count, UNSIGNED[width])

    def _emit(self, n: int, block: Words) -> None:
        lane = self._layout.lanes[n]
        if lane.mode == CODED:
            self._coded[n].append(encode_lane(block, lane.background, rare=lane.rare, level=lane.level))
            return
        at, image = self._at[n], self._image
        if lane.mode == CONSTANT:
            image[at : at + lane.width] = block[:1].view(np.uint8)
        elif lane.mode == RAW:
            if block.base is not image:
                image[at : at + block.nbytes] = block.view(np.uint8)
            self._at[n] += block.nbytes
        else:
            if block.max() > 0x7F:
                raise MisfitError
            end = self._at[n] = at + block.size - block.size // 8
            kernels.fold(block, image[at:end])

    def finish(self) -> memoryview:
        """The stored stream."""
        layout, lanes = self._layout, [self._layout.lanes[n] for n in self._order]
        block_log2 = self._shape.block.bit_length() - 1
        header = bytearray(_FIXED.pack(layout.width, layout.transform, block_log2, len(lanes)))
        for lane in lanes:
            header += _LANE.pack(lane.start, lane.width, lane.mode, lane.background)
        blocks = [block for n in self._order for block in self._coded.get(n, ())]
        sizes = [sum(map(len, block)) for block in blocks]
        header += struct.pack(f"<{len(sizes)}I", *sizes)
        total = self._fixed_bytes + sum(sizes)
        image = self._image
        if image.size < total:
            image = np.empty(total, np.uint8)
            image[: self._fixed_bytes] = self._image[: self._fixed_bytes]
        out: memoryview = memoryview(image.data)[:total]
        out[: self._header_bytes] = header.ljust(self._header_bytes, b"\0")
        at = self._fixed_bytes
        for block in blocks:
            for piece in block:
                out[at : at + len(piece)] = piece
                at += len(piece)
        return out


class Reader:
    """Gives the blocks of one stored stream, any of them at any time. Trusts nothing that the stream says."""

    def __init__(self, stored: memoryview, count: int, width: int) -> None:
        take = Take(stored)
        found, transform, block_log2, lanes = _FIXED.unpack(take(4))
        if found != width or not 8 <= block_log2 <= 20 or width << block_log2 > kernels.BLOCK_BYTES:
            raise IntegrityError(f"a stream of {width}-byte words with an impossible header")
        if not 1 <= lanes <= width:
            raise IntegrityError(f"{lanes} lanes cannot make up words of {width} bytes")
        self.shape = Shape(count, 1 << block_log2)
        self._layout = Layout(width, transform, tuple(Lane(*_LANE.unpack(take(4))) for _ in range(lanes)))
        self._tree = Tree(self._layout)
        if not self._tree.is_sound():
            raise IntegrityError("the lanes of a stream do not make up its words")
        coded = sum(lane.mode == CODED for lane in self._layout.lanes)
        sizes = struct.unpack(f"<{self.shape.blocks * coded}I", take(4 * self.shape.blocks * coded))
        if any(take(-take.at % 8)):
            raise IntegrityError("a stream's header is not padded with zeros")
        self._places: list[tuple[memoryview, list[int]]] = []
        for lane in self._layout.lanes:
            at, ends = take.at, [0]
            if lane.mode == CODED:
                ends += accumulate(sizes[: self.shape.blocks])
                sizes = sizes[self.shape.blocks :]
                take(ends[-1])
            else:
                take(stored_bytes(lane, self.shape))
            self._places.append((stored[at : take.at], ends))
        take.end()

    def block(self, index: int, out: Words) -> None:
        """Fill ``out``, which has that block's size."""
        low = self._only_low(index) if self._layout.transform == CENTRED else None
        found = self._join(index, 0, self._layout.width, out) if low is None else low
        if isinstance(found, int):
            out.fill(found)
        elif found is not out:
            np.copyto(out, found)
        if self._layout.transform == CENTRED:
            np.subtract(out, 0x80 if low is not None else kernels.CENTRES[self._layout.width], out=out)

    def _only_low(self, index: int) -> Words | int | None:
        """The lowest byte, if that is a lane and the others are absent: most blocks that were predicted well."""
        for lane, (_, ends) in zip(self._layout.lanes, self._places):
            if lane.start and (lane.mode != CODED or lane.background != 0x80 or ends[index] != ends[index + 1]):
                return None
        lowest = self._tree.lanes.get((0, 1))
        return None if lowest is None else self._join(index, 0, 1)

    def _join(self, index: int, at: int, width: int, out: Words | None = None) -> Words | int:
        lane = self._tree.lanes.get((at, width))
        count = self.shape.bounds(index)[1] - self.shape.bounds(index)[0]
        if lane is not None:
            return self._lane(lane, index, count)
        half = width // 2
        low, high = self._join(index, at, half), self._join(index, at + half, half)
        if isinstance(low, int) and isinstance(high, int) and not self._tree.is_float(at, width):
            return low | high << 8 * half
        if out is None:
            out = kernels.scratch(f"join{at}.{width}", count, UNSIGNED[width])
        join: Callable[[Any, Any, Any], None] = kernels.join_halves
        if self._tree.is_float(at, width):
            low, high, join = high, low, kernels.join_float
        join(low, high, out)
        return out

    def _lane(self, n: int, index: int, count: int) -> Words | int:
        lane, (stored, ends) = self._layout.lanes[n], self._places[n]
        first = self.shape.bounds(index)[0]
        if lane.mode == CONSTANT:
            return int.from_bytes(stored, "little")
        if lane.mode == RAW:
            return self._raw(stored[first * lane.width : (first + count) * lane.width], n, lane.width)
        out: Octets = kernels.scratch(f"lane{n}", count * lane.width, np.uint8)
        if lane.mode == SEVEN:
            before = index * (self.shape.block - self.shape.block // 8)
            kernels.unfold(np.frombuffer(stored[before : before + count - count // 8], np.uint8), out)
            return out
        data = stored[ends[index] : ends[index + 1]]
        if not len(data):
            return int.from_bytes(bytes([lane.background]) * lane.width, "little")
        found: Words = decode_lane(data, out, lane.background).view(UNSIGNED[lane.width])
        return found

    def _raw(self, stored: memoryview, n: int, width: int) -> Words:
        flat: Octets = np.frombuffer(stored, np.uint8)
        if flat.__array_interface__["data"][0] % width:
            aligned = kernels.scratch(f"lane{n}", flat.size, np.uint8)
            aligned[:] = flat
            flat = aligned
        found: Words = flat.view(UNSIGNED[width])
        return found


def encode_planes(words: Words, layout: Layout) -> memoryview:
    """A chunk by itself."""
    writer = Writer(words.size, layout)
    shape = shape_of(words.size, layout.width)
    for a, b in map(shape.bounds, range(shape.blocks)):
        writer.put(words[a:b])
    return writer.finish()


def decode_planes(stored: memoryview, out: memoryview, bases: Sequence[memoryview]) -> None:
    """Fill ``out``."""
    width = stored[0] if len(stored) else 0
    if width not in UNSIGNED or len(out) % width or bases:
        raise IntegrityError(f"planes of {width}-byte words cannot make {len(out)} bytes with {len(bases)} bases")
    with kernels.writable(out, width) as words:
        reader = Reader(stored, words.size, width)
        for n in range(reader.shape.blocks):
            a, b = reader.shape.bounds(n)
            reader.block(n, words[a:b])
