"""Leaving on a notice, in real processes: one step for all ranks, a checkpoint if there is time, and the truth."""

from __future__ import annotations

import os
import signal
import socket
import time
from collections.abc import Callable
from datetime import timedelta
from itertools import count
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

import gpumove
from gpumove import Checkpointer, ConfigError
from gpumove.inspection.run import open_run
from gpumove.leave.pulse import Pulses
from tests.dist.harness import GLOO_S, LOST, kill_self, run
from tests.dist.jobs import SETTINGS, Job, equal_linear, make, url_of
from tests.dist.models import differences
from tests.dist.test_failures import on_put

SLOW = pytest.mark.slow  # real processes against real deadlines: minutes in all, on a busy machine more

NOTICES: dict[str, Any] = {**SETTINGS, "notices": "", "overlap": False}


Place = tuple[int, int]
"""A port, and the number of the attempt."""
Attempts = Callable[[], Place]


@pytest.fixture
def agent() -> Attempts:
    """A TCPStore that no rank holds, as torchrun's agent has one; each call is another attempt there."""
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    attempts = count()
    return lambda: (store.port, next(attempts))  # the store lives as long as this is held


def join(rank: int, world_size: int, place: Place) -> None:
    if world_size > 1:
        limit = timedelta(seconds=GLOO_S)
        store = dist.TCPStore("127.0.0.1", place[0], is_master=False, timeout=limit)
        here = dist.PrefixStore(f"/worker/attempt_{place[1]}", store)
        dist.init_process_group("gloo", store=here, rank=rank, world_size=world_size, timeout=limit)


def told(ckpt: Checkpointer) -> dict[str, Any]:
    """What this rank says of it, as plain values."""
    assert ckpt.notice is not None
    outcome = ckpt.notice.outcome
    assert outcome is not None
    return {"outcome": str(outcome), "reason": outcome.reason, "step": outcome.step, "source": ckpt.notice.source}


def slow_puts(seconds: float) -> None:
    on_put(lambda: time.sleep(seconds), "packs/")


def train(
    ckpt: Checkpointer, model: torch.nn.Linear, work: Callable[[int], None], start: int, until: int = 2000
) -> int:
    """A loop with a collective in every step; the step that it ended at."""
    for step in range(start + 1, until + 1):
        work(step)
        total = torch.tensor([float(step)])
        if dist.is_initialized():
            dist.all_reduce(total)
        with torch.no_grad():
            model.weight.fill_(step)
        if ckpt.step(step):
            return step
    return until


# ---------------------------------------------------------------- agreement


def simple(rank: int, world_size: int, place: Place, url: str, tellers: dict[int, int]) -> dict[str, Any]:
    """Some ranks are told at some step; what comes of it on every rank."""
    join(rank, world_size, place)
    model = equal_linear()
    with Checkpointer(url, model=model, **NOTICES) as ckpt:
        start = ckpt.restore()
        assert float(model.weight.detach()[0, 0]) == (start or 1)

        def work(step: int) -> None:
            time.sleep(0.01)
            if tellers.get(rank) == step - start - 1:
                ckpt.request_leave(in_s=20 + rank, detail="test")

        left = train(ckpt, model, work, start)
        assert ckpt.leaving
        assert ckpt.save(left).wait(10).step == left, "it is saved: there is nothing to do"
        with pytest.raises(ConfigError, match="goes on: end the loop"):
            ckpt.step(left + 1)
        return {"left": left, **told(ckpt)}


@pytest.mark.parametrize(
    ("world_size", "tellers"),
    [
        pytest.param(1, {0: 3}, marks=SLOW),
        (2, {1: 3}),
        pytest.param(3, {0: 5, 1: 5, 2: 5}, marks=SLOW),
        pytest.param(4, {3: 0}, marks=SLOW),
        pytest.param(8, {2: 4, 7: 5}, marks=SLOW),
    ],
)
def test_all_ranks_leave_after_the_same_step_with_a_checkpoint(
    world_size: int, tellers: dict[int, int], agent: Attempts, tmp_path: Path
) -> None:
    url = url_of(tmp_path)
    for start in (0, 1):
        found = run(simple, world_size, world_size, agent(), url, tellers, group=False)
        assert len({tuple(sorted(f.items())) for f in found}) == 1, found
        left = found[0]["left"]
        assert found[0]["outcome"] == f"durable: step {left}"
        assert gpumove.checkpoints(url)[-1].step == left
        assert left > start
    with open_run(url) as log:
        log.read()
        notes = [e.text for n in range(1, log.view.head + 1) if (e := log._entry(n, {n})) and hasattr(e, "text")]
    assert f"left after step {left} on a notice (request): durable: step {left}" in notes


