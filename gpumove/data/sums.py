"""Checksums by name, and whether a file has them. It knows bytes, never where they come from."""

from __future__ import annotations

import hashlib
import mmap
import re
import zlib
from collections.abc import Callable, Iterable

from gpumove.errors import ConfigError
from gpumove.format.codec import digest

_SLICE = 1 << 20
_TEXT = re.compile(r"(?:([a-z0-9_]+):)?([0-9a-f]{8,64})")


def _crc32(data: memoryview) -> str:
    return f"{zlib.crc32(data):08x}"


def _crc32c(data: memoryview) -> str:
    import google_crc32c  # comes with the back end that names such sums

    crc = 0
    for start in range(0, data.nbytes, _SLICE):
        crc = google_crc32c.extend(crc, bytes(data[start : start + _SLICE]))  # it takes nothing but bytes
    return f"{crc:08x}"


def _md5(data: memoryview) -> str:
    return hashlib.md5(data, usedforsecurity=False).hexdigest()


def _sha256(data: memoryview) -> str:
    return hashlib.sha256(data).hexdigest()


_KINDS: dict[str, tuple[Callable[[memoryview], str], int]] = {
    "xxh3_128": (digest, 32),
    "crc32": (_crc32, 8),
    "crc32c": (_crc32c, 8),
    "md5": (_md5, 32),
    "sha256": (_sha256, 64),
}


def parse(text: str, *, name: str) -> str:
    """A digest that somebody gave, as ``kind:hex``; without a kind it is gpumove's own, xxh3_128.

    Raises:
        ConfigError: it is none.
    """
    match = _TEXT.fullmatch(text.lower())
    kind = (match[1] or "xxh3_128") if match else ""
    if match is None or kind not in _KINDS or len(match[2]) != _KINDS[kind][1]:
        kinds = ", ".join(_KINDS)
        raise ConfigError(f"the digest of {name} is {text!r}: write one of {kinds}, a colon, and the hex digits")
    return f"{kind}:{match[2]}"


def wrong(fd: int, nbytes: int, sums: Iterable[str]) -> str:
    """What of these sums the file does not have, in words; "" if it has them all."""
    wanted = [text.partition(":")[::2] for text in sums if text]
    if not wanted:
        return ""
    if not nbytes:
        return _compare(memoryview(b""), wanted)
    with mmap.mmap(fd, nbytes, access=mmap.ACCESS_READ) as mapped, memoryview(mapped) as data:
        return _compare(data, wanted)


def _compare(data: memoryview, wanted: Iterable[tuple[str, str]]) -> str:
    found = ((kind, value, _KINDS[kind][0](data)) for kind, value in wanted)
    return next((f"its {kind} is {got}, not {value}" for kind, value, got in found if got != value), "")
