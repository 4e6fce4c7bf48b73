"""Any history of a run, and copies taken at any moment of it: what the copy would resume from is what the run would."""

from __future__ import annotations

import contextlib

from hypothesis import given, settings
from hypothesis import strategies as st

from gpumove.config import Config
from gpumove.format.manifest import Pack
from gpumove.move.copier import Copier
from gpumove.move.replica import Replica
from gpumove.move.rounds import Rounds
from gpumove.store.gc import Retention, collect
from gpumove.store.log import Log
from gpumove.store.objects import Store
from gpumove.store.records import reachable
from tests.move.runs import commit, memory
from tests.store.faults import Crash, FaultyStore

CONFIG = Config(concurrency=1)
OPS = st.sampled_from(["commit", "commit", "commit", "claim", "back", "gc", "pin", "latest", "all", "follow", "crash"])


class History:
    """A run, what its owner does, and a replica of it."""

    def __init__(self, source: Store, target: Store) -> None:
        self.source, self.target = source, target
        self.owner = Log(source)
        self.owner.open(create=True)
        self.owner.read()
        self.owner.claim()
        self.serial = 0
        self.packs: dict[str, list[Pack]] = {}
        """What each attempt refers to."""
        self.current: list[Pack] = []

    def commit(self, number: int) -> None:
        self.serial += 1
        # A third of what the predecessor had is left behind: packs that only older checkpoints need.
        self.current = self.current[len(self.current) // 3 :]
        commit(self.owner, self.serial, self.current, 50 + number, 100.0)
        self.packs[self.owner.view.checkpoints[-1].attempt] = list(self.current)

    def claim(self, number: int) -> None:
        self.take_up(0)

    def back(self, number: int) -> None:
        self.take_up(number)

    def take_up(self, number: int) -> None:
        self.owner = Log(self.source)
        self.owner.open(create=False)
        found = self.owner.read().candidates()
        chosen = found[number % len(found)] if found else None
        self.owner.claim(resumed=chosen.number if chosen else None)
        self.serial = 0
        self.current = list(self.packs[chosen.attempt]) if chosen else []

    def gc(self, number: int) -> None:
        collect(self.owner, Retention(1 + number % 3))

    def pin(self, number: int) -> None:
        if self.owner.view.checkpoints:
            self.owner.pin(self.owner.view.checkpoints[0], pinned=bool(number % 2))

    def rounds(self, target: Store, *, as_source: bool = False) -> Rounds:
        log = Log(self.source)
        log.open(create=False)
        log.read()
        found = Rounds(Replica(log, Log(target), Copier(self.source, target, in_flight=1)), as_source=as_source)
        found.replica.look()
        return found

    def latest(self, number: int) -> None:
        self.bring(self.rounds(self.target))

    def all(self, number: int) -> None:
        rounds = self.rounds(self.target)
        for checkpoint in rounds.replica.behind():
            rounds.once(checkpoint)
        self.bring(rounds)

    def follow(self, number: int) -> None:
        self.bring(self.rounds(self.target, as_source=True))

    def crash(self, number: int) -> None:
        with contextlib.suppress(Crash):
            self.bring(self.rounds(FaultyStore(self.target, at=1 + number, mode="after")))  # type: ignore[arg-type]

    def bring(self, rounds: Rounds) -> None:
        rounds.once()
        assert rounds.replica.look() is None
        here, there = rounds.replica.target.view.find(), rounds.replica.source.view.find()
        assert (here and here.attempt) == (there and there.attempt)

    def check(self) -> None:
        """Whatever is in the target's log is there, and is what the source wrote."""
        log = Log(self.target)
        if not log.open(create=False):
            return
        for checkpoint in log.read().checkpoints:
            needed = reachable(self.target, checkpoint)
            assert {p.key for p in self.packs[checkpoint.attempt]} == {k for k in needed if k.startswith("packs/")}
            for key, nbytes in needed.items():
                info = self.target.exists(key)
                assert info is not None
                assert info.nbytes == nbytes


@settings(max_examples=40, deadline=None)
@given(st.lists(st.tuples(OPS, st.integers(0, 30)), min_size=8, max_size=30))
def test_any_history(ops: list[tuple[str, int]]) -> None:
    with memory().open(CONFIG) as source, memory().open(CONFIG) as target:
        history = History(source, target)
        for name, number in [*ops, ("latest", 0)]:
            getattr(history, name)(number)
            history.check()
