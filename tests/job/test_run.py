"""`gpumove run` over real torchruns: notices, crashes, kills, exit codes, and that nothing of it is left behind."""

from __future__ import annotations

import json
import os
import signal
import time
from pathlib import Path

import psutil
import pytest

from tests.job.harness import GPUMOVE, Running

TERM, USR1, INT = signal.SIGTERM, signal.SIGUSR1, signal.SIGINT


@pytest.mark.slow
def test_a_job_that_finishes(tmp_path: Path) -> None:
    running = Running(tmp_path, "finishes", "--json")
    code, out = running.end()
    assert code == 0
    assert json.loads(out) == {"exit_code": 0, "text": "finished", "outcome": None, "notice": None, "restarts": 0}


def test_a_signal_becomes_a_request_and_leaving_becomes_75(tmp_path: Path) -> None:
    running = Running(tmp_path, "leaves", "--json", "--grace", "40")
    running.started()
    now = time.time()
    running.send(TERM)
    code, out = running.end()
    assert code == 75
    told = json.loads(out)
    assert told["text"] == "durable: step 8"
    assert told["outcome"] == {"durable": True, "step": 8, "lost_steps": 0, "reason": "", "finished": False}
    assert told["notice"]["source"] == "sigterm"
    for asked in map(json.loads, running.notes("asked")):
        assert asked["source"] == "sigterm"
        assert 39 < asked["deadline"] - now < 45
    assert not running.notes("sigterm"), "the signal ends at the wrapper"


@pytest.mark.slow
@pytest.mark.parametrize("number", [USR1, INT, signal.SIGHUP])
def test_other_signals_are_notices_too(tmp_path: Path, number: signal.Signals) -> None:
    running = Running(tmp_path, "leaves", nproc=1)
    running.started()
    running.send(number)
    assert running.end()[0] == 75
    assert f"notice from {number.name.lower()}" in running.log


def test_what_was_not_durable_is_said(tmp_path: Path) -> None:
    running = Running(tmp_path, "loses")
    running.started()
    running.send(TERM)
    assert running.end() == (76, "not durable: resumes from step 5, 3 steps lost\n")


@pytest.mark.slow
def test_a_job_that_finishes_after_a_notice_has_finished(tmp_path: Path) -> None:
    running = Running(tmp_path, "finishes-when-asked")
    running.started()
    running.send(TERM)
    assert running.end() == (0, "finished\n")


@pytest.mark.slow
def test_a_worker_that_left_well_has_left_whatever_torchrun_says(tmp_path: Path) -> None:
    running = Running(tmp_path, "leaves-badly", nproc=1)
    running.started()
    running.send(TERM)
    assert running.end() == (75, "durable: step 8\n")


def test_sigterm_thrice_in_a_row_is_one(tmp_path: Path) -> None:
    """torchrun by itself would be dead by now, and its workers orphans."""
    running = Running(tmp_path, "leaves", argument="1.5")
    running.started()
    running.send(TERM)
    running.asked()
    for _ in range(2):
        running.send(TERM)
        time.sleep(0.3)  # signals of one kind that wait are one
    assert running.process.poll() is None
    assert running.end() == (75, "durable: step 8\n")
    assert not running.notes("sigterm")


@pytest.mark.slow
@pytest.mark.parametrize("again", [TERM, INT])
def test_asked_again_with_emphasis_means_now(tmp_path: Path, again: signal.Signals) -> None:
    running = Running(tmp_path, "leaves", "--grace", "100", argument="90")
    running.started()
    running.send(again)
    running.asked()
    time.sleep(5.2 if again == TERM else 0.2)  # SIGTERM soon after the first is taken for the same one
    began = time.monotonic()
    running.send(again)
    code, out = running.end()
    assert code == 76
    assert out == "not durable: resumes from step 0, 7 steps lost (it did not leave in time)\n"
    assert time.monotonic() - began < 6 + running.slack_s


@pytest.mark.slow
def test_a_worker_that_ignores_the_request_is_killed_within_the_deadline(tmp_path: Path) -> None:
    running = Running(tmp_path, "ignores", "--grace", "5")
    running.started()
    began = time.monotonic()
    running.send(TERM)
    code, out = running.end()
    took = time.monotonic() - began
    assert code == 76
    assert out == "not durable: resumes from step 0, 7 steps lost (it did not leave in time)\n"
    assert 3.5 < took < 5 + running.slack_s
    assert len(running.notes("helper")) == 2
    assert running.notes("sigterm"), "SIGTERM comes before SIGKILL"
    assert "5 processes did not end by themselves" in running.log


@pytest.mark.slow
def test_the_nearer_deadline_wins(tmp_path: Path) -> None:
    notice = tmp_path / "notice"
    running = Running(tmp_path, "ignores", "--grace", "100", "--notice", f"file:{notice}")
    running.started()
    running.send(TERM)
    running.until(lambda: "notice from sigterm, 100 s left" in running.log, "first notice")
    began = time.monotonic()
    notice.write_text(json.dumps({"in_s": 4, "source": "price", "detail": "0.31 $/h elsewhere"}))
    code, _ = running.end()
    assert code == 76
    assert time.monotonic() - began < 5.5 + running.slack_s
    assert "notice from price, 4 s left: asking the job to leave (0.31 $/h elsewhere)" in running.log


