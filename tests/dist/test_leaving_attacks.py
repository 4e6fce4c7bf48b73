"""Leaving while somebody works against it: hung stores, stopped ranks, several notices, calls at the wrong time."""

from __future__ import annotations

import contextlib
import os
import signal
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

import gpumove
from gpumove import Checkpointer
from gpumove.store.files import FileBackend
from gpumove.store.retry import in_thread
from tests.dist.harness import run
from tests.dist.jobs import equal_linear, make, url_of
from tests.dist.test_failures import on_put
from tests.dist.test_leaving import NOTICES, Attempts, Place, agent, join, leave, slow_puts, told, train

__all__ = ["agent"]

pytestmark = pytest.mark.slow  # real processes against real deadlines


def hang(method: str, *kinds: str, seconds: float = 40.0, times: int = 1 << 30) -> None:
    """From now on this call hangs for objects of these kinds, as one to a mount that is gone."""
    original = getattr(FileBackend, method)
    left = [times]

    def hooked(self: FileBackend, what: Any, *rest: Any) -> Any:
        key = what[0] if isinstance(what, list) else what
        if key.startswith(kinds) and left[0] > 0:
            left[0] -= 1
            in_thread(lambda ticket: time.sleep(seconds), rest[-1])
        return original(self, what, *rest)

    setattr(FileBackend, method, hooked)


# ---------------------------------------------------------------- stores that hang


def while_retention_deletes(rank: int, place: Place, url: str) -> dict[str, Any]:
    """Retention after step 4 hangs in a delete; the notice comes meanwhile."""
    join(rank, 2, place)
    model = equal_linear()
    with Checkpointer(url, model=model, **{**NOTICES, "keep_last": 1, "every_steps": 2}) as ckpt:
        ckpt.restore()

        def work(step: int) -> None:
            if step == 3:
                hang("delete", "manifests/", "parts/", "packs/")
            if step == 5:
                if ckpt.last is not None:
                    ckpt.last.wait(20)
                time.sleep(0.3)
                if rank == 1:
                    ckpt.request_leave(in_s=20)
            time.sleep(0.05)

        began = time.monotonic()
        left = train(ckpt, model, work, 0)
        return {"left": left, "seconds": time.monotonic() - began, **told(ckpt)}


def test_retention_gives_way_to_the_last_save(agent: Attempts, tmp_path: Path) -> None:
    url = url_of(tmp_path)
    for found in run(while_retention_deletes, 2, agent(), url, group=False):
        assert found["outcome"] == f"durable: step {found['left']}"
        assert found["seconds"] < 10
    assert gpumove.checkpoints(url)[-1].step == found["left"]


def with_a_hung_save_in_flight(rank: int, place: Place, url: str, measured: bool, in_s: float) -> dict[str, Any]:
    """The save of step 4 has an upload that hangs; with some saves measured before, or none."""
    join(rank, 2, place)
    model = equal_linear()
    with Checkpointer(url, model=model, **NOTICES) as ckpt:
        ckpt.restore()
        train(ckpt, model, lambda step: None, 0, until=3)
        if measured:
            ckpt.save(3).wait()
        if rank == 0:
            hang("put", "packs/", times=1)
        train(ckpt, model, lambda step: None, 3, until=4)
        ckpt.save(4)

        def work(step: int) -> None:
            time.sleep(0.02)
            if step == 60 and rank == 1:
                ckpt.request_leave(in_s=in_s)

        train(ckpt, model, lambda step: None, 4, until=59)
        began = time.monotonic()
        left = train(ckpt, model, work, 59)
        seconds = time.monotonic() - began
    return {"left": left, "seconds": seconds, "closed": time.monotonic() - began, **told(ckpt)}


def test_a_save_in_flight_that_hangs_is_given_up_for_a_new_one(agent: Attempts, tmp_path: Path) -> None:
    url = url_of(tmp_path)
    for found in run(with_a_hung_save_in_flight, 2, agent(), url, True, 12.0, group=False):
        assert found["outcome"] == f"durable: step {found['left']}"
        assert found["closed"] < 12


def test_where_nothing_was_measured_a_hung_save_costs_the_time_and_no_more(agent: Attempts, tmp_path: Path) -> None:
    for found in run(with_a_hung_save_in_flight, 2, agent(), url_of(tmp_path), False, 6.0, group=False):
        assert found["outcome"] == f"not durable: resumes from step 0, {found['left']} steps lost"
        assert found["seconds"] < 6
        assert found["closed"] < 7


