"""A lazy restore: the model first, the optimizer's state behind it, and never a step, a save or a look without it."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import gpumove
from gpumove.config import Config
from gpumove.errors import IntegrityError, StoreError
from gpumove.fetch import _Reader
from gpumove.format.stored import Spot, Stored
from gpumove.store.log import Log
from gpumove.store.objects import Store
from gpumove.store.records import read_manifest, read_parts
from gpumove.takeover import Takeover
from tests.jobs import TrainingJob, new_job
from tests.runs import flip

SETTINGS: dict[str, Any] = {"every_s": None, "keep_last": None, "chunk_bytes": 4096, "pack_bytes": 8192}
LAST = 7


class Gate:
    """What is late comes when the test says so."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self._open, self.reached = threading.Event(), threading.Event()
        bring = Takeover._bring

        def gated(*arguments: Any) -> None:
            self.reached.set()
            self._open.wait(20)
            bring(*arguments)

        monkeypatch.setattr(Takeover, "_bring", gated)

    def open(self, after_s: float = 0.0) -> None:
        threading.Timer(after_s, self._open.set).start()


@pytest.fixture
def gate(monkeypatch: pytest.MonkeyPatch) -> Iterator[Gate]:
    found = Gate(monkeypatch)
    yield found
    found.open()


def saved(url: str, kind: str = "adamw", *, at: tuple[int, ...] = (4,), **settings: Any) -> TrainingJob:
    """A run with saves at these steps, trained on to the last one without any."""
    job = new_job(optimizer=kind)
    with gpumove.Checkpointer(url, **job.parts(), **SETTINGS, **settings) as ckpt:
        done = ckpt.restore()
        for step in at:
            job.train(done, step, ckpt)
            ckpt.save(step).wait(60)
            done = step
    job.train(at[-1], LAST)
    return job


def state_of(job: TrainingJob) -> list[torch.Tensor]:
    return [t for entries in job.optimizer.state.values() for t in entries.values() if isinstance(t, torch.Tensor)]


@pytest.mark.parametrize("kind", ["adamw", "adamw_fused", "adamw_loop", "sgd", "adafactor", "rmsprop"])
def test_training_goes_on_bit_for_bit(kind: str, tmp_path: Path, gate: Gate) -> None:
    straight = saved(str(tmp_path), kind)
    job = new_job(seed=9, optimizer=kind)
    with gpumove.Checkpointer(str(tmp_path), **job.parts(), **SETTINGS) as ckpt:
        assert ckpt.restore(lazy=True) == 4
        assert gate.reached.wait(10)
        came: list[bool] = []
        job.optimizer.register_step_pre_hook(lambda *_: came.append(gate._open.is_set()))
        gate.open(after_s=0.2)  # forward and backward of this model take a fraction of it
        job.train(4, LAST, ckpt)
        assert came == [True] * (LAST - 4)
    assert job.losses == {step: loss for step, loss in straight.losses.items() if step > 4}
    assert job.fingerprint() == straight.fingerprint()


def test_the_model_is_there_before_the_optimizers_state(tmp_path: Path, gate: Gate) -> None:
    straight = new_job()
    with gpumove.Checkpointer(str(tmp_path), **straight.parts(), **SETTINGS) as ckpt:
        straight.train(ckpt.restore(), 4, ckpt)
        ckpt.save(4).wait(60)
    job = new_job(seed=9)
    with gpumove.Checkpointer(str(tmp_path), **job.parts(), **SETTINGS) as ckpt:
        assert ckpt.restore(lazy=True) == 4
        assert all(
            torch.equal(a, b) for a, b in zip(job.model.state_dict().values(), straight.model.state_dict().values())
        )
        assert job.scheduler.state_dict() == straight.scheduler.state_dict()
        assert not all(torch.equal(a, b) for a, b in zip(state_of(job), state_of(straight)))
        gate.open(after_s=0.1)
        job.optimizer.state_dict()  # whoever looks for himself waits too
        assert all(torch.equal(a, b) for a, b in zip(state_of(job), state_of(straight), strict=True))


