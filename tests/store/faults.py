"""A store that dies, or loses the answer, at its k-th call: the crash suite tries every k."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Sequence
from typing import Any, Literal, TypeVar

from gpumove.store.backends import Backend
from gpumove.store.files import TEMP_SUFFIX
from gpumove.store.objects import Buffer, ObjectInfo, Store

T = TypeVar("T")
Mode = Literal["before", "after", "torn", "lost"]


class Crash(BaseException):
    """The process is dead from here on."""


_said = threading.excepthook


def _says(args: threading.ExceptHookArgs) -> None:
    """A thread of a process that is dead ends without a word; what else a thread raises is shown."""
    if args.exc_type is not Crash:
        _said(args)


threading.excepthook = _says


class FaultyStore:
    """The seven verbs of a Store, counted from 1; the ``at``-th one meets the fault.

    Args:
        inner: the store that does the work.
        at: the call that fails; 0 for none, to count.
        mode: ``"before"`` dies without doing anything; ``"after"`` dies having done it; ``"torn"`` dies half-way
            (put: half of the bytes are visible where puts are not atomic, simulated on memory://, and a half-written
            temporary file on file://; delete: half of the keys are gone; else like before); ``"lost"`` does it, and
            the answer is lost on the way to the real retry policy, which has to cope.
    """

    def __init__(self, inner: Store, *, at: int = 0, mode: Mode = "before") -> None:
        self.inner = inner
        self.url, self.parallel = inner.url, inner.parallel
        self.calls = 0
        self.trail: list[str] = []
        """What was called, for messages: "put packs/..."."""
        self._at = at
        self._mode = mode
        self._dead = False
        self._lock = threading.Lock()
        self._lossy: _LossyBackend | None = None
        if mode == "lost":
            live = inner._now()
            self._lossy = live.backend = _LossyBackend(live.backend)  # type: ignore[assignment]

    def put(self, key: str, data: Buffer | Sequence[Buffer]) -> None:
        self._do(f"put {key}", lambda: self.inner.put(key, data), lambda: self._tear(key, data))

    def create(self, key: str, data: bytes) -> bool:
        return self._do(f"create {key}", lambda: self.inner.create(key, data))

    def get(self, key: str) -> bytes:
        return self._do(f"get {key}", lambda: self.inner.get(key))

    def get_ranges(
        self, key: str, ranges: Sequence[tuple[int, int]], out: Sequence[memoryview] | None = None
    ) -> list[Buffer]:
        return self._do(f"get_ranges {key}", lambda: self.inner.get_ranges(key, ranges, out))

    def exists(self, key: str) -> ObjectInfo | None:
        return self._do(f"exists {key}", lambda: self.inner.exists(key))

    def list(self, prefix: str) -> list[ObjectInfo]:
        return self._do(f"list {prefix}", lambda: self.inner.list(prefix))

    def delete(self, keys: Sequence[str]) -> None:
        half = list(keys)[: len(keys) // 2]
        self._do(f"delete {len(keys)} keys", lambda: self.inner.delete(keys), lambda: self.inner.delete(half))

    def probe_create(self) -> None:
        """Not counted: it is a question to the store, asked before anything is written."""
        self._check_alive()
        self.inner.probe_create()

    def close(self) -> None:
        self.inner.close()

    def _check_alive(self) -> None:
        if self._dead:
            raise Crash("the process is dead")

    def _do(self, what: str, work: Callable[[], T], torn: Callable[[], None] | None = None) -> T:
        with self._lock:
            self._check_alive()
            self.calls += 1
            self.trail.append(what)
            hit = self.calls == self._at
            if hit and self._mode in ("before", "torn"):
                self._dead = True
        if not hit:
            return work()
        if self._mode == "lost":
            assert self._lossy is not None
            with self._lossy.losing():
                return work()
        if self._mode == "after":
            try:
                work()
            finally:
                self._dead = True
        elif self._mode == "torn" and torn:
            torn()
        raise Crash(f"call {self.calls}, {what}: {self._mode}")

    def _tear(self, key: str, data: Buffer | Sequence[Buffer]) -> None:
        whole = b"".join([data] if isinstance(data, Buffer) else data)
        half = whole[: len(whole) // 2]
        if self.url.startswith("memory://"):
            self.inner.put(key, half)
        elif self.url.startswith("file://"):
            path = os.path.join(self.url.removeprefix("file://"), key)
            os.makedirs(os.path.dirname(path), exist_ok=True)
            with open(os.path.join(os.path.dirname(path), f".torn{TEMP_SUFFIX}"), "wb") as file:
                file.write(half)


class _LossyBackend:
    """A back end that can do a call and then fail like a connection that broke before the answer came."""

    def __init__(self, inner: Backend) -> None:
        self._inner = inner
        self._armed = threading.local()
        self._anyone = threading.Event()

    def losing(self) -> _Losing:
        return _Losing(self)

    def __getattr__(self, name: str) -> Any:
        found = getattr(self._inner, name)
        if name not in ("put", "create", "get", "read", "info", "page", "delete"):
            return found

        def call(*args: Any) -> Any:
            result = found(*args)
            if getattr(self._armed, "on", False) or (name in ("read", "delete") and self._anyone.is_set()):
                self._armed.on = False
                self._anyone.clear()
                raise ConnectionResetError("the answer was lost")
            return result

        return call


class _Losing:
    """The next call of this thread, or of the pool's threads that work for it, loses its answer."""

    def __init__(self, backend: _LossyBackend) -> None:
        self._backend = backend

    def __enter__(self) -> None:
        self._backend._armed.on = True
        self._backend._anyone.set()

    def __exit__(self, *exc: object) -> None:
        self._backend._armed.on = False
        self._backend._anyone.clear()