def nearer(rank: int, place: Place, url: str) -> dict[str, Any]:
    """All puts hang. The first notice leaves a minute, the second one seconds; it comes while the first is followed."""
    join(rank, 2, place)
    model = equal_linear()
    with Checkpointer(url, model=model, **NOTICES) as ckpt:
        ckpt.restore()
        ckpt.save(0).wait()
        train(ckpt, model, lambda step: None, 0, until=3)
        hang("put", "packs/")
        ckpt.request_leave(in_s=60)
        began = time.monotonic()
        if rank == 1:
            threading.Timer(2.0, lambda: ckpt.request_leave(in_s=3)).start()
        left = train(ckpt, model, lambda step: None, 3)
        return {"left": left, "seconds": time.monotonic() - began, **told(ckpt)}


def test_a_nearer_deadline_counts_while_the_job_leaves(agent: Attempts, tmp_path: Path) -> None:
    for found in run(nearer, 2, agent(), url_of(tmp_path), group=False):
        assert found["outcome"].startswith("not durable: resumes from step 0")
        assert 3 < found["seconds"] < 5.2


# ---------------------------------------------------------------- calls at the wrong time


def explicit(rank: int, place: Place, url: str, slow_s: float, in_s: float) -> dict[str, Any]:
    """A loop that saves explicitly after every step, and once more at its end."""
    join(rank, 2, place)
    model = equal_linear()
    slow_puts(slow_s)
    with Checkpointer(url, model=model, **NOTICES) as ckpt:
        ckpt.restore()
        for step in range(1, 2000):
            dist.all_reduce(torch.zeros(1))
            with torch.no_grad():
                model.weight.fill_(step)
            if step == 5 and rank == 1:
                began = time.monotonic()
                ckpt.request_leave(in_s=in_s)
            if step == 5 and rank == 0:
                began = time.monotonic()
            if ckpt.step(step):
                break
            ckpt.save(step)
        seconds = time.monotonic() - began
        return {"left": step, "seconds": seconds, **told(ckpt)}


@pytest.mark.parametrize(("slow_s", "in_s"), [(0.3, 15.0), (4.0, 4.0)])
def test_explicit_saves_meanwhile(slow_s: float, in_s: float, agent: Attempts, tmp_path: Path) -> None:
    url = url_of(tmp_path)
    first, second = run(explicit, 2, agent(), url, slow_s, in_s, group=False)
    assert first["outcome"] == second["outcome"]
    newest = gpumove.checkpoints(url)[-1].step
    if slow_s < in_s:
        assert first["outcome"] == f"durable: step {first['left']}"
    assert max(first["seconds"], second["seconds"]) < in_s
    assert newest == first["step"]


def thrice(rank: int, place: Place, url: str) -> dict[str, Any]:
    """A scheduler that is in a hurry: SIGTERM, at once another, and one more when nothing seems to come of it."""
    join(rank, 2, place)
    model = equal_linear()
    with Checkpointer(url, model=model, **{**NOTICES, "notices": "signals", "grace_s": 30.0}) as ckpt:
        ckpt.restore()
        ckpt.save(0).wait()
        train(ckpt, model, lambda step: None, 0, until=3)
        hang("put", "packs/")
        began = time.monotonic()
        if rank == 0:
            for pause_s in (0.0, 0.2, 5.5):
                threading.Timer(pause_s, os.kill, (os.getpid(), signal.SIGTERM)).start()
        left = train(ckpt, model, lambda step: time.sleep(0.01), 3)
        return {"left": left, "seconds": time.monotonic() - began, **told(ckpt)}


def test_sigterm_three_times(agent: Attempts, tmp_path: Path) -> None:
    for found in run(thrice, 2, agent(), url_of(tmp_path), group=False):
        assert found["outcome"] == f"not durable: resumes from step 0, {found['left']} steps lost"
        assert 5.4 < found["seconds"] < 8, "the third one means now"


def raises(rank: int, place: Place, url: str) -> dict[str, Any]:
    """Rank 1 ends with an exception between the notice and the step to leave after."""
    join(rank, 2, place)
    model = equal_linear()
    began = time.monotonic()
    ckpt = Checkpointer(url, model=model, **NOTICES)
    with pytest.raises(RuntimeError) if rank else contextlib.nullcontext(), ckpt:
        ckpt.restore()
        for step in range(1, 100):
            with torch.no_grad():
                model.weight.fill_(step + 1)
            if step == 5 and rank == 1:
                ckpt.request_leave(in_s=15)
                time.sleep(0.5)
                raise RuntimeError("the data is bad")
            if step == 5:
                while not ckpt.leaving:
                    time.sleep(0.01)
            if ckpt.step(step):
                break
    return {"left": step, "seconds": time.monotonic() - began, **told(ckpt)}