def edges(rank: int, place: Place, url: str, when: str) -> dict[str, Any]:
    """A notice before anything, before the first step, during an evaluation, while a save runs, after the last step."""
    join(rank, 2, place)
    model = equal_linear()
    ckpt = Checkpointer(url, model=model, **{**NOTICES, "every_steps": 5, "peer_s": 15.0})
    with ckpt:
        if when == "before restore":
            ckpt.request_leave(in_s=15)
        ckpt.restore()
        if when == "before the first step" and rank == 1:
            ckpt.request_leave(in_s=15)

        def work(step: int) -> None:
            time.sleep(0.02)
            if when == "evaluation" and step == 4 and rank == 1:
                ckpt.request_leave(in_s=15)
                with ckpt.busy():
                    time.sleep(1.5)
            if when == "a running save" and step == 5:
                slow_puts(0.7)
            if when == "a running save" and step == 6 and rank == 1:
                ckpt.request_leave(in_s=15)

        left = train(ckpt, model, work, 0, until=30)
        if when == "after the last step":
            ckpt.request_leave(in_s=15)
            ckpt.save(left).wait()
        last = ckpt.last
    assert last is not None
    return {"left": left, "last": last.step, **told(ckpt)}


@pytest.mark.parametrize(
    "when",
    [
        "before restore",
        "before the first step",
        pytest.param("evaluation", marks=SLOW),
        "a running save",
        "after the last step",
    ],
)
def test_a_notice_may_come_at_any_time(when: str, agent: Attempts, tmp_path: Path) -> None:
    url = url_of(tmp_path)
    first, second = run(edges, 2, agent(), url, when, group=False)
    assert first == second
    assert first["outcome"] == ("finished" if when == "after the last step" else f"durable: step {first['left']}")
    assert gpumove.checkpoints(url)[-1].step == first["left"] == first["last"]
    assert first["left"] == 30 if when == "after the last step" else first["left"] < 12
    if when == "a running save":
        assert [c.step for c in gpumove.checkpoints(url)][-2:] == [5, first["left"]], "the one in flight was finished"


def uneven(rank: int, place: Place, url: str) -> int:
    """No collectives: every rank at its own pace."""
    join(rank, 3, place)
    model = equal_linear()
    with Checkpointer(url, model=model, **NOTICES) as ckpt:
        ckpt.restore()
        for step in range(1, 1000):
            time.sleep(0.005 + 0.01 * rank)
            if step == 20 and rank == 1:
                ckpt.request_leave(in_s=30)
            if ckpt.step(step):
                assert told(ckpt)["outcome"] == f"durable: step {step}"
                return step
    raise AssertionError("not left")


@SLOW
def test_ranks_of_different_speed_leave_after_the_step_of_the_fastest(agent: Attempts, tmp_path: Path) -> None:
    found = run(uneven, 3, agent(), url_of(tmp_path), group=False)
    assert len(set(found)) == 1
    assert found[0] > 20


def at_meetings(rank: int, url: str) -> dict[str, Any]:
    """The harness's own process group is made with a file: there is no store to post on."""
    model = equal_linear()
    with Checkpointer(url, model=model, **{**NOTICES, "every_steps": 7}) as ckpt:
        ckpt.restore()

        def work(step: int) -> None:
            if step == 9 and rank == 1:
                ckpt.request_leave(in_s=20)

        left = train(ckpt, model, work, 0, until=50)
        return {"left": left, **told(ckpt)}


