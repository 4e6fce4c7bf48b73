"""One block of one lane: zstd (as a Huffman coder, or at a level), or the few values that are not the background.

Reads hostile bytes: a frame is unpacked only if it declares exactly the size that is needed.
"""

from __future__ import annotations

import struct
import threading
from typing import Any

import numpy as np
import zstandard

from gpumove.errors import IntegrityError
from gpumove.format import kernels, native
from gpumove.format.kernels import PLANE, QUADS, SPARSE, Octets

_HEAD = struct.Struct("<I")
_AS_IT_IS = 1 << 31
_RARE, _SCATTERED, _FEW = 0.02, 0.2, 0.5
"""Shares of values that are not the background. Below the first, their places are stored; below the last, quads, if
nearly all are next to the background; else their places, below the second: rows that changed are often neighbours."""
_CRAMPED = 32
"""Below so many bytes a frame's own header costs more than Huffman gains."""


class _Contexts(threading.local):
    """zstd contexts are costly to make and not thread-safe: one of each per thread."""

    def __init__(self) -> None:
        # Huffman alone: matches of 7 bytes are rare among exponents, and looking for shorter ones makes the plane
        # larger and takes four times as long. Negative levels would switch Huffman off.
        parameters = zstandard.ZstdCompressionParameters(
            strategy=zstandard.STRATEGY_FAST,
            window_log=18,
            hash_log=6,
            min_match=7,
            target_length=0,
            write_content_size=1,
        )
        self.compressors = {0: zstandard.ZstdCompressor(compression_params=parameters)}
        self.decompressor = zstandard.ZstdDecompressor()

    def compressor(self, level: int) -> zstandard.ZstdCompressor:
        if level not in self.compressors:
            self.compressors[level] = zstandard.ZstdCompressor(level=level)
        return self.compressors[level]


_contexts = _Contexts()


class Take:
    """Hands out the bytes of a buffer from left to right, and IntegrityError where there are none left."""

    def __init__(self, data: memoryview) -> None:
        self._data, self.at = data, 0

    def __call__(self, nbytes: int) -> memoryview:
        """The next so many bytes."""
        piece = self._data[self.at : self.at + nbytes]
        if len(piece) != nbytes:
            raise IntegrityError(f"stored bytes end after {len(self._data)} where at least {self.at + nbytes} belong")
        self.at += nbytes
        return piece

    def end(self) -> None:
        """Nothing may follow."""
        if self.at != len(self._data):
            raise IntegrityError(f"{len(self._data) - self.at} stored bytes too many")


def compress(data: Any, level: int) -> bytes:
    """One frame. Level 0 is Huffman alone."""
    return _contexts.compressor(level).compress(data)


def _piece(data: Any, level: int = 0) -> list[Any]:
    if len(data) >= _CRAMPED:
        frame = compress(data, level)
        if len(frame) < len(data):
            return [_HEAD.pack(len(frame)), frame]
    return [_HEAD.pack(len(data) | _AS_IT_IS), bytes(data)]


def _take_piece(take: Take, nbytes: int) -> bytes | memoryview:
    (head,) = _HEAD.unpack(take(4))
    stored = take(head & ~_AS_IT_IS)
    if not head & _AS_IT_IS:
        try:
            declared = zstandard.frame_content_size(stored)
            if declared != nbytes:
                raise IntegrityError(f"zstd frame declares {declared} bytes where {nbytes} were expected")
            return _contexts.decompressor.decompress(stored, allow_extra_data=False)
        except zstandard.ZstdError as error:
            raise IntegrityError(f"damaged zstd frame ({error})") from error
    if len(stored) != nbytes:
        raise IntegrityError(f"{len(stored)} stored bytes where {nbytes} were expected")
    return stored


def encode_lane(plane: Octets, background: int, *, others: int | None, level: int) -> list[Any]:
    """The pieces of one stored block; none at all if it is all background.

    ``others``: how many values are not the background, if they are expected to be few; else None.
    """
    if others == 0:
        return []
    if others is not None:
        if _RARE * len(plane) <= others < _FEW * len(plane):
            quads = kernels.pack_quads(plane, background, limit=len(plane) // 16)
            if quads is not None:
                return [bytes([QUADS]), *_piece(quads[0]), *_piece(quads[1])]
        if others < _SCATTERED * len(plane):
            bitmap, values = kernels.pack_sparse(plane, background, count=others)
            return [bytes([SPARSE]), *_piece(bitmap), *_piece(values)]
    return [bytes([PLANE]), *_piece(plane, level)]


def decode_lane(stored: memoryview, out: Octets, background: int) -> bytes | memoryview:
    """The plane of one stored block, in ``out`` or in memory of its own."""
    take = Take(stored)
    kind = take(1)[0]
    if kind == PLANE:
        plane = _take_piece(take, out.size)
    elif kind in (SPARSE, QUADS):
        codes = _take_piece(take, -(-out.size // (8 if kind == SPARSE else 4)))
        _spread(kind, codes, background, out, take)
        plane = out.data
    else:
        raise IntegrityError(f"a block of the unknown kind {kind}")
    take.end()
    return plane


def _spread(kind: int, codes: bytes | memoryview, background: int, out: Octets, take: Take) -> None:
    if native.core is not None:
        others = _take_piece(take, native.core.others(kind, codes, out.size))
        native.core.spread(kind, codes, background, others, out)
        return
    spread = kernels.spread_sparse if kind == SPARSE else kernels.spread_quads
    places = spread(np.frombuffer(codes, np.uint8), background, out)
    out[places] = np.frombuffer(_take_piece(take, places.size), np.uint8)
