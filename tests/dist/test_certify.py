"""Certificates of jobs of several ranks: the same layout, a broken one, and other numbers of ranks."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import msgspec
import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

from gpumove import Checkpointer, ElasticLoader, ParityError
from gpumove.parity.verdict import Certificate
from tests.dist.harness import run
from tests.dist.jobs import SETTINGS, Job, make, url_of
from tests.dist.models import RANKS
from tests.parity.jobs import contents

GLOBAL, EVERY, LAST = 12, 4, 8


def train(job: Job, ckpt: Checkpointer, step: int, stop: int) -> int:
    """The loop that users write."""
    for _, tokens in job.loader:
        step += 1
        if ckpt.step(step, loss=job.forward_and_step(tokens)) or step == stop:
            break
    return step


def first_leg(rank: int, layout: str, url: str) -> None:
    """Two checkpoints in a row."""
    job = make(layout, rank)
    with job.checkpointer(url) as ckpt:
        step = ckpt.restore()
        while step < LAST:
            step = train(job, ckpt, step, step + EVERY)
            ckpt.save(step).wait()


def second_leg(rank: int, layout: str, url: str, steps: int, damaged: int | None) -> tuple[int, bytes]:
    """A new process of other weights, which one rank may break."""
    job = make(layout, rank, seed=1)
    with job.checkpointer(url, certify=steps, every_steps=1) as ckpt:
        step = ckpt.restore()
        if rank == damaged:
            torch.manual_seed(7)
        step = train(job, ckpt, step, 1000)
        assert not ckpt.save(step).wait().pinned
        return step, msgspec.json.encode(ckpt.certificate)


def seen(found: list[tuple[int, bytes]]) -> Certificate:
    """One certificate, the same on all ranks after the same step."""
    assert len(set(found)) == 1
    return msgspec.json.decode(found[0][1], type=Certificate)


@pytest.mark.parametrize("layout", ["ddp2", pytest.param("fsdp2", marks=pytest.mark.slow)])
def test_a_job_of_two_ranks_is_certified_on_both_and_writes_nothing(layout: str, tmp_path: Path) -> None:
    url = url_of(tmp_path)
    run(first_leg, RANKS[layout], layout, url)
    before = contents(tmp_path)
    found = run(second_leg, RANKS[layout], layout, url, 4, None)
    assert (seen(found).verdict, found[0][0], len(seen(found).steps)) == ("bitwise", LAST, 4)
    broken = seen(run(second_leg, RANKS[layout], layout, url, 4, 0))
    assert (broken.verdict, broken.cause) == ("different", "rng")
    other = seen(run(second_leg, RANKS[layout], layout, url, 4, 1))
    assert (other.verdict, other.cause) == ("different", "optimizer"), "rank 0 sees it once gradients have met"
    assert contents(tmp_path) == before


# -------------------------------------------------------------------- other numbers of ranks


def build(rank: int, ranks: int, kind: str, url: str, per_rank: int, **settings: Any) -> Any:
    """A job that gives the same numbers at any number of ranks, but for rounding."""
    torch.manual_seed(3)
    model = nn.Sequential(nn.Linear(6, 33), nn.Tanh(), nn.Linear(33, 1))
    if kind == "ddp":
        model = DistributedDataParallel(model)
    elif kind == "fsdp":
        fully_shard(model, mesh=init_device_mesh("cpu", (ranks,)))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    data = torch.randn(64, 6, generator=torch.Generator().manual_seed(1))
    dataset = torch.utils.data.TensorDataset(data, data.sum(1, keepdim=True))
    loader = ElasticLoader(dataset, per_rank, shuffle=True, seed=2, rank=rank, world_size=ranks)
    ckpt = Checkpointer(url, model=model, optimizer=optimizer, loader=loader, **{**SETTINGS, **settings})
    return model, optimizer, loader, ckpt


def leg(rank: int, ranks: int, kind: str, url: str, per_rank: int, steps: int, reduced: bool) -> Any:
    """Train and save, or certify if so many steps are given."""
    model, optimizer, loader, ckpt = build(rank, ranks, kind, url, per_rank, certify=steps)
    with ckpt:
        step = ckpt.restore()
        for inputs, targets in (batch for _ in iter(int, 1) for batch in loader):
            loss = nn.functional.mse_loss(model(inputs), targets)
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            told = loss.detach().clone()
            if reduced and ranks > 1:
                dist.all_reduce(told)
                told /= ranks
            step += 1
            leaving = ckpt.step(step, loss=told)
            if step % EVERY == 0:
                ckpt.save(step).wait()
            if leaving or (step == LAST and not steps):
                break
        return step, msgspec.json.encode(ckpt.certificate)


def test_at_other_numbers_of_ranks_the_same_batches_are_within_tolerance_and_others_are_not(tmp_path: Path) -> None:
    url = url_of(tmp_path)
    run(leg, 2, 2, "ddp", url, GLOBAL // 2, 0, True)
    same = seen(run(leg, 2, 2, "ddp", url, GLOBAL // 2, 4, True))
    assert same.verdict == "bitwise"
    for ranks, kind in ((1, "plain"), (3, "fsdp")):
        found = seen(run(leg, ranks, ranks, kind, url, GLOBAL // ranks, 4, True, group=ranks > 1))
        assert (found.verdict, found.setting.world_sizes) == ("within tolerance", (2, ranks)), found.why
        assert f"2 ranks then, {ranks} now" in found.why
    alone = seen(run(leg, 1, 1, "plain", url, GLOBAL // 2, 4, True, group=False))
    assert (alone.verdict, alone.cause) == ("different", "samples"), "half the global batch"


def test_a_loss_that_is_not_reduced_is_told_as_what_it_is(tmp_path: Path) -> None:
    url = url_of(tmp_path)
    run(leg, 2, 2, "ddp", url, GLOBAL // 2, 0, False)
    found = seen(run(leg, 1, 1, "plain", url, GLOBAL, 4, False, group=False))
    assert (found.verdict, found.cause) == ("different", "world_size")
    assert "a loss that is not reduced over all ranks" in found.why


def fails(rank: int, url: str) -> str:
    job = make("ddp2", rank)
    with pytest.raises(ParityError) as caught, job.checkpointer(url, certify=4) as ckpt:
        ckpt.restore()
    return caught.value.code


def one_save(rank: int, url: str) -> None:
    job = make("ddp2", rank)
    with job.checkpointer(url) as ckpt:
        ckpt.save(train(job, ckpt, ckpt.restore(), 2)).wait()


def test_what_cannot_be_compared_is_said_on_all_ranks(tmp_path: Path) -> None:
    url = url_of(tmp_path)
    run(one_save, 2, url)
    assert run(fails, 2, url) == ["parity.unknown"] * 2