def test_without_a_shared_store_the_job_leaves_from_its_next_meeting(tmp_path: Path) -> None:
    first, second = run(at_meetings, 2, url_of(tmp_path))
    assert first == second
    left = first["left"]
    assert 9 <= left <= 14, "at the next save at the latest"
    assert first["outcome"] == f"durable: step {left}"
    assert gpumove.checkpoints(url_of(tmp_path))[-1].step == left


# ---------------------------------------------------------------- when there is not enough time


def bad_store(rank: int, place: Place, url: str, how: str) -> dict[str, Any]:
    """Step 3 is durable; then the store takes nothing any more, or takes too long."""
    join(rank, 2, place)
    model = equal_linear()
    seconds = 4.0

    def work(step: int) -> None:
        if step == 4:
            if how == "slow":
                slow_puts(6.0)
            else:
                on_put(refuse, "packs/", "parts/", "manifests/")
            if rank == 0:
                ckpt.request_leave(in_s=seconds)

    def refuse() -> None:
        raise ConnectionError("the bucket is gone")

    with Checkpointer(url, model=model, **NOTICES) as ckpt:
        ckpt.restore()
        train(ckpt, model, work, 0, until=3)
        ckpt.save(3).wait()
        began = time.monotonic()
        left = train(ckpt, model, work, 3)
        took = time.monotonic() - began
        return {"left": left, "in time": took < seconds, **told(ckpt)}


@pytest.mark.parametrize("how", ["dead", pytest.param("slow", marks=SLOW)])
def test_a_store_that_fails_in_the_grace_period_is_said_in_time(how: str, agent: Attempts, tmp_path: Path) -> None:
    for found in run(bad_store, 2, agent(), url_of(tmp_path), how, group=False):
        lost = found["left"] - 3
        assert found["outcome"] == f"not durable: resumes from step 3, {lost} steps lost"
        assert "not done in time" in found["reason"]
        assert found["in time"]
    assert gpumove.checkpoints(url_of(tmp_path))[-1].step == 3


def too_short(rank: int, place: Place, url: str, deadline_s: float) -> dict[str, Any]:
    """A save takes some four seconds, as is known from the one before."""
    join(rank, 2, place)
    model = equal_linear()

    def work(step: int) -> None:
        time.sleep(0.01)
        if step == 10 and rank == 1:
            ckpt.request_leave(deadline=time.time() + deadline_s)

    with Checkpointer(url, model=model, **NOTICES) as ckpt:
        ckpt.restore()
        slow_puts(4.0)
        ckpt.save(0).wait()
        began = time.monotonic()
        left = train(ckpt, model, work, 0)
        return {"left": left, "seconds": time.monotonic() - began, **told(ckpt)}


@pytest.mark.parametrize("deadline_s", [*(pytest.param(s, marks=SLOW) for s in (-100.0, 0.0, 3.4)), 2.2])
def test_what_cannot_be_finished_is_not_begun(deadline_s: float, agent: Attempts, tmp_path: Path) -> None:
    first, second = run(too_short, 2, agent(), url_of(tmp_path), deadline_s, group=False)
    assert first["left"] == second["left"]
    for found in (first, second):
        assert found["outcome"] == f"not durable: resumes from step 0, {found['left']} steps lost"
        assert found["seconds"] < max(4.0, deadline_s + 0.5)
    attempts = {p.name for p in (tmp_path / "run/packs").iterdir()}
    assert len(attempts) == 1, "only the first save has written anything"


def late(rank: int, place: Place, url: str) -> dict[str, Any]:
    """Rank 1 is in an evaluation until after the deadline."""
    join(rank, 2, place)
    model = equal_linear()
    with Checkpointer(url, model=model, **NOTICES) as ckpt:
        ckpt.restore()
        ckpt.save(0).wait()
        began = time.monotonic()
        for step in range(1, 1000):
            time.sleep(0.1)
            if step == 3 and rank == 0:
                ckpt.request_leave(in_s=3)
            if step == 3 and rank == 1:
                with ckpt.busy():
                    time.sleep(6)
            if ckpt.step(step):
                break
        return {"seconds": time.monotonic() - began, **told(ckpt)}