def test_a_rank_that_ends_with_an_exception_is_not_waited_for(agent: Attempts, tmp_path: Path) -> None:
    url = url_of(tmp_path)
    here, broken = run(raises, 2, agent(), url, group=False)
    newest = gpumove.checkpoints(url)[-1]
    assert (newest.step, newest.world_size) == (here["left"], 1)
    assert here["outcome"] == f"durable: step {here['left']}"
    assert here["seconds"] < 10
    assert broken["reason"] == "the training ended with RuntimeError"


def at_the_very_end(rank: int, place: Place, url: str) -> dict[str, Any]:
    """The loop is over; rank 0 waits in close() for the last save when rank 1 is told."""
    join(rank, 2, place)
    model = equal_linear()
    with Checkpointer(url, model=model, **{**NOTICES, "peer_s": 15.0}) as ckpt:
        ckpt.restore()
        train(ckpt, model, lambda step: None, 0, until=5)
        slow_puts(2.0)
        ckpt.save(5)
        if rank == 1:
            time.sleep(0.5)
            ckpt.request_leave(in_s=15)
    return {"outcome": str(ckpt.notice.outcome) if ckpt.notice is not None else "none"}


def test_a_notice_in_the_last_moment_spoils_nothing(agent: Attempts, tmp_path: Path) -> None:
    url = url_of(tmp_path)
    first, second = run(at_the_very_end, 2, agent(), url, group=False)
    assert second["outcome"] == "finished"
    assert first["outcome"] in ("finished", "none")
    assert gpumove.checkpoints(url)[-1].step == 5


def from_a_hook(rank: int, place: Place, url: str) -> dict[str, Any]:
    """The optimizer's hook asks, in the middle of a step, with a save in flight."""
    join(rank, 2, place)
    job = make("ddp2", rank)
    with job.checkpointer(url, notices="") as ckpt:
        ckpt.restore()
        job.train(ckpt, 0, 3)
        ckpt.save(3)
        job.optimizers[0].register_step_post_hook(lambda *_: ckpt.request_leave(in_s=20, detail="from a hook"))
        job.train(ckpt, 3, 4)
        return {"left": leave(job, ckpt), **told(ckpt)}


def test_a_request_from_an_optimizer_s_hook(agent: Attempts, tmp_path: Path) -> None:
    first, second = run(from_a_hook, 2, agent(), url_of(tmp_path), group=False)
    assert first == second
    assert first["outcome"] == f"durable: step {first['left']}"


def rolled_back(rank: int, place: Place, url: str) -> dict[str, Any]:
    """The job goes back to step 2 with a second restore(), while a notice is known to one rank only."""
    join(rank, 2, place)
    model = equal_linear()
    with Checkpointer(url, model=model, **NOTICES) as ckpt:
        ckpt.restore()
        train(ckpt, model, lambda step: None, 0, until=2)
        ckpt.save(2).wait()
        train(ckpt, model, lambda step: None, 2, until=30)
        if rank == 1:
            ckpt.request_leave(in_s=15)
        assert ckpt.restore(2) == 2
        began = time.monotonic()
        left = train(ckpt, model, lambda step: time.sleep(0.05), 2)
        return {"left": left, "seconds": time.monotonic() - began, **told(ckpt)}


def test_a_notice_outlives_a_second_restore(agent: Attempts, tmp_path: Path) -> None:
    first, second = run(rolled_back, 2, agent(), url_of(tmp_path), group=False)
    assert (first["left"], first["outcome"]) == (second["left"], second["outcome"])
    assert first["outcome"] == f"durable: step {first['left']}"
    assert first["left"] < 30, "the target counts from where the job goes on"


def in_restore(rank: int, place: Place, url: str) -> dict[str, Any]:
    """The notice comes while restore() reads, whose deadline is over before it has read all."""
    join(rank, 2, place)
    model = equal_linear()
    with Checkpointer(url, model=model, **NOTICES) as ckpt:
        ckpt.restore()
        ckpt.save(1).wait()
    with Checkpointer(url, model=model, **NOTICES) as ckpt:
        hang("read", "packs/", seconds=3.0)
        hang("get", "parts/", seconds=3.0)
        if rank == 1:
            threading.Timer(0.3, lambda: ckpt.request_leave(in_s=1.0)).start()
        assert ckpt.restore() == 1
        assert ckpt.leaving
        left = train(ckpt, model, lambda step: None, 1)
        return {"left": left, **told(ckpt)}


