"""The watchdog, on hangs that are real."""

from __future__ import annotations

import ctypes
import logging
import os
import signal
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from gpumove.health import Finding, Health
from gpumove.state.peers import Peers
from gpumove.watchdog import Watchdog
from tests.dist.harness import run

pytestmark = pytest.mark.slow  # real processes against real deadlines: minutes, on a busy machine more

WAIT_S = 20.0


def until(true: Callable[[], object]) -> None:
    """Wait for it, with a bound."""
    deadline = time.monotonic() + WAIT_S
    while not true():
        assert time.monotonic() < deadline, "it did not happen"
        time.sleep(0.01)


class Caught(logging.Handler):
    """What was logged."""

    def __init__(self) -> None:
        super().__init__(logging.DEBUG)
        self.lines: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.lines.append(record.getMessage())


@contextmanager
def watching(hang_s: float, folder: Path | None, health: Health | None = None) -> Iterator[tuple[Health, list[str]]]:
    """A watchdog on this thread."""
    health, caught = health or Health(), Caught()
    logging.getLogger("gpumove").addHandler(caught)
    watchdog = Watchdog(health, hang_s=hang_s, folder=None if folder is None else str(folder))
    watchdog.start()
    try:
        yield health, caught.lines
    finally:
        watchdog.close()
        logging.getLogger("gpumove").removeHandler(caught)


def hang_in_a_call_without_the_gil(seconds: float) -> None:
    ctypes.CDLL(None).usleep(int(seconds * 1e6))


def hang_in_sleep(seconds: float) -> None:
    time.sleep(seconds)


def hang_at_a_lock(seconds: float) -> None:
    lock = threading.Lock()
    lock.acquire()
    lock.acquire(timeout=seconds)


@pytest.mark.parametrize("hang", [hang_in_sleep, hang_at_a_lock, hang_in_a_call_without_the_gil])
def test_a_hang_is_told_with_all_stacks(hang: Callable[[float], None], tmp_path: Path) -> None:
    left: list[Finding] = []
    with watching(0.4, tmp_path / "new", Health(rank=5, leave_on="hang", leave=left.append)) as (health, lines):
        health.step(120)
        hang(0.9)
        health.step(121)
        until(lambda: "goes on" in lines[-1])
    assert lines[-1] == "rank 5 goes on, at step 121"
    assert lines[0].startswith("after step 120: rank 5 has told no step for ")
    assert f"tests/test_watchdog.py:{hang.__code__.co_firstlineno + 1 + 2 * (hang is hang_at_a_lock)}" in lines[0]
    file = tmp_path / "new" / "hang-step-0000000120-rank-000005-1.txt"
    assert lines[1] == f"all stacks are in {file}"
    stacks = file.read_text()
    assert hang.__name__ in stacks
    assert "MainThread" in stacks
    assert "gpumove-watchdog" in stacks
    assert [(f.kind, f.step, f.rank) for f in left] == [("hang", 120, 5)]


def test_a_hang_that_lasts_is_told_at_doubled_intervals(tmp_path: Path) -> None:
    with watching(0.2, tmp_path) as (health, lines):
        health.step(1)
        began = time.monotonic()
        until(lambda: len(lines) >= 8)
        assert time.monotonic() - began >= 1.6
    assert len(list(tmp_path.iterdir())) == 4
    assert [note["kind"] for note in health.notes()] == ["hang"]


