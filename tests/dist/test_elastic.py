"""What is not a sharded tensor: samples, generators, buffers and loaders, when the number of ranks changes."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from gpumove import Checkpointer, ElasticLoader, LayoutError
from tests.dist.harness import run
from tests.dist.jobs import SAMPLES, SETTINGS, Tokens, make, url_of


def leg(rank: int, layout: str, url: str, batch_size: int, until: int | None) -> dict[str, Any]:
    """Train some steps, or to the end of the second epoch, and save there."""
    job = make(layout, rank, batch_size=batch_size)
    with job.checkpointer(url) as ckpt:
        step = begun = ckpt.restore()
        if until is not None:
            step = job.train(ckpt, step, until)
        while until is None and job.loader.position < 2 * SAMPLES:
            step = job.train(ckpt, step, step + 1)
        ckpt.save(step).wait()
        return {"begun": begun, "samples": job.samples, "position": job.loader.position}


def test_every_sample_comes_once_per_epoch_over_two_then_four_then_one_rank(tmp_path: Path) -> None:
    url = url_of(tmp_path)
    seen: list[int] = []
    batches = []
    for layout, ranks, batch_size, until in (("ddp2", 2, 4, 5), ("fsdp4", 4, 3, 12), ("plain", 1, 5, None)):
        legs = run(leg, ranks, layout, url, batch_size, until)
        assert len({found["position"] for found in legs}) == 1
        # Step by step, rank after rank: the order in which the job as a whole has seen the samples.
        for at in range(0, len(legs[0]["samples"]), batch_size):
            batches.append([i for found in legs for i in found["samples"][at : at + batch_size]])
            seen += batches[-1]
    whole = ElasticLoader(Tokens(), 1, shuffle=True, seed=5).indices(0, len(seen)).tolist()
    assert seen == whole, "the order of samples depends on the seed alone"
    assert sorted(seen[:SAMPLES]) == sorted(seen[SAMPLES : 2 * SAMPLES]) == list(range(SAMPLES))
    assert [len(batch) for batch in batches[:13]] == [8] * 5 + [12] * 7 + [5]


class Own:
    """An object of the user, different on every rank."""

    def __init__(self, rank: int) -> None:
        self.state: dict[str, Any] = {"rank": rank, "noise": torch.full((40,), float(rank))}

    def state_dict(self) -> dict[str, Any]:
        return self.state

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.state = state


class Buffered(nn.Module):
    """A parameter that is equal on all ranks, and a buffer that is not."""

    def __init__(self, rank: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(7, 5))
        self.register_buffer("mine", torch.full((33,), float(rank)))
        self.register_buffer("count", torch.tensor(rank))


def own_parts(rank: int) -> dict[str, Any]:
    return {"model": Buffered(rank), "objects": {"own": Own(rank), "generator": torch.Generator().manual_seed(rank)}}


def save_own(rank: int, url: str) -> dict[str, Any]:
    parts = own_parts(rank)
    for seed in (random.seed, np.random.seed, torch.manual_seed):
        seed(100 + rank)
    with Checkpointer(url, **parts, **SETTINGS) as ckpt:
        ckpt.save(1).wait()
    return draws(parts)


def load_own(rank: int, url: str) -> dict[str, Any]:
    parts = own_parts(rank + 50)
    with Checkpointer(url, **parts, **SETTINGS) as ckpt:
        assert ckpt.restore() == 1
    model, own = parts["model"], parts["objects"]["own"].state
    mine = {
        "buffer": model.mine.tolist(),
        "count": int(model.count),
        "rank": own["rank"],
        "noise": own["noise"].tolist(),
    }
    return {**mine, **draws(parts)}


def draws(parts: dict[str, Any]) -> dict[str, Any]:
    """The next number of every generator."""
    return {
        "python": random.random(),
        "numpy": np.random.rand(),
        "torch": torch.rand(()).item(),
        "generator": torch.rand((), generator=parts["objects"]["generator"]).item(),
    }


GLOBAL = ("python", "numpy", "torch")


def test_what_belongs_to_a_rank_comes_back_to_it_and_new_ranks_get_what_is_written(tmp_path: Path) -> None:
    url = url_of(tmp_path)
    saved = run(save_own, 2, url)
    twice = [run(load_own, 4, url) for _ in range(2)]
    assert twice[0] == twice[1], "new ranks are a function of the checkpoint alone"
    for rank, found in enumerate(twice[0]):
        origin = rank if rank < 2 else 0  # a new rank begins with rank 0's buffers and objects
        assert found["buffer"] == [float(origin)] * 33
        assert (found["count"], found["rank"], found["noise"]) == (origin, origin, [float(origin)] * 40)
        assert found["generator"] == saved[origin]["generator"]
    for name in GLOBAL:
        assert [found[name] for found in twice[0][:2]] == [found[name] for found in saved]
        assert len({found[name] for found in twice[0]}) == 4, "every new rank draws numbers of its own"
    assert [{k: f[k] for k in GLOBAL} for f in run(load_own, 1, url)] == [{k: saved[0][k] for k in GLOBAL}]


def streams(rank: int, url: str, save: bool, numbers: list[int]) -> float:
    """One draw of a rank that reads data as ``numbers[rank]``."""
    torch.manual_seed(100 + numbers[rank])
    loader = ElasticLoader(Tokens(), 2, rank=numbers[rank], world_size=max(numbers) + 1)
    with Checkpointer(url, loader=loader, **SETTINGS) as ckpt:
        if save:
            ckpt.save(1).wait()
        else:
            assert ckpt.restore() == 1
    return torch.rand(()).item()


@pytest.mark.parametrize(
    ("before", "after"),
    [([0, 1], [0, 0]), ([0, 0], [0, 0, 1, 1]), ([0, 0, 1, 1], [0, 1]), ([0, 1], [0, 1, 0, 1]), ([0], [0, 0]),
     ([0, 1, 2, 3], [0, 0, 1, 1])],
)  # fmt: skip
def test_ranks_that_read_the_same_samples_draw_the_same_dropout(
    before: list[int], after: list[int], tmp_path: Path
) -> None:
    """Else tensor-parallel replicas would drift apart, and data-parallel ones would be copies of one another."""
    url = url_of(tmp_path)
    saved = dict(zip(before, run(streams, len(before), url, True, before)))
    found = run(streams, len(after), url, False, after)
    by_stream = dict(zip(after, found))
    assert found == [by_stream[number] for number in after]
    assert len(set(found)) == len(set(after))
    assert all(by_stream[number] == draw for number, draw in saved.items() if number in by_stream)


class PerRank:
    """A loader with a position of its own, like torchdata's."""

    def __init__(self) -> None:
        self.position = 0

    def state_dict(self) -> dict[str, int]:
        return {"position": self.position}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.position = state["position"]


def per_rank_loader(rank: int, url: str) -> tuple[str, int]:
    loader = PerRank()
    with Checkpointer(url, loader=loader, **SETTINGS) as ckpt:
        try:
            step = ckpt.restore()
        except LayoutError as error:
            return str(error), -1
        if step == 0:
            loader.position = 10 + rank
            ckpt.save(1).wait()
        return "", loader.position


def test_a_loader_that_is_not_elastic_stays_at_its_world_size(tmp_path: Path) -> None:
    url = url_of(tmp_path)
    assert run(per_rank_loader, 2, url) == run(per_rank_loader, 2, url) == [("", 10), ("", 11)]
    for ranks in (1, 4):
        for text, position in run(per_rank_loader, ranks, url):
            assert f"the loader's state is for 2 ranks and there are {ranks}" in text
            assert "ElasticLoader" in text
            assert position == -1
