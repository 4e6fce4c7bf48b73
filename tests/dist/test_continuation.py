"""Stopped and resumed by other processes, a run goes on as if nothing had happened: every loss, every bit."""

from __future__ import annotations

import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook

from gpumove.state.staging import Stager
from gpumove.store.files import FileBackend
from tests.dist import models
from tests.dist.harness import LOST, kill_self, run
from tests.dist.jobs import make, url_of

EVERY, LAST = 3, 14


def slow_down(beside: threading.Event, *, copy_s: float, put_s: float) -> None:
    """Training steps surely run beside staging and uploads.

    A copy is made when the next optimizer step wants to run, and packs go up when it has been seen that a step was done
    ``beside`` a save.
    """
    copy, put, wanted = Stager._copy, FileBackend.put, threading.Event()
    register_optimizer_step_pre_hook(lambda *_: wanted.set())  # before gpumove's own, which waits for the copy
    register_optimizer_step_post_hook(lambda *_: wanted.clear())

    def slow_copy(self: Stager, into: list[torch.Tensor], from_: list[torch.Tensor]) -> None:
        if threading.current_thread().name.startswith("gpumove-stage"):
            wanted.wait(10)
            time.sleep(copy_s)
        copy(self, into, from_)

    def slow_put(self: FileBackend, key: str, data: Sequence[memoryview], seconds: float) -> None:
        if key.startswith("packs/"):
            beside.wait(10)
        time.sleep(put_s)
        put(self, key, data, seconds)

    Stager._copy, FileBackend.put = slow_copy, slow_put  # type: ignore[method-assign]


def straight(rank: int, layout: str, options: dict[str, Any]) -> dict[str, Any]:
    """The run without gpumove, and without a stop."""
    job = make(layout, rank, **options)
    job.train(None, 0, LAST)
    return {"losses": job.losses, "samples": job.samples, **job.state()}


def first_leg(rank: int, layout: str, url: str, options: dict[str, Any], stop: int) -> None:
    """Train with overlapping saves, and end without a word some steps after one of them."""
    job, went_on = make(layout, rank, **options), threading.Event()
    slow_down(went_on, copy_s=0.03, put_s=0.05)
    ckpt = job.checkpointer(url, every_steps=EVERY)
    assert ckpt.restore() == 0
    copying: list[int] = []
    beside: list[int] = []

    def after(step: int) -> None:
        if ckpt.last is not None and ckpt.last.step == step and not ckpt.last.staged:
            copying.append(step)  # step() came back while the copy was still being made
        if ckpt.last is not None and ckpt.last.step < step and not ckpt.last.finished:
            beside.append(step)  # this whole step was done while a save was in flight
            went_on.set()
        if step % EVERY == EVERY - 1 and ckpt.last is not None:
            ckpt.last.wait()

    job.train(ckpt, 0, stop, after=after)
    assert ckpt.last is not None
    assert ckpt.last.wait().step == stop - stop % EVERY
    assert copying, "no copy overlapped with training: nothing was shown"
    assert beside, "no step ran beside an upload: nothing was shown"
    kill_self()


def second_leg(rank: int, layout: str, url: str, options: dict[str, Any], stop: int) -> dict[str, Any]:
    """Go on in a new process that began with other weights and other generators."""
    job = make(layout, rank, seed=1, **options)
    if layout == "ddp4":
        # DDP regroups its buckets after its first step, which on three and more ranks changes the order of sums. The
        # other run had its first step long ago; docs/restore.md gives this remedy.
        job.model(torch.zeros(3, models.LENGTH, dtype=torch.int64)).backward()
        job.optimizers[0].zero_grad()
    with job.checkpointer(url, every_steps=EVERY) as ckpt:
        begun = ckpt.restore()
        assert begun == stop - stop % EVERY
        job.train(ckpt, begun, LAST)
        return {"losses": job.losses, "samples": job.samples, **job.state()}


CASES = [
    ("plain", {}), ("plain", {"split": True, "scaler": True}),
    ("ddp2", {}), ("ddp2", {"kind": "fused"}), ("ddp2", {"kind": "sgd", "scaler": True}),
    ("fsdp2", {}), ("fsdp2", {"half": True, "kind": "loop"}), ("fsdp2", {"split": True}),
]  # fmt: skip
MORE = [
    ("ddp4", {}),
    ("fsdp4", {}),
    ("hsdp4", {}),
    ("tp2", {}),
    ("fsdp_tp4", {}),
    ("fsdp2", {"kind": "fused"}),
    ("ddp2", {"kind": "tensor_lr"}),
]


def check(layout: str, options: dict[str, Any], folder: Path) -> None:
    ranks = models.RANKS[layout]
    group = layout != "plain"
    expected = run(straight, ranks, layout, options, group=group)
    url, stop = url_of(folder), EVERY * 2 + 2
    assert run(first_leg, ranks, layout, url, options, stop, lost=range(ranks), group=group) == [LOST] * ranks
    found = run(second_leg, ranks, layout, url, options, stop, group=group)
    begun = stop - stop % EVERY
    for before, after in zip(expected, found):
        assert after["losses"] == {step: loss for step, loss in before["losses"].items() if step > begun}
        assert after["samples"] == before["samples"][-len(after["samples"]) :]
        assert models.differences(before["full"], after["full"]) == []
        assert models.differences(before["buffers"], after["buffers"]) == []
        for name in ("lr", "scheduler", "scaler", "position", "rng"):
            assert after[name] == before[name], name
    assert len({state["losses"][LAST] for state in expected}) == len(
        {models.data_rank(layout, r) for r in range(ranks)}
    )


@pytest.mark.parametrize(("layout", "options"), CASES, ids=str)
def test_a_resumed_run_is_the_uninterrupted_run(layout: str, options: dict[str, Any], tmp_path: Path) -> None:
    check(layout, options, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize(("layout", "options"), MORE, ids=str)
def test_a_resumed_run_is_the_uninterrupted_run_in_more_layouts(
    layout: str, options: dict[str, Any], tmp_path: Path
) -> None:
    check(layout, options, tmp_path)
