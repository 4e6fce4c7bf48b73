"""Signals as notices, in real processes: each test is a program that watches, and what is sent to it."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import textwrap
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest

from gpumove.notices.signals import Signals

PROGRAM = """
import asyncio, ctypes, faulthandler, json, logging, os, signal, sys, threading, time
from gpumove.notices.signals import Signals
from gpumove.notices.watcher import Watcher

def say(**what):
    os.write(1, (json.dumps({"at": time.monotonic(), **what}) + "\\n").encode())

class Said(logging.Handler):
    def emit(self, record):
        say(log=record.getMessage())

logging.getLogger("gpumove").addHandler(Said())
logging.getLogger("gpumove").setLevel(logging.INFO)

def told(notice):
    say(source=notice.source, detail=notice.detail, deadline=notice.deadline, now=time.time())

def start(again_s=5.0):
    watcher = Watcher([Signals(again_s=again_s)], told)
    watcher.start()
    say(ready=True)
    return watcher

def collective(seconds):
    '''The main thread waits in C for what never comes, and no signal interrupts that.'''
    libc, mutex = ctypes.CDLL(None), ctypes.create_string_buffer(64)
    libc.pthread_mutex_lock(mutex)
    libc.pthread_mutex_timedlock(mutex, (ctypes.c_long * 2)(int(time.time() + seconds), 0))

