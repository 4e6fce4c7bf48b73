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

from gpumove.config import Config
from gpumove.errors import ConfigError, GpumoveError, StoreError, describe, rebuild
from gpumove.format.manifest import Checkpoint
from gpumove.handle import SaveHandle
from gpumove.losses import Losses
from gpumove.meeting import Chair, Claimed, Report, Verdict
from gpumove.restore import Contents, fill, read_contents, try_newest
from gpumove.runner import Runner, Staged
from gpumove.state.capture import Capture, Job, Targets
from gpumove.state.layout import Layout, Planner
from gpumove.state.peers import Peers
from gpumove.state.snapshot import Snapshot
from gpumove.state.staging import Stager
from gpumove.store.log import Log
from gpumove.store.objects import Store

_log = logging.getLogger("gpumove")


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
        self._stager = Stager(overlap=self.config.overlap, skip=self.config.skip_unchanged)
        self._runner = Runner(
            self._log, self.config, self._stager, rank=self._peers.rank, world_size=self._peers.world_size
        )
        self._chair = Chair(self.config, time.monotonic())
        self._claimed, self._closed = False, False
        self._next_meeting, self._step = 0, -(1 << 62)
        self._losses = Losses()
        self._last: SaveHandle | None = None
        self._snapshot: Snapshot | None = None
        self._restored: Contents | None = None
        self._resumed = False
        self._runner.settle_at_exit()

    def __enter__(self) -> Checkpointer:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            self.close()
        except Exception as failure:
            if error is None:
                raise
            _log.error("while the training ended with %s, the last save failed too: %s", type(error).__name__, failure)

    @property
    def skipped(self) -> int:
        """Saves that were due while the one before was still running; counted on rank 0."""
        return self._chair.skipped

    @property
    def failed(self) -> int:
        """Saves that failed and were not raised: torn ones, and all with ``on_save_error="warn"``; on rank 0."""
        return self._chair.failed

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
        self._runner.drop(self._last)
        self._runner.settle(self._last, abandon=True)
        self._runner.idle()  # the log has one user at a time
        candidates = self._claim(step)
        damaged: list[int] = []

        def attempt(checkpoint: Checkpoint) -> None:
            # In two goes: no rank touches its live objects before all have found that the checkpoint fits theirs.
            look, step = partial(self._compare, checkpoint, strict=strict, damaged=damaged), checkpoint.step
            found = self._peers.agree(f"the comparison with step {step}", look)
            self._peers.agree(f"the end of reading step {step}", lambda: self._load(*found))

        def say(checkpoint: Checkpoint, error: GpumoveError) -> None:
            damaged.append(checkpoint.number)
            _log.warning("step %d is damaged and is skipped: %s", checkpoint.step, error)

        if not candidates:
            return 0
        found = try_newest(candidates, attempt, say=say)
        self._follow_on()
        self._chair.cadence.last_step = self._runner.committed_step = self._step = found.step
        self._next_meeting = 0
        self._losses.clear()
        _log.info("resumed from step %d of %s", found.step, self._store.url)
        return found.step

    def _claim(self, step: int | None, *, only_if_new: bool = False) -> list[Checkpoint]:
        """Become the owner, on all ranks; the checkpoints to try, newest first."""
        self._peers.meet("the claim of the run")
        answer = self._claim_here(step, only_if_new) if self._peers.rank == 0 else Claimed()
        answer = msgspec.msgpack.decode(self._peers.broadcast(msgspec.msgpack.encode(answer)), type=Claimed)
        if answer.error is not None:
            raise rebuild(answer.error)
        self._log.adopt(answer.run, answer.epoch)
        # What this process wrote in an older epoch may be of an attempt that is dead now: gc may take it at any time.
        self._runner.take_predecessor({})
        self._claimed = True
        return answer.candidates

    def _claim_here(self, step: int | None, only_if_new: bool) -> Claimed:
        """On rank 0. An error is part of the answer, so that no rank waits for one that will not come."""
        try:
            run = self._log.open(create=True)
            view = self._log.read()
            for broken in view.broken:
                _log.warning("log entry %d cannot be read and is skipped: %s", broken.number, broken.error)
            if only_if_new and view.checkpoints:
                raise ConfigError(
                    f"{self._store.url} already has checkpoints up to step {view.checkpoints[-1].step}: call restore() "
                    "before the first step to go on from there, or use a new URL to begin anew"
                )
            found = view.candidates()
            if step is not None:
                sound = [c for c in view.checkpoints if c.number not in view.damaged]
                found = [c for c in reversed(sound) if c.step == step][:1]
                if not found:
                    raise ConfigError(f"{self._store.url} has no sound checkpoint of step {step}")
            claim = self._log.claim(resumed=found[0].number if found else None)
            return Claimed(run, claim.epoch, found)
        except GpumoveError as error:
            return Claimed(error=describe(error))

    def _compare(self, checkpoint: Checkpoint, *, strict: bool, damaged: Sequence[int]) -> tuple[Contents, Targets]:
        if damaged and self._peers.rank == 0:
            # Before it is read: from here on no gc takes it away. For the first one the claim has said so.
            words = f"going on from step {checkpoint.step}; {len(damaged)} newer ones are damaged"
            self._log.note(words, resumed=checkpoint.number, damaged=damaged)
        rank, stream = self._peers.rank, self._job.stream()
        contents = read_contents(self._store, checkpoint, rank=rank, config=self.config, stream=stream)
        return contents, self._job.match(contents.saved, world_size=self._peers.world_size, strict=strict)

    def _load(self, contents: Contents, targets: Targets) -> None:
        fill(self._store, contents, targets, config=self.config)
        self._job.load(contents.saved, targets)
        self._restored = contents

    def _follow_on(self) -> None:
        """What was restored is what the next save is coded against: stage it now, while it is what is there."""
        if self._restored is None:
            return
        table, self._restored = self._restored.predecessor(), None
        self._runner.take_predecessor(table)
        if not self.config.delta or self.config.codec == "raw":
            return
        try:
            capture = self._peers.agree("the cut after the restore", self._job.capture)
            self._planner.agree(capture)
            layout, self._snapshot = self._peers.agree("the copy after the restore", partial(self._stage, capture))
        except GpumoveError as error:
            # On all ranks alike. If it lasts the first save says so; a job that only reads may go on.
            _log.debug("the first save will not be a difference: %s", error)
            return
        self._runner.follow_on(table, self._snapshot, layout, capture)
        self._resumed = True

    def _stage(self, capture: Capture) -> tuple[Layout, Snapshot]:
        layout = self._planner.lay_out(capture, self._runner.mutable)
        return layout, self._stager.stage(layout.sources, layout.at_once, steady=layout.steady)

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
        if self._snapshot is not None:
            self._snapshot.sight()
        self._count(step)
        if loss is not None and self._peers.rank == 0:
            self._losses.record(step, loss)
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
        self._count(step)
        if self._last is not None and not self._last.finished:
            self._last.join(self.config.peer_s)
        self._meet(step, force=True, pinned=pinned)
        if self._last is None or self._last.step != step:
            raise StoreError(f"the save of step {step} did not begin")
        return self._last

    def _count(self, step: int) -> None:
        if type(step) is not int or abs(step) >= 1 << 53:
            raise ConfigError(f"a step is an int below 2**53, not {step!r}")
        if step < self._step:
            raise ConfigError(f"steps only grow: {step} came after {self._step}. Count them over all epochs")
        self._step = step

    def _meet(self, step: int, *, force: bool, pinned: bool) -> None:
        """All ranks are here: learn what rank 0 decides, and do it."""
        marks = [time.perf_counter()]
        self._check_open()
        capture, report = self._look(step)
        marks.append(time.perf_counter())
        self._peers.meet(f"the meeting at step {step}")
        decide = partial(self._chair.decide, step, last=self._last, force=force, now=time.monotonic())
        answer = self._peers.ask(msgspec.msgpack.encode(report), lambda told: msgspec.msgpack.encode(decide(told)))
        verdict = msgspec.msgpack.decode(answer, type=Verdict)
        marks.append(time.perf_counter())
        self._next_meeting = verdict.next_meeting
        if isinstance(capture, Exception):
            raise capture
        if verdict.told and self._last is not None:
            self._last.mark_seen()
        if verdict.error is not None:
            self._raise(verdict.error)
        if verdict.replan:
            self._planner.agree(capture)
        layout = self._planner.lay_out(capture, self._runner.mutable)
        marks.append(time.perf_counter())
        if not verdict.save:
            if verdict.replan or self._resumed:
                self._runner.prepare(layout.sources)
            self._resumed = False
            return
        self._runner.settle(self._last, abandon=True)
        handle = self._last = self._runner.begin(step, verdict.serial)
        for name, began, ended in zip(("capture", "meet", "plan"), marks, marks[1:]):
            handle.trace.add(name, began, ended)
        try:
            snapshot = self._snapshot = self._stager.stage(
                layout.sources, layout.at_once, handle.trace, steady=layout.steady
            )
            handle.watch(snapshot.sight)
            agreed, trace = self._planner.agreement(), self._losses.since(self._runner.committed_step)
            self._runner.start(Staged(handle, snapshot, layout, capture, agreed, trace, marks[0], pinned))
        except BaseException as error:
            self._runner.fail(handle, error)
            handle.mark_seen()
            raise
        handle.mark_called(marks[0])

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
        if not self._claimed:
            self._claim(None, only_if_new=True)
        if self._peers.rank == 0 and self._peers.world_size == 1:
            self._log.check_owner()  # with several ranks the commit says so, on all of them

    def _raise(self, error: tuple[str, str, str]) -> None:
        """The same error on all ranks; on rank 0 it is the original."""
        original = None if self._last is None else self._last.error
        raise original if original is not None and describe(original) == error else rebuild(error)

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
            self._runner.drop(self._last)
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
