"""Streams of words as coded lanes: the writer and the reader. Knows nothing of tensors or optimizers.

The bytes are specified in docs/codecs.md.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Sequence
from itertools import accumulate
from typing import Any, NamedTuple

import numpy as np

from gpumove.errors import IntegrityError
from gpumove.format import kernels, lanes, native
from gpumove.format.entropy import Take, decode_lane, encode_lane
from gpumove.format.kernels import CENTRED, UNSIGNED, Octets, Words
from gpumove.format.lanes import CODED, CONSTANT, RAW, Layout, MisfitError, Shape, shape_of


class Difference(NamedTuple):
    """What is subtracted from words before they are stored: as the native core takes it, and for numpy."""

    packed: bytes
    subtract: Callable[[Sequence[Words], Words, Words], None]
    """Of bases, words, and where to put the differences."""
    add: Callable[[Sequence[Words], Words, Words], None]
    """Of bases, differences, and where to put the words."""


class Writer:
    """Takes the blocks of one stream in order. ``block``: their size, if another stream's words go with these."""

    def __init__(self, count: int, layout: Layout, *, block: int = 0) -> None:
        shape = Shape(count, block) if block else shape_of(count, layout.width)
        self._plan = lanes.plan_of(layout, shape)
        self._lanes, self._tree = self._plan.layout.lanes, self._plan.tree
        self._at = list(self._plan.starts)
        end, raw_bytes = self._plan.fixed_bytes, count * layout.width
        self._image = np.empty(max(end, raw_bytes) if 4 * end > raw_bytes else end, np.uint8)
        self._coded: list[list[list[Any]]] = [[] for _ in self._lanes]

    def put(self, words: Words, difference: Difference | None = None, bases: Sequence[Words] = ()) -> None:
        """The next block."""
        if native.core is not None and self._lanes[0].mode != CONSTANT:
            self._put_at_once(native.core, words, difference, bases)
            return
        if difference is not None:
            block = kernels.scratch("residual", words.size, words.dtype)
            difference.subtract(bases, words, block)
            words = block
        if self._plan.layout.transform == CENTRED:
            self._put_centred(words)
        else:
            self._split(words, 0, words.itemsize)

    def _put_at_once(
        self, core: native.Core, words: Words, difference: Difference | None, bases: Sequence[Words]
    ) -> None:
        targets: list[Octets] = []
        for n, lane in enumerate(self._lanes):
            nbytes = words.size * lane.width
            if lane.mode == RAW:
                targets.append(self._image[self._at[n] : self._at[n] + nbytes])
                self._at[n] += nbytes
            else:
                targets.append(kernels.scratch(f"lane{n}", nbytes, np.uint8))
        step = native.NOTHING if difference is None else difference.packed
        others = core.split(self._plan.head, step, words, tuple(bases), tuple(targets), self._plan.rare)
        for n, lane in enumerate(self._lanes):
            if lane.mode != RAW:
                self._emit(n, targets[n], others[n])

    def _put_centred(self, block: Words) -> None:
        """Differences: they are overwritten."""
        np.add(block, 0x80, out=block)
        if self._plan.thin and block.max() <= 0xFF:
            low = kernels.scratch("half 0 1", block.size, np.uint8)
            np.copyto(low, block, casting="unsafe")
            for n, lane in enumerate(self._lanes):
                if lane.start == 0:
                    self._emit(n, low)
                else:
                    self._coded[n].append([])
            return
        np.add(block, kernels.CENTRES[block.itemsize] - 0x80, out=block)
        self._split(block, 0, block.itemsize)

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
        if n is not None and self._lanes[n].mode == RAW and not self._at[n] % width:
            found: Words = self._image[self._at[n] : self._at[n] + count * width].view(UNSIGNED[width])
            return found
        return kernels.scratch(f"half {at} {width}", count, UNSIGNED[width])

    def _emit(self, n: int, block: Words, others: int | None = None) -> None:
        lane = self._lanes[n]
        if lane.mode == CODED:
            plane: Octets = block.view(np.uint8)
            if lane.rare and others is None:
                others = kernels.count_others(plane, lane.background)
            self._coded[n].append(
                encode_lane(plane, lane.background, others=others if lane.rare else None, level=lane.level)
            )
            return
        at, image = self._at[n], self._image
        if lane.mode == CONSTANT:
            image[at : at + lane.width] = block[:1].view(np.uint8)
        elif lane.mode == RAW:
            if block.base is not image:
                image[at : at + block.nbytes] = block.view(np.uint8)
            self._at[n] += block.nbytes
        else:
            end = self._at[n] = at + block.size - block.size // 8
            if not kernels.fold(block, image[at:end]):
                raise MisfitError

    def finish(self) -> memoryview:
        """The stored stream."""
        plan, blocks = self._plan, [block for lane in self._coded for block in lane]
        sizes = [sum(map(len, block)) for block in blocks]
        header = plan.head + struct.pack(f"<{len(sizes)}I", *sizes)
        total = plan.fixed_bytes + sum(sizes)
        image = self._image
        if image.size < total:
            image = np.empty(total, np.uint8)
            image[: plan.fixed_bytes] = self._image[: plan.fixed_bytes]
        out: memoryview = memoryview(image.data)[:total]
        out[: plan.header_bytes] = header.ljust(plan.header_bytes, b"\0")
        at = plan.fixed_bytes
        for block in blocks:
            for piece in block:
                out[at : at + len(piece)] = piece
                at += len(piece)
        return out


