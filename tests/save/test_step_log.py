"""Saves at every step where they are smaller than those that were asked for, and only there."""

from __future__ import annotations

from pathlib import Path

import pytest

import gpumove
from gpumove.config import Config
from gpumove.steplog import StepLog
from tests.save.jobs import Mixed, Plain, same


def log(every: int, **settings: object) -> StepLog:
    return StepLog(Config(every_steps=every, step_log="auto", **settings))  # type: ignore[arg-type]


def test_a_single_step_is_tried_after_a_regular_save_and_the_smaller_sum_wins() -> None:
    cheap, dear = log(4), log(4)
    for steps in (cheap, dear):
        assert steps.watching
        assert not steps.wants()
        steps.came_out(4, 0.8, in_time=True)
        steps.came_out(8, 0.6, in_time=True)
        assert steps.wants()
    cheap.came_out(9, 0.12, in_time=True)
    dear.came_out(9, 0.3, in_time=True)
    assert cheap.wants()
    assert cheap.watching
    assert not dear.wants()
    assert not dear.watching


def test_single_steps_that_are_not_done_in_time_are_given_up() -> None:
    steps = log(3)
    steps.came_out(3, 0.8, in_time=True)
    steps.came_out(6, 0.6, in_time=True)
    steps.came_out(7, 0.1, in_time=False)
    assert not steps.wants()
    assert not steps.watching


@pytest.mark.parametrize(
    ("every", "settings"), [(1, {}), (9, {}), (3, {"delta": False}), (3, {"codec": "raw"}), (3, {"step_log": "off"})]
)
def test_where_it_cannot_pay_it_is_off(every: int, settings: dict[str, object]) -> None:
    steps = StepLog(Config(**{"every_steps": every, "step_log": "auto", **settings}))  # type: ignore[arg-type]
    assert not steps.watching


@pytest.mark.parametrize(("kind", "single"), [(Mixed, True), (Plain, False)])
def test_with_bf16_gradients_every_step_is_saved_and_with_fp32_ones_is_not(
    kind: type, single: bool, tmp_path: Path
) -> None:
    job, truth = kind(), {}
    settings = {"every_s": None, "keep_last": None, "codec": "small", "max_restore_amplification": 20.0}
    with gpumove.Checkpointer(
        str(tmp_path / "run"), **{**settings, **job.parts()}, every_steps=4, step_log="auto"
    ) as ckpt:
        ckpt.restore()
        for step in range(1, 25):
            job.step()
            truth[step] = job.state()
            ckpt.step(step)
            if ckpt.last is not None:
                ckpt.last.wait(60)
    found = [c.step for c in gpumove.checkpoints(str(tmp_path / "run"))]
    assert {4, 8, 12, 16, 20, 24} <= set(found)
    assert (len(found) > 15) == single
    fresh = kind(seed=5)
    for step in found:
        parts = {k: v for k, v in fresh.parts().items() if k in ("model", "optimizer")}
        gpumove.load(str(tmp_path / "run"), step, **parts)
        assert same(fresh.state(), truth[step])
