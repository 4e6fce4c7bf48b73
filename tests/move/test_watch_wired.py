"""A job that was moved compares itself with its source's steps: in a real Checkpointer, from the real log of a move."""

from __future__ import annotations

import logging
import math
import random
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

import gpumove
from gpumove.format.manifest import Manifest
from gpumove.leave import requests
from gpumove.move.moving import move
from gpumove.move.report import Wishes
from gpumove.parity.watch import Told, told
from gpumove.store.records import read_manifest
from tests.dist.harness import run
from tests.move.runs import CONFIG, SETTINGS, Place, memory

BEFORE, STEPS = 160, 80
IDLE = Wishes(leave_timeout_s=0.0, arrive_timeout_s=0.0, force=True)
Loss = Callable[[int], float]


def noisy(step: int) -> float:
    """A loss that differs from step to step by a twentieth."""
    return 2.0 + 0.1 * random.Random(step).gauss(0, 1)


def train(place: Place, until: int, loss: Loss = noisy, pause_s: float = 0.005, **settings: Any) -> int:
    """Train on to this step, or until the job has to leave; the last step."""
    config = {**SETTINGS, "every_steps": 20, "watch_steps": STEPS, "notices": "", **settings}
    model = torch.nn.Linear(3, 2)
    with gpumove.Checkpointer(place.url, model=model, storage_options=place.options, **config) as ckpt:
        step = ckpt.restore()
        while step < until:
            time.sleep(pause_s)
            step += 1
            if ckpt.step(step, loss=loss(step)):
                return step
        ckpt.save(step).wait(60)
        return step


@pytest.fixture(scope="module")
def trained() -> Place:
    """A run of ``BEFORE`` steps."""
    place = memory()
    train(place, BEFORE)
    return place


@pytest.fixture
def source(trained: Place, monkeypatch: pytest.MonkeyPatch) -> Place:
    """A copy of it that may be moved."""
    monkeypatch.setattr(requests, "_POLL_S", 0.1)
    place = memory()
    with trained.open() as store, place.open() as copy:
        for info in store.list(""):
            copy.put(info.key, store.get(info.key))
    return place


@pytest.fixture
def moved(source: Place) -> Place:
    """Where it was moved to. Nobody trains there yet."""
    target = memory()
    done = move(source.url, target.url, IDLE, config=CONFIG)
    assert done.phase == "handed", done
    clocked(target, None)
    return target


def clocked(place: Place, seconds: float | None, ratio: float | None = None) -> None:
    """What steps took at the source is this: how long they really took is the machine's business, which is busy."""
    with place.log() as log:
        word = log.view.move
        assert word is not None
        assert set(word.facts["baseline"]) >= {"step", "loss", "seconds"}
        usual = None if seconds is None else {"rows": 160, "level": seconds, "margins": [seconds / 5] * 2}
        facts = {**word.facts, "baseline": {**word.facts["baseline"], "seconds": usual}, "step_ratio": ratio}
        log.move("handover", move=word.move, other=word.other, facts=facts)


def state(place: Place) -> Told:
    with place.log() as log:
        found = told(log.view.move)
        assert found is not None, log.view.move
        return found


def manifest(place: Place) -> Manifest:
    with place.log() as log:
        return read_manifest(log.store, log.view.checkpoints[-1])


def parity(place: Place) -> list[str]:
    """The findings of the newest manifest."""
    return [str(found["text"]) for found in manifest(place).health if found["kind"] == "parity"]


def test_a_sound_and_noisy_job_is_compared_to_the_end(moved: Place, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, "gpumove"):
        assert train(moved, BEFORE + STEPS + 20) == BEFORE + STEPS + 20
    said = state(moved)
    assert (said.handed, said.steps, said.step, said.over, said.findings) == (BEFORE, STEPS, BEFORE + STEPS, True, ())
    assert said.ratio == 1.0
    assert said.standing["loss"] == pytest.approx(2.0, abs=0.1)
    assert not parity(moved)
    assert "nothing was found" in caplog.text


def test_a_loss_that_has_risen_is_told(moved: Place) -> None:
    assert train(moved, BEFORE + STEPS, lambda step: 1.5 * noisy(step)) == BEFORE + STEPS
    said = state(moved)
    assert [found["what"] for found in said.findings] == ["loss"]
    assert said.over
    assert len(parity(moved)) == 1
    assert "not as before the move: the loss is" in parity(moved)[0]


def test_steps_that_take_longer_are_told(moved: Place) -> None:
    clocked(moved, 0.005)
    train(moved, BEFORE + STEPS, pause_s=0.02)
    assert [found["what"] for found in state(moved).findings] == ["time"]


