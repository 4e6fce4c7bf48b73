"""Optimizer state on its way: read in the background after a lazy restore, and waited for before anybody uses it.

What to read, and where it goes, is the restore's. Who has to wait, and what becomes of a failure, is decided here.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Mapping, Sequence

import torch

from gpumove.errors import GpumoveError, IntegrityError, describe, rebuild
from gpumove.format.manifest import Checkpoint
from gpumove.ranges import Wanted
from gpumove.store.log import Log
from gpumove.store.objects import Store
from gpumove.store.retry import unless

_log = logging.getLogger("gpumove")


class Late:
    """One rank's. Begins at once."""

    def __init__(self, store: Store, checkpoint: Checkpoint, work: Callable[[], object]) -> None:
        """Begin.

        Args:
            store: the run.
            checkpoint: what is read.
            work: reads it.
        """
        self._store, self._checkpoint, self._work = store, checkpoint, work
        self._given_up = threading.Event()
        self._error: BaseException | None = None
        self._told = False
        self.began = time.perf_counter()
        self._thread = threading.Thread(target=self._run, name="gpumove-late")
        self._thread.start()

    def wait(self) -> None:
        """Until all is there.

        Raises:
            IntegrityError: the checkpoint is damaged. The log says so by now: the next restore passes it over.
            StoreError: the store failed.
        """
        self._thread.join()
        if self._error is not None:
            self._told = True
            raise self._error

    def end(self, *, wait: bool) -> None:
        """Give up, or wait until all is there; nothing is read any more when this returns.

        Raises:
            GpumoveError: as above, if it was waited for and nobody was told yet.
        """
        if not wait:
            self._given_up.set()
        self._thread.join()
        if wait and self._error is not None and not self._told:
            self.wait()

    def _run(self) -> None:
        try:
            with unless(self._given_up.is_set):
                self._work()
            _log.debug("the optimizer state of step %d came in %.1f s", self._checkpoint.step,
                       time.perf_counter() - self.began)  # fmt: skip
        except Exception as error:  # noqa: BLE001 - raised in the training thread
            if self._given_up.is_set():
                return
            self._error = self._explained(error)
            if isinstance(error, IntegrityError):
                self._note(error)
        finally:
            self._work = _done  # it holds on to what it was filled from

    def _explained(self, error: Exception) -> GpumoveError:
        kind, code, text = describe(error)
        found = rebuild((kind, code, f"the optimizer state of step {self._checkpoint.step} (log entry "
                                     f"{self._checkpoint.number}) could not be read: {text}. The parameters are those "
                                     "of that step, and no optimizer has used them: restore() again"))  # fmt: skip
        found.__cause__ = error
        return found

    def _note(self, error: Exception) -> None:
        """In a log of its own: the job's has one user at a time."""
        try:
            log = Log(self._store)
            log.read()
            log.note(f"the optimizer state of step {self._checkpoint.step} is damaged: {error}",
                     damaged=[self._checkpoint.number])  # fmt: skip
        except GpumoveError as failure:
            _log.warning("the log does not say that step %d is damaged: %s", self._checkpoint.step, failure)


def _done() -> None:
    """Nothing is left to do."""


def beside(wanted: Sequence[Wanted], targets: Mapping[str, torch.Tensor]) -> list[Wanted]:
    """The same, for a thread beside the training: device memory is written on a stream of its own, or each copy would
    stand in the queue behind the forward that it is to run beside."""
    devices = {targets[want.name].device for want in wanted if targets[want.name].is_cuda}
    streams = {}
    for device in devices:
        torch.cuda.current_stream(device).synchronize()  # what used the memory before is still queued there
        streams[device] = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]

    def on(want: Wanted) -> Wanted:
        stream = streams.get(targets[want.name].device)
        return want if stream is None else want._replace(use=lambda data: _with(stream, want.use, data))

    return [on(want) for want in wanted]


def _with(stream: torch.cuda.Stream, use: Callable[[memoryview], None], data: memoryview) -> None:
    with torch.cuda.stream(stream):
        use(data)
