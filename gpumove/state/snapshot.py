"""A consistent copy in the making: when it is complete, whether it is whole, and what an optimizer has to wait for."""

from __future__ import annotations

import threading
import time
from collections.abc import Sequence
from operator import attrgetter

import torch

from gpumove.errors import ConfigError
from gpumove.tracing import Trace

_VERSION = attrgetter("_version")


class Snapshot:
    """A consistent copy in the making. ``view(i)`` is source i's bytes, row-major, after ``wait()``."""

    def __init__(
        self,
        slots: Sequence[tuple[int, int]],
        arena: torch.Tensor,
        side: int,
        trace: Trace,
        *,
        nbytes: int,
        serial: int,
    ) -> None:
        self._slots, self.side, self.trace = slots, side, trace
        self._memory = memoryview(arena.numpy())  # type: ignore[arg-type]
        self._done = threading.Event()
        self._error: BaseException | None = None
        self._on_host = threading.Event()
        self._events: list[tuple[torch.device, torch.cuda.Event]] = []
        self._watched: tuple[Sequence[int], list[torch.Tensor], list[int]] = ([], [], [])
        """Numbers of sources, the sources, and their versions: lists, since tuples wake the garbage collector."""
        self._comparing = threading.Lock()
        self._thread = threading.get_ident()
        self._sighted = threading.Event()
        self._unchanged: dict[int, memoryview] = {}
        """Sources that were not copied, because an older copy has the same bytes."""
        self.changed: list[int] = []
        """Sources that were changed while they were copied; filled by ``wait``."""
        self.nbytes, self.serial = nbytes, serial
        self.fence_s = 0.0
        """Seconds that optimizer steps waited for this snapshot."""
        self.sight_s = 0.0
        """Seconds that its save waited to see the training thread."""

    def unchanged_since(self, serial: int | None) -> frozenset[int]:
        """Sources known to have the bytes that they had in an earlier snapshot: in the one before this, or nothing is
        known. Call it after ``wait``."""
        return frozenset(self._unchanged) if serial == self.serial - 1 else frozenset()

    @property
    def done(self) -> bool:
        """Whether the copy is complete."""
        return self._done.is_set()

    def wait(self) -> None:
        """Wait until the copy is complete.

        Raises:
            ConfigError: the training code changed a source meanwhile (code ``config.torn``).
        """
        self._done.wait()
        if self._error is not None:
            raise self._error
        self._check_changed()

    def sight(self) -> None:
        """The training thread is here, so it is in no operation, and all that it has changed so far can be seen.

        torch raises a tensor's version when an operation ends: while one runs, a comparison elsewhere sees nothing.
        """
        if not self._sighted.is_set() and threading.get_ident() == self._thread:
            self._compare()
            if self._done.is_set():
                self._sighted.set()

    def confirm(self, timeout_s: float) -> None:
        """Wait until the training thread was seen after the copy, or for ``timeout_s``, and compare for the last time.

        Raises:
            ConfigError: the training code changed a source during the copy (code ``config.torn``).
        """
        began = time.perf_counter()
        if not self._sighted.wait(timeout_s):
            self._compare()
        self.sight_s = time.perf_counter() - began
        self._check_changed()

    def _check_changed(self) -> None:
        if self.changed:
            raise ConfigError("tensors changed while they were copied", code="config.torn")

    def view(self, index: int) -> memoryview:
        """The bytes of one source."""
        if (kept := self._unchanged.get(index)) is not None:
            return kept
        start, nbytes = self._slots[index]
        return self._memory[start : start + nbytes]

    def fence(self) -> None:
        """Called before an optimizer changes anything: the host waits for host copies, the stream for device ones."""
        if self._sighted.is_set():
            return
        began = time.perf_counter()
        self._on_host.wait()
        self._compare()
        self._sighted.set()  # versions that the optimizer raises from here on are no damage
        for device, event in self._events:
            # What the host enqueues from here on runs behind the copy: the host itself need not wait for it.
            torch.cuda.current_stream(device).wait_event(event)
        ended = time.perf_counter()
        self.trace.add("optimizer waits", began, ended)
        self.fence_s += ended - began

    def _compare(self) -> None:
        """Note what was changed under the copy, unless an optimizer may have done it since."""
        with self._comparing:
            if not self._sighted.is_set():
                numbers, tensors, before = self._watched
                now = list(map(_VERSION, tensors))
                if now != before:
                    found = {i for i, new, old in zip(numbers, now, before) if new != old}
                    self.changed += sorted(found - set(self.changed))

    def _watch(self, numbers: Sequence[int], tensors: list[torch.Tensor]) -> None:
        """From here on a change of these is damage."""
        self._watched = numbers, tensors, list(map(_VERSION, tensors))

    def _finish(self, error: BaseException | None) -> None:
        self._compare()
        self._error = error
        self._on_host.set()
        self._done.set()
