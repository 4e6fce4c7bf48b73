"""The blackout that is foretold, against a job and a link that are simulated tick by tick."""

from __future__ import annotations

from dataclasses import dataclass, replace

import msgspec
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from gpumove.format.manifest import Checkpoint
from gpumove.move.cutover import Rhythm, behind_s, step_s
from gpumove.move.precopy import _Since
from tests.move.stage import Stage, tape

_TICK_S = 0.005


@dataclass(frozen=True)
class Trip:
    """A job that trains, a link, and a request to leave at second 0; bytes are counted in seconds of the link."""

    step_s: float
    save_s: float
    delta_s: float
    """One commit's bytes."""
    left_s: float
    """Of those that are there at second 0."""
    age_s: float
    """How long ago the newest commit came."""
    every: int | None = 1
    """Steps from save to save."""
    rest_s: float = 0.2
    entry_s: float = 0.3
    heard_s: float = 1.0
    """From the request's entry until the job reads it."""
    sight_s: float = 0.0
    """What saves before the last one take longer."""

    @property
    def stepped(self) -> float:
        return -self.age_s - self.save_s - self.sight_s

    def foretold_s(self) -> float:
        """As the mover reckons."""
        every_s = None if self.every is None else self.every * self.step_s
        rhythm = Rhythm(0.0, self.step_s, self.stepped, self.save_s, self.save_s + self.sight_s, every_s, self.entry_s)
        behind = behind_s(
            rhythm, self.left_s * 1e6, rate_bytes_s=1e6, delta_bytes=self.delta_s * 1e6, rest_s=self.rest_s
        )
        return self.save_s + behind + self.delta_s + self.rest_s

    def measured_s(self) -> float:
        """What happens: training, then a last save, while the link takes what it can."""
        heard = self.entry_s + self.heard_s
        ends = [self.stepped + n * self.step_s for n in range(1, 2 + int((heard - self.stepped) / self.step_s))]
        stop = next(end for end in ends if end > heard)
        saved = [end for n, end in enumerate(ends, 1) if self.every is not None and n % self.every == 0 and end < stop]
        due = [end + self.save_s + self.sight_s for end in saved]
        comes = [*sorted(at for at in due if at > 0), stop + self.save_s]
        work, tick = (self.left_s + self.rest_s) if self.left_s else 0.0, 0
        while comes or work > 0:
            now, tick = self.entry_s + tick * _TICK_S, tick + 1
            while comes and comes[0] <= now:
                del comes[0]
                work += self.delta_s + self.rest_s
            work -= _TICK_S if work > 0 else 0.0
        return self.entry_s + tick * _TICK_S - stop


SECONDS = st.floats(0.05, 40.0)


@settings(max_examples=40, deadline=None)
@given(
    step_s=SECONDS, save_s=st.floats(0.05, 5.0), sight=st.floats(0.0, 0.5), delta_s=SECONDS, left=st.floats(0.0, 1.0),
    phase=st.floats(0.01, 0.99),
    every=st.sampled_from([1, 3, None]),
)  # fmt: skip
def test_what_is_foretold_is_what_happens(
    step_s: float, save_s: float, sight: float, delta_s: float, left: float, phase: float, every: int | None
) -> None:
    trip = Trip(step_s, save_s, delta_s, left * delta_s, phase * step_s * (every or 5), every)
    trip = replace(trip, sight_s=min(2.0, sight * step_s))
    heard = (trip.entry_s + trip.heard_s - trip.stepped) / step_s
    assume(min(heard % 1, 1 - heard % 1) > 1e-3)  # at the very end of a step it is the one or the other
    assert trip.foretold_s() == pytest.approx(trip.measured_s(), abs=5 * _TICK_S)


FP32 = Trip(step_s=26.7, save_s=3.8, delta_s=22.4, left_s=22.4, age_s=0.5, rest_s=1.0)
MIXED = Trip(step_s=26.7, save_s=1.7, delta_s=8.0, left_s=8.0, age_s=0.5, rest_s=1.0)
LORA = Trip(step_s=2.67, save_s=0.5, delta_s=0.6, left_s=0.6, age_s=0.5, rest_s=0.5)


@pytest.mark.parametrize("trip", [FP32, MIXED, LORA], ids=["fp32", "mixed", "lora"])
def test_whenever_it_is_asked_and_heard_the_forecast_is_within_a_fifth(trip: Trip) -> None:
    """The kinds of state of benchmarks/move.py, with a save after every step."""
    step = trip.step_s
    for tenth in range(1, 10):
        age, late = step * tenth / 10, trip.save_s + step * tenth / 10
        left = max(0.0, trip.left_s - age)
        for heard in (0.1, 0.7, 1.3, 1.9):
            if not (late + 0.4) % step < (late + 2.2) % step:
                continue  # which step is the last depends on when it is heard
            asked = replace(trip, age_s=age, left_s=left, heard_s=heard)
            assert asked.foretold_s() == pytest.approx(asked.measured_s(), rel=0.2), asked


