"""The status of a run, seen while it changes; and the verbs that show it and make the page."""

from __future__ import annotations

import json
import subprocess
import sys
import threading
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

import gpumove
from gpumove import cli, cli_report
from gpumove.inspection.run import open_run
from gpumove.report.status import Status, Watch
from gpumove.store.log import Log
from tests.jobs import new_job
from tests.report.conftest import Moved, train
from tests.runs import flip, objects


@pytest.fixture
def call(capsys: pytest.CaptureFixture[str]) -> Any:
    def run(*line: object) -> tuple[int, str, str]:
        code = cli.main([str(word) for word in line])
        out, err = capsys.readouterr()
        return code, out, err

    return run


def test_a_watch_sees_what_is_committed_since(tmp_path: Path) -> None:
    losses = train(str(tmp_path), 40)
    with open_run(str(tmp_path)) as log:
        watch = Watch(log)
        first = watch.look()
        assert (first.step, first.loss_step, first.checkpoints, first.epoch) == (40, 40, 2, 1)
        assert first.loss == pytest.approx(losses[40])
        assert first.step_s is not None
        assert first.every_s is not None
        assert 0 < first.step_s < first.every_s
        losses = train(str(tmp_path), 60)
        second = watch.look()
        assert (second.step, second.checkpoints, second.epoch) == (60, 3, 2)
        assert second.loss == pytest.approx(losses[60])
        assert second.every_s is None, "one commit of this life of the job tells no interval"
        flip(max((tmp_path / "manifests").iterdir()), 40)
        assert Watch(log).look().loss_step == 40, "what a damaged manifest said is not known"


def test_a_commit_that_does_not_come(tmp_path: Path) -> None:
    train(str(tmp_path), 60)
    with open_run(str(tmp_path)) as log:
        found = Watch(log).look()
    late = replace(found, now=found.now + 3600)
    assert (found.quiet, late.quiet) == (False, True)
    assert not replace(late, owned=False).quiet, "where no job may write, none is late"
    assert not replace(late, every_s=None).quiet


def late(log: Log) -> Status:
    """An hour later."""
    found = Watch(log).look()
    return replace(found, now=found.now + 3600)