"""


class Program:
    def __init__(self, process: subprocess.Popen[str]) -> None:
        self._process = process
        self.pid = process.pid

    def said(self, key: str) -> dict[str, Any]:
        """The next line that has this key."""
        assert self._process.stdout is not None
        for line in self._process.stdout:
            found: dict[str, Any] = json.loads(line)
            if key in found:
                return found
        raise AssertionError(f"it ended without saying {key}")

    def rest(self) -> list[dict[str, Any]]:
        assert self._process.stdout is not None
        return [json.loads(line) for line in self._process.stdout]

    def send(self, *numbers: signal.Signals) -> float:
        for number in numbers:
            os.kill(self.pid, number)
        return time.monotonic()

    def end(self) -> int:
        return self._process.wait(30)


@contextmanager
def program(text: str) -> Iterator[Program]:
    code = PROGRAM + textwrap.dedent(text)
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True) as process:
        killer = threading.Timer(60, process.kill)
        killer.start()
        try:
            yield Program(process)
        finally:
            killer.cancel()
            process.kill()


IDLE = "start(); time.sleep(30)"


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2])
def test_a_signal_is_a_notice(number: signal.Signals) -> None:
    with program(IDLE) as running:
        running.said("ready")
        running.send(number)
        notice = running.said("source")
        assert (notice["source"], notice["detail"]) == (number.name.lower(), number.name)
        assert notice["deadline"] is None


def test_it_is_heard_inside_a_collective() -> None:
    """And it is one notice, although the main thread gets to its handler much later."""
    with program("start(again_s=0.5); collective(8); say(back=True); time.sleep(0.5)") as running:
        running.said("ready")
        time.sleep(0.2)
        sent = running.send(signal.SIGTERM)
        assert running.said("source")["at"] - sent < 4
        assert running.said("back")["at"] - sent > 4
        assert running.rest() == []


def test_it_is_heard_by_a_process_with_many_files() -> None:
    text = """
    import resource
    resource.setrlimit(resource.RLIMIT_NOFILE, (4000, resource.getrlimit(resource.RLIMIT_NOFILE)[1]))
    files = [os.open(os.devnull, os.O_RDONLY) for _ in range(1100)]
    start(); time.sleep(30)
    """
    with program(text) as running:
        running.said("ready")
        running.send(signal.SIGTERM)
        assert running.said("source")


def test_slurm_continues_first() -> None:
    with program(IDLE) as running:
        running.said("ready")
        running.send(signal.SIGCONT, signal.SIGTERM)
        assert running.said("source")["source"] == "sigterm"
        running.send(signal.SIGCONT)
        running.send(signal.SIGKILL)
        assert running.rest() == []


def test_sigterm_again_means_now_and_at_once_it_is_the_same_one() -> None:
    with program("start(again_s=1.5); time.sleep(30)") as running:
        running.said("ready")
        running.send(signal.SIGTERM)
        running.send(signal.SIGTERM)
        assert running.said("source")["deadline"] is None
        time.sleep(1.6)
        running.send(signal.SIGTERM)
        again = running.said("source")
        assert again["detail"] == "SIGTERM again"
        assert abs(again["deadline"] - again["now"]) < 5
        time.sleep(0.1)
        running.send(signal.SIGTERM)  # a third one changes nothing, and does not kill
        time.sleep(0.3)
        running.send(signal.SIGKILL)
        assert running.rest() == []


def test_handlers_of_others_stay() -> None:
    text = """
    signal.signal(signal.SIGTERM, lambda *_: say(theirs="term"))
    signal.signal(signal.SIGUSR2, signal.SIG_IGN)
    faulthandler.register(signal.SIGUSR1, file=open(os.devnull, "w"))
    watcher = start()
    os.kill(os.getpid(), signal.SIGTERM)
    os.kill(os.getpid(), signal.SIGUSR1)
    time.sleep(0.5)
    watcher.close()
    say(after=signal.getsignal(signal.SIGTERM) is not signal.SIG_DFL)
    """
    with program(text) as running:
        assert "handlers of somebody else" in running.said("log")["log"] + running.said("log")["log"]
        assert running.said("theirs")["theirs"] == "term"
        lines = running.rest()
        assert [line for line in lines if "source" in line] == []
        assert lines[-1]["after"]


def test_those_that_are_free_are_taken() -> None:
    text = "signal.signal(signal.SIGTERM, lambda *_: say(theirs=True)); start(); time.sleep(30)"
    with program(text) as running:
        assert "SIGTERM: somebody else has a handler" in running.said("log")["log"]
        running.said("ready")
        running.send(signal.SIGUSR1)
        assert running.said("source")["source"] == "sigusr1"
        running.send(signal.SIGTERM)
        assert running.said("theirs")


def test_afterwards_a_signal_kills_again() -> None:
    with program("start().close(); say(closed=True); time.sleep(30)") as running:
        running.said("closed")
        running.send(signal.SIGTERM)
        assert running.end() == -signal.SIGTERM


def test_closed_by_another_thread_too() -> None:
    text = """
    thread = threading.Thread(target=start().close)
    thread.start(); thread.join()
    say(closed=True)
    time.sleep(30)
    """
    with program(text) as running:
        running.said("closed")
        running.send(signal.SIGTERM)
        assert running.end() == -signal.SIGTERM


def test_only_the_main_thread_can_take_them() -> None:
    text = "t = threading.Thread(target=start); t.start(); t.join(); time.sleep(30)"
    with program(text) as running:
        assert "main thread" in running.said("log")["log"]
        running.said("ready")
        running.send(signal.SIGTERM)
        assert running.end() == -signal.SIGTERM


@pytest.mark.parametrize("forker", ["main", "another"])
def test_a_forked_child_is_not_the_job(forker: str) -> None:
    text = """
    start()
    def fork():
        if (child := os.fork()) == 0:
            time.sleep(30)
            os._exit(0)
        time.sleep(0.3)
        os.kill(child, signal.SIGTERM)
        say(status=os.waitpid(child, 0)[1])
    if FORKER == "main":
        fork()
    else:
        thread = threading.Thread(target=fork)
        thread.start(); thread.join()
    time.sleep(0.3)
    say(end=True)
    """
    with program(text.replace("FORKER", repr(forker))) as running:
        assert running.said("status")["status"] == signal.SIGTERM
        assert [line for line in running.rest() if "source" in line] == []


def test_an_earlier_wakeup_fd_goes_on() -> None:
    """asyncio in the main thread: its own signal handlers work on, and ours too."""
    text = """
    async def main():
        loop, heard = asyncio.get_running_loop(), asyncio.Event()
        loop.add_signal_handler(signal.SIGHUP, heard.set)
        watcher = start()
        await asyncio.wait_for(heard.wait(), 20)
        say(asyncio=True)
        await asyncio.sleep(0)
        heard.clear()
        watcher.close()
        say(closed=True)
        await asyncio.wait_for(heard.wait(), 20)
        say(asyncio=True)
    asyncio.run(main())
    """
    with program(text) as running:
        running.said("ready")
        running.send(signal.SIGTERM)
        assert running.said("source")["source"] == "sigterm"
        running.send(signal.SIGHUP)
        assert running.said("asyncio")
        running.said("closed")
        running.send(signal.SIGHUP)
        assert running.said("asyncio")
        assert running.end() == 0


def test_a_later_wakeup_fd_does_not_make_it_deaf() -> None:
    text = """
    async def main():
        asyncio.get_running_loop().add_signal_handler(signal.SIGHUP, print)
        say(taken=True)
        await asyncio.sleep(30)
    start()
    asyncio.run(main())
    """
    with program(text) as running:
        running.said("taken")
        running.send(signal.SIGTERM)
        assert running.said("source")["source"] == "sigterm"


def test_an_earlier_wakeup_fd_whose_number_was_reused_is_left_alone() -> None:
    text = """
    r, w = os.pipe()
    os.set_blocking(w, False)
    signal.set_wakeup_fd(w)
    watcher = start()
    os.close(w)
    fd = os.open("/tmp", os.O_TMPFILE | os.O_RDWR)
    assert fd == w, (fd, w)
    os.kill(os.getpid(), signal.SIGTERM)
    time.sleep(0.5)
    watcher.close()
    say(bytes=os.fstat(fd).st_size, wakeup=signal.set_wakeup_fd(-1))
    """
    with program(text) as running:
        assert running.said("source")
        found = running.said("bytes")
        assert (found["bytes"], found["wakeup"]) == (0, -1)


def test_a_storm_is_one_notice_and_does_not_block() -> None:
    with program(IDLE.replace("start()", "start(again_s=60)")) as running:
        running.said("ready")
        for _ in range(3000):
            running.send(signal.SIGUSR1, signal.SIGTERM)
        sources = [running.said("source")["source"]]
        time.sleep(0.5)
        running.send(signal.SIGKILL)
        sources += [line["source"] for line in running.rest() if "source" in line]
        assert len(sources) == 1


def test_nothing_stays_behind() -> None:
    before, descriptors = signal.getsignal(signal.SIGTERM), len(os.listdir("/proc/self/fd"))
    for _ in range(3):
        source = Signals()
        source.open()
        assert signal.getsignal(signal.SIGTERM) != before
        source.close()
        source.close()
        assert source.poll() is None
    assert signal.getsignal(signal.SIGTERM) == before
    assert signal.set_wakeup_fd(-1) == -1
    assert len(os.listdir("/proc/self/fd")) == descriptors