def test_a_deadline_that_passes_during_a_restore(agent: Attempts, tmp_path: Path) -> None:
    first, second = run(in_restore, 2, agent(), url_of(tmp_path), group=False)
    assert first == second
    assert (first["left"], first["outcome"]) == (2, "not durable: resumes from step 1, 1 steps lost")


def warming_up(rank: int, place: Place, url: str) -> dict[str, Any]:
    """The first step takes long, as one that compiles; the notice comes in the middle of it, on the other rank."""
    join(rank, 2, place)
    model = equal_linear()
    forward = torch.compile(model, backend="aot_eager")
    with Checkpointer(url, model=model, **{**NOTICES, "every_steps": 5}) as ckpt:
        ckpt.restore()

        def work(step: int) -> None:
            if step == 1 and rank == 1:
                threading.Timer(0.2, lambda: ckpt.request_leave(in_s=30)).start()
            if step == 1:
                time.sleep(0.5 + 3.5 * rank)
            forward(torch.ones(2, 5)).sum().backward()

        left = train(ckpt, model, work, 0)
        return {"left": left, **told(ckpt)}


def test_a_notice_during_a_first_step_that_takes_long(agent: Attempts, tmp_path: Path) -> None:
    first, second = run(warming_up, 2, agent(), url_of(tmp_path), group=False)
    assert first == second
    assert first["left"] <= 2
    assert first["outcome"] == f"durable: step {first['left']}"


# ---------------------------------------------------------------- ranks that are stopped


def stopped(rank: int, place: Place, url: str, folder: str, when: str) -> dict[str, Any]:
    """Rank 2 of three replicas is stopped while the job leaves, and goes on once the others are through."""
    join(rank, 3, place)
    model = equal_linear()
    away = Path(folder) / "away"

    def stop() -> None:
        away.write_text(str(os.getpid()))
        os.kill(os.getpid(), signal.SIGSTOP)

    with Checkpointer(url, model=model, **{**NOTICES, "every_steps": 6, "peer_s": 120.0}) as ckpt:
        ckpt.restore()
        began = time.monotonic()
        for step in range(1, 100):
            time.sleep(0.05)
            with torch.no_grad():
                model.weight.fill_(step)
            if step == 6 and when == "before a meeting":
                meet_late(ckpt, rank, stop)
            elif step == 8 and rank == 1:
                ckpt.request_leave(in_s=16)
            elif step == 8 and rank == 2 and when == "in its save":
                on_put(stop, "parts/")
            if ckpt.step(step):
                break
        seconds = time.monotonic() - began
        if rank == 0:
            time.sleep(0.5)
            os.kill(int(away.read_text()), signal.SIGCONT)
        return {"left": step, "seconds": seconds, **told(ckpt)}


def meet_late(ckpt: Checkpointer, rank: int, stop: Callable[[], None]) -> None:
    """Rank 1 is at the meeting of step 6 before it hears of the notice, rank 0 after, and rank 2 never comes."""
    if rank == 1:
        return
    time.sleep(1.0)
    ckpt.request_leave(in_s=16)
    while ckpt._departure._target is None:
        time.sleep(0.01)
    if rank == 2:
        stop()


def test_a_rank_that_is_stopped_in_its_save_is_done_without(agent: Attempts, tmp_path: Path) -> None:
    url = url_of(tmp_path)
    found = run(stopped, 3, agent(), url, str(tmp_path), "in its save", group=False)
    newest = gpumove.checkpoints(url)[-1]
    for rank in (0, 1):
        assert found[rank]["outcome"] == f"durable: step {newest.step}"
        assert found[rank]["seconds"] < 16
    assert newest.world_size == 2
    assert found[2]["outcome"] == f"durable: step {newest.step}", "it reads so in the log"


def test_a_meeting_that_a_stopped_rank_does_not_come_to_ends_in_time(agent: Attempts, tmp_path: Path) -> None:
    url = url_of(tmp_path)
    found = run(stopped, 3, agent(), url, str(tmp_path), "before a meeting", group=False)
    newest = gpumove.checkpoints(url)[-1]
    assert (newest.step, newest.world_size) == (6, 2)
    for rank in (0, 1):
        assert found[rank]["outcome"] == "durable: step 6"
        assert found[rank]["seconds"] < 17
