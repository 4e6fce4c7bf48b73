"""Runs one trial: fresh processes on a fresh place, one per rank. A failure is part of the result."""

from __future__ import annotations

import json
import multiprocessing
import os
import re
import resource
import shutil
import tempfile
import time
import warnings
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from multiprocessing.connection import wait
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

from benchmarks.compare import trial
from benchmarks.compare.peers import PEERS
from benchmarks.compare.plan import DISK, Trial
from benchmarks.places import Place

ROOT = Path(__file__).resolve().parents[2]
_TRIAL_S = 900.0
_BLOCK_BYTES = 32 << 20
_PRELOAD = ["__main__", "benchmarks.compare.peers.dcp", "benchmarks.compare.peers.ours", "torch.distributed.fsdp"]
"""Imported once and forked from: importing torch would take longer than most of what is measured."""
_QUIET = {
    "NO_PROXY": "127.0.0.1,localhost",
    "no_proxy": "127.0.0.1,localhost",
    "MASTER_ADDR": "127.0.0.1",
    "AWS_EC2_METADATA_DISABLED": "true",
    "AWS_CONFIG_FILE": os.devnull,
    "AWS_SHARED_CREDENTIALS_FILE": os.devnull,
    "AWS_DEFAULT_REGION": "us-east-1",
    "JAX_PLATFORMS": "cpu",
}


class ChildError(Exception):
    """A process of a trial failed; the message is its last words."""


def run_trial(chosen: Trial, size_mb: float, saves: int, store: Place) -> dict[str, Any]:
    """Save in one process per rank, restore in others, below ``store``; nothing is left there."""
    section = chosen.section
    sample: dict[str, Any] = {"round": chosen.round, **vars(section), "peer": chosen.peer, "size_mb": size_mb}
    if chosen.peer != DISK and not PEERS[chosen.peer].installed:
        return {**sample, "error": "not installed"}
    if chosen.peer == DISK:
        return {**sample, "disk_s": write_and_sync(store, max(1, section.ranks), int(size_mb * 1e6))}
    place = Place(store.child("run"), store.options)
    spec = {
        "peer": chosen.peer,
        "workload": section.workload,
        "ranks": section.ranks,
        "size_mb": size_mb,
        "url": place.url,
        "options": dict(place.options),
    }
    with tempfile.TemporaryDirectory() as folder:
        try:
            sample["save"] = _run_processes({**spec, "kind": "save", "saves": saves}, Path(folder))
            digest = sample["save"]["digest"]
            sample["restore"] = _run_processes({**spec, "kind": "restore", "digest": digest}, Path(folder))
        except ChildError as error:
            sample["error"] = str(error).replace(str(store.local), "").replace(str(ROOT), "")
        finally:
            place.remove()
    return sample


def _run_processes(spec: Mapping[str, Any], folder: Path) -> dict[str, Any]:
    """One process per rank.

    Raises:
        ChildError: one failed; the others are killed.
    """
    kind, ranks = spec["kind"], max(1, spec["ranks"])
    question, answer = folder / f"{kind}.json", folder / f"{kind}-result.json"
    question.write_text(json.dumps({**spec, "meeting": (folder / f"{kind}-meeting").as_uri()}))
    logs = [folder / f"{kind}-{rank}.log" for rank in range(ranks)]
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(_PRELOAD)
    processes = []
    try:
        for rank, log in enumerate(logs):
            log.touch()  # a process may die before it gets there
            processes.append(context.Process(target=_child, args=(question, answer, rank, log)))
            processes[-1].start()
        _wait(processes, logs)
    finally:
        for process in processes:
            process.kill()
            process.join()
    result: dict[str, Any] = json.loads(answer.read_text())
    return result


def _child(question: Path, answer: Path, rank: int, log: Path) -> None:
    """In the new process: nothing is printed but what it dies of, and that goes to its log."""
    os.environ.update(_QUIET)
    os.chdir(ROOT)
    warnings.simplefilter("ignore")
    most = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))  # shared memory takes one per tensor
    with log.open("wb") as file, open(os.devnull, "wb") as nothing:
        os.dup2(nothing.fileno(), 1)
        os.dup2(file.fileno(), 2)
    trial.main(question, answer, rank)


def _wait(processes: Sequence[BaseProcess], logs: Sequence[Path]) -> None:
    """Until all have ended well, or one has not."""
    deadline = time.monotonic() + _TRIAL_S
    while time.monotonic() < deadline:
        states = [process.exitcode for process in processes]
        for state, log in zip(states, logs):
            if state:
                raise ChildError(f"exit status {state}: {_last_words(log)}")
        if all(state == 0 for state in states):
            return
        wait([process.sentinel for process in processes if process.exitcode is None], timeout=1.0)
    raise ChildError(f"did not end within {_TRIAL_S:.0f} s")


def _last_words(log: Path) -> str:
    """The last line of a traceback, which is the error; what is printed after it is not."""
    lines = [line.strip() for line in log.read_text(errors="replace").splitlines() if line.strip()]
    errors = [line for line in lines if re.match(r"[\w.]*(Error|Exception|Failure)\b", line)]
    return (errors or lines or ["no words"])[-1][-300:]


def write_and_sync(store: Place, writers: int, nbytes: int) -> float:
    """Seconds for plain files of so many bytes in all, written and synced by so many writers at once."""
    if store.local is None:
        raise ValueError("only a disk can be written to like this")
    folder = store.local / "plain"
    folder.mkdir(parents=True)
    block = os.urandom(min(_BLOCK_BYTES, max(1, nbytes // writers)))

    def write(number: int) -> None:
        with (folder / str(number)).open("wb", buffering=0) as file:
            for _ in range(max(1, round(nbytes / writers / len(block)))):
                file.write(block)
            os.fsync(file.fileno())

    with ThreadPoolExecutor(writers) as pool:
        began = time.perf_counter()
        list(pool.map(write, range(writers)))
        seconds = time.perf_counter() - began
    shutil.rmtree(folder)
    return seconds
