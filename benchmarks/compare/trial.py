"""One process of a trial: one peer saves a running training, or restores what was saved. Prints nothing."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import median
from time import perf_counter, sleep
from typing import Any

import torch

from benchmarks.compare.peers import Peer, make
from benchmarks.compare.workloads import make_job
from benchmarks.compare.world import World, join
from benchmarks.machine import memory, reset_peak
from benchmarks.places import Place
from benchmarks.workload import Job, StepTimes

_WARM_STEPS = 3
_IDLE_STEPS = 3
_MIN_STEPS = 2


class Training:
    """A job that trains, with a peer that is told of every step once it is there."""

    def __init__(self, job: Job, world: World) -> None:
        self.job, self.world = job, world
        self.peer: Peer | None = None
        self.idle: list[float] = []

    def run(self, steps: int) -> list[StepTimes]:
        """Some steps."""
        return [self._one() for _ in range(steps)]

    def run_while(self, busy: Callable[[], bool]) -> list[StepTimes]:
        """Steps until something has ended on all ranks, and the one in which it ends."""
        rows = self.run(_MIN_STEPS)
        while self.world.any(busy()):
            rows.append(self._one())
        return rows

    def rest(self, steps: int) -> list[float]:
        """Steps with nothing going on: what each costs without a save."""
        seconds = [row.total_s for row in self.run(steps)]
        self.idle += seconds
        return seconds

    def _one(self) -> StepTimes:
        row = self.job.train_step()
        began = perf_counter()
        if self.peer is not None:
            self.peer.stepped()
        row.wait_s += perf_counter() - began
        return row


class Watch(threading.Thread):
    """Waits for a save to be durable and notes the time."""

    def __init__(self, wait: Callable[[], None]) -> None:
        super().__init__(daemon=True)
        self._wait = wait
        self.ended: float | None = None
        self.error: BaseException | None = None
        self.start()

    def run(self) -> None:
        try:
            self._wait()
        except BaseException as error:  # noqa: BLE001 - raised by check() in the training thread
            self.error = error
        self.ended = perf_counter()

    def check(self) -> float:
        """When it was durable."""
        self.join()
        if self.error is not None:
            raise self.error
        return self.ended or 0.0


def save_trial(spec: dict[str, Any], job: Job, place: Place, world: World) -> dict[str, Any]:
    """Train, save several times, train on: what the saves cost."""
    # Modules are no part of a save, nor is a cloud's client: what of them is loaded late would count for some and not
    # for others.
    peer, training = make(spec["peer"], job, place, world), Training(job, world)
    place.nbytes()
    training.run(_WARM_STEPS)
    reset_peak()
    training.rest(_IDLE_STEPS)
    bare = memory()
    began = perf_counter()
    peer.open()
    open_s = perf_counter() - began
    job.close_bracket()
    training.peer = peer
    settling = training.run(_IDLE_STEPS)  # what a peer prepares after its start belongs to no save
    rows = []
    for _ in range(spec["saves"]):
        before = training.rest(_IDLE_STEPS)
        digest = job.digest()
        rows.append(row := _one_save(training, peer, place, bare_peak=bare.peak))
        reset_peak()
        # Steps on both sides of the save: other load on the machine comes and goes.
        step_s = median(before + training.rest(_IDLE_STEPS))
        row["kept_bytes"] = memory().peak - bare.peak
        row["lost_s"] = row["call_s"] + sum(row["steps_s"]) - len(row["steps_s"]) * step_s
        if world.rank == 0:
            peer.forget()
        world.barrier()
    idle = {}
    if spec["ranks"]:
        digest = job.digest()
        idle["idle_s"] = max(world.gather(_save_and_wait(peer, world)))
    peer.close()
    step_s = median(training.idle)
    return {
        **idle,
        "digest": world.gather(digest),
        "saves": [highest(world.gather(row)) for row in rows],
        "open_s": open_s,
        "settling_lost_s": sum(r.total_s for r in settling) - len(settling) * step_s,
        "idle_steps_s": training.idle,
        "step_s": step_s,
        "state_bytes": sum(world.gather(job.state_bytes)),
        "largest_rank_bytes": max(world.gather(job.state_bytes)),
        "training_peak_bytes": bare.peak,
    }


def _save_and_wait(peer: Peer, world: World) -> float:
    """Seconds until durable if nothing else runs: many ranks that train on few cores leave none to whoever saves."""
    world.barrier()
    began = perf_counter()
    peer.save()()
    return perf_counter() - began


def _one_save(training: Training, peer: Peer, place: Place, *, bare_peak: int) -> dict[str, Any]:
    """One save with training going on beside it."""
    world = training.world
    before_bytes = place.nbytes() if world.rank == 0 else 0
    world.barrier()
    reset_peak()
    began = perf_counter()
    wait = peer.save()
    called = perf_counter()
    watch = Watch(wait)
    rows = training.run_while(watch.is_alive)
    ended = watch.check()
    waited = sum(row.wait_s for row in rows)
    return {
        "step": training.job.step - len(rows),
        "call_s": called - began,
        "wait_s": waited,
        "stall_s": called - began + waited,
        "durable_s": ended - began,
        "steps_s": [row.total_s for row in rows],
        "stored_bytes": place.nbytes() - before_bytes if world.rank == 0 else 0,
        "peak_over_training_bytes": memory().peak - bare_peak,
        "own": peer.own_figures(),
    }


def restore_trial(spec: dict[str, Any], job: Job, place: Place, world: World) -> dict[str, Any]:
    """In a fresh process: restore into new objects, again into objects that have a state, and from a cold cache."""
    peer = make(spec["peer"], job, place, world)
    results = {"first": _one_restore(job, peer, world, spec["digest"])}
    for kind in ("again", "cold"):
        job.scramble()
        world.barrier()  # nobody reads while somebody evicts
        if kind == "cold" and not place.evict():
            continue
        results[kind] = _one_restore(job, peer, world, spec["digest"])
    peer.close()
    return results


def _one_restore(job: Job, peer: Peer, world: World, digests: Sequence[str]) -> dict[str, Any]:
    sleep(0.2)  # lets the threads of the restore before end
    before = memory().now
    reset_peak()
    world.barrier()
    began = perf_counter()
    parts = peer.restore()
    seconds = perf_counter() - began
    after = memory()
    row = {
        "restore_s": seconds,
        "parts": parts,
        "peak_over_before_bytes": after.peak - before,
        "peak_over_after_bytes": after.peak - after.now,
        "unequal": int(job.digest() != digests[world.rank]),
    }
    return highest(world.gather(row))


def highest(rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """All ranks' figures as one: the largest number of each, and rank 0's lists."""
    merged: dict[str, Any] = {}
    for key, value in rows[0].items():
        values = [row[key] for row in rows]
        if isinstance(value, dict):
            merged[key] = highest(values)
        else:
            merged[key] = max(values) if isinstance(value, (int, float)) else value
    return merged


def main(question: Path, answer: Path, rank: int) -> None:
    """Do what the JSON spec says; rank 0 writes a JSON result."""
    spec = json.loads(question.read_text())
    if spec["ranks"]:
        torch.set_num_threads(1)  # as torchrun does it
    world = join(spec["ranks"], rank, spec["meeting"])
    saving = spec["kind"] == "save"
    job = make_job(spec["workload"], spec["size_mb"], seed=0 if saving else 100, sharded=bool(spec["ranks"]))
    place = Place(spec["url"], spec["options"])
    result = (save_trial if saving else restore_trial)(spec, job, place, world)
    if world.rank == 0:
        answer.write_text(json.dumps(result))
    world.close()