def test_without_a_folder_or_with_one_that_cannot_be_written_stacks_go_to_the_log(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    for folder in (None, tmp_path / "file" / "below"):
        with watching(0.2, folder) as (health, lines):
            health.step(1)
            until(lambda: any("all stacks:" in line for line in lines))
        assert "in until" in next(line for line in lines if "all stacks:" in line)
        assert ("cannot be written" in lines[1]) == (folder is not None)


def test_before_the_first_step_it_is_told_but_no_reason_to_leave(tmp_path: Path) -> None:
    """It may be compiling."""
    left: list[Finding] = []
    with watching(0.2, tmp_path, Health(leave_on="hang", leave=left.append)) as (_, lines):
        until(lambda: lines)
    assert lines[0].startswith("after step None: rank 0 has told no step")
    assert not left


def test_steps_and_busy_are_no_hang(tmp_path: Path) -> None:
    with watching(0.8, tmp_path) as (health, lines):
        for step in range(10):
            health.step(step)
            time.sleep(0.1)
        with health.busy():
            time.sleep(1.4)
        time.sleep(0.1)
    assert not lines


def stopped(rank: int) -> list[str]:
    """This process stands still for a while, as a virtual machine that is moved."""
    with watching(0.6, None) as (health, lines):
        health.step(1)
        subprocess.Popen(["sh", "-c", f"sleep 2; kill -CONT {os.getpid()}"])
        before = time.monotonic()
        os.kill(os.getpid(), signal.SIGSTOP)
        until(lambda: time.monotonic() - before > 1.5)
        health.step(2)
        return lines


def test_a_process_that_was_stopped_has_not_hung() -> None:
    assert run(stopped, 1, group=False) == [[]]


def told_of(folder: str, word: str) -> bool:
    """Whether rank 0 was seen there. On a machine with no time to spare the first look may be too early."""
    return any(word in file.read_text() for file in Path(folder).glob("hang-step-0000000007-rank-000000-*.txt"))


def missing_in_a_collective(rank: int, folder: str) -> list[str]:
    """Rank 1 is elsewhere while rank 0 waits for it, in C++."""
    dist.all_reduce(torch.ones(1))  # the first one imports and connects
    with watching(0.5, Path(folder)) as (health, lines):
        health.step(7)
        if rank == 1:
            until(lambda: told_of(folder, "all_reduce"))
        dist.all_reduce(torch.ones(1))
        return lines


def test_a_rank_that_waits_in_a_collective_is_told_while_it_waits(tmp_path: Path) -> None:
    lines, _ = run(missing_in_a_collective, 2, str(tmp_path))
    assert any("its training thread is in torch/distributed/" in line and "all_reduce" in line for line in lines)


def missing_at_a_meeting(rank: int, folder: str) -> list[str]:
    """The same where gpumove itself waits."""
    peers = Peers(timeout_s=WAIT_S)
    peers.meet("the first meeting")
    with watching(0.5, Path(folder)) as (health, lines):
        health.step(7)
        if rank == 1:
            until(lambda: told_of(folder, "in meet"))
        peers.meet("the meeting at step 8")
        peers.close()
        return lines


def test_what_gpumove_itself_waits_for_is_named(tmp_path: Path) -> None:
    lines, _ = run(missing_at_a_meeting, 2, str(tmp_path))
    assert any(
        "gpumove itself is in gpumove/state/peers.py:" in line and " meet (MainThread)" in line for line in lines
    )


def test_close_ends_the_thread_at_once_and_may_come_twice_or_without_a_start() -> None:
    watchdog = Watchdog(Health(), hang_s=600)
    watchdog.close()
    again = Watchdog(Health(), hang_s=600)
    again.start()
    again.start()
    began = time.monotonic()
    again.close()
    again.close()
    assert time.monotonic() - began < 0.9
    assert not [t for t in threading.enumerate() if t.name == "gpumove-watchdog"]


def test_what_fails_in_the_watchdog_ends_the_watchdog_only(caplog: pytest.LogCaptureFixture) -> None:
    def broken() -> bool:
        raise OSError("what now")

    watchdog = Watchdog(Health(), hang_s=0.2, saving=broken)
    watchdog.start()
    until(lambda: "gave up" in caplog.text)
    until(lambda: not [t for t in threading.enumerate() if t.name == "gpumove-watchdog"])
    watchdog.close()
    assert caplog.text.count("gave up") == 1
