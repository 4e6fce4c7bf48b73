"""Stored chunks without torch: how large they are, and reading many of them in ranges, verified, in bounded memory.

It knows records and a Store, never what the bytes become: each chunk is handed to a function of the caller's.
"""

from __future__ import annotations

import base64
import binascii
import threading
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

from gpumove.config import Config
from gpumove.errors import IntegrityError, ObjectNotFoundError
from gpumove.format.codec import check_digest, decode
from gpumove.format.dtypes import item_bytes
from gpumove.format.manifest import Chunk
from gpumove.format.pack import shape_bytes
from gpumove.store.objects import Store
from gpumove.store.records import Ref

_GAP = 256 << 10
"""Ranges closer than this are fetched as one: a request costs more than the bytes between."""
_RANGE = 16 << 20


def chunk_bytes(dtype: str, chunk: Chunk) -> int:
    """Decoded bytes of a chunk."""
    return shape_bytes(chunk.shape, item_bytes(dtype))


def inline_data(name: str, chunk: Chunk, nbytes: int) -> memoryview:
    """The bytes of a chunk that travels inside its part.

    Raises:
        IntegrityError: they are not ``nbytes`` many.
    """
    try:
        data = base64.b64decode(chunk.inline or "", validate=True)
    except binascii.Error:
        data = b""
    if len(data) != nbytes:
        raise IntegrityError(f"{name} travels inline with {len(data)} bytes instead of {nbytes}")
    return memoryview(data)


class Wanted(NamedTuple):
    """A chunk that somebody needs. ``use`` gets its decoded, verified bytes, which are gone when it returns."""

    name: str
    ref: Ref
    nbytes: int
    use: Callable[[memoryview], None]


class Span(NamedTuple):
    """Bytes of one pack that are read together."""

    key: str
    start: int
    stop: int
    wanted: list[Wanted]


def spans(wanted: Iterable[Wanted]) -> list[Span]:
    """Chunks grouped by pack, neighbours joined; a chunk that is wanted twice is read once. Largest first."""
    by_pack: dict[str, dict[tuple[int, int], list[Wanted]]] = defaultdict(lambda: defaultdict(list))
    for want in wanted:
        by_pack[want.ref.pack.key][want.ref.chunk.at, want.ref.chunk.length].append(want)
    found: list[Span] = []
    for key, spots in by_pack.items():
        last: Span | None = None
        for at, length in sorted(spots):
            if last and at <= last.stop + _GAP and at + length - last.start <= _RANGE:
                last.wanted.extend(spots[at, length])
                last = found[-1] = last._replace(stop=max(last.stop, at + length))
            else:
                # Rounded down, so that chunks keep in the buffer the alignment that they have in the object.
                last = Span(key, at & ~63, at + length, list(spots[at, length]))
                found.append(last)
    return sorted(found, key=lambda s: s.start - s.stop)


class Buffers(threading.local):
    """Reused memory of each thread: fresh memory costs more to touch than to fill."""

    def __init__(self) -> None:
        self._kept: dict[str, bytearray] = {}

    def take(self, name: str, nbytes: int) -> memoryview:
        """The thread's buffer of this name, grown if need be."""
        if len(self._kept.get(name, b"")) < nbytes:
            self._kept[name] = bytearray(nbytes)
        return memoryview(self._kept[name])[:nbytes]

    def drop(self, name: str) -> None:
        """Never use it again: a call that hung may still write into it."""
        self._kept.pop(name, None)


def fetch(store: Store, wanted: Sequence[Wanted], *, config: Config) -> int:
    """Read, verify and hand over chunks, from several threads at once.

    Args:
        store: the run.
        wanted: what to read; inline chunks are fine.
        config: how many calls and bytes may be in flight.

    Returns:
        Bytes read from the store.

    Raises:
        IntegrityError: an object is missing, truncated or damaged; the message names it and the tensor.
    """
    for want in wanted:
        if want.ref.chunk.inline is not None:
            want.use(inline_data(want.name, want.ref.chunk, want.nbytes))
    todo = spans(w for w in wanted if w.ref.chunk.inline is None)
    buffers = Buffers()
    widest = max((s.stop - s.start + max(w.nbytes for w in s.wanted) for s in todo), default=1)
    threads = max(1, min(config.concurrency, config.budget_bytes // widest, len(todo)))

    def work(span: Span) -> int:
        _take(store, span, buffers)
        return span.stop - span.start

    with ThreadPoolExecutor(threads, thread_name_prefix="gpumove-get") as pool:
        return sum(pool.map(work, todo))  # map() takes back what is still queued if one fails


def read_span(store: Store, key: str, start: int, stop: int, *, buffers: Buffers) -> memoryview:
    """Bytes of an object in this thread's buffer, until the next call.

    Raises:
        IntegrityError: it is missing or too short.
    """
    out = buffers.take("fetched", stop - start)
    try:
        (got,) = store.get_ranges(key, [(start, stop)], [out])
    except ObjectNotFoundError as error:
        raise IntegrityError(f"{store.url}/{key} is missing, and a committed checkpoint needs it") from error
    if memoryview(got).obj is not out.obj:
        buffers.drop("fetched")
    return memoryview(got)


def decoded(chunk: Chunk, stored: memoryview, nbytes: int, *, buffers: Buffers) -> memoryview:
    """A chunk's decoded bytes, verified; ``stored`` itself if it is raw.

    Raises:
        IntegrityError: they are damaged.
    """
    if chunk.codec == "raw/1" and len(stored) == nbytes:
        check_digest(stored, chunk.digest)
        return stored
    out = buffers.take("decoded", nbytes)
    decode(chunk.codec, stored, out, expected=chunk.digest)
    return out


def _take(store: Store, span: Span, buffers: Buffers) -> None:
    got = read_span(store, span.key, span.start, span.stop, buffers=buffers)
    for want in span.wanted:
        chunk = want.ref.chunk
        stored = got[chunk.at - span.start : chunk.at - span.start + chunk.length]
        try:
            data = decoded(chunk, stored, want.nbytes, buffers=buffers)
        except IntegrityError as error:
            raise IntegrityError(
                f"{store.url}/{span.key} is damaged at bytes {chunk.at} to {chunk.at + chunk.length} ({want.name}): "
                f"{error}",
                code="integrity.chunk",
            ) from error
        want.use(data)
