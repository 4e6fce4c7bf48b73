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


def fed(steps: StepLog, every: int, *, regular: list[float], single: list[float], in_time: bool = True) -> int:
    """Save as the log wants it; the step that was reached."""
    step = 0
    regular, single = list(regular), list(single)
    while regular or (single and steps.wants()):
        alone = steps.wants()
        if alone and not single:
            break
        step += 1 if alone else every
        steps.came_out(step, single.pop(0) if alone else regular.pop(0), in_time=in_time)
    return step


def test_single_steps_are_tried_for_a_whole_chain_and_the_smaller_sum_wins() -> None:
    chain = [0.1] * 9 + [0.7] + [0.1] * 6
    cheap, dear = log(4), log(4)
    fed(cheap, 4, regular=[0.7, 0.65, 0.65], single=chain)
    assert cheap.wants(), "0.14 four times is less than 0.67"
    assert cheap.watching
    fed(dear, 4, regular=[0.7, 0.6, 0.6], single=[0.3] * 16)
    assert not dear.wants()
    assert not dear.watching


def test_what_lost_is_tried_again_after_a_while() -> None:
    steps = log(4)
    step = fed(steps, 4, regular=[0.7, 0.6, 0.6], single=[0.3] * 16)
    for _ in range(64):
        assert not steps.wants()
        step += 4
        steps.came_out(step, 0.6, in_time=True)
    assert steps.wants()


def test_single_steps_that_are_not_done_in_time_are_given_up() -> None:
    steps = log(3)
    fed(steps, 3, regular=[0.8, 0.6, 0.6], single=[])
    assert steps.wants()
    steps.came_out(10, 0.1, in_time=False)
    assert not steps.wants()
    assert not steps.watching


@pytest.mark.parametrize(
    ("every", "settings"), [(1, {}), (9, {}), (3, {"delta": False}), (3, {"codec": "raw"}), (3, {"step_log": "off"})]
)
def test_where_it_cannot_pay_it_is_off(every: int, settings: dict[str, object]) -> None:
    steps = StepLog(Config(**{"every_steps": every, "step_log": "auto", **settings}))  # type: ignore[arg-type]
    for step in range(1, 40):
        steps.came_out(step, 0.1, in_time=True)
    assert not steps.watching
    assert not steps.wants()


@pytest.mark.parametrize(("kind", "single"), [(Mixed, True), (Plain, False)])
def test_with_bf16_gradients_every_step_is_saved_and_with_fp32_ones_is_not(
    kind: type, single: bool, tmp_path: Path
) -> None:
    job, truth = kind(), {}
    settings = {"every_s": None, "keep_last": None, "codec": "small", "max_restore_amplification": 20.0}
    with gpumove.Checkpointer(
        str(tmp_path / "run"), **{**settings, **job.parts()}, every_steps=3, step_log="auto"
    ) as ckpt:
        ckpt.restore()
        for step in range(1, 46):
            job.step()
            truth[step] = job.state()
            ckpt.step(step)
            if ckpt.last is not None:
                ckpt.last.wait(60)
    found = [c.step for c in gpumove.checkpoints(str(tmp_path / "run"))]
    assert set(range(3, 46, 3)) <= set(found)
    assert (len(found) > 35) == single, found
    fresh = kind(seed=5)
    for step in found[::5]:
        parts = {k: v for k, v in fresh.parts().items() if k in ("model", "optimizer")}
        gpumove.load(str(tmp_path / "run"), step, **parts)
        assert same(fresh.state(), truth[step])
