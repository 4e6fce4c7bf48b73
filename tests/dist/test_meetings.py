"""Meetings: all ranks save the same steps, and the users' own collectives are left alone."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from gpumove import Checkpointer, GpumoveError
from gpumove.state import layout
from gpumove.state.layout import Planner
from tests.dist.harness import run
from tests.dist.jobs import SETTINGS, equal_linear, make, url_of


def uneven_ranks(rank: int, url: str) -> dict[str, Any]:
    """Ranks that only meet at saves: rank 1 is five times as slow, and sometimes pauses."""
    model = equal_linear()
    saved: list[int] = []
    with Checkpointer(url, model=model, **{**SETTINGS, "every_s": 0.15}) as ckpt:
        ckpt.restore()
        for step in range(1, 61):
            time.sleep(0.001 + 0.008 * rank + 0.05 * (step % 17 == 16 and rank))
            with torch.no_grad():
                model.weight.fill_(step)
            ckpt.step(step)
            if ckpt.last is not None and (not saved or saved[-1] != ckpt.last.step):
                saved.append(ckpt.last.step)
    return {"saved": saved, "skipped": ckpt.skipped}


def test_a_cadence_in_seconds_saves_the_same_steps_on_ranks_of_different_speed(tmp_path: Path) -> None:
    found = run(uneven_ranks, 3, url_of(tmp_path))
    assert found[0]["saved"] == found[1]["saved"] == found[2]["saved"]
    assert len(found[0]["saved"]) >= 2


def own_collectives(rank: int, url: str) -> list[int]:
    """The default group is busy all the time, also with collectives that are in flight over a meeting."""
    job = make("ddp2", rank)
    seen = []
    with job.checkpointer(url, every_steps=1) as ckpt:
        ckpt.restore()
        for step in range(1, 16):
            before = torch.full((1000,), float(step + rank))
            flying = dist.all_reduce(before, async_op=True)
            job.train(None, step - 1, step)
            ckpt.step(step)
            if step % 5 == 0:
                ckpt.save(step)
            after = torch.tensor([float(rank)])
            dist.all_reduce(after)
            assert flying is not None
            flying.wait()
            assert torch.equal(before, torch.full((1000,), 2.0 * step + 1))
            assert after.item() == 1
            dist.barrier()
            seen.append(ckpt.last.step if ckpt.last is not None else 0)
    return seen


def test_the_users_own_collectives_go_on_beside_saves(tmp_path: Path) -> None:
    first, second = run(own_collectives, 2, url_of(tmp_path))
    assert first == second
    assert first[4::5] == [5, 10, 15]


def two_runs(rank: int, folder: str) -> list[int]:
    """Two Checkpointers: one over the job, one over something else, at their own cadences."""
    job, other = make("fsdp2", rank), equal_linear(3)
    with (
        job.checkpointer(f"file://{folder}/a", every_steps=2) as ckpt,
        Checkpointer(f"file://{folder}/b", model=other, rng=False, **{**SETTINGS, "every_steps": 3}) as second,
    ):
        begun = [ckpt.restore(), second.restore()]
        assert float(other.weight.detach().sum()) == 9 * (begun[1] or 1)
        for step in range(begun[0] + 1, begun[0] + 7):
            job.train(ckpt, step - 1, step)
            with torch.no_grad():
                other.weight.fill_(step)
            second.step(step)
            for each in (ckpt, second):
                if each.last is not None:
                    each.last.wait()
    return begun


def test_two_checkpointers_of_different_runs_in_one_job(tmp_path: Path) -> None:
    assert run(two_runs, 2, str(tmp_path)) == [[0, 0]] * 2
    assert run(two_runs, 2, str(tmp_path)) == [[6, 6]] * 2


def wait_everywhere(rank: int, url: str) -> tuple[Any, ...]:
    job = make("ddp2", rank)
    with job.checkpointer(url) as ckpt:
        ckpt.restore()
        job.train(ckpt, 0, 1)
        entry = ckpt.save(1, pinned=True).wait()
        return entry.number, entry.step, entry.attempt, entry.manifest, entry.pinned, ckpt.last is not None


def test_every_rank_can_wait_for_the_commit(tmp_path: Path) -> None:
    first, second = run(wait_everywhere, 2, url_of(tmp_path))
    assert first == second
    assert first[1] == 1
    assert first[4]


def wait_on_rank_0(rank: int, url: str) -> float:
    """What many scripts do at the end: rank 0 waits for the save, the others wait for rank 0."""
    job = make("ddp2", rank)
    with job.checkpointer(url) as ckpt:
        ckpt.restore()
        job.train(ckpt, 0, 1)
        handle = ckpt.save(1)
        began = time.monotonic()
        if rank == 0:
            assert handle.wait().step == 1
        dist.barrier()
    return time.monotonic() - began


def test_rank_0_may_wait_for_a_save_while_the_others_wait_for_rank_0(tmp_path: Path) -> None:
    assert max(run(wait_on_rank_0, 2, url_of(tmp_path))) < 10


def wait_late(rank: int, url: str) -> list[Any]:
    """Rank 1 asks about all saves when retention has removed the first ones."""
    job = make("ddp2", rank)
    found: list[Any] = []
    with job.checkpointer(url, keep_last=2) as ckpt:
        ckpt.restore()
        handles = []
        for step in range(1, 5):
            job.train(None, step - 1, step)
            handles.append(ckpt.save(step))
        if rank == 0:
            handles[-1].wait()
        dist.barrier()
        for handle in handles:
            try:
                found.append(handle.wait().step)
            except GpumoveError as error:
                found.append(error.code)
    return found


def test_waiting_for_a_checkpoint_that_is_gone_ends_at_once(tmp_path: Path) -> None:
    began = time.monotonic()
    found = run(wait_late, 2, url_of(tmp_path))[1]
    assert found[0] == "store.superseded"  # the second may be about to go
    assert found[2:] == [3, 4]
    assert time.monotonic() - began < SETTINGS["peer_s"]


def count_plans(rank: int, url: str) -> list[tuple[int, int]]:
    """(descriptions, agreements) so far, after each of some meetings."""
    calls = {"describe": 0, "agree": 0}

    def counted(name: str, work: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **keywords: Any) -> Any:
            calls[name] += 1
            return work(*args, **keywords)

        return call

    layout._describe = counted("describe", layout._describe)
    Planner.agree = counted("agree", Planner.agree)  # type: ignore[method-assign]
    job = make("fsdp2", rank)
    found = []
    with job.checkpointer(url) as ckpt:
        ckpt.restore()
        for step in range(1, 5):
            job.train(None, step - 1, step)
            ckpt.save(step).wait()
            found.append((calls["describe"], calls["agree"]))
    return found


def test_a_plan_is_made_once(tmp_path: Path) -> None:
    # A scheduler, a loader and generators are in this job: none of them may make a plan look outdated.
    assert run(count_plans, 2, url_of(tmp_path)) == [[(1, 1)] * 4] * 2
