"""A run at one store and an empty place at another, with jobs that do at once what a move asks of them."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator
from typing import Any

import msgspec

from gpumove.errors import FencedError, StoreError
from gpumove.format import keys
from gpumove.format.manifest import Checkpoint, LogEntry
from gpumove.leave.requests import answer, standing
from gpumove.move.copier import Copier
from gpumove.move.machine import Mover
from gpumove.move.moving import move
from gpumove.move.phase import Ends
from gpumove.move.replica import Replica
from gpumove.move.report import Event, Report, Wishes
from gpumove.move.rounds import Rounds
from gpumove.notices.notice import Outcome
from gpumove.store.log import Log
from gpumove.store.objects import Store
from gpumove.store.view import View
from tests.move.runs import CONFIG, Place, memory, train

WISHES = Wishes(leave_timeout_s=5.0, arrive_timeout_s=5.0, hear_timeout_s=0.0)
BEGUN, TRAINED = 2, 6
"""Checkpoints that are there when the move begins, and that the job has in all."""


class Killed(BaseException):
    """A process's end that nothing in it sees coming."""


def tape() -> Place:
    """What the source's job writes, from its first step to its last."""
    place = memory()
    train(place, TRAINED)
    return place


class Stage:
    """Both ends. The source's job has not committed yet all that the tape has.

    Args:
        recorded: a tape.
        deaf: the job does not hear what it is asked.
        apart_s: between two steps: any link keeps up with that.
    """

    def __init__(self, recorded: Place, *, deaf: bool = False, apart_s: float = 100.0) -> None:
        self.source, self.target, self.deaf = memory(), memory(), deaf
        self.events: list[Event] = []
        self.hook: Callable[[Event], None] = lambda event: None
        with recorded.open() as store, recorded.log() as log:
            self._tape = list(log.view.checkpoints)
            with self.source.open() as copy:
                for info in store.list(""):
                    if not info.key.startswith("log/"):
                        copy.put(info.key, store.get(info.key))
        self._store = Store.open(self.source.url, CONFIG)
        self.job = Log(self._store)
        self.job.open(create=False)
        self.job.claim()
        self.left, self._apart_s, self._began = False, apart_s, time.time() - apart_s * (TRAINED + 1)
        for _ in range(BEGUN):
            self.commit()

    def close(self) -> None:
        self._store.close()

    # ---------------------------------------------------------------- the jobs

    def commit(self) -> Checkpoint:
        """The source's job commits the next one."""
        last = max(self.steps(self.source), default=0)
        made = next(c for c in self._tape if c.step > last)

        def make(view: View, number: int) -> LogEntry:
            at = self._began + self._apart_s * made.step
            return msgspec.structs.replace(made, number=number, epoch=view.epoch, writer=self.job.writer, time=at)

        return self.job.append(make)  # type: ignore[return-value]

    def react(self, event: Event | None = None) -> None:
        """What the jobs do when they look at their logs."""
        if event is not None:
            self.events.append(event)
            self.hook(event)
        if not self.deaf and not self.left:
            self._leave()
        with contextlib.suppress(FencedError, StoreError), self.target.log() as log:
            if (
                log.view.move is not None
                and log.view.move.state == "handover"
                and log.view.epoch == log.view.move.epoch
            ):
                self.arrive()

    def _leave(self) -> None:
        view = self.look(self.source)
        if (asked := standing(view, self.job.epoch)) is None:
            return
        if asked.save and len(self.steps(self.source)) < TRAINED:
            self.commit()
        self.job.follow()
        step = self.job.view.find().step  # type: ignore[union-attr]
        self.left = answer(self.job, step, Outcome(True, step, 0), stopped_at=1000.0, seconds=10)

    def arrive(self) -> Log:
        """The target's job claims, and does a step."""
        with self.target.log() as log:
            handed = log.view.move
            assert handed is not None
            log.claim(resumed=log.view.find().number)  # type: ignore[union-attr]
            facts = {"step": 9, "blackout_s": 1.5, "forced": handed.facts.get("forced", False)}
            log.move("done", move=handed.move, other=handed.other, facts=facts)
            return log

    # ---------------------------------------------------------------- the mover

    def mover(self, source: Store, target: Store, wishes: Wishes = WISHES) -> Mover:
        """One over these stores, which may be faulty ones."""
        log = Log(source)
        log.open(create=False)
        log.read()
        copier = Copier(source, target, in_flight=1, budget_bytes=1 << 20)
        rounds = Rounds(Replica(log, Log(target), copier))
        return Mover(Ends(source.url, target.url), rounds, wishes, tell=self.react)

    def move(self, wishes: Wishes = WISHES, **more: Any) -> Report:
        """What the command line does."""
        return move(self.source.url, self.target.url, wishes, config=CONFIG, tell=self.react, **more)

    def killed_at(self, state: str, wishes: Wishes = WISHES, **more: Any) -> None:
        """A mover that is killed just after it has told this; what is hooked up happens before, and then no more."""
        before = self.hook

        def kill(event: Event) -> None:
            before(event)
            if event.state == state:
                raise Killed

        self.hook = kill
        with contextlib.suppress(Killed):
            self.move(wishes, **more)
            raise AssertionError(f"the move ended without {state}")
        self.hook = lambda event: None

    # ---------------------------------------------------------------- what is to be seen

    def look(self, place: Place) -> View:
        with place.log() as log:
            return log.view

    def steps(self, place: Place) -> list[int]:
        return [c.step for c in self.look(place).checkpoints]

    def claimable(self) -> tuple[bool, bool]:
        """Of the source and of the target."""
        found = []
        for place in (self.source, self.target):
            with place.open() as store:
                log = Log(store)
                there = bool(log.open(create=False)) and log.read().head > 0
                found.append(there and not log.view.refusal())
        return found[0], found[1]

    @contextlib.contextmanager
    def zombie(self) -> Iterator[None]:
        """What the source's job does as it wakes up must be refused."""
        self.job.epoch = self.job.epoch or 1
        try:
            self.commit()
        except FencedError as error:
            assert error.code == "fenced.moved"  # noqa: PT017 - either is asserted below
            yield
            return
        raise AssertionError("a job that has lost the run has committed")


def attempts(view: View) -> set[str]:
    return {c.attempt for c in view.checkpoints}


def newest_key(view: View) -> str:
    return keys.entry_key(view.head)