def test_a_job_that_has_left_is_not_waited_for(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    train(str(tmp_path), 60)
    job = new_job()
    with gpumove.Checkpointer(str(tmp_path), **job.parts(), every_s=None) as ckpt:
        for step in range(ckpt.restore() + 1, 63):
            job.train(step - 1, step, ckpt)
            ckpt.save(step).wait(60)
        ckpt.request_leave(in_s=20.0)
        while not ckpt.step(step):
            step += 1
    with open_run(str(tmp_path)) as log:
        found = late(log)
        assert (found.every_s is None, found.quiet) == (False, False)
        assert found.ended.startswith(f"the job has left after step {step} on a notice (request)")
    assert cli.main(["status", str(tmp_path)]) == 0
    assert f"ended      {found.ended}\n" in capsys.readouterr().out
    train(str(tmp_path), 80)
    with open_run(str(tmp_path)) as log:
        assert Watch(log).look().ended == "", "it was started again"


@pytest.mark.parametrize(
    ("state", "ended", "said"),
    [
        ("left", "", "the job has left, for a move"),
        ("watched", "finished", "the job has come to its end"),
        ("watched", "left", "the job has left, as it was asked to"),
        ("watched", "ValueError", "the job has ended with ValueError"),
        ("watched", "", ""),
    ],
)
def test_what_a_word_of_a_move_says_of_its_end(tmp_path: Path, state: str, ended: str, said: str) -> None:
    train(str(tmp_path), 60)
    facts = {"watch": {"handed": 20, "steps": 200, "epoch": 1, "ended": ended}} if state == "watched" else {}
    with open_run(str(tmp_path)) as log:
        assert late(log).quiet
        log.move(state, move="0" * 16, other="memory://elsewhere", facts=facts)
        assert (late(log).ended, late(log).quiet) == (said, not said)
        log.claim()
        assert late(log).ended == "", "another one has come since"


def test_status(call: Any, moved: Moved) -> None:
    code, out, err = call("status", moved.target)
    assert (code, err) == (0, "")
    assert "checkpoint step 120" in out
    assert f"loss       {moved.losses[120]:.6g} at step 120" in out
    assert f"moving     the run was moved here from {moved.source}" in out
    data = json.loads(call("status", moved.source, "--json")[1])
    assert (data["step"], data["owned"]) == (60, False)


def test_watching_tells_what_is_new_and_ends_when_interrupted(
    call: Any, moved: Moved, monkeypatch: pytest.MonkeyPatch
) -> None:
    left = [3]

    def sleep(seconds: float) -> None:
        left[0] -= 1
        if not left[0]:
            raise KeyboardInterrupt

    monkeypatch.setattr(cli_report.time, "sleep", sleep)
    code, out, _ = call("status", moved.target, "--watch")
    assert (code, out.count("checkpoint step")) == (130, 1)
    left[0] = 3
    code, out, _ = call("status", moved.target, "--watch", "--json")
    assert code == 130
    assert [json.loads(line)["step"] for line in out.splitlines()] == [120] * 3
    left[0] = 3
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("TERM", "xterm-256color")
    code, out, _ = call("status", moved.target, "--watch")
    assert code == 130
    assert "\x1b[" in out
    assert out.count("step 120,") >= 3


def test_watching_beside_a_job_that_trains(tmp_path: Path) -> None:
    train(str(tmp_path), 20)
    job = threading.Thread(target=train, args=(str(tmp_path), 80))
    with open_run(str(tmp_path)) as log:
        watch, steps, until = Watch(log), [20], time.monotonic() + 60
        job.start()
        while steps[-1] != 80 and time.monotonic() < until:
            steps.append(watch.look().step or 0)
        job.join()
    assert steps == sorted(steps)
    assert steps[-1] == 80


def test_report(call: Any, moved: Moved, tmp_path: Path) -> None:
    before = [objects(Path(url.removeprefix("file://"))) for url in moved[:2]]
    out = tmp_path / "r.html"
    code, said, err = call("report", moved.source, moved.target, "-o", out, "--hourly", "2", "--hourly", "3")
    assert (code, err) == (0, "")
    assert said.startswith(f"{out}: ")
    assert out.read_text().startswith("<!DOCTYPE html>")
    code, said, _ = call("report", moved.source, "-o", out, "--json")
    assert json.loads(said) == {"out": str(out), "bytes": out.stat().st_size}
    assert [objects(Path(url.removeprefix("file://"))) for url in moved[:2]] == before, "nothing is written there"


def test_report_of_what_is_not_there(call: Any, moved: Moved, tmp_path: Path) -> None:
    out = tmp_path / "r.html"
    code, _, err = call("report", tmp_path / "nowhere", "-o", out)
    assert (code, "there is no gpumove run" in err) == (2, True)
    code, _, err = call("report", moved.source, "-o", tmp_path / "no" / "r.html")
    assert (code, "cannot be written" in err) == (2, True)
    code, _, err = call("report", moved.source, "-o", out, "--hourly", "cheap")
    assert (code, "--hourly takes a price" in err) == (2, True)
    assert not out.exists()


@pytest.mark.parametrize("line", [["status"], ["report", "-o", "OUT"]], ids=" ".join)
def test_neither_needs_torch(moved: Moved, tmp_path: Path, line: list[str]) -> None:
    line = [moved.target if word == "URL" else word.replace("OUT", str(tmp_path / "r")) for word in [*line, "URL"]]
    code = f"import sys; from gpumove.cli import main; assert main({line!r}) == 0; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60, stdout=subprocess.DEVNULL)


def test_without_matplotlib_it_says_what_to_install(moved: Moved, tmp_path: Path) -> None:
    code = (
        "import sys; sys.modules['matplotlib'] = None; from gpumove.cli import main; "
        f"sys.exit(main(['report', {moved.source!r}, '-o', {str(tmp_path / 'r')!r}]))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.returncode == 2
    assert "pip install 'gpumove[report]'" in done.stderr