def test_steps_of_other_devices_are_not_judged(moved: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    clocked(moved, 0.005)
    monkeypatch.setattr("gpumove.parity.watching.same_devices", lambda before, after: False)
    train(moved, BEFORE + STEPS, pause_s=0.02)
    assert (state(moved).findings, state(moved).ratio) == ((), None)


def test_a_ratio_that_was_said_counts(source: Place) -> None:
    target = memory()
    move(source.url, target.url, replace(IDLE, step_ratio=50.0), config=CONFIG)
    clocked(target, 0.005, ratio=state_of_handover(target)["step_ratio"])
    train(target, BEFORE + STEPS, pause_s=0.02)
    assert (state(target).findings, state(target).ratio) == ((), 50.0)


def state_of_handover(place: Place) -> dict[str, Any]:
    with place.log() as log:
        assert log.view.move is not None
        return log.view.move.facts


def broken(step: int) -> float:
    return math.nan if step > BEFORE + 10 else noisy(step)


def test_leave_saves_and_leaves(moved: Place) -> None:
    last = train(moved, BEFORE + 5000, broken, on_parity="leave", watch_steps=5000)
    assert BEFORE + 10 < last < BEFORE + 4000
    assert manifest(moved).step == last
    assert state(moved).findings[0]["what"] == "nan"
    assert state(moved).ended == "left"


def test_stop_raises_and_saves_nothing(moved: Place) -> None:
    with pytest.raises(gpumove.ParityError, match="the loss is nan") as caught:
        train(moved, BEFORE + 5000, broken, on_parity="stop", every_steps=None, watch_steps=5000)
    assert caught.value.code == "parity.after_move"
    assert f"step {BEFORE}" in str(caught.value)
    with moved.log() as log:
        assert log.view.checkpoints[-1].step == BEFORE
    assert state(moved).ended == "ParityError"
    assert state(moved).findings[0]["what"] == "nan"
    with pytest.raises(gpumove.ParityError):  # started again, it stops again
        train(moved, BEFORE + 5000, broken, on_parity="stop", every_steps=None, watch_steps=5000)


def test_a_job_that_is_started_again_goes_on_comparing(moved: Place) -> None:
    train(moved, BEFORE + 30)
    said = state(moved)
    assert (said.step, said.over, said.ended) == (BEFORE + 30, False, "finished")
    train(moved, BEFORE + STEPS + 5, lambda step: 2 * noisy(step))
    assert state(moved).over
    assert [found["what"] for found in state(moved).findings] == ["loss"]
    train(moved, BEFORE + STEPS + 60, lambda step: 9 * noisy(step))
    assert len(state(moved).findings) == 1


@pytest.mark.parametrize("settings", [{"watch_steps": 0}, {"watch_steps": 10}])
def test_what_is_over_is_not_compared(moved: Place, settings: dict[str, Any]) -> None:
    with moved.log() as log:
        assert log.view.move is not None
    train(moved, BEFORE + 60, lambda step: 3.0 if step > BEFORE + 10 else noisy(step), **settings)
    assert not parity(moved)


def test_a_run_without_losses_is_watched_for_nothing_but_its_time() -> None:
    source, target = memory(), memory()
    config = {**SETTINGS, "every_steps": 20, "notices": ""}
    with gpumove.Checkpointer(source.url, model=torch.nn.Linear(3, 2), **config) as ckpt:
        ckpt.restore()
        for step in range(1, 41):
            ckpt.step(step)
        ckpt.save(40).wait(60)
    move(source.url, target.url, IDLE, config=CONFIG)
    with gpumove.Checkpointer(target.url, model=torch.nn.Linear(3, 2), **config) as ckpt:
        assert ckpt.restore() == 40
        for step in range(41, 60):
            ckpt.step(step, loss=7.0)
        time.sleep(0.6)
        assert ckpt._watching._state is not None
        assert ckpt._watching._state.findings == ()


def test_a_restore_of_an_earlier_step_is_not_compared(moved: Place, caplog: pytest.LogCaptureFixture) -> None:
    with (
        caplog.at_level(logging.WARNING, "gpumove"),
        gpumove.Checkpointer(moved.url, model=torch.nn.Linear(3, 2), **{**SETTINGS, "notices": ""}) as ckpt,
    ):
        with moved.log() as log:
            steps = [c.step for c in log.view.checkpoints]
        if len(steps) > 1:
            ckpt.restore(steps[0])
            assert ckpt._watching._state is None


def test_withdrawn_moves_and_foreign_facts_are_no_reason_to_compare(moved: Place) -> None:
    with moved.log() as log:
        word = log.view.move
        assert word is not None
        for facts in ({}, {"step": BEFORE}, {"step": "x", "moved": True}, {"watch": 3}):
            log.move("handover", move=word.move, other=word.other, facts=facts)
            with gpumove.Checkpointer(moved.url, model=torch.nn.Linear(3, 2), **{**SETTINGS, "notices": ""}) as ckpt:
                ckpt.restore()
                assert ckpt._watching._state is None
            log.read()


# -------------------------------------------------------------------- several ranks


def stopping(rank: int, url: str) -> tuple[int, str]:
    """A job of several ranks whose loss is no number after the move: all stop after the same step."""
    step = 0
    settings = {**SETTINGS, "every_steps": None, "on_parity": "stop", "notices": ""}
    with gpumove.Checkpointer(url, model=torch.nn.Linear(3, 2), **settings) as ckpt:
        step = ckpt.restore()
        try:
            while step < BEFORE + 5000:
                time.sleep(0.005)
                step += 1
                torch.distributed.barrier()
                ckpt.step(step, loss=math.nan)
        except gpumove.ParityError as error:
            return step, str(error)
    raise AssertionError("it was not stopped")


def test_all_ranks_stop_after_the_same_step(tmp_path: Path) -> None:
    source, target = Place(f"file://{tmp_path}/here"), Place(f"file://{tmp_path}/there")
    train(source, BEFORE, pause_s=0.0)
    move(source.url, target.url, IDLE, config=CONFIG)
    said = run(stopping, 2, target.url)
    assert said[0][0] == said[1][0]
    assert all("the loss is nan" in text for _, text in said)
    assert state(target).findings[0]["what"] == "nan"
