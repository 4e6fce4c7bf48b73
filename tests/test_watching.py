"""What tells a rise from chance, and what is said of it."""

from __future__ import annotations

import math
import random
from collections.abc import Callable

import msgspec
import pytest

from gpumove.config import Config
from gpumove.errors import ConfigError
from gpumove.format.manifest import TraceRow
from gpumove.parity.usual import LEAST_ROWS, MOST_ROWS, Rise, Usual, usual
from gpumove.parity.watch import Judge, baseline, from_facts

Model = Callable[[random.Random, int], list[float]]
WATCH = 200


def white(spread: float) -> Model:
    return lambda chance, rows: [1 + spread * chance.gauss(0, 1) for _ in range(rows)]


def heavy(spread: float) -> Model:
    """Student's t with two degrees of freedom: the variance is infinite."""
    return lambda c, rows: [1 + spread * c.gauss(0, 1) / math.sqrt(c.gammavariate(1, 2) / 2) for _ in range(rows)]


def falling(spread: float) -> Model:
    return lambda chance, rows: [1 + 2 * math.exp(-row / 300) + spread * chance.gauss(0, 1) for row in range(rows)]


def rising(spread: float) -> Model:
    return lambda chance, rows: [1 + 2e-4 * row + spread * chance.gauss(0, 1) for row in range(rows)]


def spiky(spread: float) -> Model:
    """One step in fifty is twice as high, and takes three more to come down."""

    def rows_of(chance: random.Random, rows: int) -> list[float]:
        found = [1 + spread * chance.gauss(0, 1) for _ in range(rows + 8)]
        for row in range(rows):
            if chance.random() < 0.02:
                for after in range(4):
                    found[row + after] += 1 / (1 + after)
        return found[:rows]

    return rows_of


MODELS = [white(0.005), white(0.15), heavy(0.03), falling(0.03), rising(0.03), spiky(0.02)]


def told_after(model: Model, seed: int, rows: int, *, times: float = 1.0, floor: float = 0.01) -> int | None:
    """After how many steps a rise is told, if it is."""
    drawn = model(random.Random(seed), rows + WATCH)
    before = usual(drawn[:rows])
    assert before is not None
    rise = Rise(before, floor=floor)
    return next((n for n, value in enumerate(drawn[rows:], 1) if rise.add(times * value) is not None), None)


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("rows", [LEAST_ROWS, 512])
def test_chance_is_not_told(model: Model, rows: int) -> None:
    assert [told_after(model, seed, rows) for seed in range(8)].count(None) >= 7


@pytest.mark.parametrize("model", MODELS)
def test_a_jump_is_told_at_once(model: Model) -> None:
    assert [told_after(model, seed, 512, times=3.0) for seed in range(4)] == [32] * 4


def test_a_small_rise_is_told_where_the_noise_is_small() -> None:
    assert all(told_after(white(0.005), seed, 512, times=1.03) == 32 for seed in range(5))
    assert told_after(white(0.0), 1, 512, times=1.009) is None
    assert told_after(white(0.0), 1, 512, times=1.011) == 32
    assert told_after(white(0.0), 1, 512, times=1.09, floor=0.1) is None


def test_too_few_rows_tell_nothing_and_many_are_bounded() -> None:
    assert usual([1.0] * (LEAST_ROWS - 1)) is None
    found = usual([1.0] * LEAST_ROWS)
    assert found == Usual(LEAST_ROWS, 1.0, (0.0,))
    many = usual([9.0] * 5000 + [1.0] * MOST_ROWS)
    assert many is not None
    assert (many.rows, many.level, many.margins) == (MOST_ROWS, 1.0, (0.0, 0.0, 0.0))
    assert usual([]) is None


@pytest.mark.parametrize("level", [0.0, -2.0])
def test_a_level_that_is_not_positive(level: float) -> None:
    chance = random.Random(1)
    before = usual([level + 0.01 * chance.gauss(0, 1) for _ in range(200)])
    assert before is not None
    same, higher = Rise(before, floor=0.01), Rise(before, floor=0.01)
    assert all(same.add(level + 0.01 * chance.gauss(0, 1)) is None for _ in range(200))
    assert any(higher.add(level + 1) for _ in range(40))