@SLOW
def test_a_rank_that_does_not_come_is_named_and_not_waited_for(agent: Attempts, tmp_path: Path) -> None:
    here, away = run(late, 2, agent(), url_of(tmp_path), group=False)
    assert here["seconds"] < 3.8
    assert here["outcome"].startswith("not durable: resumes from step 0")
    assert "rank 1 (busy, as it says) did not come" in here["reason"]
    assert away["outcome"].startswith("not durable: resumes from step 0")


# ---------------------------------------------------------------- ranks that are gone


def lose(rank: int, layout: str, world_size: int, place: Place, url: str, lost: int, when: str) -> dict[str, Any]:
    """One rank is killed while the job leaves; what the others make of it, and the state that they had."""
    join(rank, world_size, place)
    job = make(layout, rank)
    with job.checkpointer(url, notices="") as ckpt:
        ckpt.restore()
        job.train(ckpt, 0, 2)
        ckpt.save(2).wait()
        job.train(None, 2, 4)
        dist.barrier()
        if rank == lost:
            kill_at(when)
        if rank == (lost + 1) % world_size:
            ckpt.request_leave(in_s=25)
        began = time.monotonic()
        if when == "before it answers":
            if rank == lost:
                kill_self()
            while ckpt._departure.limit > 4:  # whoever goes on to step 5 is stopped by torch, not by us
                time.sleep(0.01)
        left = leave(job, ckpt)
        seconds = time.monotonic() - began
        return {"left": left, "seconds": seconds, "own": own_state(job), **told(ckpt)}


def kill_at(when: str) -> None:
    if when == "first pack":
        on_put(kill_self, "packs/")
    if when == "part":
        on_put(kill_self, "parts/")
    if when == "manifest":
        on_put(kill_self, "manifests/")


def leave(job: Job, ckpt: Checkpointer) -> int:
    """Told at step 4; the step after which the job leaves is this one or the next."""
    step = 4
    while not ckpt.step(step):
        job.train(None, step, step + 1)
        step += 1
    return step


def own_state(job: Job) -> dict[str, torch.Tensor]:
    """Parameters as this rank has them, without asking those that are gone."""
    return {
        name: (p.to_local() if hasattr(p, "to_local") else p).detach().clone()
        for name, p in job.model.named_parameters()
    }


def look(rank: int, layout: str, world_size: int, place: Place, url: str) -> tuple[int, dict[str, torch.Tensor]]:
    join(rank, world_size, place)
    job = make(layout, rank, seed=1)
    with job.checkpointer(url, notices="") as ckpt:
        step = ckpt.restore()
        found = own_state(job)
        job.train(ckpt, step, step + 1)
        assert ckpt.save(step + 1).wait().step == step + 1
    return step, found


@pytest.mark.parametrize(
    "when", [pytest.param("before it answers", marks=SLOW), pytest.param("first pack", marks=SLOW), "part"]
)
@pytest.mark.parametrize(
    ("layout", "world_size", "lost"),
    [pytest.param("ddp2", 2, 1, marks=SLOW), ("ddp2", 2, 0), pytest.param("hsdp4", 4, 2, marks=SLOW)],
)
def test_replicas_complete_the_save_of_a_rank_that_is_gone(
    layout: str, world_size: int, lost: int, when: str, agent: Attempts, tmp_path: Path
) -> None:
    url = url_of(tmp_path)
    found = run(lose, world_size, layout, world_size, agent(), url, lost, when, group=False, lost=[lost])
    assert found[lost] is LOST
    others = [f for f in found if f is not LOST]
    assert {f["outcome"] for f in others} == {f"durable: step {others[0]['left']}"}
    assert all(f["seconds"] < 24 for f in others)
    newest = gpumove.checkpoints(url)[-1]
    assert (newest.step, newest.world_size) == (others[0]["left"], world_size - 1)
    again = run(look, world_size, layout, world_size, agent(), url, group=False)
    for rank, before in enumerate(found):
        if before is not LOST:
            assert again[rank][0] == before["left"]
            assert not differences(before["own"], again[rank][1])


