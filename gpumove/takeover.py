"""Becoming a run's owner, and reading its newest sound checkpoint into the live objects: on all ranks, or on none.

Collective, in the training thread. When what comes after is saved is not known here.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Sequence
from functools import partial

import msgspec
from torch.utils.hooks import RemovableHandle

from gpumove.cadence import past
from gpumove.config import Config
from gpumove.errors import ConfigError, FencedError, GpumoveError, describe, rebuild
from gpumove.fetch import fetch
from gpumove.format import keys
from gpumove.format.manifest import Checkpoint, Manifest
from gpumove.from_env import another
from gpumove.lazy import Late, beside
from gpumove.meeting import Claimed, Told
from gpumove.ranges import Wanted
from gpumove.restore import Contents, filled, parted, read_contents, try_newest, wants
from gpumove.saver import Saver
from gpumove.state.capture import Capture, Job, Targets
from gpumove.state.layout import Layout
from gpumove.state.peers import Peers
from gpumove.state.snapshot import Snapshot
from gpumove.state.staging import Stager
from gpumove.store.log import Log
from gpumove.waiting import Waiting
from gpumove.warm import Warm

_log = logging.getLogger("gpumove")


class Takeover:
    """One rank's side."""

    def __init__(self, peers: Peers, job: Job, log: Log, config: Config, saver: Saver, stager: Stager) -> None:
        self._peers, self._job, self._book, self._config = peers, job, log, config
        self._saver, self._runner, self._stager = saver, saver.runner, stager
        self._warm: Warm | None = None
        self._taken: Claimed | None = None
        self._began = 0.0
        self._late: Late | None = None
        self._looks: list[RemovableHandle] = []
        self.manifest: Manifest | None = None
        """Of the checkpoint that was loaded."""
        self.resumed = False
        """Whether the first save follows on from what was restored."""

    def begin(self) -> None:
        """Nothing is on its way, and nobody uses the log, from here on."""
        self.end()
        self._cool_down()
        self._taken = None
        self._runner.drop(self._saver.last)
        self._runner.settle(self._saver.last, abandon=True)
        self._runner.idle()  # the log has one user at a time

    def wait(self, told: Callable[[], Told | None], *, strict: bool, step: int | None) -> Told | None:
        """Until the run is claimed, with all but the newest bytes of it here; or a notice that ends the wait."""
        waiting = Waiting(self._peers, self._job, self._book, self._config, told=told, strict=strict)
        while (notice := waiting.run()) is None:
            self._warm = waiting.warm
            try:
                self._taken = self.claim(step, follow=True)
                break
            except FencedError as error:
                if error.code != "fenced.moved":
                    raise
                _log.warning("the wait goes on: %s", error)  # it was taken back just before the claim
        return notice

    # ---------------------------------------------------------------- claim

    def claim(self, step: int | None, *, only_if_new: bool = False, follow: bool = False) -> Claimed:
        """Become the owner, on all ranks; the checkpoints to try, newest first. Done already, if that was waited for.

        Args:
            step: the checkpoint to take; by default the newest.
            only_if_new: there must be none.
            follow: what is new in the log is all that is not known of it.
        """
        taken, self._taken = self._taken, None
        if taken is not None:
            return taken
        self._peers.meet("the claim of the run")
        self._began = time.perf_counter()
        answer = self._claim_here(step, only_if_new, follow) if self._peers.rank == 0 else Claimed()
        answer = msgspec.msgpack.decode(self._peers.broadcast(msgspec.msgpack.encode(answer)), type=Claimed)
        if answer.error is not None:
            raise rebuild(answer.error)
        self._book.adopt(answer.run, answer.epoch)
        # What this process wrote in an older epoch may be of an attempt that is dead now: gc may take it at any time.
        self._runner.take_predecessor({})
        return answer

    def _claim_here(self, step: int | None, only_if_new: bool, follow: bool) -> Claimed:
        """On rank 0. An error is part of the answer, so that no rank waits for one that will not come."""
        url = self._book.store.url
        if (asked := another(*self._config.run_place(), url)) is not None:
            _log.warning(
                "gpumove run was given %s, and the script opens %s: that one is what is trained and saved. Use "
                "Checkpointer.from_env in it, or the variable GPUMOVE_URL", asked, url,
            )  # fmt: skip
        try:
            run = self._book.run if follow else self._book.open(create=True)
            self._book.follow() if follow else self._book.read()
            view = self._book.view
            for broken in view.broken:
                _log.warning("log entry %d cannot be read and is skipped: %s", broken.number, broken.error)
            if only_if_new and view.checkpoints:
                raise ConfigError(
                    f"{self._book.store.url} already has checkpoints up to step {view.checkpoints[-1].step}: call "
                    "restore() before the first step to go on from there, or use a new URL to begin anew"
                )
            found = view.candidates()
            if step is not None:
                sound = [c for c in view.checkpoints if c.number not in view.damaged]
                found = [c for c in reversed(sound) if c.step == step][:1]
                if not found:
                    raise ConfigError(f"{self._book.store.url} has no sound checkpoint of step {step}")
            claim = self._book.claim(resumed=found[0].number if found else None, regions=self._config.allowed_regions)
            before = past([(c.time, keys.epoch_of(c.attempt)) for c in view.checkpoints])
            return Claimed(run, claim.epoch, found, before)
        except GpumoveError as error:
            return Claimed(error=describe(error))

    # ---------------------------------------------------------------- load

    def read(self, checkpoint: Checkpoint, *, strict: bool) -> None:
        """Fill the live objects from this checkpoint, of a run that this job does not own.

        Raises:
            LayoutError: the checkpoint and the live objects do not fit.
            IntegrityError: it is damaged.
        """
        contents, _, _ = self._load(checkpoint, strict=strict, lazy=False, damaged=())
        self.manifest = contents.manifest

    def _load(
        self, checkpoint: Checkpoint, *, strict: bool, lazy: bool, damaged: Sequence[int]
    ) -> tuple[Contents, Targets, list[Wanted]]:
        # In two goes: no rank touches its live objects before all have found that the checkpoint fits theirs.
        look, step = partial(self._compare, checkpoint, strict=strict, damaged=damaged), checkpoint.step
        found = self._peers.agree(f"the comparison with step {step}", look)
        return *found, self._peers.agree(f"the end of reading step {step}", lambda: self._fill(*found, lazy=lazy))

    def load(self, candidates: Sequence[Checkpoint], *, strict: bool, lazy: bool) -> Checkpoint:
        """Fill the live objects from the newest of these that is sound; damaged ones are named in a warning.

        Raises:
            LayoutError: the checkpoint and the live objects do not fit.
            IntegrityError: every checkpoint is damaged.
        """
        damaged: list[int] = []
        loaded: list[tuple[Contents, Targets, list[Wanted]]] = []

        def attempt(checkpoint: Checkpoint) -> None:
            loaded.append(self._load(checkpoint, strict=strict, lazy=lazy, damaged=damaged))

        def say(checkpoint: Checkpoint, error: GpumoveError) -> None:
            damaged.append(checkpoint.number)
            _log.warning("step %d is damaged and is skipped: %s", checkpoint.step, error)

        found = try_newest(candidates, attempt, say=say)
        self.manifest = loaded[-1][0].manifest
        self._follow_on(*loaded[-1], checkpoint=found, lazy=lazy)
        self._runner.restore_s = None if lazy else time.perf_counter() - self._began
        if self._peers.rank == 0:  # behind what was staged: the next step may change it before it is copied
            self._runner.compare(self.manifest, self._peers.world_size)
        return found

    def _compare(self, checkpoint: Checkpoint, *, strict: bool, damaged: Sequence[int]) -> tuple[Contents, Targets]:
        if damaged and self._peers.rank == 0:
            # Before it is read: from here on no gc takes it away. For the first one the claim has said so.
            words = f"going on from step {checkpoint.step}; {len(damaged)} newer ones are damaged"
            self._book.note(words, resumed=checkpoint.number, damaged=damaged)
        rank, stream = self._peers.rank, self._job.stream()
        contents = read_contents(self._book.store, checkpoint, rank=rank, config=self._config, stream=stream)
        return contents, self._job.match(contents.saved, world_size=self._peers.world_size, strict=strict)

    def _fill(self, contents: Contents, targets: Targets, *, lazy: bool) -> list[Wanted]:
        """Read what is needed now; what is left."""
        late = self._job.optimizer_state(contents.saved, targets) if lazy else {}
        first, later = parted(wants(contents, targets), late)
        self._fetch(first)
        filled(targets)
        self._job.load(contents.saved, targets)
        return later

    def _fetch(self, wanted: Sequence[Wanted]) -> None:
        held = None if self._warm is None else self._warm.get
        fetch(self._book.store, wanted, config=self._config, held=held)

    # ---------------------------------------------------------------- after it

    def _follow_on(
        self, contents: Contents, targets: Targets, later: list[Wanted], *, checkpoint: Checkpoint, lazy: bool
    ) -> None:
        """What was restored is what the next save is coded against: stage it now, while it is what is there."""
        table = contents.predecessor()
        self._runner.take_predecessor(table)
        if later:
            rest = Targets({want.name: targets.tensors[want.name] for want in later}, {})
            work = partial(self._bring, beside(later, rest.tensors), rest)
            self._await(Late(self._book.store, checkpoint, work))
            return
        self._cool_down()
        if lazy or not self._config.delta or self._config.codec == "raw":
            return
        if (found := self._staged()) is not None:
            capture, layout, snapshot = found
            self._runner.follow_on(table, snapshot, layout, capture)
            self.resumed = True

    def _await(self, late: Late) -> None:
        """From now on whoever uses an optimizer's state waits for it: its steps, snapshots, whoever looks at it."""
        self._late, self._stager.awaited = late, late.wait
        self._looks = [o.register_state_dict_pre_hook(lambda _: late.wait()) for o in self._job.optimizers()]

    def _bring(self, later: Sequence[Wanted], targets: Targets) -> None:
        self._fetch(later)
        filled(targets)  # of these alone: a forward that has used the others may be waiting for its backward
        self._cool_down()

    def _cool_down(self) -> None:
        if self._warm is not None:
            self._warm.close()
            self._warm = None

    def _staged(self) -> tuple[Capture, Layout, Snapshot] | None:
        """A copy of what was restored, on all ranks, or nothing on any."""
        try:
            capture = self._peers.agree("the cut after the restore", self._job.capture)
            self._saver.planner.agree(capture)
            return self._peers.agree("the copy after the restore", lambda: self._copy(capture))
        except GpumoveError as error:
            # If it lasts the first save says so; a job that only reads may go on.
            _log.debug("the first save will not be a difference: %s", error)
            return None

    def _copy(self, capture: Capture) -> tuple[Capture, Layout, Snapshot]:
        layout = self._saver.lay_out(capture)
        return capture, layout, self._saver.stage(layout)

    # ---------------------------------------------------------------- end

    def end(self, *, wait: bool = False) -> None:
        """What is still on its way is not wanted any more, or is waited for.

        Raises:
            GpumoveError: it failed, and nobody was told yet.
        """
        late, self._late = self._late, None
        for look in self._looks:
            look.remove()
        self._looks = []
        self._stager.awaited = lambda: None
        if late is not None:
            late.end(wait=wait)
