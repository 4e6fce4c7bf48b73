"""Health in a real job: findings reach the log and the next manifest, and make the job leave where asked for."""

from __future__ import annotations

import json
import logging
import math
import time
from pathlib import Path
from typing import Any

import pytest
import torch

import gpumove
from gpumove import health
from gpumove.cli import main
from tests.dist.harness import run
from tests.dist.jobs import SETTINGS, equal_linear, url_of


def shown(url: str, capsys: pytest.CaptureFixture[str]) -> list[dict[str, Any]]:
    """The findings in the newest manifest, as ``gpumove show --json`` gives them."""
    capsys.readouterr()
    assert main(["show", "--json", url]) == 0
    return list(json.loads(capsys.readouterr().out)["health"])


def until_leave(ckpt: gpumove.Checkpointer, loss: float, pause_s: float = 0.02, most_s: float = 20.0) -> int:
    """Steps with that loss until the job has to leave."""
    end, step = time.monotonic() + most_s, 0
    while time.monotonic() < end:
        time.sleep(pause_s)
        step += 1
        if ckpt.step(step, loss=loss):
            return step
    raise AssertionError("the job was not told to leave")


def test_a_loss_that_is_no_number_is_in_the_next_manifest_and_makes_the_job_leave(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with gpumove.Checkpointer(str(tmp_path), model=torch.nn.Linear(3, 2), every_s=600, leave_on="hang,nan") as ckpt:
        ckpt.restore()
        step = until_leave(ckpt, math.nan)
        assert ckpt.notice is not None
        assert ckpt.notice.source == "health"
        assert str(ckpt.notice.outcome) == f"durable: step {step}"
    found = shown(str(tmp_path), capsys)
    assert [(f["kind"], f["rank"]) for f in found] == [("nan", 0)]
    assert "nan" in found[0]["text"]
    assert found[0]["step"] <= step
    assert main(["show", str(tmp_path)]) == 0
    assert "the loss of rank 0 is nan" in capsys.readouterr().out


def test_without_leave_on_it_is_told_and_training_goes_on(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with (
        caplog.at_level(logging.WARNING, "gpumove"),
        gpumove.Checkpointer(str(tmp_path), model=torch.nn.Linear(3, 2), every_s=None) as ckpt,
    ):
        ckpt.restore()
        with pytest.raises(AssertionError):
            until_leave(ckpt, math.inf, most_s=2.5)
        assert not ckpt.leaving
    assert sum("the loss of rank 0 is inf" in line.getMessage() for line in caplog.records) == 1


def test_a_hung_step_leaves_its_stacks_and_makes_the_job_leave_but_busy_does_not(tmp_path: Path) -> None:
    traces = tmp_path / "traces"
    settings: dict[str, Any] = {"every_s": None, "hang_s": 1.0, "leave_on": "hang", "trace_dir": str(traces)}
    with gpumove.Checkpointer(str(tmp_path / "run"), model=torch.nn.Linear(3, 2), **settings) as ckpt:
        ckpt.restore()
        assert not ckpt.step(1)
        with ckpt.busy():
            time.sleep(1.5)
        assert not ckpt.leaving
        assert not list(traces.glob("hang-*"))
        assert not ckpt.step(2)
        until, stacks = time.monotonic() + 20, [""]
        while "test_a_hung_step_leaves_its_stacks" not in stacks[0]:  # this step hangs
            assert time.monotonic() < until, stacks
            time.sleep(0.1)
            stacks = [path.read_text() for path in sorted(traces.glob("hang-*"))] or [""]
        assert ckpt.leaving
        until_leave_step = 2
        while not ckpt.step(until_leave_step := until_leave_step + 1):
            time.sleep(0.02)
        assert ckpt.notice is not None
        assert ckpt.notice.source == "health"
        assert "has told no step" in ckpt.notice.detail


def lagging(rank: int, url: str) -> list[dict[str, Any]]:
    """Rank 1 takes longer than the others for what it does by itself."""
    health.BLOCK_S = 0.05
    with gpumove.Checkpointer(url, model=equal_linear(), **{**SETTINGS, "every_steps": 8}) as ckpt:
        ckpt.restore()
        for step in range(1, 65):
            time.sleep(0.08 if rank == 1 else 0.01)
            ckpt.step(step)
        ckpt.save(65).wait()
        return ckpt._health.notes()


def test_a_rank_that_lags_is_named_in_the_manifest_of_all(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run(lagging, 3, url_of(tmp_path))
    found = shown(url_of(tmp_path), capsys)
    assert ("straggler", 1) in [(f["kind"], f["rank"]) for f in found]


@pytest.mark.parametrize("word", ["hangs", "slow;nan", "none"])
def test_an_unknown_finding_in_leave_on_is_refused_at_the_start(word: str, tmp_path: Path) -> None:
    with pytest.raises(gpumove.ConfigError, match="leave_on takes slow, straggler, nan, hang"):
        gpumove.Checkpointer(str(tmp_path), leave_on=word)
