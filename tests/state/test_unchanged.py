"""Unchanged tensors are found without copying them, on a device by sums that torch computes there."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import gpumove
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
    return Stager(overlap=True)


def test_a_source_that_did_not_change_is_not_copied(stager: Stager) -> None:
    frozen, moving = torch.randn(1000), torch.randn(1000)
    first = stager.stage([frozen, moving], [False, False])
    first.wait()
    stager.keep(first)
    stager.settle({0})
    second = stager.stage([frozen, moving], [False, False])
    second.wait()  # the first look: nothing to compare with, so it is copied
    stager.keep(second)
    stager.settle({0})
    third = stager.stage([frozen, moving.add_(1)], [False, False])
    third.wait()
    assert set(third._unchanged) == {0}
    assert bytes(third.view(0)) == frozen.numpy().tobytes()
    assert bytes(third.view(1)) == moving.numpy().tobytes()
    stager.keep(third)
    stager.settle({0})
    frozen.mul_(2)
    fourth = stager.stage([frozen, moving], [False, False])
    fourth.wait()
    assert bytes(fourth.view(0)) == frozen.numpy().tobytes()
    stager.close()


def test_after_a_failed_save_everything_is_copied(stager: Stager) -> None:
    source = torch.randn(1000)
    for _ in range(3):
        stager.stage([source], [False]).wait()
        stager.settle({0})
    stager.settle(None)
    snapshot = stager.stage([source], [False])
    snapshot.wait()
    assert not snapshot._unchanged
    stager.close()


def test_saves_are_exact_while_parts_of_a_model_are_frozen_and_thawed(tmp_path: Path) -> None:
    job = Plain()
    truth = {}
    with gpumove.Checkpointer(
        str(tmp_path / "run"), **job.parts(), every_s=None, keep_last=None, skip_unchanged=True
    ) as ckpt:
        ckpt.restore()
        for step in range(1, 10):
            job.model[0].requires_grad_(step in (1, 6, 7))
            job.step()
            truth[step] = job.state()
            ckpt.save(step).wait(60)
            if step == 5:
                assert ckpt._snapshot is not None
                assert len(ckpt._snapshot._unchanged) >= 6
    fresh = Plain(seed=9)
    for step, state in truth.items():
        gpumove.load(str(tmp_path / "run"), step, model=fresh.model, optimizer=fresh.optimizer)
        assert same(fresh.state(), state)
