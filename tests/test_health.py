"""Health: what is found, what is not taken for a finding, and what it costs."""

from __future__ import annotations

import json
import logging
import math
import random
import threading
import timeit
from collections.abc import Callable
from functools import partial
from typing import Any

import msgspec
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from gpumove.health import Finding, Health, Lap, Vitals, find_straggler
from gpumove.steptimes import Pace

Noise = Callable[[random.Random, int], float]
NOISES: dict[str, Noise] = {
    "steady": lambda chance, n: chance.gauss(1, 0.03),
    "uneven": lambda chance, n: chance.lognormvariate(0, 0.3),
    "wild": lambda chance, n: chance.lognormvariate(0, 0.6),
    "two kinds of steps": lambda chance, n: chance.choice((1.0, 2.0)),
    "a hiccup in a hundred": lambda chance, n: chance.gauss(1, 0.03) * (20 if chance.random() < 0.01 else 1),
    "every tenth is long": lambda chance, n: chance.gauss(1, 0.03) * (1 if n % 10 else 10),
    "one in ten is long": lambda chance, n: chance.gauss(1, 0.03) * (10 if chance.random() < 0.1 else 1),
}


def told(pace: Pace, step_s: float, noise: Noise, seed: int, steps: range) -> list[int]:
    """The steps at which something was said."""
    chance = random.Random(seed)
    return [n for n in steps if pace.add(step_s * max(0.05, noise(chance, n)))]


@pytest.mark.parametrize("name", NOISES)
@given(seed=st.integers(0, 1 << 30), step_s=st.sampled_from([0.02, 0.3, 4.0, 30.0]))
@settings(max_examples=12, deadline=None, derandomize=True)  # chance can make a finding: docs/health.md says how often
def test_noise_is_no_finding(name: str, seed: int, step_s: float) -> None:
    assert told(Pace(), step_s, NOISES[name], seed, range(12_000)) == []


@given(seed=st.integers(0, 1 << 30), step_s=st.sampled_from([0.02, 0.3, 4.0]), factor=st.floats(1.15, 8))
@settings(max_examples=25, deadline=None)
def test_slower_steps_are_found_once(seed: int, step_s: float, factor: float) -> None:
    pace, noise = Pace(), NOISES["steady"]
    before, after = round(max(300, 400 / step_s)), round(max(600, 1200 / step_s))
    assert told(pace, step_s, noise, seed, range(before)) == []
    found = told(pace, step_s * factor, noise, seed, range(before, before + after))
    assert len(found) == 1
    assert (found[0] - before) * step_s <= 60 + 20 * max(1, step_s) * 8


def test_what_is_said_has_both_times_and_the_share() -> None:
    pace = Pace()
    words = [w for n in range(2000) if (w := pace.add(0.5 if n < 1000 else 0.6))]
    assert words == ["a step takes 600 ms, 20% longer than the 500 ms of this run before"]


def test_a_second_episode_is_said_again_and_a_lasting_one_becomes_the_baseline() -> None:
    pace, steady = Pace(), NOISES["steady"]
    assert told(pace, 0.5, steady, 1, range(1000)) == []
    assert len(told(pace, 0.7, steady, 2, range(1000))) == 1
    assert told(pace, 0.5, steady, 3, range(1000)) == []  # as it was
    assert len(told(pace, 0.7, steady, 4, range(20_000))) == 1  # hours
    assert len(told(pace, 0.9, steady, 5, range(1000))) == 1  # slower than the new normal


@pytest.mark.parametrize("name", ["steady", "uneven"])
def test_data_that_slowly_grows_is_no_finding(name: str) -> None:
    """Up to twice as long over half a day."""
    noise = NOISES[name]
    drifting: Noise = lambda chance, n: noise(chance, n) * (1 + n / 80_000)  # noqa: E731
    assert told(Pace(), 0.5, drifting, 1, range(80_000)) == []


class Clock:
    """Seconds that pass when told to."""

    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now

    def pass_(self, seconds: float) -> None:
        self.now += seconds


def health(clock: Callable[[], float], **more: Any) -> tuple[Health, list[Finding]]:
    """With everything as a reason to leave, and what was asked to leave for."""
    left: list[Finding] = []
    return Health(leave_on="slow, nan,straggler,hang", leave=left.append, clock=clock, **more), left


