"""Differences under DDP, FSDP2 and TP: every step of a chain comes back, at any layout, and the chain goes on."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from gpumove import Config
from gpumove.inspection.run import open_run, pick
from gpumove.inspection.summary import detail
from tests.dist import models
from tests.dist.harness import run
from tests.dist.jobs import make, url_of

STEPS = 5
SETTINGS = {"codec": "small", "chunk_bytes": 1 << 16, "max_restore_amplification": 20.0, "keep_last": None}


def train(rank: int, layout: str, url: str, first: int, last: int) -> list[dict[str, Any]]:
    job = make(layout, rank, seed=first)
    states = []
    with job.checkpointer(url, **SETTINGS) as ckpt:
        assert ckpt.restore() == first
        for step in range(first, last):
            job.train(ckpt, step, step + 1)
            ckpt.save(step + 1).wait()
            states.append(models.full_state(job.model, *job.optimizers))
    return states


def restore(rank: int, layout: str, url: str, step: int) -> dict[str, Any]:
    job = make(layout, rank, seed=7)
    with job.checkpointer(url, **SETTINGS) as ckpt:
        assert ckpt.restore(step) == step
    return models.full_state(job.model, *job.optimizers)


def spread(scenario: Any, layout: str, *arguments: Any) -> list[Any]:
    return run(scenario, models.RANKS[layout], layout, *arguments, group=layout != "plain")


def look(url: str, step: int) -> Any:
    with open_run(url) as log:
        return detail(log, pick(log.read(), step, url=url), config=Config())


def ways(found: Any) -> dict[str, int]:
    total: dict[str, int] = {}
    for group in found.groups:
        for name, way in group.ways.items():
            total[name] = total.get(name, 0) + way.nbytes
    return total


@pytest.mark.parametrize("layout", ["ddp2", "fsdp2", "fsdp_tp4"])
def test_a_chain_is_exact_at_every_step_and_under_another_layout(layout: str, tmp_path: Path) -> None:
    url = url_of(tmp_path)
    truth = spread(train, layout, url, 0, STEPS)[0]
    assert [look(url, step).chain for step in range(1, STEPS + 1)] == list(range(STEPS))
    assert ways(look(url, STEPS)).get("predicted", 0) > 20_000, "families came together on one rank"
    for step, other in ((2, "plain"), (STEPS, layout)):
        for state in spread(restore, other, url, step):
            assert models.differences(truth[step - 1], state) == []


@pytest.mark.parametrize(("source", "target", "goes_on"), [("fsdp2", "fsdp2", True), ("fsdp2", "ddp2", False)])
def test_the_chain_goes_on_after_a_restore_if_the_layout_is_the_same(
    source: str, target: str, goes_on: bool, tmp_path: Path
) -> None:
    url = url_of(tmp_path)
    spread(train, source, url, 0, 2)
    truth = spread(train, target, url, 2, 4)[0]
    assert (look(url, 3).chain == 2) == goes_on
    for state in spread(restore, "plain", url, 4):
        assert models.differences(truth[1], state) == []
