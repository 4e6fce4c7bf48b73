"""Store: objects under one URL, put, created, read, listed and deleted, with deadlines, retries and checks.

It knows keys and bytes, never tensors, and nothing of what the objects mean.
"""

from __future__ import annotations

import contextlib
import math
import os
import threading
import time
import uuid
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from contextvars import copy_context
from dataclasses import dataclass
from functools import partial
from typing import Any, NoReturn, TypeVar

from gpumove.config import Config
from gpumove.errors import ConfigError, GpumoveError, IntegrityError, ObjectNotFoundError, StoreError
from gpumove.store import address, retry
from gpumove.store.backends import Backend, Buffer, ObjectInfo
from gpumove.store.connect import connect

__all__ = ["Buffer", "ObjectInfo", "Store"]

T = TypeVar("T")
U = TypeVar("U")
_MIB = 1 << 20
_PROBE_ROUNDS = 2


@dataclass
class _Live:
    """What cannot be shared with a forked child: connections, threads, locks."""

    pid: int
    backend: Backend
    limiter: retry.Limiter
    pool: ThreadPoolExecutor
    parent: _Live | None = None  # kept, because finalizers of a file system hang on the parent's dead event loop


class Store:
    """The objects below one URL. Thread-safe; a forked child reopens it by itself."""

    def __init__(
        self,
        url: str,
        config: Config,
        back_end: Callable[[], Backend],
        *,
        scrub: Callable[[str], str] = str,
        clock: retry.Clock | None = None,
    ) -> None:
        self.url = url
        """Normalised, without any secret: safe to log."""
        self._config = config
        self._back_end = back_end
        self._scrub = scrub
        self._clock = clock or retry.Clock()
        self._closed, self._until = False, math.inf
        self._live = self._start(None)

    @classmethod
    def open(
        cls,
        url: str,
        config: Config,
        *,
        options: Mapping[str, Any] | None = None,
        clock: retry.Clock | None = None,
    ) -> Store:
        """Open the store at a URL or plain path; nothing is written and no call is made yet.

        Args:
            url: ``file://`` or a path, ``memory://``, ``s3://``, ``gs://``, ``abfs://``, or any other fsspec scheme.
            config: concurrency, deadlines and the bound on retries.
            options: storage options of fsspec, such as keys and endpoints.
            clock: for tests.

        Raises:
            ConfigError: an unknown scheme, a missing package, credentials in the URL, or options that are refused.
        """
        place, given = address.parse(url), dict(options or {})
        scrub = address.Scrubber(place.raw, given)

        def back_end() -> Backend:
            try:
                return connect(place, config, given)
            except GpumoveError:
                raise
            except Exception as error:  # noqa: BLE001 - constructors of file systems raise what they like
                text, fault = scrub(f"{type(error).__name__}: {error}"), retry.judge(error)
            if fault.kind == "transient":  # some look for credentials on the network
                raise StoreError(f"{place.url} cannot be opened ({text}); {fault.advice}", code=fault.code)
            raise ConfigError(f"{place.url} cannot be opened with these storage options ({text})")

        return cls(place.url, config, back_end, scrub=scrub, clock=clock)

    @property
    def parallel(self) -> bool:
        """Whether calls wait for a network, so that many at once are quicker, and not for this machine."""
        return self._now().backend.parallel

    def put(self, key: str, data: Buffer | Sequence[Buffer]) -> None:
        """Write a whole object under a name that is only ever given to these bytes; durable and checked on return.

        Args:
            key: name below the root.
            data: the bytes, or a list of buffers to be written one after the other without being joined.

        Raises:
            StoreError: it could not be written. IntegrityError: it arrives damaged, again and again.
        """
        views = [memoryview(b).cast("B") for b in ([data] if isinstance(data, Buffer) else data)]
        nbytes = sum(view.nbytes for view in views)
        self._run("put", key, nbytes, lambda backend, seconds: backend.put(key, views, seconds))

    def create(self, key: str, data: bytes) -> bool:
        """Create a small object if its key is free, atomically. True if, and only if, ``data`` lies there now.

        Raises:
            StoreError: neither could be made sure of. The object may or may not appear later; read it back.
        """

        def attempt(backend: Backend, seconds: float) -> bool:
            try:
                backend.create(key, data, seconds)
            except Exception as error:
                if backend.fault(error, "create").kind != "exists":
                    raise
                return self._is_ours(backend, key, data, seconds)
            return True

        try:
            return self._run("create", key, len(data), attempt)
        except StoreError as error:
            # The last answer may have been lost like those before it: what lies there decides.
            if error.code in (retry.NO_CREATE.code, retry.NO_BUCKET.code, "store.denied", "store.credentials"):
                raise
            live = self._now()
            with contextlib.suppress(Exception), retry.unless(self._is_over):
                return live.backend.get(key, min(10.0, self._config.deadline_s)) == data
            raise

    @staticmethod
    def _is_ours(backend: Backend, key: str, data: bytes, seconds: float) -> bool:
        """Read back what made a create fail: a retried create meets its own first try if that answer was lost."""
        try:
            return backend.get(key, seconds) == data
        except Exception as error:
            if backend.fault(error, "get").kind != "missing":
                raise
            raise ConnectionError("the key was taken and is free again") from None

    def get(self, key: str) -> bytes:
        """Read a whole, small object.

        Raises:
            ObjectNotFoundError: it does not exist.
        """
        return self._run("get", key, 0, lambda backend, seconds: backend.get(key, seconds))

    def get_ranges(
        self, key: str, ranges: Sequence[tuple[int, int]], out: Sequence[memoryview] | None = None
    ) -> list[Buffer]:
        """Read half-open byte ranges of an object.

        Args:
            key: name below the root.
            ranges: pairs ``(start, end)``.
            out: writable buffers of exactly those sizes, which the store may fill. What is returned is the result: a
                buffer that is not in it was left behind by a call that hung, which may still write into it, so it must
                not be used again.

        Raises:
            ObjectNotFoundError: there is no such object. IntegrityError: it is shorter than the ranges.
        """
        if any(not 0 <= start <= end for start, end in ranges):
            raise ConfigError(f"{self.url}/{key}: these are not half-open byte ranges: {list(ranges)[:8]}")
        views = None if out is None else [memoryview(view).cast("B") for view in out]
        if views is not None and [v.nbytes for v in views] != [end - start for start, end in ranges]:
            raise ConfigError(f"{self.url}/{key}: the buffers given do not have the sizes of the ranges")
        result: list[Buffer] = [b""] * len(ranges)
        wanted = [i for i, (start, end) in enumerate(ranges) if start < end]
        groups = [[i] for i in wanted] if self.parallel else [wanted] if wanted else []

        def fetch(group: list[int]) -> None:
            parts = self._read(key, [ranges[i] for i in group], [views[i] for i in group] if views else None)
            for i, part in zip(group, parts):
                result[i] = part

        self._each(fetch, groups)
        return result

    def _read(self, key: str, ranges: Sequence[tuple[int, int]], out: Sequence[memoryview] | None) -> list[Buffer]:
        targets = [out]

        def attempt(backend: Backend, seconds: float) -> list[Buffer]:
            # A first call that hung may still write into the caller's buffers, so only one call ever gets them.
            parts = backend.read(key, ranges, targets.pop() if targets else None, seconds)
            short = [r for r, part in zip(ranges, parts) if len(part) != r[1] - r[0]]
            if short:
                info = backend.info(key, seconds)
                found, end = (info.nbytes if info else 0), short[-1][1]
                if found >= end:
                    raise ConnectionError("the answer ended early")
                raise IntegrityError(
                    f"{self.url}/{key} is truncated: bytes up to {end} were expected, but it has {found}; "
                    "fall back to another checkpoint",
                    code="integrity.truncated",
                )
            return parts

        return self._run("get_ranges", key, sum(end - start for start, end in ranges), attempt)

    def exists(self, key: str) -> ObjectInfo | None:
        """Size and time of an object, or None; asked of the store, never of a listing."""
        return self._run("exists", key, 0, lambda backend, seconds: backend.info(key, seconds))

    def regions(self) -> tuple[str, ...]:
        """The regions that the data lies in, in lower case, as the store tells; none if it does not."""
        return self._run("regions", "", 0, lambda backend, seconds: backend.regions(seconds))

    def list(self, prefix: str) -> list[ObjectInfo]:
        """All objects below ``prefix`` (a "directory"; "" is the root), sorted by key; [] if there are none."""
        start = prefix.strip("/") + "/" if prefix.strip("/") else ""
        found: list[ObjectInfo] = []
        token: str | None = None
        while True:
            page, token = self._run("list", start, 0, partial(_page, start, token))
            found += page
            if token is None:
                return sorted(found)

    def delete(self, keys: Sequence[str]) -> None:
        """Delete objects; missing ones are fine."""
        size = self._now().backend.batch
        batches = [list(keys[i : i + size]) for i in range(0, len(keys), size)]

        def drop(batch: list[str]) -> None:
            for key in batch:
                _check_key(key)
            self._run("delete", batch[0], 0, lambda backend, seconds: backend.delete(batch, seconds))

        self._each(drop, batches)

    def probe_create(self) -> None:
        """Try out whether creates are exclusive here; what it writes is deleted.

        Raises:
            StoreError: code ``store.no_create_only`` if two creates of one key do not give exactly one winner.
        """
        keys = [f"probe/{uuid.uuid4().hex}" for _ in range(_PROBE_ROUNDS)]
        try:
            for key in keys:
                self._race(key)
        finally:
            with contextlib.suppress(StoreError):
                self.delete(keys)

    def _race(self, key: str) -> None:
        """One create before, several at once after a barrier, one later: exactly one may win, and it must lie there."""
        claims = [f"{i} {uuid.uuid4().hex}".encode() for i in range(min(8, max(2, self._config.concurrency)))]
        barrier = threading.Barrier(len(claims))
        won: list[bytes] = []
        failures: list[BaseException] = []

        def claim(text: bytes) -> None:
            try:
                barrier.wait(timeout=60)
                if self.create(key, text):
                    won.append(text)
            except BaseException as error:  # noqa: BLE001 - raised below, in the caller's thread
                failures.append(error)

        threads = [threading.Thread(target=claim, args=(text,), daemon=True) for text in claims]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        if failures:
            raise failures[0]
        late = self.create(key, b"late " + claims[0])
        held = self.get(key)
        if late or len(won) != 1 or held != won[0]:
            raise StoreError(
                f"{self.url} cannot hold a log: of {len(claims) + 1} creates of one key {len(won) + late} won, and the "
                f"{'winner' if held in won else 'wrong one'} lies there; {retry.NO_CREATE.advice}",
                code=retry.NO_CREATE.code,
            )

    def hurry(self, seconds: float) -> None:
        """From now on no call lasts longer than this, neither those that are running nor those to come."""
        self._until = min(self._until, time.monotonic() + seconds)

    def _is_over(self) -> bool:
        return time.monotonic() >= self._until

    def close(self) -> None:
        """Let go of connections and threads. Calls in flight end by themselves."""
        self._closed = True
        if self._live.pid == os.getpid():
            self._live.pool.shutdown(wait=False)
            self._live.backend.close()

    def _start(self, parent: _Live | None) -> _Live:
        most = self._config.concurrency
        pool = ThreadPoolExecutor(most, thread_name_prefix="gpumove-store")
        return _Live(os.getpid(), self._back_end(), retry.Limiter(most, self._clock), pool, parent)

    def _now(self) -> _Live:
        """The live parts, made anew in a forked child, whose parent's threads and locks are gone."""
        if self._closed:
            raise StoreError(f"{self.url} was closed; open it again", code="store.closed")
        if self._live.pid != os.getpid():
            self._live = self._start(self._live)
        return self._live

    def _each(self, work: Callable[[U], None], items: Sequence[U]) -> None:
        """Do all, at once where there are several; the first error is raised when none is running any more."""
        if len(items) < 2:
            for item in items:
                work(item)
            return
        futures = [self._now().pool.submit(copy_context().run, work, item) for item in items]
        wait(futures)
        for future in futures:
            future.result()

    def _run(self, verb: str, key: str, nbytes: int, attempt: Callable[[Backend, float], T]) -> T:
        """One operation under the one retry policy; every failure leaves here as one of our errors."""
        if verb not in ("list", "regions"):
            _check_key(key)
        live, config, extra_s = self._now(), self._config, nbytes / _MIB
        try:
            with retry.unless(self._is_over):
                return retry.retrying(
                    lambda seconds: attempt(live.backend, seconds),
                    judged=lambda error: live.backend.fault(error, verb),
                    deadline_s=config.deadline_s + extra_s,
                    budget_s=config.retry_s + extra_s,
                    limiter=live.limiter,
                    clock=self._clock,
                )
        except retry.GaveUpError as gave_up:
            failure = gave_up
        # Outside of the handler: the error must not drag along the back end's own, whose text may hold a secret.
        return self._fail(verb, key, live.backend, failure)

    def _fail(self, verb: str, key: str, backend: Backend, failure: retry.GaveUpError) -> NoReturn:
        fault, where = failure.fault, f"{self.url}/{key}"
        if fault.kind == "missing" and verb in ("get", "get_ranges"):
            raise ObjectNotFoundError(f"{where} does not exist")
        advice = fault.advice
        if fault.code in ("store.denied", "store.credentials"):
            advice = f"credentials come from {backend.access}"
        tried = f"tried {failure.tries} times in {failure.seconds:.0f} s" if failure.tries > 1 else "not retried"
        text = self._scrub(f"{type(failure.error).__name__}: {failure.error}")
        kind: type[GpumoveError] = IntegrityError if fault.kind == "corrupt" else StoreError
        raise kind(f"{verb} {where} failed, {tried}: {text}; {advice or 'see docs/store.md'}", code=fault.code)


def _page(prefix: str, token: str | None, backend: Backend, seconds: float) -> tuple[list[ObjectInfo], str | None]:
    return backend.page(prefix, token, seconds)


def _check_key(key: str) -> None:
    if not key or any(part in ("", ".", "..") for part in key.split("/")) or "\0" in key or "\\" in key:
        raise ConfigError(f"{key!r} is no key: parts between single slashes, none of them '.' or '..'")
