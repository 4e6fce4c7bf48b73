"""Real processes with a gloo group: started in milliseconds, never left hanging, and honest about why they failed.

The processes are forked from a server that has imported torch and gpumove once, so every scenario gets *fresh* ones: a
resumed run shares nothing with the one before it, and a rank may be killed for good.
"""

from __future__ import annotations

import contextlib
import faulthandler
import logging
import multiprocessing as mp
import os
import pickle
import signal
import tempfile
import time
import traceback
from collections.abc import Callable, Collection
from dataclasses import dataclass
from datetime import timedelta
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

GLOO_S = 20.0
"""Bound on the job's own collectives: a deadlock shows as an error of torch before it shows as a hang of the test."""
_GRACE_S, _END_S = 5.0, 20.0
_START_S = 180.0
"""Bound on the start of a process: the first one waits until the server has imported torch."""
_PRELOAD = [
    "pytest", "torch", "torch.distributed.fsdp", "torch.distributed.tensor.parallel", "gpumove.checkpointer",
    "gpumove.store.files", "gpumove.state.loader", "torch._dynamo", "numpy.random", "tests.dist.models",
]  # fmt: skip


class Lost:
    """What a rank answers that was killed."""

    def __repr__(self) -> str:
        return "LOST"


LOST = Lost()


@dataclass
class _Rank:
    process: mp.process.BaseProcess
    answers: Connection
    stacks: Path
    result: Any = LOST
    failure: str | None = None
    done: bool = False


@dataclass(frozen=True)
class _Task:
    """What one process is told."""

    scenario: Callable[..., Any]
    arguments: tuple[Any, ...]
    keywords: dict[str, Any]
    rank: int
    world_size: int
    group: bool
    meeting: Path
    stacks: Path


def run(
    scenario: Callable[..., Any],
    world_size: int,
    *arguments: Any,
    timeout_s: float = 60.0,
    lost: Collection[int] = (),
    group: bool = True,
    **keywords: Any,
) -> list[Any]:
    """Run ``scenario(rank, *arguments, **keywords)`` in ``world_size`` fresh processes that share a gloo group.

    Args:
        scenario: a function of a module, importable by its name.
        world_size: number of processes.
        *arguments: passed on, pickled.
        timeout_s: bound on everything after the start; then all stacks are dumped, all processes killed and the test
            fails.
        lost: ranks that are expected to be killed.
        group: whether there is a process group; without one, only one process makes sense.
        **keywords: passed on, pickled.

    Returns:
        What every rank returned; ``LOST`` for killed ones.
    """
    with tempfile.TemporaryDirectory(prefix="gpumove-dist-") as folder:
        place = Path(folder)
        ranks = [
            _start(_Task(scenario, arguments, keywords, r, world_size, group, place / "meeting", place / f"stacks-{r}"))
            for r in range(world_size)
        ]
        try:
            for rank in ranks:
                _see_begin(rank)
            hung = _collect(ranks, timeout_s, lost)
            if hung:
                _ask_for_stacks(ranks)
            stacks = [r.stacks.read_text() if r.stacks.exists() else "" for r in ranks]
        finally:
            for rank in ranks:
                rank.process.kill()
                rank.process.join()
    problems = [f"--- rank {n}\n{r.failure}" for n, r in enumerate(ranks) if r.failure]
    died = [n for n, r in enumerate(ranks) if r.done and r.result is LOST and not r.failure and n not in lost]
    problems += [f"--- rank {n} died (exit code {ranks[n].process.exitcode})\n{stacks[n]}" for n in died]
    problems += [f"--- rank {n} was to be lost and is not" for n in lost if ranks[n].result is not LOST]
    if hung:
        problems.append(f"--- ranks {hung} did not end; the stacks:")
        problems += [f"--- rank {n}\n{text}" for n, text in enumerate(stacks)]
    if problems:
        pytest.fail("\n".join(problems), pytrace=False)
    return [rank.result for rank in ranks]


def _start(task: _Task) -> _Rank:
    context = mp.get_context("forkserver")
    context.set_forkserver_preload(_PRELOAD)
    ours, theirs = context.Pipe()
    process = context.Process(target=_child, args=(task, theirs), daemon=True)
    process.start()
    theirs.close()
    return _Rank(process, ours, task.stacks)


def _see_begin(rank: _Rank) -> None:
    """Wait for a process's first word; if it has none, ``_collect`` tells why."""
    if rank.answers.poll(_START_S):
        with contextlib.suppress(EOFError):
            rank.answers.recv_bytes()


def _collect(ranks: list[_Rank], timeout_s: float, lost: Collection[int]) -> list[int]:
    """Wait for every rank's answer and end; the ranks that hang. A rank that fails leaves the others little time."""
    deadline = time.monotonic() + timeout_s
    while left := [r for r in ranks if not r.done]:
        seconds = deadline - time.monotonic()
        if seconds <= 0 or not (ready := wait([r.answers for r in left], seconds)):
            return [n for n, r in enumerate(ranks) if not r.done]
        for rank in left:
            if rank.answers in ready:
                _take(rank)
                if rank.failure or (rank.result is LOST and ranks.index(rank) not in lost):
                    deadline = min(deadline, time.monotonic() + _GRACE_S)
    for rank in ranks:
        with contextlib.suppress(OSError):
            rank.answers.send_bytes(b"all have answered")
    for rank in ranks:
        rank.process.join(_END_S)  # an answer is not the end: a thread may keep the process
    return [n for n, r in enumerate(ranks) if r.process.is_alive()]


def _take(rank: _Rank) -> None:
    rank.done = True
    with contextlib.suppress(EOFError):
        kind, value = pickle.loads(rank.answers.recv_bytes())
        rank.result, rank.failure = (value, None) if kind == "result" else (None, value)


def _ask_for_stacks(ranks: list[_Rank]) -> None:
    """Let every live process write down where it is."""
    for rank in ranks:
        if rank.process.is_alive() and rank.process.pid:
            os.kill(rank.process.pid, signal.SIGUSR1)
    time.sleep(0.5)


def _child(task: _Task, answers: Connection) -> None:
    with open(task.stacks, "w") as stacks:
        answers.send_bytes(b"begun")
        faulthandler.enable(file=stacks)
        faulthandler.register(signal.SIGUSR1, file=stacks)
        os.environ["GLOO_SOCKET_IFNAME"] = "lo"  # else gloo asks the resolver for this machine's name
        logging.getLogger("torch.distributed.tensor").setLevel(logging.ERROR)  # it finds our gathers suboptimal
        torch.set_num_threads(1)  # more would share two cores among themselves, and sum in another order
        try:
            if task.group:
                dist.init_process_group(
                    "gloo",
                    init_method=f"file://{task.meeting}",
                    rank=task.rank,
                    world_size=task.world_size,
                    timeout=timedelta(seconds=GLOO_S),
                )
            answer = ("result", task.scenario(task.rank, *task.arguments, **task.keywords))
        except BaseException:  # whatever it is, the test is told
            answer = ("failure", traceback.format_exc())
        # Plain pickle: torch's own reducer for pipes would hand over shared memory that dies with this process.
        answers.send_bytes(pickle.dumps(answer))
        # Whoever leaves a gloo group early breaks what others still have to receive.
        answers.poll(GLOO_S)
        answers.close()
        if dist.is_initialized():
            dist.destroy_process_group()
        faulthandler.unregister(signal.SIGUSR1)
        faulthandler.disable()


def kill_self() -> None:
    """End this process as a lost machine would: at once, without any clean-up."""
    os.kill(os.getpid(), signal.SIGKILL)
