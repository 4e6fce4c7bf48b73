"""Unchanged tensors are found without copying them, on a device by sums that torch computes there."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

import gpumove
from gpumove import commit
from gpumove.format.codec import digest
from gpumove.save import units
from gpumove.save.writer import PartWriter
from gpumove.state import unchanged
from gpumove.state.staging import Stager
from gpumove.state.unchanged import sums
from tests.save.jobs import Plain, same


def flat(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.contiguous().reshape(-1).view(torch.uint8)


@pytest.mark.parametrize("nbytes", [0, 1, 3, 4, 5, 4096, 70_001])
def test_sums_tell_contents_apart(nbytes: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(unchanged, "_WORDS", 1000)
    data = torch.randint(0, 256, (nbytes,), dtype=torch.uint8)
    mark = sums(data)
    assert torch.equal(sums(data.clone()), mark)
    seen = {tuple(mark.tolist())}
    for at in {0, nbytes // 2, nbytes - 1} if nbytes else ():
        for bit in range(8):
            other = data.clone()
            other[at] ^= 1 << bit
            seen.add(tuple(sums(other).tolist()))
    assert len(seen) == 1 + 8 * len({0, nbytes // 2, nbytes - 1} if nbytes else ())


def test_sums_see_what_moved() -> None:
    data = torch.arange(1000, dtype=torch.int32)
    swapped = data.clone()
    swapped[3], swapped[700] = data[700], data[3]
    assert not torch.equal(sums(flat(data)), sums(flat(swapped)))
    assert not torch.equal(sums(flat(torch.zeros(10))), sums(flat(-torch.zeros(10))))


@pytest.fixture
def stager() -> Stager:
    return Stager(overlap=True, skip="all")


def test_a_source_that_did_not_change_is_not_copied(stager: Stager) -> None:
    frozen, moving = torch.randn(1000), torch.randn(1000)
    at_once = [False, False]
    first = stager.stage([frozen, moving], at_once)
    first.wait()
    stager.keep(first)
    stager.settle({0})
    second = stager.stage([frozen, moving], at_once)
    second.wait()  # the first look: nothing to compare with, so it is copied
    stager.keep(second)
    stager.settle({0})
    third = stager.stage([frozen, moving.add_(1)], at_once)
    third.wait()
    assert set(third._unchanged) == {0}
    assert bytes(third.view(0)) == frozen.numpy().tobytes()
    assert bytes(third.view(1)) == moving.numpy().tobytes()
    stager.keep(third)
    stager.settle({0})
    frozen.mul_(2)
    fourth = stager.stage([frozen, moving], at_once)
    fourth.wait()
    assert bytes(fourth.view(0)) == frozen.numpy().tobytes()
    stager.close()


def test_after_a_failed_save_everything_is_copied(stager: Stager) -> None:
    source, at_once = torch.randn(1000), [False]
    for _ in range(3):
        stager.stage([source], at_once).wait()
        stager.settle({0})
    stager.settle(None)
    snapshot = stager.stage([source], at_once)
    snapshot.wait()
    assert not snapshot._unchanged
    stager.close()


def test_saves_are_exact_while_parts_of_a_model_are_frozen_and_thawed(tmp_path: Path) -> None:
    job = Plain()
    truth = {}
    with gpumove.Checkpointer(
        str(tmp_path / "run"), **job.parts(), every_s=None, keep_last=None, skip_unchanged="all"
    ) as ckpt:
        ckpt.restore()
        for step in range(1, 10):
            job.model[0].requires_grad_(step in (1, 6, 7))
            job.step()
            truth[step] = job.state()
            ckpt.save(step).wait(60)
            if step == 5:
                assert ckpt._saver.snapshot is not None
                assert len(ckpt._saver.snapshot._unchanged) >= 6
    fresh = Plain(seed=9)
    for step, state in truth.items():
        gpumove.load(str(tmp_path / "run"), step, model=fresh.model, optimizer=fresh.optimizer)
        assert same(fresh.state(), state)


class Adapted(nn.Module):
    """Two frozen matrices of one shape, and a little that is trained."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(5)
        self.one, self.two = (nn.Linear(128, 128, bias=False).requires_grad_(requires_grad=False) for _ in range(2))
        self.head = nn.Linear(128, 4)

    def train_step(self, optimizer: torch.optim.Optimizer) -> None:
        self.head(self.two(self.one(torch.randn(8, 128)))).sum().backward()
        optimizer.step()
        optimizer.zero_grad()


