"""Rounds and their forecast: its numbers as properties, whether it comes true, and the following of a real job."""

from __future__ import annotations

import math
import threading
import time
from collections.abc import Iterator

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gpumove.config import Config
from gpumove.errors import FencedError
from gpumove.format import keys
from gpumove.format.manifest import FORMAT, Checkpoint
from gpumove.move.copier import Copier
from gpumove.move.replica import Replica
from gpumove.move.rounds import Forecast, Measured, Round, Rounds, forecast, measure
from gpumove.store.log import Log
from gpumove.store.objects import Store
from tests.jobs import TrainingJob
from tests.move.runs import check, commit, memory, train

NUMBERS = st.floats(1e-3, 1e12)
SECONDS = st.floats(0, 1e6)
MEASURED = st.builds(Measured, rate_bytes_s=NUMBERS, delta_bytes=NUMBERS, every_s=NUMBERS, rest_s=SECONDS)


# -------------------------------------------------------------------- numbers


@given(MEASURED, st.dictionaries(st.sampled_from(["leave", "handover", "restore"]), SECONDS))
def test_a_blackout_is_the_sum_of_its_parts(found: Measured, parts: dict[str, float]) -> None:
    said = forecast(found, **parts)
    assert said.blackout_s == pytest.approx(sum(said.parts.values()))
    assert {**said.parts, **parts} == said.parts
    assert set(said.parts) == {"last_delta", *parts}
    assert said.blackout_s >= found.rest_s


@given(MEASURED, st.floats(1.0, 1e3))
def test_more_bytes_take_longer_and_a_faster_link_is_quicker(found: Measured, factor: float) -> None:
    here = forecast(found)
    more = forecast(Measured(found.rate_bytes_s, (found.delta_bytes or 0) * factor, found.every_s, found.rest_s))
    faster = forecast(Measured((found.rate_bytes_s or 0) * factor, found.delta_bytes, found.every_s, found.rest_s))
    assert (faster.blackout_s or 0) <= (here.blackout_s or 0) <= (more.blackout_s or 0)
    assert here.converges or not more.converges
    assert faster.converges or not here.converges


@given(r=st.floats(0.01, 1000), b=st.floats(0.001, 1.0), step_s=st.floats(0.01, 100))
def test_it_converges_where_the_design_says_so(r: float, b: float, step_s: float) -> None:
    """R steps in one transfer of the raw state, b the share of it that one step's delta is: R b <= 1."""
    raw = 1e9
    rate = raw / (r * step_s)
    if not math.isclose(r * b, 1.0, rel_tol=1e-6):
        assert forecast(Measured(rate, raw * b, step_s)).converges == (r * b < 1)


@pytest.mark.parametrize(
    ("found", "text"),
    [
        (Measured(None, None, None), "has not committed"),
        (Measured(1e6, None, None), "has not committed"),
        (Measured(None, 5.0, 1.0), "nothing was sent"),
        (Measured(1e6, 5.0, None), "too little"),
    ],
)
def test_what_is_not_known_is_not_foretold(found: Measured, text: str) -> None:
    said = forecast(found)
    assert text in said.why
    assert not said.converges
    assert (said.blackout_s is None) == (text != "too little")


def test_a_commit_that_brings_nothing_takes_no_link() -> None:
    said = forecast(Measured(None, 0.0, 10.0, 0.5))
    assert (said.blackout_s, said.converges) == (0.5, True)


def commits(times: list[float], sizes: list[int]) -> list[Checkpoint]:
    return [
        Checkpoint(
            format=FORMAT, number=n + 1, epoch=1, writer="w", time=at, step=n, attempt=keys.attempt_name(1, n + 1),
            manifest="0" * 32, manifest_bytes=1, world_size=1, state_bytes=1, new_bytes=size,
        )
        for n, (at, size) in enumerate(zip(times, sizes))
    ]  # fmt: skip


def test_the_first_commit_is_no_delta_and_one_pause_is_no_interval() -> None:
    found = measure([], commits([0, 10, 20, 500, 510], [10_000, 100, 110, 90, 100]), record_bytes=7, rate_bytes_s=50.0)
    assert found == Measured(rate_bytes_s=50.0, delta_bytes=107.0, every_s=10.0, rest_s=0.0)


def test_the_link_is_as_fast_as_it_was_for_rounds_of_about_that_size() -> None:
    rounds = [
        Round(1, 10_000_000, 9, 11.0, 10.0),  # the base: fills the link
        Round(2, 100_000, 3, 0.7, 0.5),
        Round(3, 0, 0, 0.1, 0.0),
        Round(4, 120_000, 3, 0.8, 0.6),
    ]
    found = measure(rounds, commits([0, 5, 10], [10_000_000, 100_000, 100_000]), record_bytes=0, rate_bytes_s=1e9)
    assert found.rate_bytes_s == pytest.approx(200_000)
    assert found.rest_s == pytest.approx(0.2)
    large = measure(rounds, commits([0, 5, 10], [10_000_000] * 3), record_bytes=0, rate_bytes_s=1e9)
    assert large.rate_bytes_s == pytest.approx(1_000_000)


# -------------------------------------------------------------------- what was foretold


@pytest.fixture
def source() -> Iterator[Store]:
    with memory().open(Config()) as store:
        yield store


