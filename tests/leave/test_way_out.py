"""A job of one rank that leaves: the outcomes, what is noted, what bad input gets, and what holds nobody up."""

from __future__ import annotations

import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest

import gpumove
from gpumove import ConfigError
from gpumove.cli import main
from gpumove.leave.leaving import Leaving
from tests.jobs import new_job

SETTINGS: dict[str, Any] = {"every_s": None, "notices": ""}


@pytest.fixture
def url(tmp_path: Path) -> str:
    return str(tmp_path / "run")


def leave(url: str, *, in_s: float = 20.0, **settings: Any) -> tuple[gpumove.Checkpointer, int]:
    """Train until step 6, where a notice comes; the step that the job left after."""
    job = new_job()
    with gpumove.Checkpointer(url, **job.parts(), **{**SETTINGS, **settings}) as ckpt:
        ckpt.restore()
        job.train(0, 5, ckpt)
        ckpt.request_leave(in_s=in_s)
        step = 5
        while not ckpt.step(step):
            job.train(step, step + 1)
            step += 1
    return ckpt, step


def outcome(ckpt: gpumove.Checkpointer) -> str:
    assert ckpt.notice is not None
    return str(ckpt.notice.outcome)


def test_a_job_goes_on_bit_for_bit_where_it_left(url: str) -> None:
    whole = new_job()
    whole.train(0, 12)
    ckpt, left = leave(url)
    assert outcome(ckpt) == f"durable: step {left}"
    job = new_job()
    with gpumove.Checkpointer(url, **job.parts(), **SETTINGS) as again:
        assert again.restore() == left
        job.train(left, 12, again)
    assert {s: whole.losses[s] for s in job.losses} == job.losses
    assert job.fingerprint() == whole.fingerprint()
    assert again.notice is None
    assert not again.leaving


def test_the_verbs_take_a_log_that_notes_it(url: str, capsys: pytest.CaptureFixture[str]) -> None:
    _, left = leave(url)
    for verb in (["ls", url], ["show", url], ["verify", url], ["gc", url]):
        assert main(verb) == 0
    assert f"resume step {left}" in capsys.readouterr().out


def test_another_owner_is_told_truthfully(url: str) -> None:
    job, other = new_job(), new_job()
    with gpumove.Checkpointer(url, **job.parts(), **SETTINGS) as ckpt:
        ckpt.restore()
        job.train(0, 3, ckpt)
        ckpt.save(3).wait(60)
        with gpumove.Checkpointer(url, **other.parts(), **SETTINGS) as newer:
            assert newer.restore() == 3
            ckpt.request_leave(in_s=20)
            step = 3
            while not ckpt.step(step):
                step += 1
    assert ckpt.notice is not None
    assert ckpt.notice.outcome is not None
    assert str(ckpt.notice.outcome) == f"not durable: resumes from step 3, {step - 3} steps lost"
    assert "claimed" in ckpt.notice.outcome.reason


def test_an_end_before_the_step_to_leave_after(url: str) -> None:
    job = new_job()
    with gpumove.Checkpointer(url, **job.parts(), **SETTINGS) as ckpt:
        ckpt.restore()
        job.train(0, 5, ckpt)
        ckpt.save(5).wait(60)
        ckpt.request_leave(in_s=20)
    assert outcome(ckpt) == "finished"
    assert ckpt.notice is not None
    assert ckpt.notice.outcome is not None
    assert (ckpt.notice.outcome.durable, ckpt.notice.outcome.step) == (True, 5)


def test_an_exception_before_the_step_to_leave_after(url: str) -> None:
    job = new_job()
    ckpt = gpumove.Checkpointer(url, **job.parts(), **SETTINGS)

    def body() -> None:
        with ckpt:
            ckpt.restore()
            job.train(0, 3, ckpt)
            ckpt.save(3).wait(60)
            job.train(3, 5, ckpt)
            ckpt.request_leave(in_s=20)
            raise RuntimeError("a collective failed")

    with pytest.raises(RuntimeError, match="a collective failed"):
        body()
    assert outcome(ckpt) == "not durable: resumes from step 3, 2 steps lost"
    assert ckpt.notice is not None
    assert ckpt.notice.outcome is not None
    assert ckpt.notice.outcome.reason == "the training ended with RuntimeError"


def test_what_cannot_be_read_from_the_log_is_not_said_to_be_durable(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The very worst: what came of it is not known, and the store is gone."""

    def lost(*_: Any) -> None:
        raise ConnectionError("no answer")

    job = new_job()
    with gpumove.Checkpointer(url, **job.parts(), **SETTINGS) as ckpt:
        ckpt.restore()
        job.train(0, 3, ckpt)
        ckpt.save(3).wait(60)
        monkeypatch.setattr(Leaving, "_rounds", lost)
        monkeypatch.setattr("gpumove.store.log.Log.read", lambda self: time.sleep(30))
        ckpt.request_leave(in_s=2.0)
        began, step = time.monotonic(), 4
        while not ckpt.step(step):
            step += 1
        assert time.monotonic() - began < 15
    assert outcome(ckpt) == f"not durable: resumes from step 3, {step - 3} steps lost"


@pytest.mark.parametrize(
    "wrong", [{"deadline": "soon"}, {"in_s": True}, {"in_s": float("nan")}, {"deadline": 1.0, "in_s": 1.0}]
)
def test_a_request_with_a_wrong_time_is_refused(url: str, wrong: dict[str, Any]) -> None:
    with gpumove.Checkpointer(url, **new_job().parts(), **SETTINGS) as ckpt, pytest.raises(ConfigError):
        ckpt.request_leave(**wrong)


def test_a_request_from_another_thread(url: str) -> None:
    job = new_job()
    with gpumove.Checkpointer(url, **job.parts(), **SETTINGS) as ckpt:
        ckpt.restore()
        thread = threading.Thread(target=lambda: ckpt.request_leave(in_s=20, detail="a price"))
        step = 0
        while True:
            job.train(step, step + 1)
            step += 1
            if step == 3:
                thread.start()
                thread.join()
            if ckpt.step(step):
                break
    assert outcome(ckpt) == f"durable: step {step}"
    assert ckpt.notice is not None
    assert (ckpt.notice.source, ckpt.notice.detail) == ("request", "a price")


def test_a_script_that_closes_nothing_ends(url: str) -> None:
    code = (
        "import sys, torch, gpumove\n"
        "ckpt = gpumove.Checkpointer(sys.argv[1], model=torch.nn.Linear(2, 2))\n"
        "ckpt.restore()\n"
        "ckpt.step(1)\n"
    )
    subprocess.run([sys.executable, "-c", code, url], check=True, timeout=60)
