"""Becoming a run's owner, and reading its newest sound checkpoint into the live objects: on all ranks, or on none.

Collective, in the training thread. What is saved afterwards, and when, is not known here.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from functools import partial
from typing import TypeVar

import msgspec

from gpumove.cadence import past
from gpumove.config import Config
from gpumove.errors import ConfigError, GpumoveError, describe, rebuild
from gpumove.format.manifest import Checkpoint
from gpumove.meeting import Claimed
from gpumove.restore import Contents, fill, read_contents, try_newest
from gpumove.state.capture import Capture, Job, Targets
from gpumove.state.layout import Planner
from gpumove.state.peers import Peers
from gpumove.store.log import Log

T = TypeVar("T")
_log = logging.getLogger("gpumove")


class Takeover:
    """One rank's side."""

    def __init__(self, peers: Peers, job: Job, log: Log, config: Config) -> None:
        self._peers, self._job, self._book, self._config = peers, job, log, config

    def claim(self, step: int | None, *, only_if_new: bool = False) -> Claimed:
        """Become the owner, on all ranks; the checkpoints to try, newest first."""
        self._peers.meet("the claim of the run")
        answer = self._claim_here(step, only_if_new) if self._peers.rank == 0 else Claimed()
        answer = msgspec.msgpack.decode(self._peers.broadcast(msgspec.msgpack.encode(answer)), type=Claimed)
        if answer.error is not None:
            raise rebuild(answer.error)
        self._book.adopt(answer.run, answer.epoch)
        return answer

    def _claim_here(self, step: int | None, only_if_new: bool) -> Claimed:
        """On rank 0. An error is part of the answer, so that no rank waits for one that will not come."""
        try:
            run = self._book.open(create=True)
            view = self._book.read()
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
            claim = self._book.claim(resumed=found[0].number if found else None)
            before = past([(c.time, c.epoch) for c in view.checkpoints], claim.epoch)
            return Claimed(run, claim.epoch, found, before)
        except GpumoveError as error:
            return Claimed(error=describe(error))

    def load(self, candidates: Sequence[Checkpoint], *, strict: bool) -> tuple[Checkpoint, Contents]:
        """Fill the live objects from the newest of these that is sound; damaged ones are named in a warning.

        Raises:
            LayoutError: the checkpoint and the live objects do not fit.
            IntegrityError: every checkpoint is damaged.
        """
        damaged: list[int] = []
        loaded: list[Contents] = []

        def attempt(checkpoint: Checkpoint) -> None:
            # In two goes: no rank touches its live objects before all have found that the checkpoint fits theirs.
            look, step = partial(self._compare, checkpoint, strict=strict, damaged=damaged), checkpoint.step
            found = self._peers.agree(f"the comparison with step {step}", look)
            self._peers.agree(f"the end of reading step {step}", lambda: self._fill(*found))
            loaded.append(found[0])

        def say(checkpoint: Checkpoint, error: GpumoveError) -> None:
            damaged.append(checkpoint.number)
            _log.warning("step %d is damaged and is skipped: %s", checkpoint.step, error)

        found = try_newest(candidates, attempt, say=say)
        return found, loaded[-1]

    def _compare(self, checkpoint: Checkpoint, *, strict: bool, damaged: Sequence[int]) -> tuple[Contents, Targets]:
        if damaged and self._peers.rank == 0:
            # Before it is read: from here on no gc takes it away. For the first one the claim has said so.
            words = f"going on from step {checkpoint.step}; {len(damaged)} newer ones are damaged"
            self._book.note(words, resumed=checkpoint.number, damaged=damaged)
        rank, stream = self._peers.rank, self._job.stream()
        contents = read_contents(self._book.store, checkpoint, rank=rank, config=self._config, stream=stream)
        return contents, self._job.match(contents.saved, world_size=self._peers.world_size, strict=strict)

    def _fill(self, contents: Contents, targets: Targets) -> None:
        fill(self._book.store, contents, targets, config=self._config)
        self._job.load(contents.saved, targets)

    def staged(self, planner: Planner, stage: Callable[[Capture], T]) -> tuple[Capture, T] | None:
        """A copy of what was restored, on all ranks, or nothing on any."""
        try:
            capture = self._peers.agree("the cut after the restore", self._job.capture)
            planner.agree(capture)
            return capture, self._peers.agree("the copy after the restore", lambda: stage(capture))
        except GpumoveError as error:
            # If it lasts the first save says so; a job that only reads may go on.
            _log.debug("the first save will not be a difference: %s", error)
            return None
