"""The word beside a long round: what it repeats is what stands in the log when it is said, however late that is."""

from __future__ import annotations

import time
from typing import Any

import pytest

from gpumove.format.manifest import Move
from gpumove.move import herald
from gpumove.move.herald import Herald
from gpumove.store.log import Log
from gpumove.store.objects import Store
from tests.move.runs import Place, memory, train

MOVE, OTHER = "0" * 16, "memory://elsewhere"


@pytest.fixture
def source(monkeypatch: pytest.MonkeyPatch) -> Place:
    """A run that is being moved, and a herald that speaks as soon as it may."""
    monkeypatch.setattr(herald, "_TICK_S", 0.01)
    place = memory()
    train(place, 1)
    say(place)
    return place


def say(place: Place, **facts: Any) -> None:
    with place.log() as log:
        log.move("begin", move=MOVE, other=OTHER, facts=facts)


def newest(place: Place) -> Move:
    with place.log() as log:
        assert log.view.move is not None
        return log.view.move


def until_said_after(place: Place, number: int) -> Move:
    end = time.monotonic() + 20
    while (found := newest(place)).number <= number:
        assert time.monotonic() < end
        time.sleep(0.01)
    return found


def test_it_repeats_what_was_said_meanwhile(source: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    """The mover looks at the log between rounds only: by then a job may have answered, or somebody resumed the move."""
    monkeypatch.setattr(herald, "_AGAIN_S", 0.5)
    with source.log() as log, Herald(log, lambda: False) as speaks:
        say(source, every_step=True, job={"save_s": 2.0})
        before = newest(source)
        time.sleep(0.6)
        speaks.copying = True
        found = until_said_after(source, before.number)
    assert found.facts == {"every_step": True, "job": {"save_s": 2.0}, "hold": False}


def test_it_does_not_take_back_what_is_said_while_it_speaks(source: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    """Somebody else's word gets the number that it was about to use."""
    create, overtaken = Store.create, []

    def late(self: Store, key: str, data: bytes) -> bool:
        if b'"hold":true' in data and not overtaken:
            overtaken.append(key)
            say(source, every_step=True)
        return create(self, key, data)

    monkeypatch.setattr(Store, "create", late)
    with source.log() as log, Herald(log, lambda: True) as speaks:
        before = newest(source)
        speaks.copying = True
        until_said_after(source, before.number + 1)
    assert overtaken
    assert newest(source).facts == {"every_step": True, "hold": True}


def test_once_is_enough_however_long_the_round_takes(source: Place) -> None:
    with source.log() as log, Herald(log, lambda: True) as speaks:
        before = newest(source)
        speaks.copying = True
        said = until_said_after(source, before.number)
        time.sleep(0.3)
        assert newest(source) == said
    assert log.view.move == before, "the mover's own view is the mover's"


def test_a_job_that_has_claimed_meanwhile_is_not_said_to_be_idle(
    source: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Else the mover would seal a run that is trained, without asking."""
    monkeypatch.setattr(herald, "_AGAIN_S", 0.05)
    say(source, idle=True)
    with source.log() as log, Herald(log, lambda: True) as speaks:
        with source.open() as store:
            job = Log(store)
            job.open(create=False)
            job.read()
            job.claim()
            job.move("begin", move=MOVE, other=OTHER, facts={"job": {}})
        before = newest(source)
        speaks.copying = True
        found = until_said_after(source, before.number)
    assert found.facts == {"job": {}, "hold": True}


def test_it_says_nothing_once_the_move_has_gone_on(source: Place) -> None:
    with source.log() as log, Herald(log, lambda: True) as speaks:
        with source.log() as other:
            other.move("request", move=MOVE, other=OTHER)
        before = newest(source)
        speaks.copying = True
        time.sleep(0.3)
    assert newest(source) == before