def test_large_tensors_come_between_forward_and_backward(tmp_path: Path, gate: Gate) -> None:
    """They are filled in place: nothing that the forward has kept for the backward may seem to have changed."""

    def job(seed: int) -> tuple[nn.Module, torch.optim.Optimizer]:
        torch.manual_seed(seed)
        model = nn.Sequential(nn.Linear(200, 300), nn.GELU(), nn.Linear(300, 200))
        return model, torch.optim.AdamW(model.parameters(), lr=1e-2)

    def backward(model: nn.Module, then: Callable[[], object] = lambda: None) -> None:
        loss = model(torch.ones(4, 200)).square().mean()
        then()
        loss.backward()

    model, optimizer = job(1)
    with gpumove.Checkpointer(str(tmp_path), model=model, optimizer=optimizer, **SETTINGS) as ckpt:
        ckpt.restore()
        backward(model)
        optimizer.step()
        ckpt.save(1).wait(60)
    optimizer.zero_grad()
    backward(model)
    optimizer.step()
    again, fresh = job(2)
    with gpumove.Checkpointer(str(tmp_path), model=again, optimizer=fresh, **SETTINGS) as ckpt:
        ckpt.restore(lazy=True)
        before = {key: state["exp_avg"]._version for key, state in fresh.state.items()}
        backward(again, lambda: (gate.open(), fresh.state_dict()))
        assert any(state["exp_avg"]._version > before[key] for key, state in fresh.state.items())
        fresh.step()
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), again.parameters()))


class Mixed(nn.Module):
    """bfloat16 to compute with."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.body = nn.Sequential(nn.Linear(40, 80), nn.GELU(), nn.Linear(80, 40)).bfloat16()


def mixed_job(seed: int) -> tuple[Mixed, nn.ParameterList, torch.optim.AdamW]:
    """A model in bfloat16, and AdamW over masters in float32."""
    model = Mixed(seed)
    masters = nn.ParameterList([nn.Parameter(p.detach().float()) for p in model.parameters()])
    return model, masters, torch.optim.AdamW(masters.parameters(), lr=1e-2)


def mixed_step(model: Mixed, masters: nn.ParameterList, optimizer: torch.optim.AdamW, step: int) -> float:
    inputs = torch.randn(8, 40, generator=torch.Generator().manual_seed(step)).bfloat16()
    loss = model.body(inputs).float().square().mean()
    loss.backward()
    for master, p in zip(masters, model.parameters()):
        master.grad, p.grad = p.grad.float() if p.grad is not None else None, None
    optimizer.step()
    with torch.no_grad():
        for master, p in zip(masters, model.parameters()):
            p.copy_(master)
    return float(loss.detach())


def test_masters_in_an_optimizer(tmp_path: Path, gate: Gate) -> None:
    model, masters, optimizer = mixed_job(1)
    parts = {"model": model, "objects": {"masters": masters}, "optimizer": optimizer}
    with gpumove.Checkpointer(str(tmp_path), **parts, **SETTINGS, codec="small") as ckpt:
        ckpt.restore()
        for step in range(1, 4):
            mixed_step(model, masters, optimizer, step)
            ckpt.step(step)
            ckpt.save(step).wait(60)
    expected = [mixed_step(model, masters, optimizer, step) for step in (4, 5, 6)]
    for at in (1, 3):  # a base, and a difference
        again, copies, fresh = mixed_job(5)
        parts = {"model": again, "objects": {"masters": copies}, "optimizer": fresh}
        with gpumove.Checkpointer(str(tmp_path), **parts, **SETTINGS) as ckpt:
            assert ckpt.restore(at, lazy=True) == at
            gate.open(after_s=0.05)
            found = [mixed_step(again, copies, fresh, step) for step in range(at + 1, 7)]
        assert found[-3:] == expected
        assert all(torch.equal(a, b) for a, b in zip(again.parameters(), model.parameters()))
        for a, b in zip(fresh.state.values(), optimizer.state.values(), strict=True):
            assert all(torch.equal(a[key], b[key]) for key in b)


def test_what_the_model_is_decoded_from_is_decoded_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Parameters are predicted from new moments: these come with them, and not once more behind them."""
    saved(str(tmp_path), at=(2, 3, 4), codec="small")
    decoded: list[Spot] = []
    decode = _Reader._decode

    def noted(self: _Reader, spot: Spot, node: Stored) -> None:
        decoded.append(spot)
        decode(self, spot, node)

    monkeypatch.setattr(_Reader, "_decode", noted)
    seen = []
    for lazy in (False, True):
        job = new_job(seed=9)
        with gpumove.Checkpointer(str(tmp_path), **job.parts(), **SETTINGS) as ckpt:
            ckpt.restore(lazy=lazy)
            job.optimizer.state_dict()
        seen.append(sorted(decoded))
        decoded.clear()
    assert seen[0] == seen[1]
    assert len(set(seen[1])) == len(seen[1])