def test_steps_beside_a_save_are_compared_with_their_like() -> None:
    """Saves begin after a while, and from then on run all the time: slower, and nothing is wrong."""
    clock = Clock()
    watched, left = health(clock)
    for step in range(4000):
        saving = step >= 1000
        clock.pass_((0.7 if saving else 0.5) * (1.3 if step >= 3000 else 1))
        watched.step(step)
        watched.look(saving=saving)
        assert not (left and step < 3000)
    assert [finding.kind for finding in left] == ["slow"]
    assert "910 ms, 30% longer than the 700 ms" in left[0].text


def test_evaluations_in_busy_are_neither_steps_nor_silence() -> None:
    clock = Clock()
    watched, left = health(clock)
    for step in range(2000):
        clock.pass_(0.5)
        watched.step(step)
        if step % 3 == 0:
            with watched.busy():
                clock.pass_(60)
                watched.look(saving=False)
                assert watched.look(saving=False)  # nobody expects a step
            clock.pass_(5)  # and what is left of it counts for nobody
        watched.look(saving=False)
    assert not left
    assert not watched.look(saving=False)


def test_other_ranks_leave_slow_steps_to_rank_0() -> None:
    clock = Clock()
    watched, left = health(clock, rank=1)
    for step in range(2000):
        clock.pass_(0.5 if step < 1000 else 0.8)
        watched.step(step)
        watched.look(saving=False)
    assert not left


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("kind", ["float", "tensor", "needs grad"])
def test_a_loss_that_is_no_number_is_told_once_per_episode(bad: float, kind: str) -> None:
    make: Callable[[float], Any] = {
        "float": float,
        "tensor": torch.tensor,
        "needs grad": lambda value: torch.tensor(value, requires_grad=True) * 1,
    }[kind]
    clock = Clock()
    watched, left = health(clock, rank=3)
    losses = [1.0, bad, bad, 2.0, bad]
    for step, loss in enumerate(losses):
        clock.pass_(2)
        watched.step(step, make(loss))
        watched.look(saving=False)
    assert [(f.kind, f.step, f.rank) for f in left] == [("nan", 1, 3), ("nan", 4, 3)]
    assert str(bad) in left[0].text


@pytest.mark.parametrize("loss", ["no number", torch.zeros(2), torch.tensor(1j), None])
def test_a_loss_that_cannot_be_read_is_left_alone(loss: Any) -> None:
    watched, left = health(Clock())
    watched.step(1, loss)
    watched.look(saving=False)
    assert not left


def test_a_finding_is_logged_noted_and_asked_to_leave_for_if_so_wanted(caplog: pytest.LogCaptureFixture) -> None:
    left: list[Finding] = []
    watched = Health(leave_on="nan", leave=left.append)
    with caplog.at_level(logging.WARNING, logger="gpumove"):
        watched.tell(Finding("slow", 7, "a step takes long"))
        watched.tell(Finding("nan", 8, "the loss is nan"))
    assert [record.getMessage() for record in caplog.records] == [
        "after step 7: a step takes long",
        "after step 8: the loss is nan",
    ]
    assert [finding.step for finding in left] == [8]
    assert json.loads(json.dumps(watched.notes())) == [
        {"kind": "slow", "step": 7, "text": "a step takes long", "rank": 0},
        {"kind": "nan", "step": 8, "text": "the loss is nan", "rank": 0},
    ]


def test_notes_are_bounded() -> None:
    watched = Health()
    for step in range(1000):
        watched.tell(Finding("slow", step, "again"))
    assert [note["step"] for note in watched.notes()] == list(range(900, 1000))


def laps(*own: float, cpu: tuple[float, ...] = (), steps: int = 100) -> list[Lap]:
    return [Lap(steps, o, c) for o, c in zip(own, cpu or (0.0,) * len(own))]


def test_the_rank_that_comes_late_is_the_straggler() -> None:
    assert find_straggler(laps(100, 101, 140, 99)) == (
        2,
        "rank 2 comes late to every meeting: 1.4 s per step, the others 1 s",
    )


def test_so_is_the_one_that_computes_while_the_others_wait_in_collectives() -> None:
    found = find_straggler(laps(100, 100, 100, cpu=(30, 95, 31)))
    assert found is not None
    assert found[0] == 1
    assert "950 ms per step, they 305 ms" in found[1]


@given(
    st.lists(st.floats(0, 10), min_size=2, max_size=64),
    st.floats(100, 1e5),
)
def test_ranks_that_are_alike_are_no_stragglers(excess: list[float], own_s: float) -> None:
    """Up to a tenth apart, whatever else."""
    own = [own_s * (1 + e / 101) for e in excess]
    assert find_straggler(laps(*own, cpu=tuple(0.5 * o for o in own))) is None