# -------------------------------------------------------------------- a whole baseline


def rows(count: int, *, loss: float | None = 2.0, seconds: float | None = 0.5, start: int = 1) -> list[TraceRow]:
    facts = {} if seconds is None else {"s": seconds}
    return [TraceRow(start + n, loss, facts) for n in range(count)]


def test_a_baseline_is_a_few_numbers_of_the_newest_rows() -> None:
    found = baseline([*rows(100, start=50), *rows(60, loss=9.0)])
    assert found is not None
    assert (found.step, found.wild) == (149, 0)
    again = from_facts(msgspec.json.decode(msgspec.json.encode(msgspec.to_builtins(found))))
    assert again == found


def test_a_step_that_was_done_twice_counts_once() -> None:
    found = baseline([*rows(80), *rows(80)])
    assert found is not None
    assert found.loss is not None
    assert found.loss.rows == 80


def test_what_was_not_recorded_is_not_judged_and_said() -> None:
    assert baseline([]) is None
    for before, ratio, lacking in (
        (None, 1.0, ["the loss", "the step time"]),
        (baseline(rows(200, loss=None)), 1.0, ["the loss"]),
        (baseline(rows(200, seconds=None)), 1.0, ["the step time"]),
        (baseline(rows(200)), None, ["the step time, because these are other devices"]),
        (baseline(rows(200)), 1.0, []),
        (baseline(rows(LEAST_ROWS - 1)), 1.0, ["the loss", "the step time"]),
    ):
        judge = Judge(before, ratio)
        said = judge.unjudged()
        assert len(said) == len(lacking)
        assert all(text.startswith(start) for text, start in zip(said, lacking))
        watched = {f.what for n in range(100) for f in judge.add(n, 9.0, 9.0)}
        missing = {"the loss": "loss", "the step time": "time"}
        assert watched == {"loss", "time"} - {missing[start.split(",")[0]] for start in lacking}


@pytest.mark.parametrize("wrong", [3, "x", [], {"loss": 1}, {"step": 1, "loss": {"rows": "a"}}])
def test_facts_that_are_no_baseline(wrong: object) -> None:
    assert from_facts(wrong) is None
    assert from_facts(None) is None


def test_a_loss_that_is_no_number_is_told_at_once_unless_that_was_so_before() -> None:
    judge = Judge(baseline(rows(100)), 1.0)
    assert [f.what for f in judge.add(1, math.nan, None)] == ["nan"]
    assert judge.add(2, math.inf, None) == []  # once
    wild = [*rows(100), TraceRow(101, None, {"loss": "nan"})]
    judge = Judge(baseline(wild), 1.0)
    assert [judge.add(n, loss, None) for n, loss in enumerate([math.inf, math.nan, 2.0, math.nan, math.nan])] == [
        []
    ] * 5
    assert [f.what for f in judge.add(9, math.nan, None)] == ["nan"]


def test_the_first_steps_may_take_long_and_a_ratio_scales() -> None:
    judge = Judge(baseline(rows(200, seconds=0.5)), 0.5)
    warm = [judge.add(n, None, 60.0) for n in range(10)]
    usual_here = [judge.add(n, None, 0.26) for n in range(100)]
    assert not any(warm + usual_here)
    assert judge.standing()["s"] == pytest.approx(0.26)
    slow = [f for n in range(100) for f in judge.add(n, None, 0.28)]
    assert [f.what for f in slow] == ["time"]
    assert "above the 250 ms that are to be expected (as at the source, times 0.5)" in slow[0].text


def test_settings_are_checked() -> None:
    with pytest.raises(ConfigError, match="watch_steps must be an int of at least 0"):
        Config(watch_steps=-1)
    with pytest.raises(ConfigError, match="on_parity must be one of warn, leave, stop"):
        Config(on_parity="rollback")
