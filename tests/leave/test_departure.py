"""The agreement, with one thread for each rank and a board that all of them share."""

from __future__ import annotations

import random
import threading
import time
from collections import Counter
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest

from gpumove.errors import StoreError
from gpumove.leave.board import Board, OwnBoard
from gpumove.leave.departure import Departure
from gpumove.notices.notice import Notice, Outcome


class SharedBoard(OwnBoard):
    shared = True


def rank_of(board: Board, rank: int, world_size: int, *, grace_s: float = 20.0, start: int = 0) -> Departure:
    departure = Departure(grace_s=grace_s, peer_s=20.0)
    departure.open(board, SimpleNamespace(rank=rank, world_size=world_size))  # type: ignore[arg-type]
    departure.step = start
    return departure


def train(departure: Departure, work: Callable[[int], None], until: int = 100_000) -> int | None:
    """The loop of one rank; the step that it left after, or None if it came to its end."""
    for step in range(1, until + 1):
        work(step)
        departure.step = step
        if step >= departure.limit:
            target = departure.target(step)
            assert target is not None
            assert step <= target, "a rank has passed the step that all leave after"
            if step == target:
                return step
    return None


def all_ranks(departures: list[Departure], body: Callable[[int, Departure], Any]) -> list[Any]:
    found: list[Any] = [None] * len(departures)

    def one(rank: int) -> None:
        found[rank] = body(rank, departures[rank])

    threads = [threading.Thread(target=one, args=(rank,), daemon=True) for rank in range(len(departures))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
        assert not thread.is_alive()
    for departure in departures:
        departure.end()
    return found


@pytest.mark.parametrize("seed", range(12))
def test_all_ranks_leave_after_the_same_step(seed: int) -> None:
    """Some in step with one another, some at their own pace, told at any time, on any rank, on several."""
    chance = random.Random(seed)
    world_size = chance.randint(1, 8)
    board = SharedBoard()
    departures = [rank_of(board, rank, world_size) for rank in range(world_size)]
    together = threading.Barrier(world_size) if chance.random() < 0.7 else None
    # A slow rank does all the steps that a fast one has done meanwhile: the test's time is the slowest pace squared.
    pace = [chance.choice([0.0, 0.001, 0.003]) for _ in range(world_size)]
    tellers = {chance.randrange(world_size): chance.randint(0, 40) for _ in range(chance.randint(1, 3))}

    def body(rank: int, departure: Departure) -> int | None:
        own = random.Random(seed * 100 + rank)

        def work(step: int) -> None:
            time.sleep(pace[rank] * own.random())
            if tellers.get(rank) == step - 1:
                departure.request(Notice("request", time.time() + 15 + rank))
            if together is not None:
                together.wait(30)

        return train(departure, work)

    left = all_ranks(departures, body)
    assert left[0] is not None
    assert len(set(left)) == 1, left
    nearest = {departure.notice.deadline for departure in departures if departure.notice is not None}
    assert len(nearest) == 1, "the nearest deadline is known to all"


class Counting(SharedBoard):
    """Counts what is looked at."""

    def __init__(self) -> None:
        super().__init__()
        self.looks: Counter[str] = Counter()

    def get(self, key: str) -> bytes | None:
        self.looks[key.partition("/")[0]] += 1
        return super().get(key)


def test_an_agreement_costs_a_large_job_little() -> None:
    """If every rank looked at every other, a thousand of them would ask a million times."""
    world_size = 40
    board = Counting()
    departures = [rank_of(board, rank, world_size) for rank in range(world_size)]
    departures[7].request(Notice("request", time.time() + 60))
    left = all_ranks(departures, lambda rank, departure: train(departure, lambda step: time.sleep(0.02)))
    assert len(set(left)) == 1
    assert left[0] is not None
    assert board.looks["beat"] == 0, "all of them come: nobody needs to be looked for"
    assert world_size <= board.looks["at"] <= 3 * world_size, "the last one to publish looks at all steps"


def test_a_second_opening_is_another_board() -> None:
    """As with a restore in mid-run: no step that was told, or agreed on, before it counts."""
    departure = rank_of(SharedBoard(), 0, 1, start=100)
    departure.request(Notice("request", time.time() + 20))
    assert departure.target(100) == 101
    departure.open(SharedBoard(), SimpleNamespace(rank=0, world_size=1))  # type: ignore[arg-type]
    departure.step = 50
    assert departure.target(50) in (51, -(1 << 62) + 1)
    departure.end()


def test_what_is_over_hears_nothing_more() -> None:
    departure = rank_of(OwnBoard(), 0, 1)
    departure.over(None, left=False)
    departure.request(Notice("request", time.time() + 20))
    assert departure.notice is None
    assert departure.left_s() == float("inf")
    departure.end()


def test_a_step_number_may_jump() -> None:
    departure = rank_of(OwnBoard(), 0, 1)
    departure.step = 10
    departure.request(Notice("request", time.time() + 10))
    while departure.limit > 20:
        time.sleep(0.001)
    departure.step = 20
    assert departure.target(20) == 11


def test_before_the_first_step_and_after_the_last() -> None:
    board = SharedBoard()
    first, second = (rank_of(board, rank, 2) for rank in range(2))
    first.request(Notice("request", time.time() + 15))
    assert all_ranks([first, second], lambda rank, departure: train(departure, lambda step: time.sleep(0.3))) == [1, 1]
    board = SharedBoard()
    first, second = (rank_of(board, rank, 2) for rank in range(2))

    def told_at_the_end(rank: int, departure: Departure) -> int | None:
        left = train(departure, lambda step: None, until=50)
        if rank == 0:
            departure.request(Notice("request", time.time() + 15))
        return left

    assert all_ranks([first, second], told_at_the_end) == [None, None]


def test_the_nearer_deadline_wins_and_the_same_again_is_no_news(caplog: pytest.LogCaptureFixture) -> None:
    departure = rank_of(OwnBoard(), 0, 1, grace_s=30.0)
    now = time.time()
    for deadline in (now + 100, now + 50, now + 70, now + 50, None):
        departure.request(Notice("file", deadline))
    assert departure.notice == Notice("file", None)
    assert 20 < departure.left_s() < 30
    assert caplog.text.count("notice from file") == 3
    departure.request(Notice("aws", now - 100))
    assert departure.left_s() == 0, "a deadline in the past is now"
    departure.over(Outcome(True, 5, 0), left=True)
    departure.request(Notice("aws", now - 200))
    assert departure.notice.deadline == now - 100, "what has an outcome is over"
    departure.end()


def test_ranks_that_never_answer_are_left_behind_where_the_others_wait() -> None:
    board = SharedBoard()
    there = [rank_of(board, rank, 3) for rank in range(2)]  # rank 2 is gone
    there[1].request(Notice("request", time.time() + 40))
    began = time.monotonic()
    # Both have told step 7 and wait there: nobody has passed it, so all that are left may leave after it.
    left = all_ranks(there, lambda rank, departure: train(departure, lambda step: time.sleep(0.3), until=1))
    assert left == [1, 1]
    assert time.monotonic() - began < 15


class Broken(SharedBoard):
    """Does not answer for some keys, or for some time."""

    def __init__(self, *keys: str, times: int = 1 << 30) -> None:
        super().__init__()
        self.keys, self.times = keys, times

    def get(self, key: str) -> bytes | None:
        if key in self.keys and self.times:
            self.times -= 1
            raise StoreError("the job's own store does not answer", code="store.peers")
        return super().get(key)


class Undecided(SharedBoard):
    """Takes everything but a target."""

    def swap(self, key: str, old: bytes, new: bytes) -> bytes:
        if key == "target":
            raise StoreError("the job's own store does not answer", code="store.peers")
        return super().swap(key, old, new)


def test_without_an_agreement_the_wait_ends_and_the_missing_are_known() -> None:
    departure = rank_of(Undecided(), 1, 3)
    departure.request(Notice("request", time.time() + 1))
    departure.step = 5
    while departure.limit > 5:
        time.sleep(0.001)
    began = time.monotonic()
    assert departure.target(5) is None
    assert 1.5 < time.monotonic() - began < 10
    assert departure.missing() == [0, 2]
    departure.end()


def test_a_board_that_fails_for_a_while_is_asked_again(caplog: pytest.LogCaptureFixture) -> None:
    departure = rank_of(Broken("notice", times=4), 0, 1)
    departure.request(Notice("request", time.time() + 15))
    assert train(departure, lambda step: time.sleep(0.01)) is not None
    assert caplog.text.count("does not answer") == 1
    departure.end()


def test_where_the_board_is_dead_training_goes_on_and_the_next_meeting_may_tell() -> None:
    departure = rank_of(Broken("notice"), 0, 2)
    departure.request(Notice("request", time.time() + 15))
    assert departure.told() is None, "it may get there any moment"
    assert train(departure, lambda step: time.sleep(0.1), until=25) is None
    told = departure.told()
    assert told is not None
    assert told.source == "request"
    departure.end()
