"""The end of a job that is to leave at the same time: what signals do then, what is said, and that the process ends."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest

import gpumove
from gpumove import StoreError
from gpumove.config import Config
from gpumove.store.files import FileBackend
from gpumove.store.objects import Store
from gpumove.store.retry import in_thread, unless
from tests.jobs import new_job

SETTINGS: dict[str, Any] = {"every_s": None, "notices": ""}

SCRIPT = """
import sys, time
import torch, gpumove
from gpumove.store.files import FileBackend
from gpumove.store.retry import in_thread

url, slow_s, grace_s, way = sys.argv[1], float(sys.argv[2]), float(sys.argv[3]), sys.argv[4]
model = torch.nn.Linear(50, 50)
put = FileBackend.put

def slow(self, key, data, seconds):
    if key.startswith("packs/"):
        print("in flight", flush=True)
        in_thread(lambda ticket: time.sleep(slow_s), seconds)
    put(self, key, data, seconds)

with gpumove.Checkpointer(url, model=model, every_s=None, grace_s=grace_s) as ckpt:
    ckpt.restore()
    for step in range(1, 4):
        ckpt.step(step)
    FileBackend.put = slow
    ckpt.save(3)
    if way == "raises":
        raise RuntimeError("the training broke")
print(ckpt.notice.source if ckpt.notice else None, "|", ckpt.notice and ckpt.notice.outcome, flush=True)
"""


def closing(folder: Path, slow_s: float, grace_s: float, way: str = "ends") -> tuple[int, str, float, dict[str, Any]]:
    """SIGTERM while close() waits for the last save: status, last line, by how many seconds it ended too late, word.

    To begin, which is much more than to end, takes a process as long as the machine is slow: so late it may be.
    """
    (folder / "words").mkdir()
    began = time.monotonic()
    process = subprocess.Popen(
        [sys.executable, "-c", SCRIPT, str(folder / "run"), str(slow_s), str(grace_s), way],
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "GPUMOVE_RUN_DIR": str(folder / "words")},
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "in flight\n"
    time.sleep(0.3)  # the script is in close() by then, or on its way
    ends = time.monotonic() + grace_s + max(2.0, time.monotonic() - began)
    process.send_signal(signal.SIGTERM)
    text = process.stdout.read()
    status = process.wait(60)
    word = json.loads((folder / "words/outcome-0.json").read_text())
    return status, text.strip().splitlines()[-1] if text.strip() else "", time.monotonic() - ends, word


def test_a_signal_in_close_does_not_end_the_last_save(tmp_path: Path) -> None:
    status, line, _, word = closing(tmp_path, 3.0, 30.0)
    assert (status, line) == (0, "sigterm | finished")
    assert word["state"] == "finished"
    assert gpumove.checkpoints(str(tmp_path / "run"))[-1].step == 3


def test_a_last_save_that_is_not_done_in_time_is_no_finished_job(tmp_path: Path) -> None:
    status, line, late_s, word = closing(tmp_path, 100.0, 3.0)
    assert (status, line) == (0, "sigterm | not durable: resumes from step 0, 3 steps lost")
    assert late_s < 0, "neither close() nor the process waits for what hangs"
    assert (word["state"], word["outcome"]["durable"]) == ("left", False)
    assert gpumove.checkpoints(str(tmp_path / "run")) == []


@pytest.mark.slow
def test_an_exception_and_a_signal_and_a_save_that_hangs(tmp_path: Path) -> None:
    status, _, late_s, word = closing(tmp_path, 100.0, 3.0, "raises")
    assert status == 1
    assert late_s < 0
    assert word["state"] == "failed"


def test_after_the_end_a_request_is_none(tmp_path: Path) -> None:
    job = new_job()
    with gpumove.Checkpointer(str(tmp_path), **job.parts(), **SETTINGS) as ckpt:
        ckpt.restore()
        job.train(0, 2, ckpt)
    ckpt.request_leave(in_s=5)
    assert ckpt.notice is None
    with pytest.raises(gpumove.ConfigError, match="closed"):
        ckpt.save(3)


def test_a_save_after_leaving_is_refused_or_the_one_that_there_is(tmp_path: Path) -> None:
    job = new_job()
    with gpumove.Checkpointer(str(tmp_path), **job.parts(), **SETTINGS) as ckpt:
        ckpt.restore()
        ckpt.request_leave(deadline=time.time() - 10)
        step = 1
        while not ckpt.step(step):
            step += 1
        began = time.monotonic()
        with pytest.raises(gpumove.ConfigError, match="had to leave"):
            ckpt.save(step)
        assert time.monotonic() - began < 5


# ---------------------------------------------------------------- real jobs of the ways that numbers are tested for


def test_a_save_that_codes_everything_is_hurried_if_it_would_not_fit(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    job = new_job()
    url = str(tmp_path / "run")
    with gpumove.Checkpointer(url, **job.parts(), **SETTINGS, codec="small", keep_last=None) as ckpt:
        ckpt.restore()
        job.train(0, 3, ckpt)
        ckpt.save(3).wait(60)
        ckpt._runner.took.append(60.0)  # as measured where the codec takes a minute
        ckpt.request_leave(in_s=15)
        step = 3
        while not ckpt.step(step):
            job.train(step, step + 1)
            step += 1
        assert not ckpt._runner.writer._pace._always, "it codes what pays only"
    assert ckpt.notice is not None
    assert str(ckpt.notice.outcome) == f"durable: step {step}"
    assert "a save takes 60.0 s" in caplog.text
    whole = new_job()
    whole.train(0, step + 3)
    again = new_job()
    with gpumove.Checkpointer(url, **again.parts(), **SETTINGS) as resumed:
        assert resumed.restore() == step
        again.train(step, step + 3, resumed)
    assert {s: whole.losses[s] for s in again.losses} == again.losses
    assert again.fingerprint() == whole.fingerprint()


def test_an_interval_that_is_found_by_itself(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Saves come as often as the measured stall and the past of the run ask for."""
    caplog.set_level("INFO", "gpumove")
    job = new_job()
    with gpumove.Checkpointer(str(tmp_path), **job.parts(), every_s="auto", notices="", keep_last=None) as ckpt:
        ckpt.restore()
        interval = ckpt._chair.cadence.interval
        interval.seconds = 0.2  # instead of the first 30 s
        step = 0
        until = time.monotonic() + 30
        while not interval._said_s and time.monotonic() < until:
            job.train(step, step + 1, ckpt)
            step += 1
            time.sleep(0.01)
        assert "a save every" in caplog.text
        stall_s = gpumove_stall(ckpt)
        assert interval.seconds == pytest.approx((2 * stall_s * 3600) ** 0.5, rel=0.1)
        before = len(gpumove.checkpoints(str(tmp_path)))
        job.train(step, step + 50, ckpt)
        assert len(gpumove.checkpoints(str(tmp_path))) <= before + 1, "they are rarer now"


