"""The store dies, or loses its answer, at the k-th call of a copy, for every k, at either end; and real kills.

After each: every checkpoint in the target's log is whole, the next copy completes it, and little is sent twice.
"""

from __future__ import annotations

import contextlib
from collections import Counter
from typing import Any

import pytest

from gpumove.move.copier import Copier
from gpumove.move.replica import Replica
from gpumove.move.rounds import Rounds
from gpumove.store.gc import Retention
from gpumove.store.log import Log
from gpumove.store.objects import Store
from gpumove.store.records import reachable
from tests.move.runs import Place, memory, train
from tests.store.faults import Crash, FaultyStore, Mode


@pytest.fixture(scope="module")
def source() -> Place:
    place = memory()
    train(place, 3)
    return place


def bring_all(source: Any, target: Any, keep: Retention | None = None) -> None:
    """What ``gpumove replicate --step all`` does, call by call in a fixed order."""
    log = Log(source)
    log.open(create=False)
    log.read()
    rounds = Rounds(Replica(log, Log(target), Copier(source, target, in_flight=1)), keep)
    rounds.replica.look()
    for checkpoint in rounds.replica.behind():
        rounds.once(checkpoint)


def checkpoints(source: Place, target: Place) -> list[int]:
    """The steps in the target's log, all that each needs being there, byte for byte."""
    with source.open() as there, target.open() as here:
        log = Log(here)
        if not log.open(create=False):
            return []
        for key in {key for checkpoint in log.read().checkpoints for key in reachable(here, checkpoint)}:
            assert here.get(key) == there.get(key)
        return [c.step for c in log.view.checkpoints]


def packs_put(trail: list[str]) -> Counter[str]:
    return Counter(call.split()[1] for call in trail if call.startswith("put packs/"))


def crash_at(at: int, mode: Mode, end: str, source: Place, target: Place, keep: Retention | None) -> tuple[int, int]:
    """Copy with a fault at one call of one end, then again without: calls that there were, packs put twice."""
    with contextlib.ExitStack() as stack:
        stores: dict[str, Any] = {
            "source": stack.enter_context(source.open()), "target": stack.enter_context(target.open())
        }  # fmt: skip
        inner: Store = stores[end]
        stores[end] = faulty = FaultyStore(inner, at=at, mode=mode)
        with contextlib.suppress(Crash):
            bring_all(stores["source"], stores["target"], keep)
    checkpoints(source, target)
    with source.open() as there, target.open() as here:
        again = FaultyStore(here)
        bring_all(there, again, keep)
    first = packs_put(faulty.trail) if end == "target" else Counter[str]()
    return faulty.calls, len(first & packs_put(again.trail))


@pytest.mark.parametrize("end", ["source", "target"])
@pytest.mark.parametrize("mode", ["before", "after", "torn", "lost"])
def test_at_every_call(source: Place, mode: Mode, end: str) -> None:
    at = calls = 0
    while at <= calls:
        at += 1
        target = memory()
        calls, twice = crash_at(at, mode, end, source, target, None)
        assert checkpoints(source, target) == [1, 2, 3]
        # The pack that was under way: nobody knows whether it had arrived before the next listing says so.
        assert twice <= (1 if mode in ("before", "torn") else 0), f"call {at}"
    assert calls > 20


@pytest.mark.parametrize("mode", ["before", "after"])
def test_at_every_call_with_retention(source: Place, mode: Mode) -> None:
    at = calls = 0
    while at <= calls:
        at += 1
        target = memory()
        calls, _ = crash_at(at, mode, "target", source, target, Retention(1))
        assert checkpoints(source, target)[-1] == 3
    assert calls > 20