def test_a_save_before_the_first_step_has_all(tmp_path: Path, gate: Gate) -> None:
    straight = saved(str(tmp_path / "a"))
    job = new_job(seed=9)
    with gpumove.Checkpointer(str(tmp_path / "a"), **job.parts(), **SETTINGS) as ckpt:
        ckpt.restore(lazy=True)
        gate.open(after_s=0.2)
        ckpt.save(4).wait(60)
    again = new_job(seed=11)
    with gpumove.Checkpointer(str(tmp_path / "a"), **again.parts(), **SETTINGS) as ckpt:
        ckpt.restore()
        again.train(4, LAST, ckpt)
    assert again.fingerprint() == straight.fingerprint()


def test_closing_waits_and_a_failed_training_does_not(tmp_path: Path, gate: Gate) -> None:
    saved(str(tmp_path))
    job = new_job(seed=9)

    def fail() -> None:
        with gpumove.Checkpointer(str(tmp_path), **job.parts(), **SETTINGS) as ckpt:
            ckpt.restore(lazy=True)
            gate.open(after_s=0.3)
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fail()
    assert not [t for t in threading.enumerate() if t.name == "gpumove-late"]


def harm(url: Path, step: int, name: str) -> None:
    """Flip a bit of a stored tensor of a checkpoint."""
    store = Store.open(str(url), Config())
    checkpoint = Log(store).read().find(step)
    assert checkpoint is not None
    parts = read_parts(store, read_manifest(store, checkpoint).parts, concurrency=1)
    part, entry = next((p, e) for p in parts for e in p.tensors if e.fqn.endswith(name))
    chunk = entry.chunks[0]
    assert chunk.inline is None
    flip(url / part.packs[chunk.pack].key, chunk.at + chunk.length // 2)
    store.close()


@pytest.mark.parametrize("how", ["step", "save", "close", "look"])
def test_damage_surfaces_where_the_state_is_needed_and_is_remembered(how: str, tmp_path: Path, gate: Gate) -> None:
    saved(str(tmp_path), at=(3, 4), delta=False)
    harm(tmp_path, 4, "mid.weight.exp_avg")
    job = new_job(seed=9)
    ckpt = gpumove.Checkpointer(str(tmp_path), **job.parts(), **SETTINGS)
    assert ckpt.restore(lazy=True) == 4
    before = [p.detach().clone() for p in job.model.parameters()]
    gate.open()
    calls: dict[str, Callable[[], object]] = {
        "step": lambda: job.train(4, 5, ckpt),
        "save": lambda: ckpt.save(4),
        "close": ckpt.close,
        "look": job.optimizer.state_dict,
    }
    with pytest.raises(IntegrityError, match=r"optimizer state of step 4 \(log entry \d+\).*restore\(\) again"):
        calls[how]()
    assert all(torch.equal(a, b) for a, b in zip(before, job.model.parameters()))
    job.optimizer.zero_grad()
    if how == "close":
        ckpt = gpumove.Checkpointer(str(tmp_path), **job.parts(), **SETTINGS)
    with ckpt:
        assert ckpt.restore(lazy=True) == 3, "the damaged one is passed over without being tried"
        job.train(3, LAST, ckpt)
    straight = saved(str(tmp_path / "other"), at=(3,), delta=False)
    assert job.fingerprint() == straight.fingerprint()


def test_a_store_that_is_gone_is_no_damage(tmp_path: Path, gate: Gate, monkeypatch: pytest.MonkeyPatch) -> None:
    saved(str(tmp_path))
    job = new_job(seed=9)
    ckpt = gpumove.Checkpointer(str(tmp_path), **job.parts(), **SETTINGS)
    ckpt.restore(lazy=True)
    monkeypatch.setattr(ckpt._store, "get_ranges", refuse)
    gate.open()
    with pytest.raises(StoreError, match="the optimizer state of step 4"):
        job.train(4, 5, ckpt)
    ckpt.close()
    monkeypatch.undo()
    again = gpumove.Checkpointer(str(tmp_path), **job.parts(), **SETTINGS)
    assert again.restore(lazy=True) == 4
    again.close()


def refuse(*_: object) -> None:
    raise StoreError("the network is gone", code="store.unavailable")


def test_restoring_again_gives_up_what_is_on_its_way(tmp_path: Path, gate: Gate) -> None:
    straight = saved(str(tmp_path), at=(3, 4))
    job = new_job(seed=9)
    with gpumove.Checkpointer(str(tmp_path), **job.parts(), **SETTINGS) as ckpt:
        ckpt.restore(lazy=True)
        gate.open(after_s=0.1)
        assert ckpt.restore(4) == 4
        job.train(4, LAST, ckpt)
    assert job.fingerprint() == straight.fingerprint()