_FIXED = struct.Struct("<4B")


class Reader:
    """Gives the blocks of one stored stream, any of them at any time. Trusts nothing that the stream says."""

    def __init__(self, stored: memoryview, count: int, width: int) -> None:
        take = Take(stored)
        found, _, block_log2, count_of_lanes = _FIXED.unpack(take(4))
        if found != width or not 8 <= block_log2 <= 20 or width << block_log2 > kernels.BLOCK_BYTES:
            raise IntegrityError(f"a stream of {width}-byte words with an impossible header")
        if not 1 <= count_of_lanes <= width:
            raise IntegrityError(f"{count_of_lanes} lanes cannot make up words of {width} bytes")
        self.shape = Shape(count, 1 << block_log2)
        take(4 * count_of_lanes)
        self._head = bytes(stored[: take.at])
        self._layout, self._tree = lanes.read_layout(self._head)
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
                take(lanes.size_of(lane, self.shape))
            self._places.append((stored[at : take.at], ends))
        take.end()

    def block(self, index: int, out: Words, difference: Difference | None = None, bases: Sequence[Words] = ()) -> None:
        """Fill ``out``, which has that block's size."""
        if native.core is not None:
            sources = tuple(self._stored(n, index, out.size) for n in range(len(self._layout.lanes)))
            step = native.NOTHING if difference is None else difference.packed
            native.core.join(self._head, step, out, tuple(bases), sources)
            return
        if difference is not None:
            block = kernels.scratch("residual", out.size, out.dtype)
            self._fill(index, block)
            difference.add(bases, block, out)
        else:
            self._fill(index, out)

    def _fill(self, index: int, out: Words) -> None:
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
        return None if (0, 1) not in self._tree.lanes else self._join(index, 0, 1)

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
        lane, stored = self._layout.lanes[n], self._stored(n, index, count)
        if stored is None:
            return int.from_bytes(bytes([lane.background]) * lane.width, "little")
        if lane.mode == CONSTANT:
            return int.from_bytes(stored, "little")
        flat: Octets = np.frombuffer(stored, np.uint8)
        if flat.__array_interface__["data"][0] % lane.width:
            aligned = kernels.scratch(f"aligned{n}", flat.size, np.uint8)
            aligned[:] = flat
            flat = aligned
        found: Words = flat.view(UNSIGNED[lane.width])
        return found

    def _stored(self, n: int, index: int, count: int) -> bytes | memoryview | None:
        """A lane's bytes in one block. A constant's are one word; None: all are background."""
        lane, (stored, ends) = self._layout.lanes[n], self._places[n]
        first = index * self.shape.block
        if lane.mode == CONSTANT:
            return stored
        if lane.mode == RAW:
            return stored[first * lane.width : (first + count) * lane.width]
        if lane.mode == CODED and ends[index] == ends[index + 1]:
            return None
        out = kernels.scratch(f"lane{n}", count * lane.width, np.uint8)
        if lane.mode == CODED:
            return decode_lane(stored[ends[index] : ends[index + 1]], out, lane.background)
        before = index * (self.shape.block - self.shape.block // 8)
        kernels.unfold(np.frombuffer(stored[before : before + count - count // 8], np.uint8), out)
        return out.data


def encode_planes(words: Words, layout: Layout) -> memoryview:
    """A chunk by itself."""
    return encode_stream(words, layout, None, ())


def encode_stream(words: Words, layout: Layout, difference: Difference | None, bases: Sequence[Words]) -> memoryview:
    """A chunk as differences to what its bases make of it."""
    writer = Writer(words.size, layout)
    shape = shape_of(words.size, layout.width)
    for a, b in map(shape.bounds, range(shape.blocks)):
        writer.put(words[a:b], difference, [base[a:b] for base in bases])
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