def owner_of(store: Store) -> Log:
    log = Log(store)
    log.open(create=True)
    log.read()
    log.claim()
    return log


def follower(source: Store, target: Store, **copier: float) -> Rounds:
    log = Log(source)
    log.open(create=False)
    log.read()
    return Rounds(Replica(log, Log(target), Copier(source, target, **copier)))  # type: ignore[arg-type]


@pytest.mark.parametrize(("every_s", "converges"), [(2.0, True), (0.2, False)])
def test_the_next_round_takes_as_long_as_was_foretold(source: Store, every_s: float, converges: bool) -> None:
    """Deltas of 2 MB over a link of 2 MB/s: a second each."""
    owner, packs = owner_of(source), []  # type: ignore[var-annotated]
    with memory().open(Config()) as target:
        commit(owner, 1, packs, 3_000_000, 100.0)
        rounds = follower(source, target, limit_bytes_s=2e6)
        rounds.once()
        for serial in range(2, 5):
            commit(owner, serial, packs, 2_000_000, 100.0 + serial * every_s)
            assert rounds.left_bytes(rounds.replica.look()) == pytest.approx(2_000_000, rel=0.01)
            done = rounds.once()
            assert done is not None
            assert rounds.left_bytes(rounds.replica.look()) == 0
        said = rounds.forecast(leave=1.0)
        commit(owner, 5, packs, 2_000_000, 100.0 + 5 * every_s)
        last = rounds.once()
        assert last is not None
        took = [done.seconds for done in rounds.done[1:]]
        slack_s = 0.25 * last.seconds + max(took) - min(took)  # as much as they differ anyway, on a busy machine
        assert said.parts["last_delta"] == pytest.approx(last.seconds, abs=slack_s)
        assert said.blackout_s == pytest.approx(1.0 + said.parts["last_delta"])
        assert said.converges == converges
        assert ("keeps up" if converges else "would not help") in said.why


# -------------------------------------------------------------------- following


def test_a_real_job_is_followed_while_it_trains() -> None:
    place, target = memory(), memory()
    train(place, 1)
    seen: list[tuple[Round, Forecast]] = []
    with place.open() as there, target.open() as here:
        rounds = follower(there, here)
        rounds.as_source, rounds.poll_s = True, 0.01
        thread = threading.Thread(target=rounds.follow, args=(lambda *told: seen.append(told),))
        thread.start()

        def wait_now_and_then(step: int, job: TrainingJob) -> None:
            until = time.monotonic() + 30
            while step % 4 == 0 and time.monotonic() < until and all(r.step != step for r, _ in seen):
                time.sleep(0.01)

        truth = train(place, 12, each=wait_now_and_then, keep_last=3)
        rounds.stop.set()
        thread.join(30)
        assert not thread.is_alive()
        rounds.once()
    steps = [r.step for r, _ in seen]
    assert steps == sorted(set(steps))
    assert {4, 8, 12} <= set(steps)
    assert len(target.steps()) <= 4
    check(target, {**truth}, [step for step in target.steps() if step in truth])
    assert seen[-1][1].blackout_s is not None


def test_what_lay_there_before_these_rounds_is_not_dropped() -> None:
    place, target = memory(), memory()
    train(place, 1)
    with place.open() as there, target.open() as here:
        assert follower(there, here).once() is not None
        rounds = follower(there, here)
        rounds.as_source = rounds.spares = True
        for step in (3, 5, 6):
            train(place, step, keep_last=2)
            assert rounds.once() is not None
    assert place.steps() == [5, 6]
    assert target.steps() == [1, 5, 6]


def test_following_ends_when_the_run_has_moved_away_and_all_of_it_is_there() -> None:
    place, target = memory(), memory()
    truth = train(place, 3)
    with place.log() as log:
        log.move("sealed", move="ab" * 8, other=target.url)
    with place.open() as there, target.open() as here:
        told: list[int] = []
        follower(there, here).follow(lambda found, said: told.append(found.step))
    assert told == [3]
    check(target, truth, [3])


def test_following_ends_when_another_replicator_takes_over() -> None:
    place, target = memory(), memory()
    train(place, 2)
    with place.open() as there, target.open() as here:
        rounds = follower(there, here)
        rounds.poll_s = 0.01
        assert rounds.once() is not None
        with target.log() as log:
            log.claim(follows=place.url)
        with pytest.raises(FencedError):
            rounds.follow(lambda found, said: None)


def test_a_damaged_commit_is_passed_over_until_the_next_one() -> None:
    place, target = memory(), memory()
    truth = train(place, 2)
    with place.open() as there, target.open() as here:
        rounds = follower(there, here)
        rounds.poll_s = 0.01
        assert rounds.once() is not None
        truth |= train(place, 3)
        with place.log() as log:
            key = log.view.checkpoints[-1].manifest_key
        there.put(key, b"rot")
        thread = threading.Thread(target=rounds.follow, args=(lambda found, said: rounds.stop.set(),))
        thread.start()
        until = time.monotonic() + 20
        while not rounds.damaged and time.monotonic() < until:
            time.sleep(0.01)
        truth |= train(place, 4)
        thread.join(20)
        assert not thread.is_alive()
        assert len(rounds.damaged) == 1
    steps = target.steps()  # the job has passed it over too, and went on from step 2
    assert steps in ([2, 3], [2, 4])
    check(target, truth, steps)