@SLOW
def test_a_committer_that_dies_after_all_parts_are_there_is_replaced(agent: Attempts, tmp_path: Path) -> None:
    url = url_of(tmp_path)
    lost, other = run(lose, 2, "ddp2", 2, agent(), url, 0, "manifest", group=False, lost=[0])
    assert lost is LOST
    assert other["outcome"] == f"durable: step {other['left']}"
    assert gpumove.checkpoints(url)[-1].step == other["left"]


def mute(rank: int, place: Place, url: str) -> dict[str, Any]:
    """Rank 1 is alive, slow, and gives no sign of life."""
    join(rank, 2, place)
    job = make("ddp2", rank)
    with job.checkpointer(url, notices="") as ckpt:
        ckpt.restore()
        job.train(ckpt, 0, 4)
        if rank == 1:
            Pulses.show = lambda self, rank, beat: None  # type: ignore[method-assign]
            slow_puts(5.0)
            ckpt.request_leave(in_s=25)
        return {"left": leave(job, ckpt), **told(ckpt)}


@SLOW
def test_a_rank_that_only_seems_to_be_gone_hears_what_the_others_achieved(agent: Attempts, tmp_path: Path) -> None:
    first, second = run(mute, 2, agent(), url_of(tmp_path), group=False)
    assert first["outcome"] == f"durable: step {first['left']}"
    assert first == second
    newest = gpumove.checkpoints(url_of(tmp_path))[-1]
    assert (newest.step, newest.world_size) == (first["left"], 1)


def lose_the_store(rank: int, port: int, url: str) -> dict[str, Any]:
    """Rank 0 holds the job's store, as without torchrun, and is killed in mid-save."""
    limit = timedelta(seconds=GLOO_S)
    address = f"tcp://127.0.0.1:{port}"
    dist.init_process_group("gloo", init_method=address, rank=rank, world_size=2, timeout=limit)
    job = make("ddp2", rank)
    with job.checkpointer(url, notices="") as ckpt:
        ckpt.restore()
        job.train(ckpt, 0, 2)
        ckpt.save(2).wait()
        job.train(None, 2, 4)
        if rank == 0:
            kill_at("first pack")
            ckpt.request_leave(in_s=10)
        began = time.monotonic()
        left = leave(job, ckpt)
        return {"left": left, "seconds": time.monotonic() - began, **told(ckpt)}


def test_if_the_job_s_store_is_lost_the_newest_checkpoint_stands(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    lost, other = run(lose_the_store, 2, port, url_of(tmp_path), group=False, lost=[0])
    assert lost is LOST
    assert other["outcome"] == f"not durable: resumes from step 2, {other['left'] - 2} steps lost"
    assert "store does not answer" in other["reason"]
    assert other["seconds"] < 10


def signalled(rank: int, place: Place, url: str) -> dict[str, Any]:
    join(rank, 3, place)
    model = equal_linear()
    with Checkpointer(url, model=model, **{**NOTICES, "notices": "signals", "grace_s": 20.0}) as ckpt:
        ckpt.restore()

        def work(step: int) -> None:
            if step == 5 and rank != 1:
                os.kill(os.getpid(), signal.SIGTERM)

        left = train(ckpt, model, work, 0)
        return {"left": left, **told(ckpt)}


def test_a_signal_on_several_ranks_is_one_notice(agent: Attempts, tmp_path: Path) -> None:
    found = run(signalled, 3, agent(), url_of(tmp_path), group=False)
    assert {f["outcome"] for f in found} == {f"durable: step {found[0]['left']}"}
    assert {f["source"] for f in found} == {"sigterm"}


@pytest.mark.parametrize("when", [pytest.param("first pack", marks=SLOW), "part"])
def test_without_replicas_the_newest_checkpoint_stands(when: str, agent: Attempts, tmp_path: Path) -> None:
    url = url_of(tmp_path)
    other, lost = run(lose, 2, "fsdp2", 2, agent(), url, 1, when, group=False, lost=[1])
    assert lost is LOST
    assert other["outcome"] == f"not durable: resumes from step 2, {other['left'] - 2} steps lost"
    assert other["seconds"] < 24
    assert "elements" in other["reason"] or "cover" in other["reason"], other["reason"]
    assert gpumove.checkpoints(url)[-1].step == 2