@pytest.fixture
def hashed(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Bytes of each chunk that was hashed to compare it with the last save."""
    found: list[int] = []

    def counted(data: memoryview) -> str:
        found.append(len(data))
        return digest(data)

    monkeypatch.setattr(units, "digest", counted)
    return found


@pytest.mark.parametrize("codec", ["auto", "raw"])
def test_what_no_optimizer_works_on_is_not_copied_or_hashed_again(
    tmp_path: Path, hashed: list[int], codec: str
) -> None:
    model = Adapted()
    optimizer = torch.optim.AdamW(model.head.parameters())
    with gpumove.Checkpointer(str(tmp_path), model=model, optimizer=optimizer, every_s=None, codec=codec) as ckpt:
        ckpt.restore()
        counts = []
        for step in range(1, 5):
            model.train_step(optimizer)
            hashed.clear()
            ckpt.save(step).wait(60)
            counts.append(hashed.count(128 * 128 * 4))
    assert counts == [2, 0, 0, 0]


def test_a_change_right_after_a_restore_is_saved(tmp_path: Path) -> None:
    """The copy after a restore is of what is there then; the record is of what was restored."""
    for life in range(3):
        model = Adapted()
        optimizer = torch.optim.AdamW(model.head.parameters())
        with gpumove.Checkpointer(str(tmp_path), model=model, optimizer=optimizer, every_s=None) as ckpt:
            step = ckpt.restore()
            if life:
                assert float(model.one.weight[3, 3]) == life - 1
            with torch.no_grad():
                model.one.weight[3, 3] = life
            model.train_step(optimizer)
            ckpt.save(step + 1).wait(60)


def test_names_that_swap_their_tensors_are_seen(tmp_path: Path) -> None:
    model = Adapted()
    optimizer = torch.optim.AdamW(model.head.parameters())
    with gpumove.Checkpointer(str(tmp_path), model=model, optimizer=optimizer, every_s=None, keep_last=None) as ckpt:
        ckpt.restore()
        truth = {}
        for step in range(1, 7):
            model.train_step(optimizer)
            if step in (3, 5):
                model.one, model.two = model.two, model.one
            if step == 6:
                model.one.weight.data, model.two.weight.data = model.two.weight.data, model.one.weight.data
            truth[step] = {n: p.detach().clone() for n, p in model.named_parameters()}
            ckpt.save(step).wait(60)
    for step, state in truth.items():
        fresh = Adapted()
        gpumove.load(str(tmp_path), step, model=fresh)
        assert all(torch.equal(p, state[n]) for n, p in fresh.named_parameters()), step


def test_after_a_save_that_failed_changes_are_seen(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = Adapted()
    optimizer = torch.optim.AdamW(model.head.parameters())
    config = {"every_s": None, "on_save_error": "warn", "keep_last": None}
    with gpumove.Checkpointer(str(tmp_path), model=model, optimizer=optimizer, **config) as ckpt:
        ckpt.restore()
        for step in range(1, 6):
            model.train_step(optimizer)
            with torch.no_grad():
                model.one.weight.mul_(-1.0 if step in (2, 3) else 1.0)
            with monkeypatch.context() as patch:
                if step == 2:
                    patch.setattr(commit, "commit", _refuse)
                    patch.setattr(PartWriter, "write", _refuse)
                ckpt.save(step).join(60)
    fresh = Adapted()
    assert gpumove.load(str(tmp_path), model=fresh) == 5
    assert torch.equal(fresh.one.weight, model.one.weight)
    assert gpumove.verify(str(tmp_path), deep=True).sound


def _refuse(*_: object) -> None:
    raise gpumove.StoreError("the disk is gone")