def test_what_is_behind_goes_over_during_the_last_step_and_its_save() -> None:
    fresh = FP32.foretold_s()
    assert fresh == pytest.approx(FP32.save_s + FP32.delta_s + FP32.rest_s), "a whole delta costs nothing here"
    late = replace(FP32, age_s=15.0)
    assert late.foretold_s() == pytest.approx(fresh + 22.4 + 1.0 - (26.7 - 15.0 - 3.8 - 0.3) - 3.8)
    assert late.foretold_s() == pytest.approx(late.measured_s(), rel=0.01)


def test_commits_that_should_have_come_long_ago_are_not_waited_for() -> None:
    """Saves are held back, or the job hangs: its last commit is an hour old."""
    rhythm = Rhythm(3600.0, 2.0, 0.0, 0.5, 0.5, 10.0, 0.3)
    assert all(at > 3590 for at in rhythm.commits())
    assert behind_s(rhythm, 0.0, rate_bytes_s=1e6, delta_bytes=1e8, rest_s=0.2) < 2 * 100.2
    assert replace(rhythm, every_s=None).commits() == []
    assert 3600 < rhythm.stop <= 3600 + 0.3 + 1.0 + 2.0


@pytest.mark.parametrize("every_s", [20.0, 20.8, 21.5])
def test_the_last_step_is_not_counted_twice_where_times_were_measured_a_little_apart(every_s: float) -> None:
    """A save every ten steps of 2.08 s, and the tenth is the last one: it is no save before it."""
    rhythm = Rhythm(17.5, 2.08, 0.0, 0.2, 2.3, every_s, 0.3)
    assert rhythm.stop == pytest.approx(20.8)
    assert rhythm.commits() == []
    assert replace(rhythm, now=19.6).commits() == pytest.approx([20.8 + 2.3])  # one step later it is one


def test_clocks_that_differ_do_no_harm() -> None:
    """The newest commit is of the future."""
    rhythm = Rhythm(0.0, 2.0, 50.0, 0.5, 0.5, 2.0, 0.3)
    assert 50 < rhythm.stop <= 50 + 2.0 + 1.3
    assert behind_s(rhythm, 1e6, rate_bytes_s=1e6, delta_bytes=1e6, rest_s=0.2) < 5


# -------------------------------------------------------------------- where it is decided


@pytest.mark.parametrize(("apart_s", "behind"), [(100.0, 0.0), (1e-3, 9.0)])
def test_the_mover_takes_the_rhythm_of_the_job_from_its_commits(apart_s: float, behind: float) -> None:
    """Ten seconds of the link are lacking: with long steps they go over before the job has left."""
    stage = Stage(tape(), apart_s=apart_s)
    with stage.source.open() as here, stage.target.open() as there:
        mover = stage.mover(here, there)
        mover.look()
        mover._begin()
        mover.rounds.once()
        mover._precopy.hear({"hold": True}, entry_s=0.01)  # no saves on the way
        assert mover._precopy.next_step().step in ("cut", "wait", "usual")
        parts = mover._precopy.facts()["forecast_parts"]
        assert parts.keys() >= {"looks", "last_delta", "handover"}
        assert "behind" not in parts, "nothing is lacking"
        rate = mover.rounds.measured().rate_bytes_s
        assert rate is not None
        assert mover._precopy._behind_s(int(10 * rate)) == pytest.approx(behind, abs=0.5)
        stage.commit()
        mover._precopy.next_step()
        assert "behind" not in mover._precopy.facts()["forecast_parts"], "a few bytes, and a second until it is heard"
    stage.close()


def test_commits_are_counted_though_retention_takes_them_away() -> None:
    recorded = tape()
    with recorded.log() as log:
        line = [numbered(c, 20 + place) for place, c in enumerate(log.view.checkpoints)]
    since = _Since(21)
    assert since.count(line[:2]) == 0
    assert [since.count(line[place : place + 2]) for place in range(1, 5)] == [1, 2, 3, 4]
    assert since.count(line[-1:]) == 4


def test_a_clock_that_was_set_back_tells_no_step_time() -> None:
    recorded = tape()
    with recorded.log() as log:
        first, last = log.view.checkpoints[0], log.view.checkpoints[-1]
    assert step_s([first, msgspec.structs.replace(last, epoch=first.epoch, time=first.time)]) is None
    assert step_s([first, msgspec.structs.replace(last, epoch=first.epoch, time=first.time - 5.0)]) is None


def numbered(checkpoint: Checkpoint, number: int) -> Checkpoint:
    return msgspec.structs.replace(checkpoint, number=number)
