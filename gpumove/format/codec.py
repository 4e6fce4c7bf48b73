"""Codecs by name: how a stored chunk becomes its bytes again, and the digest that proves it. No I/O.

A decoder fills a buffer of exactly the chunk's size or raises IntegrityError; damaged or hostile input never makes it
allocate more than a small multiple of that. Choosing a codec is coding.py's; the bytes are specified in docs/codecs.md.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from functools import partial

import xxhash

from gpumove.errors import ConfigError, IntegrityError
from gpumove.format.differences import decode_round, decode_step, decode_sub
from gpumove.format.planes import decode_planes

Buffer = bytes | bytearray | memoryview
Decoder = Callable[[memoryview, memoryview, Sequence[memoryview]], None]

RAW = "raw/1"
PLANES = "planes/1"
SUB = "sub/1"
ROUND = "round/1"


def digest(*buffers: Buffer) -> str:
    """XXH3-128 of the buffers' concatenation, as 32 hex digits."""
    if len(buffers) == 1:
        return xxhash.xxh3_128_hexdigest(buffers[0])
    return digest_all(buffers)


def digest_all(buffers: Iterable[Buffer]) -> str:
    """The same of buffers that are there one after the other."""
    hasher = xxhash.xxh3_128()
    for buffer in buffers:
        hasher.update(buffer)
    return hasher.hexdigest()


def mark(buffer: Buffer) -> str:
    """XXH3-64, as 16 hex digits: enough to tell whether two things that should be equal are."""
    return xxhash.xxh3_64_hexdigest(buffer)


def _decode_raw(stored: memoryview, out: memoryview, bases: Sequence[memoryview]) -> None:
    if len(stored) != len(out) or bases:
        raise IntegrityError(f"raw chunk of {len(stored)} bytes and {len(bases)} bases where {len(out)} were expected")
    out[:] = stored


_REGISTRY: dict[str, Decoder] = {
    RAW: _decode_raw,
    PLANES: decode_planes,
    SUB: decode_sub,
    ROUND: decode_round,
    "adam/1": partial(decode_step, "adam/1"),
    "momentum/1": partial(decode_step, "momentum/1"),
}


def find(name: str) -> Decoder:
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


def decode(name: str, stored: memoryview, out: memoryview, *, bases: Sequence[memoryview] = (), expected: str) -> None:
    """Decode a chunk into ``out`` and compare its digest.

    Args:
        name: the codec.
        stored: the stored bytes.
        out: exactly the chunk's size.
        bases: the decoded bytes of the chunks that this one was encoded against, in the codec's order.
        expected: the digest of the decoded bytes.

    Raises:
        ConfigError: unknown codec, or a thread whose arithmetic cannot be made to follow IEEE 754.
        IntegrityError: the bytes are damaged; ``out`` then holds rubbish.
    """
    decoder = find(name)
    if not len(out) and name != RAW:
        raise IntegrityError(f"an empty chunk stored as {name}")
    decoder(stored, out, bases)
    check_digest(out, expected)


def check_digest(data: memoryview, expected: str) -> None:
    """Raise IntegrityError if decoded bytes are not what was recorded."""
    if (found := digest(data)) != expected:
        raise IntegrityError(f"its bytes hash to {found}, and {expected} was recorded")
