"""Recording and certifying on a real device: nothing is waited for, its generator counts, and bits are bits."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import gpumove
from gpumove.parity.recorder import Recorder, told
from gpumove.state.capture import Job

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]


def job() -> tuple[nn.Module, torch.optim.Optimizer]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 256), nn.Dropout(0.2), nn.GELU(), nn.Linear(256, 64)).cuda()
    return model, torch.optim.AdamW(model.parameters(), lr=1e-3)


def steps(ckpt: gpumove.Checkpointer, model: nn.Module, optimizer: torch.optim.Optimizer, step: int, stop: int) -> int:
    """Train; a call of ``step`` between meetings may not wait for the device."""
    inputs = torch.randn(32, 64, generator=torch.Generator().manual_seed(4)).cuda()
    while step < stop:
        loss = (model(inputs) - inputs).square().mean()
        loss.backward()
        norm = nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        step += 1
        meets = step >= ckpt._rendezvous.next_step
        torch.cuda.set_sync_debug_mode("default" if meets else "error")
        leaving = ckpt.step(step, loss=loss, grad_norm=norm)
        torch.cuda.set_sync_debug_mode("default")
        if leaving:
            break
    return step


def certify(url: str, damage: Any = lambda *_: None) -> Any:
    model, optimizer = job()
    with gpumove.Checkpointer(url, model=model, optimizer=optimizer, every_s=None, certify=6) as ckpt:
        step = ckpt.restore()
        damage(model, optimizer)
        steps(ckpt, model, optimizer, step, 100)
    return ckpt.certificate


def test_a_job_on_a_device_is_certified_and_its_generator_counts(tmp_path: Path) -> None:
    url = str(tmp_path)
    model, optimizer = job()
    with gpumove.Checkpointer(url, model=model, optimizer=optimizer, every_s=None) as ckpt:
        step = ckpt.restore()
        for stop in (4, 10):
            step = steps(ckpt, model, optimizer, step, stop)
            ckpt.save(step).wait()
    found = certify(url)
    assert found.verdict == "bitwise", found.why
    assert "the gradient norm" in found.why
    drawn = certify(url, lambda *_: torch.rand(1, device="cuda"))
    assert (drawn.verdict, drawn.cause) == ("different", "rng"), drawn.why
    moment = certify(url, lambda m, o: o.state[m[3].bias]["exp_avg"].zero_())
    assert (moment.verdict, moment.cause) == ("different", "optimizer"), moment.why
    assert moment.first.step == 6


def test_what_recording_costs_with_a_device() -> None:
    model, optimizer = job()
    loss = torch.ones((), device="cuda")
    for certify_steps, most_us in ((0, 60.0), (1 << 20, 150.0)):
        mine = Recorder(Job(model=model, optimizer=optimizer), rng=True, certify_steps=certify_steps)
        took = []
        for step in range(2000):
            began = time.perf_counter()
            mine.record(step, loss, 0.1, loss)
            took.append(1e6 * (time.perf_counter() - began))
        torch.cuda.synchronize()
        began = time.perf_counter()
        rows = told(mine.since(999))
        per_row = 1e6 * (time.perf_counter() - began) / len(rows)
        print(f"certify_steps={certify_steps}: record {sorted(took)[1000]:.1f} us, told {per_row:.1f} us per row")
        assert sorted(took)[1000] < most_us
