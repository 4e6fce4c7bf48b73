"""One process of the comparison: one peer saves a running training, or restores what was saved. Prints nothing.

`python -m benchmarks.trial SPEC OUT` reads a JSON spec and writes a JSON result; benchmarks.save_restore starts it.
"""

from __future__ import annotations

import json
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from statistics import median
from time import perf_counter, sleep
from typing import Any

from benchmarks.machine import memory, reset_peak
from benchmarks.peers import Peer, make
from benchmarks.places import Place
from benchmarks.workload import Job, StepTimes

_WARM_STEPS = 4
_IDLE_STEPS = 5
_MIN_STEPS = 2


class Training:
    """A job that trains, with a peer that is told of every step once it is there."""

    def __init__(self, job: Job) -> None:
        self.job = job
        self.peer: Peer | None = None
        self.idle: list[float] = []

    def run(self, steps: int) -> list[StepTimes]:
        """Some steps."""
        return [self._one() for _ in range(steps)]

    def run_while(self, busy: Callable[[], bool]) -> list[StepTimes]:
        """Steps until something ends, and the one in which it ends."""
        rows = self.run(_MIN_STEPS)
        while busy():
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


def save_trial(spec: dict[str, Any]) -> dict[str, Any]:
    """Train, save several times, train on: what the saves cost."""
    job, place = Job(spec["size_mb"]), Place(spec["url"], spec["options"])
    training = Training(job)
    training.run(_WARM_STEPS)
    reset_peak()
    training.rest(_IDLE_STEPS)
    bare = memory()
    peer = make(spec["peer"], job, place)
    began = perf_counter()
    peer.open()
    open_s = perf_counter() - began
    job.close_bracket()
    training.peer = peer
    settling = training.run(_IDLE_STEPS)  # what a peer prepares after its start belongs to no save
    rows = []
    for number in range(spec["saves"]):
        last = number + 1 == spec["saves"]
        before = training.rest(_IDLE_STEPS)
        rows.append(row := _one_save(training, peer, place, bare_peak=bare.peak, with_digest=last))
        reset_peak()
        # Steps on both sides of the save: other load on the machine comes and goes.
        step_s = median(before + training.rest(_IDLE_STEPS))
        row["kept_bytes"] = memory().peak - bare.peak
        row["lost_s"] = row["call_s"] + sum(row["steps_s"]) - len(row["steps_s"]) * step_s
        peer.forget()
    peer.close()
    step_s = median(training.idle)
    return {
        "saves": rows,
        "open_s": open_s,
        "settling_lost_s": sum(r.total_s for r in settling) - len(settling) * step_s,
        "idle_steps_s": training.idle,
        "step_s": step_s,
        "state_bytes": job.state_bytes,
        "training_peak_bytes": bare.peak,
    }


def _one_save(training: Training, peer: Peer, place: Place, *, bare_peak: int, with_digest: bool) -> dict[str, Any]:
    """One save with training going on beside it."""
    digest = training.job.digest() if with_digest else None
    before_bytes = place.nbytes()
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
        "stored_bytes": place.nbytes() - before_bytes,
        "peak_over_training_bytes": memory().peak - bare_peak,
        "digest": digest,
        "own": peer.own_figures(),
    }


def restore_trial(spec: dict[str, Any]) -> dict[str, Any]:
    """In a fresh process: restore into new objects, again into objects that have a state, and from a cold cache."""
    job, place = Job(spec["size_mb"], seed=1), Place(spec["url"], spec["options"])
    peer = make(spec["peer"], job, place)
    results = {"first": _one_restore(job, peer, spec["digest"])}
    for kind in ("again", "cold"):
        job.scramble()
        if kind == "cold" and not place.evict():
            continue
        results[kind] = _one_restore(job, peer, spec["digest"])
    peer.close()
    return results


def _one_restore(job: Job, peer: Peer, digest: str) -> dict[str, Any]:
    sleep(0.2)  # lets the threads of the restore before end
    before = memory().now
    reset_peak()
    began = perf_counter()
    parts = peer.restore()
    seconds = perf_counter() - began
    after = memory()
    return {
        "restore_s": seconds,
        "parts": parts,
        "peak_over_before_bytes": after.peak - before,
        "peak_over_after_bytes": after.peak - after.now,
        "equal": job.digest() == digest,
    }


def main(arguments: list[str]) -> None:
    """Do what the spec says."""
    spec = json.loads(Path(arguments[0]).read_text())
    result = {"save": save_trial, "restore": restore_trial}[spec["kind"]](spec)
    Path(arguments[1]).write_text(json.dumps(result))


if __name__ == "__main__":
    main(sys.argv[1:])