@given(st.integers(2, 40), st.data())
def test_one_straggler_among_any_number_is_found(size: int, data: st.DataObject) -> None:
    lag = data.draw(st.integers(0, size - 1))
    own = [data.draw(st.floats(95, 105)) for _ in range(size)]
    own[lag] = data.draw(st.floats(130, 1e4))
    found = find_straggler(laps(*own))
    assert found is not None
    assert found[0] == lag


class Ranks:
    """The meetings of some ranks, each with a Health and a clock of its own."""

    def __init__(self, size: int) -> None:
        self.clocks = [Clock() for _ in range(size)]
        made = [health(clock, rank=rank) for rank, clock in enumerate(self.clocks)]
        self.all, self.left = [one for one, _ in made], made[0][1]
        self.step = 0

    def lap(self, steps: int, *seconds: float) -> None:
        """All do so many steps, each in its own time, and meet."""
        self.step += steps
        for clock, own_s in zip(self.clocks, seconds):
            clock.pass_(own_s)
        told = [msgspec.msgpack.decode(msgspec.msgpack.encode(h.report(self.step)), type=Vitals) for h in self.all]
        self.all[0].hear(told, self.step)
        for one in self.all:
            one.met(self.step)


def test_a_straggler_is_told_after_some_meetings_and_once() -> None:
    ranks = Ranks(3)
    ranks.lap(1, 5, 5, 900)  # before the first meeting there is no measure: this one compiled
    for _ in range(2):
        ranks.lap(10, 20, 20, 30)
    assert not ranks.left
    for _ in range(5):
        ranks.lap(10, 20, 20, 30)
    assert [(f.kind, f.rank, f.step) for f in ranks.left] == [("straggler", 2, 31)]
    for _ in range(3):
        ranks.lap(10, 20, 20, 20)
    for _ in range(3):
        ranks.lap(10, 30, 20, 20)
    assert [f.rank for f in ranks.left] == [2, 0]


def test_short_laps_are_put_together() -> None:
    """A meeting at every step."""
    ranks = Ranks(2)
    for _ in range(200):
        ranks.lap(1, 1, 1.3)
    assert [f.rank for f in ranks.left] == [1]


def test_one_late_meeting_and_one_evaluating_rank_are_no_stragglers() -> None:
    ranks = Ranks(2)
    for n in range(30):
        if n % 2:
            with ranks.all[0].busy():  # only rank 0 evaluates; the other waits for it inside of a collective
                ranks.clocks[0].pass_(50)
            ranks.lap(10, 20, 70)
        else:
            ranks.lap(10, 20, 70 if n == 10 else 20)
    assert not ranks.left


def test_what_other_ranks_found_gets_into_the_notes_of_rank_0() -> None:
    ranks = Ranks(2)
    ranks.all[1].tell(Finding("nan", 3, "the loss of rank 1 is nan", 1))
    ranks.all[0].tell(Finding("slow", 4, "a step takes long", 0))
    ranks.lap(10, 1, 1)
    ranks.lap(10, 1, 1)
    assert [note["kind"] for note in ranks.all[0].notes()] == ["slow", "nan"]


def test_threads_do_not_lose_steps() -> None:
    watched = Health()
    stop = threading.Event()

    def look() -> None:
        while not stop.is_set():
            watched.look(saving=False)

    thread = threading.Thread(target=look)
    thread.start()
    for step in range(50_000):
        watched.step(step)
    stop.set()
    thread.join()
    watched.look(saving=False)
    assert watched.last_step == 49_999


def test_a_step_costs_below_a_microsecond() -> None:
    """The best of many, since others use the machine too: what the code itself takes."""
    watched, loss = Health(), torch.tensor(1.0)
    assert min(timeit.repeat(lambda: watched.step(1, loss), number=2000, repeat=50)) / 2000 < 1e-6


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_loss_on_a_device_is_not_waited_for() -> None:
    clock = Clock()
    watched, left = health(clock)
    torch.cuda.synchronize()
    for step, value in enumerate([1.0, math.nan, math.nan, 3.0]):
        clock.pass_(2)
        torch.cuda._sleep(500_000_000)  # some 0.3 s of the device
        loss = torch.full((1,), value, device="cuda")
        took = timeit.timeit(partial(watched.step, step, loss), number=1)
        loss.fill_(0.0)  # a captured graph writes to the same place
        assert step == 0 or took < 0.05
        torch.cuda.synchronize()
        watched.look(saving=False)
    assert [(f.kind, f.step) for f in left] == [("nan", 1)]
