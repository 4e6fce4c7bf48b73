"""Store: objects under one URL, put, created, read, listed and deleted, with deadlines, retries and checks.

It knows keys and bytes, never tensors, and nothing of what the objects mean.
"""

from __future__ import annotations

import contextlib
import os
import threading
import uuid
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from dataclasses import dataclass
from typing import Any, NoReturn, TypeVar

from gpumove.config import Config
from gpumove.errors import ConfigError, GpumoveError, IntegrityError, ObjectNotFoundError, StoreError
from gpumove.store import address, backends, retry
from gpumove.store.backends import Backend, Buffer, ObjectInfo

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
        connect: Callable[[], Backend],
        *,
        scrub: Callable[[str], str] = str,
        clock: retry.Clock | None = None,
    ) -> None:
        self.url = url
        """Normalised, without any secret: safe to log."""
        self._config = config
        self._connect = connect
        self._scrub = scrub
        self._clock = clock or retry.Clock()
        self._closed = False
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

        def connect() -> Backend:
            try:
                return backends.connect(place, config, given)
            except ConfigError:
                raise
            except Exception as error:  # noqa: BLE001 - constructors of file systems raise what they like
                text = scrub(f"{type(error).__name__}: {error}")
                raise ConfigError(f"{place.url} cannot be opened with these storage options ({text})") from None

        return cls(place.url, config, connect, scrub=scrub, clock=clock)

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
            with contextlib.suppress(Exception):
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
        groups = [[i] for i in wanted] if self._now().backend.parallel else [wanted] if wanted else []

        def fetch(group: list[int]) -> None:
            parts = self._read(key, [ranges[i] for i in group], [views[i] for i in group] if views else None)
            for i, part in zip(group, parts):
                result[i] = part

        self._each(fetch, groups)
        return result

    def _read(
        self, key: str, ranges: Sequence[tuple[int, int]], out: Sequence[memoryview] | None
    ) -> list[Buffer]:
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

    def list(self, prefix: str) -> list[ObjectInfo]:
        """All objects below ``prefix`` (a "directory"; "" is the root), sorted by key; [] if there are none."""
        start = prefix.strip("/") + "/" if prefix.strip("/") else ""
        found: list[ObjectInfo] = []
        token: str | None = None
        while True:
            at = token
            page, token = self._run("list", start, 0, lambda backend, seconds: backend.page(start, at, seconds))
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
