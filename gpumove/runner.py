"""The background of a Checkpointer: one save at a time, from the staged copy to the commit, and retention after it."""

from __future__ import annotations

import logging
import time
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait

import torch

from gpumove.commit import Order, commit, wait_for_commit, wait_for_parts
from gpumove.config import Config
from gpumove.ending import finish_at_exit
from gpumove.environment.fingerprint import Environment
from gpumove.environment.said import tell
from gpumove.errors import ConfigError
from gpumove.format import keys
from gpumove.format.manifest import Checkpoint, Manifest
from gpumove.format.stored import Stored
from gpumove.handle import SaveHandle
from gpumove.parity.recorder import told
from gpumove.retention import Keeper
from gpumove.save.chunks import ChunkKey
from gpumove.save.predecessor import Predecessor, keeps_in_memory
from gpumove.save.request import Request
from gpumove.save.writer import PartWriter, say_failure
from gpumove.staged import Seat, Staged
from gpumove.state.arena import staged_bytes
from gpumove.state.capture import Capture
from gpumove.state.families import settled
from gpumove.state.layout import Layout
from gpumove.state.snapshot import Snapshot
from gpumove.state.staging import Stager
from gpumove.store.gc import Retention
from gpumove.store.log import Log
from gpumove.store.retry import unless
from gpumove.telemetry import Telemetry

_log = logging.getLogger("gpumove")
_SIGHT_S = 2.0
"""How long a part waits to see the training thread after the copy. An operation that was changing a tensor is over by
then; a thread that is still away may be in a barrier, where it waits for a rank that waits for this very commit."""