def gpumove_stall(ckpt: gpumove.Checkpointer) -> float:
    assert ckpt._chair._counted is not None
    return max(1e-3, ckpt._chair._counted.stats.stall_s)


# ---------------------------------------------------------------- a store in a hurry


def hung_store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Store:
    monkeypatch.setattr(
        FileBackend, "get", lambda self, key, seconds: in_thread(lambda ticket: time.sleep(30), seconds)
    )
    return Store.open(str(tmp_path), Config())


def test_a_store_in_a_hurry_ends_running_calls_and_those_to_come(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = hung_store(tmp_path, monkeypatch)
    threading.Timer(0.5, store.hurry, (0.5,)).start()
    began = time.monotonic()
    with pytest.raises(StoreError, match="nobody waits") as caught:
        store.get("k")
    assert 0.9 < time.monotonic() - began < 10
    assert caught.value.code == "store.abandoned"
    began = time.monotonic()
    with pytest.raises(StoreError, match="nobody waits"):
        store.put("k", b"data")
    assert time.monotonic() - began < 5


def test_what_is_not_wanted_ends_and_the_rest_of_the_store_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store, unwanted = hung_store(tmp_path, monkeypatch), threading.Event()
    threading.Timer(0.5, unwanted.set).start()
    began = time.monotonic()
    with unless(unwanted.is_set), pytest.raises(StoreError, match="nobody waits"):
        store.get("k")
    assert time.monotonic() - began < 10
    store.put("k", b"data")
    assert store.exists("k")


def test_pending_work_does_not_outlast_the_time_there_is(tmp_path: Path) -> None:
    """What prepares the next save may be slow: gigabytes of new memory."""
    job = new_job()
    with gpumove.Checkpointer(str(tmp_path), **job.parts(), **SETTINGS) as ckpt:
        ckpt.restore()
        job.train(0, 2, ckpt)
        runner, ended = ckpt._runner, threading.Event()
        runner._pending.append(runner._thread.submit(ended.wait, 30))
        time.sleep(0.1)
        began = time.monotonic()
        assert not runner.settle(None, abandon=True, timeout_s=0.5)
        assert time.monotonic() - began < 10
        ended.set()
        assert runner.settle(None, abandon=True, timeout_s=20)
