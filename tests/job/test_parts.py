"""The parts of `gpumove run` that can be looked at one by one: verdicts, files, and who gets a signal."""

from __future__ import annotations

import json
import os
import signal
import stat
import subprocess
import sys
import time
from pathlib import Path

import pytest

from gpumove.config import Config
from gpumove.errors import ConfigError, LayoutError, StoreError
from gpumove.from_env import RunFolder, Word, where
from gpumove.job.family import Member, _stat, send
from gpumove.job.outcome import crash_code, judge, quote
from gpumove.job.progress import Progress
from gpumove.notices.notice import Notice, Outcome

DURABLE, LOST = Outcome(True, 9, 0), Outcome(False, 5, 4, "late")


def word(state: str, outcome: Outcome | None = None, **more: object) -> Word:
    return Word(pid=1, state=state, outcome=outcome, **{"source": "aws", **more})  # type: ignore[arg-type]


FAILED = word("failed", error="Traceback:\nValueError: boom\n", time=5.0, rank=1)


@pytest.mark.parametrize(
    ("status", "words", "asked", "code", "text"),
    [
        (0, [], False, 0, "finished"),
        (0, [word("finished")], True, 0, "finished"),
        (0, [word("left", DURABLE)], False, 75, "durable: step 9"),  # another node, or the job's own request
        (1, [word("left", DURABLE)], True, 75, "durable: step 9"),
        (-9, [word("left", LOST), word("training")], True, 76, "not durable: resumes from step 5, 4 steps lost"),
        (0, [word("left", DURABLE), word("left", LOST)], True, 76, "not durable: resumes from step 5, 4 steps lost"),
        (0, [word("left", Outcome(True, 9, 0, finished=True))], True, 0, "finished"),
        (-9, [word("training")], True, 76, "torchrun was killed by signal 9"),
        (1, [FAILED], True, 76, "rank 1 failed first: ValueError: boom"),
        (1, [word("training"), FAILED], False, None, "rank 1 failed first: ValueError: boom"),
        (1, [word("left", DURABLE, source="sigterm"), FAILED], False, None, "rank 1 failed first: ValueError: boom"),
        (1, [word("left", DURABLE, source="sigterm"), FAILED], True, 75, "durable: step 9"),
        (0, [word("left", DURABLE, source="sigterm")], False, 75, "durable: step 9"),  # somebody signalled a worker
        (1, [], False, None, "torchrun ended with status 1"),
        (2, [], False, 2, "torchrun did not take its arguments"),
        (1, [word("failed", exit_code=30, error="LayoutError: x")], False, 30, "rank 0 failed first: LayoutError: x"),
        (1, [word("failed", exit_code=10, error="StoreError: x")], False, None, "rank 0 failed first: StoreError: x"),
    ],
)
def test_verdicts(status: int, words: list[Word], asked: bool, code: int | None, text: str) -> None:
    verdict = judge(status, words, asked=asked)
    assert (verdict.exit_code, verdict.text) == (code, text)


def test_of_several_failures_the_first_is_quoted() -> None:
    later = word("failed", error="a collective timed out", time=6.0, exit_code=StoreError.exit_code)
    assert quote(1, [later, FAILED], "noise") == "rank 1 (pid 1) failed first:\nTraceback:\nValueError: boom"
    assert crash_code([later, FAILED]) == 1
    assert crash_code([later]) == StoreError.exit_code


def test_words_survive_the_way_and_rubbish_says_nothing(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path)
    said = [word("training", step=3, rank=10), word("left", LOST, rank=2)]
    for each in said:
        folder.say(each)
    (tmp_path / "outcome-7.json").write_bytes(b"\xff{")
    (tmp_path / "outcome-8.json").write_text('{"pid": 3, "state": "asleep"}')
    assert folder.words() == [said[1], said[0]]
    folder.forget()
    assert folder.words() == []


def test_a_request_says_what_the_notice_said(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path)
    folder.ask(Notice("aws", 123.5, "spot"))
    assert json.loads(folder.request_file.read_text()) == {"deadline": 123.5, "source": "aws", "detail": "spot"}


def test_options_are_for_this_user_only(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path)
    folder.put_options({"key": "secret", "nested": {"n": 3}})
    assert where("s3://bucket/run", str(tmp_path)) == ("s3://bucket/run", {"key": "secret", "nested": {"n": 3}})
    assert stat.S_IMODE((tmp_path / "options.json").stat().st_mode) == 0o600
    assert where("/runs/1", None) == ("/runs/1", {})
    with pytest.raises(ConfigError, match="GPUMOVE_URL is not set"):
        where("", None)


def test_a_pid_that_belongs_to_another_process_now_is_not_signalled() -> None:
    with subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"]) as process:
        found = _stat(process.pid)
        assert found is not None
        send(Member(process.pid, found.started - 1), signal.SIGKILL)
        time.sleep(0.1)
        assert process.poll() is None
        send(Member(process.pid, found.started), signal.SIGKILL)
        assert process.wait(10) == -signal.SIGKILL
    send(Member(process.pid, found.started), signal.SIGKILL)  # gone: nothing happens


def test_a_worker_puts_down_what_it_raises(tmp_path: Path) -> None:
    code = (
        "import sys; from gpumove.from_env import Worker; from gpumove.errors import LayoutError\n"
        f"worker = Worker({str(tmp_path)!r}, 3); worker.training(12); raise LayoutError('they do not fit')\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    (said,) = RunFolder(tmp_path).words()
    assert (said.rank, said.state, said.step, said.exit_code) == (3, "failed", 12, LayoutError.exit_code)
    assert said.error is not None
    assert said.error.rstrip().endswith("LayoutError: they do not fit")
    assert done.returncode == 1
    assert "LayoutError: they do not fit" in done.stderr, "it is shown as ever"


def test_a_worker_dies_with_its_parent(tmp_path: Path) -> None:
    worker = f"from gpumove.from_env import Worker; import time; Worker({str(tmp_path)!r}, 0); time.sleep(600)"
    code = (
        "import subprocess, sys, time\n"
        f"subprocess.Popen([sys.executable, '-c', {worker!r}], start_new_session=True); time.sleep(600)\n"
    )
    with subprocess.Popen([sys.executable, "-c", code]) as parent:
        until = time.monotonic() + 30
        while not (words := RunFolder(tmp_path).words()) and time.monotonic() < until:
            time.sleep(0.02)
        parent.kill()
    while _alive(words[0].pid) and time.monotonic() < until:
        time.sleep(0.02)
    assert not _alive(words[0].pid)


def _alive(pid: int) -> bool:
    found = _stat(pid)
    return found is not None and found.state != "Z"


def test_progress_of_a_run_that_is_not_there(tmp_path: Path) -> None:
    progress = Progress(str(tmp_path / "run"), Config(), {})
    assert progress.read() == 0
    assert progress.look().step(10) == 0
    assert os.listdir(tmp_path) == []