class Runner:
    """Runs saves in the background of one rank."""

    def __init__(self, log: Log, config: Config, stager: Stager, *, rank: int) -> None:
        self._log_book, self._config = log, config
        self._telemetry = Telemetry(config, rank=rank)
        self._stager = stager
        self._kept_bytes, self._keeps = 0, False
        self.writer = PartWriter(log.store, config)
        self._environment = Environment()
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="gpumove-save")
        self._pending: list[Future[None]] = []
        self._keeper = Keeper(log, Retention(config.keep_last, config.keep_every)) if rank == 0 else None
        self.leaving: Callable[[], bool] = lambda: False
        """Whether the job has to leave: what can wait until after that gives way."""
        self.mutable: set[str] = set()
        """Tensors that were seen to change outside optimizers: from now on they are copied at once."""
        self.committed_step, self.committed_attempt = -1, ""
        self.took: deque[float] = deque(maxlen=8)
        """Seconds of the last saves, from the call to the end of what this rank does for them, less those below."""
        self.sights: deque[float] = deque(maxlen=8)
        """Seconds that they waited to see the training thread: as a job leaves it is there."""
        self.restore_s: float | None = None
        """Of the restore that the job has begun with, from the claim on."""
        self._adoption: Future[None] | None = None
        """What makes a restored checkpoint the predecessor of the first save."""
        self._written: int | None = None
        """Serial number of the snapshot that this process wrote last: what the writer's table is of."""

    def begin(self, step: int, serial: int) -> SaveHandle:
        """The handle of this epoch's save number ``serial``."""
        if self._log_book.epoch is None:
            raise ConfigError("claim the run before saving")
        attempt = keys.attempt_name(self._log_book.epoch, serial)
        return SaveHandle(step, attempt, traced=self._config.trace_dir is not None)

    def keeps(self, nbytes: int) -> bool:
        """Whether a snapshot of this size stays in memory, for the next one to be coded against."""
        if not 0.9 * self._kept_bytes <= nbytes <= 1.1 * self._kept_bytes:  # values grow a little from save to save
            self._kept_bytes, self._keeps = nbytes, keeps_in_memory(self._config, nbytes, held=self._stager.nbytes)
        return self._keeps

    def follow_on(self, table: dict[ChunkKey, Stored], snapshot: Snapshot, layout: Layout, capture: Capture) -> None:
        """The restored checkpoint is the predecessor of the first save: ``snapshot`` has its bytes."""
        keep = self.keeps(snapshot.nbytes)
        self._stager.keep(snapshot if keep else None)
        self._adoption = self._thread.submit(self._adopt, table, snapshot, layout, capture, keep)
        self._pending.append(self._adoption)

    def _adopt(
        self, table: dict[ChunkKey, Stored], snapshot: Snapshot, layout: Layout, capture: Capture, keep: bool
    ) -> None:
        try:
            snapshot.wait()
        except ConfigError as error:
            if error.code != "config.torn":  # of torn ones too every base is compared with its digest before use
                return
        rules = settled(capture.rules, layout.scalars, snapshot.view)
        self.writer.follow(table, layout.items, snapshot, rules=rules, keep=keep)

    def take_predecessor(self, table: dict[ChunkKey, Stored]) -> None:
        """What a restored checkpoint holds, without its bytes: unchanged chunks are recognised by their digests."""
        self._stager.keep(None)
        self._written = None
        self.writer.adopt(Predecessor(table))

    def prepare(self, sources: Sequence[torch.Tensor]) -> None:
        """Touch the staging memory before the first save needs it."""
        both = self.keeps(staged_bytes(sources))
        self._stager.go_on()
        self._pending.append(self._thread.submit(self._stager.prepare, sources, both=both))

    def drop(self, handle: SaveHandle | None) -> None:
        """What prepares the next save, or follows on from a restore, is not wanted any more; a running save is."""
        if handle is None or handle.finished:
            self._stager.give_up()

    def settle(self, handle: SaveHandle | None, *, abandon: bool, timeout_s: float | None = None) -> bool:
        """Wait until nothing uses the staging memory, telling a running save to give up if so asked.

        Returns:
            False if it still did when the time was over.
        """
        until = None if timeout_s is None else time.monotonic() + timeout_s
        if abandon:
            self.abandon(handle)
        while self._pending:
            # To touch memory that is used at once would only cost time; what the next save is coded against is worth a
            # wait. One that failed is no loss, since staging does the same.
            future = self._pending[-1]
            unwanted = future is not self._adoption and future.cancel()
            if not unwanted and not wait([future], _left(until)).done:
                return False
            self._pending.pop()
            if not future.cancelled() and (error := future.exception()) is not None:
                _log.warning("the next save is slower or larger than need be: %s", error)
        return handle is None or handle.join(_left(until))

    def abandon(self, handle: SaveHandle | None) -> None:
        """Tell a running save to give up."""
        if handle is not None and not handle.finished:
            handle.cancelled.set()
            self._stager.give_up()
            handle.mark_seen()  # that it was abandoned is no news to whoever did it

    def idle(self) -> None:
        """Wait until nothing at all is done in the background."""
        self._thread.submit(lambda: None).result()

    def start(self, staged: Staged) -> None:
        """Hand a staged save to the background."""
        self._thread.submit(self._run, staged)

    def _run(self, staged: Staged) -> None:
        handle = staged.handle
        try:
            with unless(handle.cancelled.is_set):
                self._save(staged)
            handle.finish()
        except BaseException as error:  # noqa: BLE001 - kept in the handle, raised once in the training thread
            _log.debug("the save of step %d failed: %s", handle.step, error)
            self._stager.settle(None)
            handle.finish(error)
            say_failure(self._log_book.store, handle.attempt, staged.seat.rank, error)
            return
        finally:
            self._telemetry.ended(handle, run=self._log_book.run)
        if self._keeper is not None and not self.leaving():
            with unless(self.leaving):
                self._keeper.retain()

    def fail(self, handle: SaveHandle, seat: Seat, error: BaseException) -> None:
        """A save that did not get as far as the background: end it, and leave word for the committer."""
        handle.finish(error)
        self._thread.submit(say_failure, self._log_book.store, handle.attempt, seat.rank, error)
        self._thread.submit(self._telemetry.ended, handle, run=self._log_book.run)

    def hurry(self) -> None:
        """From now on all is written, and coded only where that is quicker, whatever the settings ask for."""
        self.writer.close()
        self._stager.keep(None)
        self._written = None
        self.writer = PartWriter(self._log_book.store, self._config.replace(codec="auto"))

    def compare(self, manifest: Manifest, world_size: int) -> None:
        """Say what is not as it was where this checkpoint was made: in the background, and only if all goes well."""
        self._thread.submit(lambda: tell(manifest, self._environment.now(world_size=world_size)))

    def note(self, text: str, timeout_s: float) -> None:
        """Say something in the log, behind what is being done, if that is possible in time."""
        try:
            self._thread.submit(self._log_book.note, text).result(timeout_s)
        except Exception as error:  # noqa: BLE001 - it is for people: what counts is in the log already, or is not
            _log.info("not noted in the log: %s (%s)", text, error or type(error).__name__)

    def _request(self, staged: Staged) -> Request:
        shared = staged.cut.capture.shared if staged.seat.rank == 0 else {}
        return Request(
            run=self._log_book.run,
            attempt=staged.handle.attempt,
            rank=staged.seat.rank,
            world_size=staged.seat.world_size,
            step=staged.handle.step,
            plan=staged.cut.agreed.digest,
            items=staged.cut.layout.items,
            values={**shared, **staged.cut.capture.own},
            rules=settled(staged.cut.capture.rules, staged.cut.layout.scalars, staged.snapshot.view),
            keep=self.keeps(staged.snapshot.nbytes),
            unchanged=staged.snapshot.unchanged_since(self._written),
            trace=staged.handle.trace,
            cancelled=staged.handle.cancelled,
            confirm=lambda: self._whole(staged, lambda: staged.snapshot.confirm(_SIGHT_S)),
        )

    def _save(self, staged: Staged) -> None:
        handle, stats = staged.handle, staged.handle.stats
        self._whole(staged, staged.snapshot.wait)
        handle.mark_staged(time.perf_counter() - staged.began)
        request = self._request(staged)
        self._written = None
        _, part = self.writer.write(request, staged.snapshot)
        self._written = staged.snapshot.serial
        self._stager.keep(staged.snapshot if request.keep else None)
        if not request.keep:
            self._stager.trim()
        if part.compared:
            self._stager.settle(part.clean)
        stats.state_bytes, stats.clean_bytes, stats.new_bytes = part.state_bytes, part.clean_bytes, part.new_bytes
        stats.packs, stats.peak_bytes = part.packs, part.peak_bytes
        stats.stall_s += staged.snapshot.fence_s
        handle.mark_uploaded(time.perf_counter() - staged.began, self._follow(handle))
        if staged.seat.rank == 0:
            handle.mark_committed(self._commit(staged), time.perf_counter() - staged.began)
        self.sights.append(staged.snapshot.sight_s)
        self.took.append(time.perf_counter() - staged.began - self.sights[-1])

    def _whole(self, staged: Staged, check: Callable[[], None]) -> None:
        """Check the snapshot; if it is torn, remember by what and say so."""
        try:
            check()
        except ConfigError as error:
            names = sorted({staged.cut.layout.names[i] for i in staged.snapshot.changed})
            self.mutable.update(names)
            raise ConfigError(
                f"{', '.join(names[:5])}{' and more' if len(names) > 5 else ''} changed outside of an optimizer step "
                "while being copied. From now on gpumove copies them before step() returns; "
                "overlap=False does so for all",
                code=error.code,
            ) from error

    def _commit(self, staged: Staged) -> Checkpoint:
        order = Order(
            attempt=staged.handle.attempt,
            step=staged.handle.step,
            plans=staged.cut.agreed.all_digests,
            state_bytes=staged.cut.agreed.state_bytes,
            fingerprint=self._environment.now(world_size=staged.seat.world_size),
            trace=told(staged.trace),
            trace_after=staged.trace_after,
            health=staged.health,
            probes=staged.probes,
            pinned=staged.pinned,
        )
        trace, cancelled = staged.handle.trace, staged.handle.cancelled
        with trace.span("wait for parts"):
            parts = wait_for_parts(self._log_book, order, timeout_s=staged.seat.patience_s, cancelled=cancelled)
        with trace.span("commit"):
            now_s = time.perf_counter() - staged.began
            took = staged.handle.took(now_s, staged.snapshot.sight_s, self.restore_s)
            entry = commit(self._log_book, order, parts, took=took)
        self.committed_step, self.committed_attempt = entry.step, entry.attempt
        return entry

    def _follow(self, handle: SaveHandle) -> Callable[[float], Checkpoint]:
        """How ranks other than 0 learn of the commit."""

        def follow(timeout_s: float) -> Checkpoint:
            return wait_for_commit(self._log_book, handle.attempt, timeout_s=min(timeout_s, self._config.peer_s))

        return follow

    def settle_at_exit(self) -> None:
        """Let a running save finish if the script ends without ``close``."""
        finish_at_exit(self._thread)

    def close(self, *, settled: bool = True) -> None:
        """End the threads. A running save must have been settled, or it is left behind and ends by itself."""
        self._thread.shutdown(wait=settled)
        if settled:
            self.writer.close()


def _left(until: float | None) -> float | None:
    return None if until is None else max(0.0, until - time.monotonic())
