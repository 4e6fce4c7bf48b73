"""The object in the training loop: it decides with the other ranks when to save, stages, and hands over.

Collectives happen only here, in the training thread, and only at steps that all ranks know beforehand to be meetings.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from types import TracebackType
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer

from gpumove.config import Config
from gpumove.errors import ConfigError, StoreError
from gpumove.format.manifest import Checkpoint
from gpumove.from_env import where
from gpumove.handle import SaveHandle
from gpumove.health import Finding, Health
from gpumove.leave.way_out import WayOut, request
from gpumove.meeting import Chair, Told
from gpumove.notices.notice import Notice
from gpumove.parity.outputs import ProbeResult
from gpumove.parity.probe import Probes
from gpumove.parity.recorder import Recorder
from gpumove.parity.replay import Replay
from gpumove.parity.verdict import Certificate
from gpumove.parity.watching import Watching
from gpumove.rendezvous import Rendezvous
from gpumove.runner import Runner
from gpumove.saver import Saver
from gpumove.staged import Seat
from gpumove.state.capture import Job
from gpumove.state.layout import Planner
from gpumove.state.peers import Peers
from gpumove.state.staging import Stager
from gpumove.store.log import Log
from gpumove.store.objects import Store
from gpumove.takeover import Takeover
from gpumove.watchdog import Watchdog

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
        self.config = Config.of_job(config, settings)
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
        self._runner = Runner(self._log, self.config, self._stager, rank=self._peers.rank)
        leave_on = self.config.leave_on + (",parity" if self.config.on_parity == "leave" else "")
        self._health = Health(rank=self._peers.rank, leave_on=leave_on, leave=self._leave)
        self._recorder = Recorder(self._job, rng=rng, certify_steps=self.config.certify or self.config.certify_steps)
        self._probes = Probes(self._job, self._peers, self.busy)
        self._saver = Saver(
            self._job, self._planner, self._stager, self._runner, self._health, self._recorder, self._probes
        )
        self._watchdog = Watchdog(
            self._health, hang_s=self.config.hang_s, folder=self.config.trace_dir, saving=self._saver.running
        )
        self._takeover = Takeover(self._peers, self._job, self._log, self.config, self._saver, self._stager)
        self._way_out = WayOut(self.config, self._peers, self._saver, self._log)
        self._departure = self._way_out.departure
        requests, self._watching = self._way_out.requests, Watching(self.config, self._recorder, self._health.tell)
        self._chair = Chair(self.config, time.monotonic(), self._health.hear, requests.asked, self._watching)
        requests.watching = self._watching
        self._chair.choose, self._probes.left_s = self._probes.choose, self._departure.left_s
        seat = Seat(self._peers.rank, self._peers.world_size, self.config.peer_s)
        self._rendezvous = Rendezvous(
            self._peers, self._chair, self._saver, self._takeover, self._health, self._way_out, seat
        )
        replay = Replay(self._peers, self._log, self.config, self._takeover, self._recorder)
        self._replay = replay if self.config.certify else None
        self._claimed, self._closed = False, False
        self._step = -(1 << 62)
        self._failure: BaseException | None = None
        self._runner.settle_at_exit()

    @classmethod
    def from_env(cls, **arguments: Any) -> Checkpointer:
        """The Checkpointer of a job that ``gpumove run`` has started: it knows the URL and the store's options.

        Args:
            **arguments: the others of :class:`Checkpointer`.

        Raises:
            ConfigError: nobody said where the run lies.
        """
        url, options = where(*Config.run_place())
        return cls(url, **{"storage_options": options, **arguments})

    def __enter__(self) -> Checkpointer:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._failure = None if isinstance(error, SystemExit) else error
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
        return self._saver.last

    @property
    def certificate(self) -> Certificate | None:
        """What has come of ``Config.certify``: set when ``step`` has returned True, on all ranks."""
        return None if self._replay is None else self._replay.certificate

    # ---------------------------------------------------------------- leaving

    @property
    def leaving(self) -> bool:
        """Whether there is a notice: something long, such as an evaluation, may end early."""
        return self._departure.notice is not None

    @property
    def notice(self) -> Notice | None:
        """The notice with the nearest deadline; ``notice.outcome`` says what became of it, once that is known."""
        return self._departure.notice

    def request_leave(self, deadline: float | None = None, in_s: float | None = None, detail: str = "") -> None:
        """Let the whole job leave; from any thread of any rank. ``step`` returns True on all of them, soon.

        Args:
            deadline: when the machine goes, in seconds since the epoch.
            in_s: or in how many seconds from now. With neither, ``grace_s`` is left.
            detail: for the log.
        """
        self._departure.request(request(deadline, in_s, detail, now=time.time()))

    @contextmanager
    def busy(self) -> Iterator[None]:
        """``with ckpt.busy():`` what runs inside takes long, such as an evaluation, and is no hang."""
        with self._health.busy(), self._way_out.busy():
            yield

    def _leave(self, finding: Finding) -> None:
        self._departure.request(Notice("health", None, finding.text))

    # ---------------------------------------------------------------- probes

    def probe(
        self, fn: Callable[[], Any], name: str = "probe", *, every: int = 1, tolerance: float | None = None
    ) -> None:
        """Record with checkpoints what the model gives for fixed inputs, and compare that after a restore.

        Call it before ``restore``, on all ranks. ``fn`` runs in the training thread, without gradients, the job's
        modules in eval mode; generators, flags and buffers are put back afterwards. Rank 0's outputs are what counts.

        Args:
            fn: gives a tensor, or a dict or tuple of tensors; always the same for the same parameters.
            name: one for each probe.
            every: run it with every so many checkpoints, and with all that ``save`` asks for.
            tolerance: the largest difference that passes for rounding, as a share of the largest recorded value.

        Raises:
            ConfigError: the name is taken, or an argument is wrong.
        """
        self._probes.add(fn, name, every=every, tolerance=tolerance)

    @property
    def probes(self) -> dict[str, ProbeResult]:
        """What ``restore`` has found, by name: how far the probes are from what the checkpoint recorded."""
        return dict(self._probes.results)

    # ---------------------------------------------------------------- restore

    def restore(
        self, step: int | None = None, *, strict: bool = True, lazy: bool = False, wait: bool | None = None
    ) -> int:
        """Claim the run and load its newest checkpoint into the live objects.

        A damaged checkpoint is named in a warning, and the one before it is taken.

        Args:
            step: take this step's checkpoint instead of the newest. Later ones stay, but training goes on from here.
            strict: refuse a checkpoint that holds more than the live objects take.
            lazy: return when all but the optimizers' state is there; that follows, and their first step waits for it.
            wait: if the run is not here yet, or lies elsewhere still, wait until it is handed over, and read ahead.
                By default ``Config.wait``.

        Returns:
            The step to go on from: 0 for a new run, and if a notice ended the wait; then ``step`` says so at once.

        Raises:
            LayoutError: the checkpoint and the live objects do not fit; all differences are listed.
            IntegrityError: every checkpoint is damaged.
            StoreError: the store failed, or cannot hold a run.
        """
        if self._replay is not None:
            self._watchdog.start()
            self._step = self._replay.restore(step, strict=strict)
            self._probes.compare(self._takeover.manifest)
            return self._step
        self._takeover.begin()
        if self.config.wait if wait is None else wait:
            self._way_out.watch()
            if (told := self._takeover.wait(self._way_out.known, strict=strict, step=step)) is not None:
                self._way_out.turn_back(told)
                return 0
        candidates = self._claim(step)
        if not candidates:
            return 0
        found = self._takeover.load(candidates, strict=strict, lazy=lazy)
        self._chair.cadence.last_step = self._runner.committed_step = self._step = found.step
        self._runner.committed_attempt = found.attempt
        self._departure.step = found.step
        self._rendezvous.next_step = 0
        self._recorder.clear()
        self._watching.begin(self._log, found, world_size=self._peers.world_size)
        _log.info("resumed from step %d of %s", found.step, self._store.url)
        self._probes.compare(self._takeover.manifest)
        return found.step

    def _claim(self, step: int | None, *, only_if_new: bool = False) -> list[Checkpoint]:
        """Become the owner, on all ranks; the checkpoints to try, newest first."""
        claimed = self._takeover.claim(step, only_if_new=only_if_new)
        self._way_out.open()
        self._watchdog.start()
        self._chair.cadence.interval.learn(claimed.past, time.monotonic())
        self._claimed = True
        return claimed.candidates

    # ---------------------------------------------------------------- save

    def step(
        self,
        step: int,
        *,
        loss: torch.Tensor | float | None = None,
        grad_norm: torch.Tensor | float | None = None,
        samples: Any = None,
    ) -> bool:
        """Tell that a step is complete, after ``optimizer.step`` and everything else that belongs to it.

        Between meetings this takes a microsecond. At a meeting, a due save is staged and handed to the background.

        Args:
            step: the number of steps done; it grows.
            loss: recorded in the next manifest; a device tensor is not waited for.
            grad_norm: likewise.
            samples: ids of this rank's batch, as a sequence, array or tensor of ints; an ``ElasticLoader`` tells them.

        Returns:
            True, on all ranks after the same step, if the job has to leave: end the loop. What could be saved is saved.

        Raises:
            GpumoveError: an earlier save failed (once), or the run belongs to somebody else.
        """
        if self._saver.snapshot is not None:
            self._saver.snapshot.sight()
        self._count(step)
        took_s = self._health.step(step, loss)
        if self._peers.rank == 0:
            self._recorder.record(step, loss, took_s, grad_norm, samples)
        self._departure.step = step  # before the limit is looked at
        if step >= self._departure.limit and self._way_out.due(step):
            return True
        if step >= self._rendezvous.next_step:
            if self._replay is not None:
                return self._replay.step(step)
            try:
                told = self._meet(step, force=False, pinned=False)
            except StoreError as error:
                if self._way_out.lost(step, error):
                    return True
                raise
            if told is not None:
                self._way_out.leave_from_meeting(told, step, self.save)
                return True
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
        if self._replay is not None:
            return self._replay.save(step)
        last = self._saver.last
        if self._way_out.saved(step) and last is not None:
            return last
        if last is not None:
            self._departure.wait(last.join, most_s=min(self.config.peer_s, self._departure.meet_s))
        self._meet(step, force=True, pinned=pinned)
        if self._saver.last is not None and self._saver.last.step == step:
            return self._saver.last
        if self.leaving:
            return self._saver.refuse(step, "the one before is not done, and the job has to leave")
        raise StoreError(f"the save of step {step} did not begin")

    def _count(self, step: int) -> None:
        if type(step) is not int or abs(step) >= 1 << 53:
            raise ConfigError(f"a step is an int below 2**53, not {step!r}")
        if step < self._step:
            raise ConfigError(f"steps only grow: {step} came after {self._step}. Count them over all epochs")
        self._step = step

    def _meet(self, step: int, *, force: bool, pinned: bool) -> Told | None:
        began = time.perf_counter()
        self._check_open()
        return self._rendezvous.meet(step, began=began, force=force, pinned=pinned)

    def _check_open(self) -> None:
        if self._closed:
            raise ConfigError("the Checkpointer is closed")
        if not self._claimed:
            self._claim(None, only_if_new=True)
        if self._peers.rank == 0 and self._peers.world_size == 1:
            self._log.check_owner()  # with several ranks the commit says so, on all of them

    # ---------------------------------------------------------------- end

    def close(self) -> None:
        """Wait for the running save and give everything back. Safe to call twice.

        Raises:
            GpumoveError: the last save failed and nobody was told yet.
        """
        if self._closed:
            return
        self._closed = True
        self._watchdog.close()
        self._watching.close(self._failure, left=self.leaving)
        ended = False
        try:
            if self._replay is not None:
                self._replay.close()
            ended = self._way_out.finish(self._step, self._failure)
            self._takeover.end(wait=ended and self._failure is None and not self.leaving)
        finally:
            if not ended:
                self._store.hurry(0.0)
            self._runner.close(settled=ended)
            self._stager.close()
            self._peers.close()
            self._store.close()
        failure = self._saver.last.unseen_error() if self._saver.last is not None else None
        if failure is not None and self._saver.last is not None:
            self._saver.last.mark_seen()
            raise failure
