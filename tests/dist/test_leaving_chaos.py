"""Leaving under faults drawn by chance: whatever happens, nothing is claimed that is not so, and nobody is late."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import time
from pathlib import Path
from typing import Any

import pytest

import gpumove
from tests.dist.harness import run
from tests.dist.jobs import make, url_of
from tests.dist.models import differences
from tests.dist.test_failures import on_put
from tests.dist.test_leaving import Attempts, Place, agent, join, leave, look, own_state, told
from tests.dist.test_leaving_attacks import hang

__all__ = ["agent"]

pytestmark = pytest.mark.slow

KINDS = ("packs/", "parts/", "manifests/", "log/")


def draw(seed: int) -> dict[str, Any]:
    """What goes wrong, on which of two ranks, and when."""
    chance = random.Random(seed)
    plan = {
        "in_s": chance.choice([1.0, 3.0, 5.0, 8.0]),
        "teller": chance.randrange(2),
        "victim": chance.randrange(2),
        "what": chance.choice(["hang", "hang once", "refuse", "pause", "slow", "nothing"]),
        "kind": chance.choice(KINDS),
        "in_flight": chance.random() < 0.5,
        "measured": chance.random() < 0.7,
        "second_s": chance.choice([None, None, 2.0]),
    }
    if plan["what"] == "pause":  # in the last save: a rank that is stopped in its training stops all others
        plan |= {"in_flight": False, "measured": True}
    return plan


def chaos(rank: int, place: Place, url: str, plan: dict[str, Any]) -> dict[str, Any]:
    join(rank, 2, place)
    job = make("ddp2", rank)
    ckpt = job.checkpointer(url, notices="", retry_s=20.0)
    with ckpt:
        ckpt.restore()
        job.train(ckpt, 0, 2)
        handle = ckpt.save(2)
        if plan["measured"]:
            handle.wait()
        job.train(None, 2, 3)
        if rank == plan["victim"]:
            go_wrong(plan["what"], plan["kind"])
        if plan["in_flight"] and plan["measured"]:
            ckpt.save(3)
        job.train(None, 3, 4)
        began = time.monotonic()
        if rank == plan["teller"]:
            ckpt.request_leave(in_s=plan["in_s"])
        elif plan["second_s"] is not None:
            ckpt.request_leave(in_s=plan["second_s"])
        left = leave(job, ckpt)
        seconds = time.monotonic() - began
    return {"left": left, "seconds": seconds, "own": own_state(job), "closed": time.monotonic() - began, **told(ckpt)}


def go_wrong(what: str, kind: str) -> None:
    method = "create" if kind == "log/" else "put"
    if what.startswith("hang"):
        hang(method, kind, times=1 if what == "hang once" else 1 << 30)
    elif what == "slow":
        hang(method, kind, seconds=1.5)
    elif what == "pause" and kind != "log/":
        on_put(pause, kind)
    elif what == "refuse" and kind != "log/":
        on_put(refuse, kind)


def pause() -> None:
    """Be stopped for some seconds, as by a host that migrates."""
    subprocess.Popen(["sh", "-c", f"sleep 4; kill -CONT {os.getpid()}"])
    os.kill(os.getpid(), signal.SIGSTOP)


def refuse() -> None:
    raise ConnectionError("the bucket is gone")


SEEDS = range(int(os.environ.get("CHAOS_FROM", "0")), int(os.environ.get("CHAOS_TO", "10")))


@pytest.mark.parametrize("seed", SEEDS)
def test_nothing_is_claimed_that_is_not_so(seed: int, agent: Attempts, tmp_path: Path) -> None:
    plan, url = draw(seed), url_of(tmp_path)
    print(plan)
    found = run(chaos, 2, agent(), url, plan, group=False)
    for one in found:
        print({k: v for k, v in one.items() if k != "own"})
    steps = [c.step for c in gpumove.checkpoints(url)]
    deadline_s = min(plan["in_s"], plan["second_s"] or 100.0)
    for rank, one in enumerate(found):
        if plan["what"] != "pause" or rank != plan["victim"]:
            # An agreement has two seconds in any case, and one look at the log comes after that.
            assert one["seconds"] < max(deadline_s, 3.5)
            assert one["closed"] < max(deadline_s, 3.5) + 1.0
        if one["outcome"].startswith("durable"):
            assert one["step"] in steps
        else:
            assert max(steps, default=0) >= one["step"]
    assert len({one["left"] for one in found}) == 1
    if not steps:
        return
    again = run(look, 2, "ddp2", 2, agent(), url, group=False)
    assert {step for step, _ in again} == {steps[-1]}
    for before, (step, after) in zip(found, again):
        if step == before["left"]:
            assert not differences(before["own"], after)
