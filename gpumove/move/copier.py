"""Copier: objects from one store to another one, many at a time, hashed between read and write, in bounded memory.

It knows keys, sizes and digests, and two Stores, whose deadlines, retries and checks it relies on; never what the
objects mean.
"""

from __future__ import annotations

import contextlib
import mmap
import tempfile
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from contextvars import copy_context
from dataclasses import dataclass
from typing import NamedTuple, TypeVar

from gpumove.errors import ConfigError, GpumoveError, IntegrityError, ObjectNotFoundError, StoreError
from gpumove.format.codec import digest
from gpumove.move.lending import Lender
from gpumove.move.pace import RANGE, Cap, Rate
from gpumove.store import retry
from gpumove.store.objects import Buffer, ObjectInfo, Store

Progress = Callable[[int, int], None]
"""Told (bytes done, bytes in all), from any thread, one call at a time."""
T = TypeVar("T")

_READS = 3


class Object(NamedTuple):
    """What is to be copied."""

    key: str
    nbytes: int
    digest: str | None = None
    """Without one, whatever is read is right."""
    mtime: float | None = None
    """Then this tells whether it was changed while it was read."""
    known: str | None = None
    """The digest of what lies at the target under this key: the same is not written again."""


@dataclass(frozen=True)
class Sent:
    """What a transfer was."""

    nbytes: int = 0
    seconds: float = 0.0
    objects: int = 0

    def __add__(self, other: Sent) -> Sent:
        return Sent(self.nbytes + other.nbytes, self.seconds + other.seconds, self.objects + other.objects)


