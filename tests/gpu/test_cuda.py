"""On a CUDA device: snapshots are exact and overlap, the step is not held up, a resumed run is bit for bit the same."""

from __future__ import annotations

import time
from pathlib import Path

import pytest
import torch
from torch import nn

import gpumove
from gpumove.state.staging import Stager

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


def job(seed: int = 0, width: int = 512) -> tuple[nn.Module, torch.optim.Optimizer]:
    torch.manual_seed(seed)
    model = nn.Sequential(
        nn.Linear(width, width), nn.BatchNorm1d(width), nn.ReLU(), nn.Dropout(0.1), nn.Linear(width, width)
    ).cuda()
    return model, torch.optim.AdamW(model.parameters(), lr=1e-3, fused=True)


def train(
    model: nn.Module, optimizer: torch.optim.Optimizer, start: int, stop: int, ckpt: gpumove.Checkpointer | None = None
) -> list[float]:
    losses = []
    for step in range(start, stop):
        x = torch.randn(64, model[0].in_features, device="cuda", generator=None)
        loss = model(x).square().mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.detach())
        if ckpt is not None:
            ckpt.step(step + 1, loss=loss.detach())
    return [float(x) for x in losses]


def test_a_snapshot_is_exact_although_the_optimizer_steps_at_once() -> None:
    stager = Stager(overlap=True)
    model, optimizer = job(width=4096)
    train(model, optimizer, 0, 2)
    sources = [p.detach() for p in model.parameters()]
    for _ in range(10):
        loss = model(torch.randn(64, 4096, device="cuda")).square().mean()
        loss.backward()
        expected = [s.clone() for s in sources]
        snapshot = stager.stage(sources, [False] * len(sources))
        optimizer.step()
        snapshot.wait()
        for i, e in enumerate(expected):
            found = torch.frombuffer(bytearray(snapshot.view(i)), dtype=e.dtype).view(e.shape)
            assert torch.equal(found, e.cpu())
        optimizer.zero_grad()
    stager.close()


def test_the_call_does_not_wait_for_the_device(tmp_path: Path) -> None:
    model, optimizer = job(width=8192)
    with gpumove.Checkpointer(str(tmp_path / "run"), model=model, optimizer=optimizer) as ckpt:
        ckpt.restore()
        train(model, optimizer, 0, 2, ckpt)
        ckpt.save(2).wait(300)
        torch.cuda.synchronize()
        began = time.perf_counter()
        handle = ckpt.save(3)
        call_s = time.perf_counter() - began
        handle.wait_staged(300)
        assert call_s < 0.5 * (handle.stats.staged_s or 0.0) + 0.02


def test_a_stopped_run_goes_on_bit_for_bit(tmp_path: Path) -> None:
    torch.use_deterministic_algorithms(True, warn_only=True)
    model, optimizer = job()
    whole = train(model, optimizer, 0, 20)
    url = str(tmp_path / "run")
    first, first_optimizer = job()
    with gpumove.Checkpointer(url, model=first, optimizer=first_optimizer) as ckpt:
        head = train(first, first_optimizer, ckpt.restore(), 9, ckpt)
        ckpt.save(9)
        train(first, first_optimizer, 9, 12)
    again, again_optimizer = job(seed=5)
    with gpumove.Checkpointer(url, model=again, optimizer=again_optimizer) as ckpt:
        tail = train(again, again_optimizer, ckpt.restore(), 20, ckpt)
    assert head + tail == whole
    for a, b in zip(model.state_dict().values(), again.state_dict().values()):
        assert torch.equal(a, b)


def test_optimizer_state_comes_beside_the_first_forward(tmp_path: Path) -> None:
    torch.use_deterministic_algorithms(True, warn_only=True)
    url = str(tmp_path / "run")
    model, optimizer = job(width=2048)
    with gpumove.Checkpointer(url, model=model, optimizer=optimizer, every_s=None) as ckpt:
        ckpt.restore()
        train(model, optimizer, 0, 3, ckpt)
        ckpt.save(3).wait(300)
        expected = train(model, optimizer, 3, 6)
    fresh, restored = job(seed=99, width=2048)
    with gpumove.Checkpointer(url, model=fresh, optimizer=restored, every_s=None) as ckpt:
        assert ckpt.restore(lazy=True) == 3
        assert train(fresh, restored, 3, 6) == expected
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), fresh.parameters()))


@pytest.mark.parametrize("settings", [{"fused": True}, {"foreach": True}, {"capturable": True}], ids=str)
def test_what_a_device_computed_is_predicted_on_the_host(settings: dict[str, bool], tmp_path: Path) -> None:
    """Kernels there may round differently: it costs a fraction of a bit, and no exactness."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(512, 512), nn.GELU(), nn.Linear(512, 512)).cuda()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, **settings)
    url, truth = str(tmp_path / "run"), {}
    with gpumove.Checkpointer(url, model=model, optimizer=optimizer, codec="small", keep_last=None) as ckpt:
        ckpt.restore()
        for step in range(1, 5):
            model(torch.randn(64, 512, device="cuda")).square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()
            truth[step] = [t.detach().cpu().clone() for t in model.state_dict().values()]
            ckpt.save(step).wait(300)
    sent = [c.new_bytes / c.state_bytes for c in gpumove.checkpoints(url)]
    assert max(sent[2:]) < 0.4, sent
    for step, state in truth.items():
        gpumove.load(url, step, model=model)
        assert all(torch.equal(a, b.cpu()) for a, b in zip(state, model.state_dict().values()))


def test_unchanged_tensors_are_found_on_the_device_behind_work_that_still_runs() -> None:
    stager, at_once = Stager(overlap=True, skip="all"), [False, False]
    frozen, moving = torch.randn(1 << 22, device="cuda"), torch.randn(1 << 22, device="cuda")
    heavy = torch.randn(4096, 4096, device="cuda")
    for turn in range(8):
        for _ in range(20):
            heavy = heavy @ heavy / 64
        moving.add_(1)
        if turn == 5:
            frozen.add_(1)  # queued behind the products: a fingerprint taken too early would not see it
        snapshot = stager.stage([frozen, moving], at_once)
        snapshot.wait()
        assert bytes(snapshot.view(0)) == frozen.cpu().numpy().tobytes()
        assert bytes(snapshot.view(1)) == moving.cpu().numpy().tobytes()
        assert (0 in snapshot._unchanged) == (turn in (2, 3, 4, 6, 7))
        stager.keep(snapshot)
        stager.settle({0})
    stager.close()