def test_a_killed_torchrun_leaves_no_orphans_and_is_started_again(tmp_path: Path) -> None:
    running = Running(tmp_path, "leaves")
    before = running.started()
    os.kill(running.torchrun(), signal.SIGKILL)
    running.started(1)
    assert not any(psutil.pid_exists(pid) for pid in before)
    assert "torchrun was killed by signal 9 and no rank said why" in running.log
    assert "starting again in 1 s, from step 0" in running.log
    running.send(TERM)
    assert running.end()[0] == 75


def test_a_killed_gpumove_run_takes_torchrun_and_its_workers_along(tmp_path: Path) -> None:
    running = Running(tmp_path, "leaves", "--grace", "2")
    workers = running.started()
    processes = [psutil.Process(pid) for pid in (running.torchrun(), *workers)]
    running.process.kill()
    _, alive = psutil.wait_procs(processes, timeout=20)
    assert not alive
    assert len(running.notes("sigterm")) == 2, "workers were told first"


def test_a_crash_loop_ends_and_quotes_the_first_rank_that_failed(tmp_path: Path) -> None:
    running = Running(tmp_path, "fails", "--max-restarts", "1", argument="1")
    code, out = running.end()
    assert code == 1
    assert out == (
        "gave up, as 2 attempts in a row brought no newer checkpoint: rank 1 failed first: ValueError: "
        "the loss went up\n"
    )
    assert running.log.count("failed first:\nTraceback (most recent call last):\n") == 2
    assert 'raise ValueError("the loss went up")\nValueError: the loss went up\n' in running.log
    assert len(running.notes("started")) == 4


@pytest.mark.slow
def test_a_script_that_never_got_to_gpumove_is_quoted_from_standard_error(tmp_path: Path) -> None:
    running = Running(tmp_path, "import-error", "--max-restarts", "0", nproc=1)
    code, out = running.end()
    assert code == 1
    assert out == "gave up, as the attempt brought no newer checkpoint: torchrun ended with status 1\n"
    _, _, quoted = running.log.partition("no rank said why; the end of standard error:\n")
    assert "ModuleNotFoundError: No module named 'gpumove.nonsense'\n" in quoted


@pytest.mark.slow
def test_a_crash_that_does_not_come_again(tmp_path: Path) -> None:
    running = Running(tmp_path, "fails-once", "--json")
    code, out = running.end()
    assert code == 0
    assert json.loads(out)["restarts"] == 1


@pytest.mark.slow
def test_a_fenced_job_is_not_started_again(tmp_path: Path) -> None:
    running = Running(tmp_path, "fenced", nproc=1)
    code, out = running.end()
    assert (code, out) == (40, "rank 0 failed first: gpumove.errors.FencedError: somebody else has the run\n")
    assert len(running.notes("started")) == 1


@pytest.mark.slow
def test_a_notice_between_two_attempts(tmp_path: Path) -> None:
    running = Running(tmp_path, "fails", "--max-restarts", "9")
    running.until(lambda: "starting again in" in running.log, "crash")
    running.send(TERM)
    code, out = running.end()
    assert code == 76
    assert out.startswith("not durable: resumes from step 0, 7 steps lost (it had crashed before the notice came: ")


@pytest.mark.slow
@pytest.mark.parametrize("number", [TERM, USR1])
def test_a_signal_to_every_process_of_the_job_loses_nothing(tmp_path: Path, number: signal.Signals) -> None:
    """As systemd with KillMode=control-group and Slurm with some plugins do."""
    running = Running(tmp_path, "leaves", argument="1")
    workers = running.started()
    for pid in (*workers, running.torchrun(), running.process.pid):
        os.kill(pid, number)
    assert running.end() == (75, "durable: step 8\n")


@pytest.mark.slow
def test_wrong_calls(tmp_path: Path) -> None:
    wrong = {
        "nothing to run": ["run", str(tmp_path)],
        "is no source of notices": ["run", str(tmp_path), "--notice", "smoke", "--", "x.py"],
        "grace_s must be": ["run", str(tmp_path), "--grace", "-3", "--", "x.py"],
        "names no bucket": ["run", "s3://", "--", "x.py"],
        "at least 0": ["run", str(tmp_path), "--max-restarts", "-1", "--", "x.py"],
        "did not take its arguments": ["run", str(tmp_path), "--", "--nproc-per-nodule", "2", "x.py"],
    }
    for message, arguments in wrong.items():
        running = Running.__new__(Running)
        running.folder, running.nproc, running._log = tmp_path, 0, tmp_path / "stderr"
        running.start([*GPUMOVE, *arguments])
        code, out = running.end()
        assert code == 2, running.log
        assert message in running.log + out
    running = Running.__new__(Running)
    running.folder, running.nproc, running._log = tmp_path, 0, tmp_path / "stderr"
    running.start([*GPUMOVE, "run", str(tmp_path), "--", "x.py"], {"GPUMOVE_CERTIFY": "5"})
    assert (running.end()[0], "would save nothing" in running.log) == (2, True)