class Copier:
    """Copies objects from ``source`` to ``target``.

    Args:
        source: read only.
        target: written to.
        in_flight: objects under way at once.
        budget_bytes: memory for them all. An object of more than half of it goes through a temporary file, alone.
        limit_bytes_s: bound on the rate of reading, and so, over some seconds, of writing.
        clock: for tests.
    """

    def __init__(
        self,
        source: Store,
        target: Store,
        *,
        in_flight: int = 16,
        budget_bytes: int = 256 << 20,
        limit_bytes_s: float | None = None,
        clock: retry.Clock | None = None,
    ) -> None:
        self.source, self.target = source, target
        self.rate = Rate()
        self.lender = Lender(budget_bytes)
        self._cap = Cap(limit_bytes_s, clock or retry.Clock()) if limit_bytes_s else None
        self._threads = max(1, in_flight)
        self._large = threading.Lock()
        self.cancelled = threading.Event()
        """Once set, what is under way is given up with ``store.abandoned``."""

    def copy(
        self,
        objects: Iterable[Object],
        *,
        progress: Progress | None = None,
        done: Callable[[Object, str], None] | None = None,
        lost: Callable[[Object, GpumoveError], None] | None = None,
    ) -> Sent:
        """Copy them, in their order as far as there is one with many under way.

        Args:
            objects: what to copy.
            progress: told how far it is.
            done: told each object that lies at the target now, and its digest; one call at a time.
            lost: told of those that the source has no more, has changed meanwhile, or has under a key that is none;
                without it that is an error.

        Raises:
            ObjectNotFoundError: the source has it no more.
            IntegrityError: it is damaged at the source, or arrives damaged again and again.
            StoreError: one of the stores failed.
        """
        todo = list(objects)
        total, began, lock = sum(o.nbytes for o in todo), time.monotonic(), threading.Lock()
        sent = Sent()

        def one(item: Object) -> None:
            nonlocal sent
            try:
                with self.rate.moving(item.nbytes):
                    nbytes, name = self._copy_one(item)
            except (ObjectNotFoundError, _ChangedError, ConfigError) as error:
                if lost is None:
                    raise
                with lock:
                    lost(item, error)
                return
            self.rate.add(nbytes)
            with lock:
                sent += Sent(nbytes, 0.0, 1 if name != item.known else 0)
                if done:
                    done(item, name)
                if progress:
                    progress(sent.nbytes, total)

        with self.rate.running():
            self._each(one, todo)
        return Sent(sent.nbytes, time.monotonic() - began, sent.objects)

    def put(self, records: Mapping[str, bytes]) -> Sent:
        """Write small objects whose bytes are here already."""
        began = time.monotonic()

        def one(key: str) -> None:
            self.target.put(key, records[key])
            self.rate.add(len(records[key]))

        with self.rate.running():
            self._each(one, list(records))
        return Sent(sum(map(len, records.values())), time.monotonic() - began, len(records))

    def damaged(self, objects: Iterable[Object]) -> list[Object]:
        """Those that lie at the target and are not what their digest says, or cannot be read whole."""
        found: list[Object] = []

        def one(item: Object) -> None:
            try:
                with self._memory(item.nbytes) as lent:
                    if digest(*self._read(self.target, item, lent)) != item.digest:
                        found.append(item)
            except (IntegrityError, ObjectNotFoundError):
                found.append(item)

        self._each(one, list(objects))
        return sorted(found)

    def _each(self, work: Callable[[T], None], items: Sequence[T]) -> None:
        """Do all, many at once. The first error ends the others, and is raised when none is running any more."""
        queue, lock, stop = iter(items), threading.Lock(), threading.Event()
        failures: list[BaseException] = []

        def run() -> None:
            with retry.unless(lambda: stop.is_set() or self.cancelled.is_set()):
                while not stop.is_set():
                    with lock:
                        item = next(queue, None)
                    if item is None:
                        return
                    try:
                        self._check_wanted()
                        work(item)
                    except BaseException as error:  # noqa: BLE001 - raised below, in the caller's thread
                        failures.append(error)
                        stop.set()

        with ThreadPoolExecutor(max(1, min(self._threads, len(items))), thread_name_prefix="gpumove-copy") as pool:
            try:
                wait([pool.submit(copy_context().run, run) for _ in range(min(self._threads, len(items)))])
            finally:
                stop.set()
        if failures:
            raise failures[0]

    def _check_wanted(self) -> None:
        if self.cancelled.is_set():
            raise StoreError("the transfer was given up; what has arrived is not sent again", code="store.abandoned")

    # ---------------------------------------------------------------- one object

    def _copy_one(self, item: Object) -> tuple[int, str]:
        """Read, hash, write; bytes and digest. Ranges come unchecked from most stores, so it may be read again."""
        if item.digest is None and item.nbytes <= RANGE:
            self._pace(item.nbytes)
            data = self.source.get(item.key)  # a whole object is checked where its store tells a checksum
            return self._write(item, [data])
        with self._memory(item.nbytes) as lent:
            for _ in range(_READS):
                parts = self._read(self.source, item, lent)
                if item.digest in (None, digest(*parts)):
                    break
            else:
                raise IntegrityError(
                    f"{self.source.url}/{item.key} is damaged: its bytes, read {_READS} times, do not hash to "
                    f"{item.digest}, which was recorded",
                    code="integrity.object",
                )
            if item.digest is None:
                self._check_unchanged(item)
            return self._write(item, parts)

    def _write(self, item: Object, parts: Sequence[Buffer]) -> tuple[int, str]:
        """Bytes that were sent, and the digest."""
        name = item.digest or digest(*parts)
        if name == item.known:
            return 0, name
        self.target.put(item.key, parts)
        return sum(map(len, parts)), name

    def _check_unchanged(self, item: Object) -> None:
        """Ranges of two versions of an object make none."""
        now = self.source.exists(item.key)
        if now != ObjectInfo(item.key, item.nbytes, item.mtime):
            raise _ChangedError(f"{self.source.url}/{item.key} was changed while it was read", code="store.changed")

    @contextlib.contextmanager
    def _memory(self, nbytes: int) -> Iterator[_Lent]:
        """Room for one object, in memory or, if that is too little, in a temporary file."""
        if nbytes > self.lender.limit_bytes // 2:
            with self._large, tempfile.TemporaryFile(prefix="gpumove-") as file:
                file.truncate(nbytes)
                yield _Lent(memoryview(mmap.mmap(file.fileno(), nbytes)))
            return
        view = self.lender.lend(nbytes, self.cancelled.is_set)
        if view is None:
            self._check_wanted()
        assert view is not None
        lent = _Lent(view)
        try:
            yield lent
        finally:
            self.lender.take_back(view, again=not lent.left_behind)

    def _read(self, store: Store, item: Object, lent: _Lent) -> list[Buffer]:
        step = self._cap.piece_bytes if self._cap else RANGE
        spans = [(at, min(at + step, item.nbytes)) for at in range(0, item.nbytes, step)]
        outs = lent.parts(spans)
        if self._cap is None:
            found = store.get_ranges(item.key, spans, outs)
        else:
            found = []
            for number, span in enumerate(spans):
                self._pace(span[1] - span[0])
                found += store.get_ranges(item.key, [span], outs[number : number + 1])
        lent.check(found)
        return found

    def _pace(self, nbytes: int) -> None:
        if self._cap:
            self._cap.wait(nbytes)


class _ChangedError(StoreError):
    """The source has another version of it now."""


class _Lent:
    """Memory for one object, given up where a call that hung may still write into it."""

    def __init__(self, view: memoryview) -> None:
        self._view = view
        self.left_behind = False

    def parts(self, spans: Sequence[tuple[int, int]]) -> list[memoryview]:
        """Where the ranges are to lie."""
        if self.left_behind:
            return [memoryview(bytearray(end - start)) for start, end in spans]
        return [self._view[start:end] for start, end in spans]

    def check(self, found: Sequence[Buffer]) -> None:
        """What was read elsewhere has left its place here to a call that may still be under way."""
        if any(not isinstance(part, memoryview) or part.obj is not self._view.obj for part in found):
            self.left_behind = True
