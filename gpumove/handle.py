"""What a caller holds of a save that runs in the background."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from dataclasses import dataclass

from gpumove.errors import StoreError
from gpumove.format.manifest import Checkpoint, Took
from gpumove.tracing import Trace


@dataclass
class SaveStats:
    """What a save cost this rank. Seconds count from the call; bytes are this rank's."""

    stall_s: float = 0.0
    """Training time lost: the call itself, and what the next optimizer step waited."""
    staged_s: float | None = None
    """Until the staged copy was complete."""
    uploaded_s: float | None = None
    """Until this rank's part was durable."""
    committed_s: float | None = None
    """Until the checkpoint existed (rank 0)."""
    state_bytes: int = 0
    """Bytes that this rank answers for."""
    clean_bytes: int = 0
    """Of these, unchanged since the last save: not sent."""
    new_bytes: int = 0
    """Bytes of packs that were sent."""
    packs: int = 0
    peak_bytes: int = 0
    """Most pack bytes in flight at once."""

    @property
    def upload_bytes_per_s(self) -> float | None:
        """Sent bytes over the seconds between staging and the last byte."""
        if self.uploaded_s is None or self.staged_s is None or self.uploaded_s <= self.staged_s:
            return None
        return self.new_bytes / (self.uploaded_s - self.staged_s)


class SaveHandle:
    """One save: begun by ``save`` or by a due ``step``, finished in the background.

    The states follow one another: staged (live tensors may change again), uploaded (this rank's bytes are durable),
    committed (the checkpoint exists). ``error`` is set instead if it failed.
    """

    def __init__(self, step: int, attempt: str, *, traced: bool = False) -> None:
        self.step, self.attempt, self.began = step, attempt, time.perf_counter()
        self.stats, self.trace = SaveStats(), Trace(on=traced)
        self.error: BaseException | None = None
        self.instead = ""
        """Why nothing is written, where that is as it should be."""
        self.cancelled = threading.Event()
        self._staged, self._uploaded, self._finished = threading.Event(), threading.Event(), threading.Event()
        self._entry: Checkpoint | None = None
        self._follow: Callable[[float], Checkpoint] | None = None
        self._seen, self._called = False, False
        self._sight: Callable[[], None] = lambda: None

    def __repr__(self) -> str:
        state = (
            self.instead or f"failed: {self.error}" if self.error or self.instead else "committed" if self.committed
            else "uploaded" if self.uploaded else "staged" if self.staged else "staging"
        )  # fmt: skip
        return f"SaveHandle(step={self.step}, {state})"

    @property
    def staged(self) -> bool:
        """Whether the copy is complete: from here on live tensors may be changed by anybody."""
        self._sight()
        return self._staged.is_set() and self.error is None

    @property
    def uploaded(self) -> bool:
        """Whether this rank's bytes are durable."""
        return self._uploaded.is_set()

    @property
    def committed(self) -> bool:
        """Whether the checkpoint is known to exist. Ranks other than 0 learn it by ``wait`` or at the next save."""
        return self._entry is not None

    @property
    def finished(self) -> bool:
        """Whether this rank has nothing left to do for it, by success or failure."""
        self._sight()
        return self._finished.is_set()

    def wait_staged(self, timeout_s: float | None = None) -> None:
        """Wait until the copy is complete.

        Raises:
            GpumoveError: the save failed before that.
            StoreError: it took longer than ``timeout_s`` (code ``store.timeout``).
        """
        self._wait(self._staged, timeout_s, "staged")

    def wait(self, timeout_s: float | None = None) -> Checkpoint:
        """Wait until the checkpoint exists.

        Args:
            timeout_s: seconds, or None for as long as the save's own bounds allow.

        Returns:
            Its log entry.

        Raises:
            GpumoveError: the save failed; raised here once more even if ``step`` has raised it.
            StoreError: it took longer than ``timeout_s`` (code ``store.timeout``).
        """
        self._wait(self._finished, timeout_s, "committed")
        if self._entry is None and self._follow is not None:
            self._entry = self._follow(timeout_s if timeout_s is not None else float("inf"))
        if self._entry is None:
            raise StoreError(f"the save of step {self.step} ended without a commit")
        return self._entry

    def _wait(self, event: threading.Event, timeout_s: float | None, what: str) -> None:
        if not self._wait_in_sight(event, timeout_s):
            raise StoreError(f"the save of step {self.step} was not {what} within {timeout_s} s", code="store.timeout")
        if self.error is not None:
            self._seen = True
            raise self.error

    def join(self, timeout_s: float | None) -> bool:
        """Wait until this rank has nothing left to do for it, and tell whether that is so; raises nothing."""
        return self._wait_in_sight(self._finished, timeout_s)

    def join_copy(self, timeout_s: float) -> bool:
        """Wait in the training thread until that may be elsewhere, or blocked, without holding the save up."""
        return self._wait_in_sight(self._staged, timeout_s)

    def _wait_in_sight(self, event: threading.Event, timeout_s: float | None) -> bool:
        """Wait; the save may in turn be waiting to see the training thread once the copy is complete."""
        self._sight()
        until = None if timeout_s is None else time.monotonic() + timeout_s
        if event is not self._staged and not self._staged.wait(timeout_s):
            return False
        self._sight()
        done = event.wait(None if until is None else max(0.0, until - time.monotonic()))
        self._sight()
        return done

    def watch(self, sight: Callable[[], None]) -> None:
        """``sight`` is called whenever the training thread looks at this handle."""
        self._sight = sight

    def unseen_error(self) -> BaseException | None:
        """The error, if it was not raised anywhere yet."""
        return None if self._seen else self.error

    def mark_seen(self) -> None:
        """The error was raised in the training thread."""
        self._seen = True

    def mark_called(self, began: float) -> None:
        """The call that began the save returns now; it was made at ``began``."""
        ended = time.perf_counter()
        self.trace.add("call", began, ended)
        self.stats.stall_s += ended - began
        self._called = True

    def mark_staged(self, seconds: float) -> None:
        """The copy is complete."""
        self.stats.staged_s = seconds
        self._staged.set()

    def mark_uploaded(self, seconds: float, follow: Callable[[float], Checkpoint]) -> None:
        """This rank's part is durable; ``follow`` waits for the commit elsewhere."""
        self.stats.uploaded_s, self._follow = seconds, follow
        self._uploaded.set()

    def mark_committed(self, entry: Checkpoint, seconds: float) -> None:
        """The checkpoint exists."""
        self._entry, self.stats.committed_s = entry, seconds

    def took(self, ready_s: float, sight_s: float, restore_s: float | None) -> Took:
        """What it has cost so far, for the manifest.

        Args:
            ready_s: until all parts were there.
            sight_s: of that, until the training thread was seen after the copy.
            restore_s: of the restore that this job began with.
        """
        stats = self.stats
        stall_s = stats.stall_s if self._called else None  # the call that began it may not have returned yet
        parts = (stall_s, stats.staged_s, stats.uploaded_s, ready_s, sight_s, restore_s)
        return Took(*(None if seconds is None else round(seconds, 6) for seconds in parts))

    def finish(self, error: BaseException | None = None) -> None:
        """Nothing more will happen here."""
        self.error = error
        self._staged.set()
        self._finished.set()
