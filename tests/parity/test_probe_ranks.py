"""Output probes on several ranks: they change nothing in the training, and say the same on any number of ranks."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from tests.dist import models
from tests.dist.harness import run
from tests.dist.jobs import make, url_of

STEPS, SAVED = 7, 4


def fixed() -> torch.Tensor:
    return torch.arange(2 * models.LENGTH).view(2, models.LENGTH) % models.VOCABULARY


def trained(rank: int, url: str, layout: str, probed: bool) -> dict[str, Any]:
    """Seven steps with two saves; all that must not depend on whether there are probes."""
    job = make(layout, rank)
    with job.checkpointer(url) as ckpt:
        if probed:
            model = job.model.module if layout.startswith("ddp") else job.model
            ckpt.probe(lambda: {"loss": job.model(fixed()), "few": model.few.weight}, "fixed")
            ckpt.probe(lambda: torch.rand(3), "random")  # draws, and gives other numbers each time
        step = ckpt.restore()
        for until in (2, SAVED):
            step = job.train(ckpt, step, until)
            ckpt.save(step).wait()
        ckpt.save(step).wait()  # with nothing in between: after a forward without backward
        job.train(ckpt, step, STEPS)
    return {"losses": job.losses, "training": [m.training for m in job.model.modules()], **job.state()}


def resumed(rank: int, url: str, layout: str, spoiled: bool) -> dict[str, Any]:
    job = make(layout, rank, seed=3)
    model = job.model.module if layout.startswith("ddp") else job.model

    def look() -> dict[str, torch.Tensor]:
        if spoiled:
            model.batch.running_mean.add_(1.0)  # a buffer: it is put back
        return {"loss": job.model(fixed()), "few": model.few.weight}

    with job.checkpointer(url) as ckpt:
        ckpt.probe(look, "fixed", tolerance=1e-5)
        ckpt.probe(lambda: torch.rand(3), "random")
        assert ckpt.restore() == SAVED
        found = ckpt.probes
        buffers = models.buffers(job.model)
    verdicts = {name: (r.verdict, r.ok, r.step, [o.name for o in r.outputs]) for name, r in found.items()}
    return {"probes": verdicts, "buffers": buffers}


def odd(rank: int, url: str, how: str) -> dict[str, Any]:
    """A probe that goes wrong on one rank, saved with and resumed from."""
    job = make("ddp2", rank)

    def look() -> torch.Tensor:
        if how == "raises" and rank == 1:
            raise RuntimeError("not here")
        if how == "raises on the first" and rank == 0:
            raise RuntimeError("not here")
        return job.model(fixed())

    with job.checkpointer(url, every_steps=2) as ckpt:
        if how != "lacking" or rank == 0:
            ckpt.probe(look)
        step = ckpt.restore()
        began = step
        step = job.train(ckpt, step, step + 3)
        ckpt.save(step).wait()
        found = {name: result.verdict for name, result in ckpt.probes.items()}
    return {"began": began, "probes": found, "losses": job.losses}


SLOW = pytest.mark.slow


@pytest.mark.parametrize(
    "layout", ["fsdp2", *(pytest.param(name, marks=SLOW) for name in ("ddp2", "tp2", "fsdp4", "fsdp_tp4"))]
)
def test_a_probe_changes_no_bit_of_the_training(layout: str, tmp_path: Path) -> None:
    world = models.RANKS[layout]
    with_it = run(trained, world, url_of(tmp_path / "a"), layout, True)
    without = run(trained, world, url_of(tmp_path / "b"), layout, False)
    for one, other in zip(with_it, without):
        for key in one:
            if key in ("full", "buffers"):
                assert not models.differences(one[key], other[key]), key
            else:
                assert one[key] == other[key], key
    for after in ("ddp2", "plain"):
        found = run(resumed, models.RANKS[after], url_of(tmp_path / "a"), after, False, group=after != "plain")
        assert all(rank["probes"] == found[0]["probes"] for rank in found), "the same on every rank"
        fixed_one, random_one = (found[0]["probes"][name] for name in ("fixed", "random"))
        # Tensor parallelism sums in another order.
        assert fixed_one[0] in (("bitwise", "within tolerance") if "tp" in layout else ("bitwise",))
        assert fixed_one[1:] == (True, SAVED, ["loss", "few"])
        assert random_one[0] == "bitwise"  # it draws from the generators as they were saved
    spoiled = run(resumed, 1, url_of(tmp_path / "a"), "plain", True, group=False)[0]
    assert spoiled["probes"]["fixed"][:2] == ("different", False)
    assert not models.differences(found[0]["buffers"], spoiled["buffers"])


@pytest.mark.parametrize(
    "how", ["lacking", *(pytest.param(how, marks=SLOW) for how in ("raises", "raises on the first"))]
)
def test_a_probe_that_fails_costs_no_checkpoint(how: str, tmp_path: Path) -> None:
    url = url_of(tmp_path)
    first, second = run(odd, 2, url, how), run(odd, 2, url, how)
    assert [rank["began"] for rank in first] == [0, 0]
    assert [rank["began"] for rank in second] == [3, 3], "all saves were committed"
    assert second[0]["probes"] == second[1]["probes"] == ({"probe": "bitwise"} if how == "raises" else {})
