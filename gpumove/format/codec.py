"""Codecs: how a chunk's bytes are stored. A registry by ``"name/version"``; bytes in, bytes out, no I/O.

A codec is two functions. ``encode`` may give None, "this does not pay", and the chunk is stored raw. ``decode`` fills a
buffer of exactly the chunk's size or raises IntegrityError: a damaged or hostile input never allocates more than that.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import dataclass

import xxhash
import zstandard

from gpumove.errors import ConfigError, IntegrityError

Buffer = bytes | bytearray | memoryview

_SAMPLE_BYTES = 64 << 10
_WORTH = 0.5
"""zstd works at a fraction of the speed of a disk or a good link, so "auto" uses it only on what shrinks to half."""


@dataclass(frozen=True)
class Codec:
    """One way to store a chunk."""

    name: str
    encode: Callable[[memoryview], Buffer | None]
    decode: Callable[[memoryview, memoryview], None]


def digest(*buffers: Buffer) -> str:
    """XXH3-128 of the buffers' concatenation, as 32 hex digits."""
    if len(buffers) == 1:
        return xxhash.xxh3_128_hexdigest(buffers[0])
    hasher = xxhash.xxh3_128()
    for buffer in buffers:
        hasher.update(buffer)
    return hasher.hexdigest()


class _Contexts(threading.local):
    """zstd contexts are costly to make and not thread-safe: one of each per thread."""

    def __init__(self) -> None:
        self.compressor = zstandard.ZstdCompressor(level=1, write_content_size=True)
        self.decompressor = zstandard.ZstdDecompressor()


_contexts = _Contexts()


def _encode_raw(data: memoryview) -> Buffer:
    return data


def _decode_raw(stored: memoryview, out: memoryview) -> None:
    if len(stored) != len(out):
        raise IntegrityError(f"raw chunk of {len(stored)} bytes where {len(out)} were expected")
    out[:] = stored


def _encode_zstd(data: memoryview) -> Buffer | None:
    return _contexts.compressor.compress(data)


def _encode_if_worth(data: memoryview) -> Buffer | None:
    """Three samples tell noise from structure for a few per cent of the cost of compressing it all."""
    third = len(data) // 3
    sample = [data[i : i + _SAMPLE_BYTES // 3] for i in (0, third, 2 * third)]
    if sum(len(_encode_zstd(s) or b"") for s in sample) > _WORTH * sum(map(len, sample)):
        return None
    return _encode_zstd(data)


def _decode_zstd(stored: memoryview, out: memoryview) -> None:
    try:
        declared = zstandard.frame_content_size(stored)
        if declared != len(out):
            raise IntegrityError(f"zstd frame declares {declared} bytes where {len(out)} were expected")
        with _contexts.decompressor.stream_reader(stored, closefd=False) as reader:
            got = _fill(reader, out)
            extra = reader.read(1)
    except zstandard.ZstdError as error:
        raise IntegrityError(f"damaged zstd frame ({error})") from error
    if got != len(out) or extra:
        raise IntegrityError(f"zstd frame holds {got}{'+' if extra else ''} bytes where {len(out)} were expected")


def _fill(reader: zstandard.ZstdDecompressionReader, out: memoryview) -> int:
    got = 0
    while got < len(out):
        n = reader.readinto(out[got:])
        if not n:
            break
        got += n
    return got


RAW = Codec("raw/1", _encode_raw, _decode_raw)
ZSTD = Codec("zstd/1", _encode_zstd, _decode_zstd)
ZSTD_IF_WORTH = Codec("zstd/1", _encode_if_worth, _decode_zstd)
_REGISTRY = {codec.name: codec for codec in (RAW, ZSTD)}
_CHOICES: dict[str, tuple[Codec, ...]] = {"raw": (), "zstd": (ZSTD,), "auto": (ZSTD_IF_WORTH,)}


def find(name: str) -> Codec:
    """The codec of a stored chunk.

    Raises:
        ConfigError: no such codec in this version of gpumove.
    """
    try:
        return _REGISTRY[name]
    except KeyError:
        raise ConfigError(
            f"the checkpoint uses the codec {name!r}, which this gpumove does not know: upgrade gpumove",
            code="config.unknown_codec",
        ) from None


def encode(data: memoryview, choice: str) -> tuple[str, Buffer]:
    """Store a chunk the best way that the setting allows.

    Args:
        data: the chunk's bytes.
        choice: ``Config.codec``.

    Returns:
        The codec's name and the stored bytes; never more than ``len(data)`` of them. They may be ``data`` itself.
    """
    for codec in _CHOICES[choice]:
        stored = codec.encode(data)
        if stored is not None and len(stored) < len(data):
            return codec.name, stored
    return RAW.name, data


def decode(name: str, stored: memoryview, out: memoryview, *, expected: str) -> None:
    """Decode a chunk into ``out`` and compare its digest.

    Raises:
        ConfigError: unknown codec.
        IntegrityError: the bytes are damaged; ``out`` then holds rubbish.
    """
    find(name).decode(stored, out)
    check_digest(out, expected)


def check_digest(data: memoryview, expected: str) -> None:
    """Raise IntegrityError if decoded bytes are not what was recorded."""
    if (found := digest(data)) != expected:
        raise IntegrityError(f"its bytes hash to {found}, and {expected} was recorded")
