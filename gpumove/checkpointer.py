"""The object in the training loop: it decides with the other ranks when to save, stages, and hands over.

Collectives happen only here, in the training thread, and only at steps that all ranks know beforehand to be meetings.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Mapping, Sequence
from functools import partial
from types import TracebackType
from typing import Any

import msgspec
import torch
from torch import nn
from torch.optim import Optimizer

from gpumove.cadence import Cadence
from gpumove.config import Config
from gpumove.errors import ConfigError, FencedError, GpumoveError, StoreError, describe, rebuild
from gpumove.format.manifest import Checkpoint
from gpumove.handle import SaveHandle
from gpumove.meeting import Claimed, Report, Verdict, first_error
from gpumove.restore import fill, read_contents, try_newest
from gpumove.runner import Runner, Staged
from gpumove.state.capture import Capture, Job
from gpumove.state.layout import Planner, urgent
from gpumove.state.peers import Peers
from gpumove.state.staging import Stager
from gpumove.store.log import Log
from gpumove.store.objects import Store

_log = logging.getLogger("gpumove")
_MAX_TRACE = 10_000


class Checkpointer:
    """Saves a training job to an object store beside the training, and restores it bit for bit.

    Use it as a context manager, call :meth:`restore` once before the loop and :meth:`step` after every step. All ranks
    make the same calls in the same order.
    """

    def __init__(
        self,
        url: str,
        *,
        model: nn.Module | Mapping[str, nn.Module] | None = None,
        optimizer: Optimizer | Sequence[Optimizer] | Mapping[str, Optimizer] | None = None,
        scheduler: Any = None,
        scaler: Any = None,
        loader: Any = None,
        objects: Mapping[str, Any] | None = None,
        rng: bool = True,
        config: Config | None = None,
        storage_options: Mapping[str, Any] | None = None,
        **settings: Any,
    ) -> None:
        """Take hold of the live objects. Nothing is read or written yet.

        Args:
            url: where the run lies: ``s3://bucket/run``, ``gs://``, ``abfs://``, ``file://`` or a path.
            model: the module, wrapped or not (DDP, FSDP2, TP, compiled), or several by name.
            optimizer: a ``torch.optim.Optimizer`` over the model's parameters, or several.
            scheduler: one learning rate scheduler, or several.
            scaler: a GradScaler.
            loader: an ``ElasticLoader``, a torchdata ``StatefulDataLoader``, or anything with a state.
            objects: further state by name: modules (an EMA), objects with ``state_dict`` and ``load_state_dict``,
                random generators, dicts of plain values (updated in place).
            rng: whether python's, numpy's and torch's global generators belong to the job.
            config: settings; by default from the environment and ``settings``.
            storage_options: for fsspec; credentials are better left to the cloud's standard places.
            **settings: fields of :class:`Config`.

        Raises:
            ConfigError: a setting or an object cannot be used.
        """
        self.config = Config.from_env(**settings) if config is None else config.replace(**settings)
        self._peers = Peers(timeout_s=self.config.peer_s)
        self._job = Job(
            model=model,
            optimizer=optimizer,
            scheduler=scheduler,
            scaler=scaler,
            loader=loader,
            objects=objects,
            rng=rng,
        )
        self._store = Store.open(url, self.config, options=storage_options)
        self._log = Log(self._store)
        self._planner = Planner(self._peers, split_bytes=self.config.chunk_bytes)
        self._stager = Stager(overlap=self.config.overlap)
        self._runner = Runner(self._log, self.config, rank=self._peers.rank, world_size=self._peers.world_size)
        self._cadence = Cadence(self.config, time.monotonic())
        self._claimed, self._closed = False, False
        self._next_meeting, self._serial = 0, 0
        self._trace: list[tuple[int, Any]] = []
        self._last: SaveHandle | None = None
        self.skipped = 0
        """Saves that were due while the one before was still running."""
        self.failed = 0
        """Saves that failed and were not raised (``on_save_error="warn"``), or whose tensors changed under the copy."""

    def __enter__(self) -> Checkpointer:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            self.close()
        except GpumoveError as failure:
            if error is None:
                raise
            _log.error("while the training ended with %s, the last save failed too: %s", type(error).__name__, failure)

    @property
    def last(self) -> SaveHandle | None:
        """The newest save, running or finished."""
        return self._last

    # ---------------------------------------------------------------- restore

    def restore(self, step: int | None = None, *, strict: bool = True) -> int:
        """Claim the run and load its newest checkpoint into the live objects.

        A damaged checkpoint is named in a warning, and the one before it is taken.

        Args:
            step: take this step's checkpoint instead of the newest. Later ones stay, but training goes on from here.
            strict: refuse a checkpoint that holds more than the live objects take.

        Returns:
            The step to go on from: 0 for a new run.

        Raises:
            LayoutError: the checkpoint and the live objects do not fit; all differences are listed.
            IntegrityError: every checkpoint is damaged.
            StoreError: the store failed, or cannot hold a run.
        """
        candidates = self._claim(step)
        damaged: list[int] = []

        def attempt(checkpoint: Checkpoint) -> None:
            work = partial(self._load, checkpoint, strict=strict)
            self._peers.agree(f"the end of reading step {checkpoint.step}", work)

        def say(checkpoint: Checkpoint, error: GpumoveError) -> None:
            damaged.append(checkpoint.number)
            _log.warning("step %d is damaged and is skipped: %s", checkpoint.step, error)

        if not candidates:
            return 0
        found = try_newest(candidates, attempt, say=say)
        self._cadence.last_step = found.step
        self._peers.agree("the end of restore()", lambda: self._say_resumed(found, damaged))
        _log.info("resumed from step %d of %s", found.step, self._store.url)
        return found.step

    def _say_resumed(self, found: Checkpoint, damaged: Sequence[int]) -> None:
        if self._peers.rank == 0:
            words = f"resumed from step {found.step}" + (f"; {len(damaged)} damaged were skipped" if damaged else "")
            self._log.note(words, resumed=found.number, damaged=damaged)

    def _claim(self, step: int | None) -> list[Checkpoint]:
        """Become the owner, on all ranks; the checkpoints to try, newest first."""
        self._peers.meet("the claim of the run")
        answer = self._claim_here(step) if self._peers.rank == 0 else Claimed()
        answer = msgspec.msgpack.decode(self._peers.broadcast(msgspec.msgpack.encode(answer)), type=Claimed)
        if answer.error is not None:
            raise rebuild(answer.error)
        self._log.adopt(answer.run, answer.epoch)
        self._claimed = True
        return answer.candidates

    def _claim_here(self, step: int | None) -> Claimed:
        """On rank 0. An error is part of the answer, so that no rank waits for one that will not come."""
        try:
            run = self._log.open(create=True)
            view = self._log.read()
            for broken in view.broken:
                _log.warning("log entry %d cannot be read and is skipped: %s", broken.number, broken.error)
            found = view.candidates()
            if step is not None:
                sound = [c for c in view.checkpoints if c.number not in view.damaged]
                found = [c for c in reversed(sound) if c.step == step][:1]
                if not found:
                    raise ConfigError(f"{self._store.url} has no sound checkpoint of step {step}")
            return Claimed(run, self._log.claim().epoch, found)
        except GpumoveError as error:
            return Claimed(error=describe(error))

    def _load(self, checkpoint: Checkpoint, *, strict: bool) -> None:
        rank, stream = self._peers.rank, self._job.stream()
        contents = read_contents(self._store, checkpoint, rank=rank, config=self.config, stream=stream)
        targets = self._job.match(contents.saved, world_size=self._peers.world_size, strict=strict)
        fill(self._store, contents, targets, config=self.config)
        self._job.load(contents.saved, targets)
        self._runner.take_predecessor(contents.predecessor())

    # ---------------------------------------------------------------- save

    def step(self, step: int, *, loss: torch.Tensor | float | None = None) -> bool:
        """Tell that a step is complete, after ``optimizer.step`` and everything else that belongs to it.

        Between meetings this is one comparison. At a meeting, a due save is staged and handed to the background.

        Args:
            step: the number of steps done; it grows.
            loss: recorded in the next manifest; a device tensor is not waited for.

        Returns:
            True if the job should leave now.

        Raises:
            GpumoveError: an earlier save failed (once), or the run belongs to somebody else.
        """
        if loss is not None and self._peers.rank == 0:
            self._trace.append((step, loss.detach().clone() if isinstance(loss, torch.Tensor) else float(loss)))
        if step >= self._next_meeting:
            self._meet(step, force=False, pinned=False)
        return False

    def save(self, step: int, *, pinned: bool = False) -> SaveHandle:
        """Begin a save now, on all ranks alike; waits for a running one first.

        Until the handle is ``staged``, parameters may be changed by optimizers only.

        Args:
            step: the number of steps done.
            pinned: retention keeps this checkpoint for good.

        Returns:
            The handle to wait on.
        """
        if self._last is not None and not self._last.finished:
            self._last.join(self.config.peer_s)
        self._meet(step, force=True, pinned=pinned)
        if self._last is None or self._last.step != step:
            raise StoreError(f"the save of step {step} did not begin")
        return self._last

    def _meet(self, step: int, *, force: bool, pinned: bool) -> None:
        """All ranks are here: learn what rank 0 decides, and do it."""
        began = time.perf_counter()
        self._check_open()
        capture, report = self._look(step)
        self._peers.meet(f"the meeting at step {step}")
        reports = self._peers.gather(msgspec.msgpack.encode(report))
        verdict = self._decide(step, reports, force=force) if self._peers.rank == 0 else Verdict()
        verdict = msgspec.msgpack.decode(self._peers.broadcast(msgspec.msgpack.encode(verdict)), type=Verdict)
        self._next_meeting = verdict.next_meeting
        if isinstance(capture, Exception):
            raise capture
        if verdict.told and self._last is not None:
            self._last.mark_seen()
        if verdict.error is not None:
            self._raise(verdict.error)
        if verdict.replan:
            self._planner.agree(capture)
        layout = self._planner.lay_out(capture)
        if not verdict.save:
            if verdict.replan:
                self._runner.prepare(self._stager, layout.sources)
            return
        self._runner.settle(self._last, abandon=True)
        handle = SaveHandle(step, self._runner.attempt(verdict.serial))
        snapshot = self._stager.stage(layout.sources, urgent(layout, capture, self._runner.mutable))
        self._last = handle
        agreed, trace = self._planner.agreement(), self._take_trace()
        self._runner.start(Staged(handle, snapshot, layout, capture, agreed, trace, began, pinned))
        handle.stats.stall_s += time.perf_counter() - began

    def _look(self, step: int) -> tuple[Capture | Exception, Report]:
        """The cut. A failure is told at the meeting: the other ranks must not wait for this one."""
        try:
            capture = self._job.capture()
            return capture, Report(step, replan=self._planner.changed(capture))
        except Exception as error:  # noqa: BLE001 - state_dict() of a user's object raises what it likes
            return error, Report(step, error=describe(error))

    def _check_open(self) -> None:
        if self._closed:
            raise ConfigError("the Checkpointer is closed")
        if not self._claimed and (found := self._claim(None)):
            raise ConfigError(
                f"{self._store.url} already has checkpoints up to step {found[0].step}: call restore() before the "
                "first step to go on from there, or use a new URL to begin anew"
            )

    def _decide(self, step: int, reports: Sequence[bytes], *, force: bool) -> Verdict:
        """Rank 0: save or not, plan anew or not, and when to meet again."""
        now = time.monotonic()
        found = [msgspec.msgpack.decode(r, type=Report) for r in reports]
        if (problem := first_error(found)) is not None:
            return Verdict(error=problem, next_meeting=self._cadence.next_meeting(step, now))
        verdict = Verdict(replan=any(r.replan for r in found), serial=self._serial + 1)
        last = self._last
        failure = last.unseen_error() if last is not None and last.finished else None
        if last is not None and failure is not None:
            verdict.told = True
            if isinstance(failure, GpumoveError) and failure.code == "config.torn":
                self.failed += 1
                _log.warning("the save of step %d is discarded and taken again: %s", last.step, failure)
                verdict.save = True
            elif self.config.on_save_error == "warn" and not isinstance(failure, FencedError):
                self.failed += 1
                _log.error("the save of step %d failed: %s", last.step, failure)
            else:
                verdict.error = describe(failure)
        if self._cadence.due(step, now) or force:
            if last is not None and not last.finished:
                self.skipped += 1
                _log.warning("a save is due at step %d while that of step %d still runs: skipped", step, last.step)
            else:
                verdict.save = True
            self._cadence.took(step, now)
        if verdict.save:
            self._serial += 1
        verdict.next_meeting = self._cadence.next_meeting(step, now)
        return verdict

    def _raise(self, error: tuple[str, str, str]) -> None:
        """The same error on all ranks; on rank 0 it is the original."""
        original = None if self._last is None else self._last.error
        raise original if original is not None and describe(original) == error else rebuild(error)

    def _take_trace(self) -> list[tuple[int, Any]]:
        """What was recorded since the last commit."""
        committed = self._runner.committed_step
        self._trace = [t for t in self._trace if t[0] > committed][-_MAX_TRACE:]
        return list(self._trace)

    # ---------------------------------------------------------------- end

    def close(self) -> None:
        """Wait for the running save and give everything back. Safe to call twice.

        Raises:
            GpumoveError: the last save failed and nobody was told yet.
        """
        if self._closed:
            return
        self._closed = True
        try:
            self._runner.settle(self._last, abandon=False)
        finally:
            self._runner.close()
            self._stager.close()
            self._peers.close()
            self._store.close()
        failure = self._last.unseen_error() if self._last is not None else None
        if failure is not None and self._last is not None:
            self._last.mark_seen()
            raise failure
