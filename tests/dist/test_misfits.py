"""Ranks that do not fit together, or of which one cannot: the same error on all of them, and nobody waits."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn

from gpumove import Checkpointer, GpumoveError
from tests.dist.harness import run
from tests.dist.jobs import SETTINGS, equal_linear, url_of


class Odd(nn.Module):
    """A model of which ranks disagree in the way that is asked for."""

    def __init__(self, rank: int, how: str) -> None:
        super().__init__()
        torch.manual_seed(rank if how == "values" else 0)
        self.first = nn.Linear(9, 9 + rank * (how == "shapes"))
        self.second = nn.Linear(7, 7, dtype=torch.float64 if how == "dtypes" and rank == 1 else None)
        self.third = nn.ModuleDict({f"expert{rank if how == 'names' else 0}": nn.Linear(3, 3)})


def misfit(rank: int, url: str, how: str) -> tuple[str, str]:
    with Checkpointer(url, model=Odd(rank, how), **SETTINGS) as ckpt:
        ckpt.restore()
        try:
            ckpt.save(1)
        except GpumoveError as error:
            return type(error).__name__, str(error)
    return "", ""


@pytest.mark.parametrize(
    ("how", "words"),
    [
        ("values", ["model.first.weight has different values on ranks 0 and 1, 2", "model.second.bias has different"]),
        ("shapes", ["model.first.weight is float32[9, 9] on rank 0 and float32[10, 9] on rank 1",
                    "model.first.bias is float32[9] on rank 0 and float32[11] on rank 2"]),
        ("dtypes", ["model.second.weight is float32[7, 7] on rank 0 and float64[7, 7] on rank 1"]),
        ("names", ["model.third.expert0.weight does not exist on rank 1, 2",
                   "model.third.expert2.bias does not exist on rank 0, 1"]),
    ],
)  # fmt: skip
def test_ranks_that_do_not_fit_together_are_told_so_before_anything_is_written(
    how: str, words: list[str], tmp_path: Path
) -> None:
    found = run(misfit, 3, url_of(tmp_path), how)
    assert len(set(found)) == 1, "the same on every rank"
    kind, text = found[0]
    assert kind == "LayoutError"
    for word in words:
        assert word in text
    assert not (tmp_path / "run/packs").exists()


class Fragile:
    """An object whose state cannot be taken, or cannot be given back, on one rank."""

    def __init__(self, broken: str) -> None:
        self.broken = broken

    def state_dict(self) -> dict[str, Any]:
        if self.broken == "raises":
            raise ValueError("no state today")
        return {"it": object() if self.broken == "unencodable" else 1}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        if self.broken == "load":
            raise ValueError("not this state")


def one_fails(rank: int, url: str, broken: str, save: bool) -> tuple[str, str]:
    fragile = Fragile(broken if rank == 1 else "")
    model: nn.Module = equal_linear()
    if broken == "extra" and rank == 1:
        model = nn.Sequential(model)
    with Checkpointer(url, model=model, objects={"fragile": fragile}, **SETTINGS) as ckpt:
        try:
            ckpt.restore()
            if save:
                ckpt.save(1).wait()
        except (GpumoveError, ValueError) as error:
            return type(error).__name__, str(error)
    return "", ""


@pytest.mark.parametrize(
    ("broken", "kind", "word"),
    [("raises", "ValueError", "no state today"), ("unencodable", "ConfigError", "'objects.fragile.it'")],
)
def test_a_state_that_one_rank_cannot_take_is_an_error_on_all(
    broken: str, kind: str, word: str, tmp_path: Path
) -> None:
    began = time.monotonic()
    (kind_0, text_0), (kind_1, text_1) = run(one_fails, 2, url_of(tmp_path), broken, True)
    assert (kind_1, kind_0) == (kind, "GpumoveError" if kind == "ValueError" else kind)
    assert word in text_1
    assert word in text_0
    assert "rank 1: " in text_0
    assert time.monotonic() - began < SETTINGS["peer_s"], "nobody waited for the rank that failed"


@pytest.mark.parametrize(
    ("broken", "kind", "word"),
    [("load", "ValueError", "not this state"), ("extra", "LayoutError", "lacks model.0.weight")],
)
def test_a_restore_that_one_rank_cannot_do_is_an_error_on_all(
    broken: str, kind: str, word: str, tmp_path: Path
) -> None:
    url = url_of(tmp_path)
    assert run(one_fails, 2, url, "", True) == [("", "")] * 2
    (kind_0, text_0), (kind_1, text_1) = run(one_fails, 2, url, broken, False)
    assert (kind_1, kind_0) == (kind, "GpumoveError" if kind == "ValueError" else kind)
    assert word in text_1
    assert word in text_0
    assert "rank 1: " in text_0


def too_early(rank: int, folder: str) -> str:
    """The process group is made after the Checkpointer: every rank would take itself for the only one."""
    dist.destroy_process_group()
    ckpt = Checkpointer(f"file://{folder}/run", model=nn.Linear(1, 1), **SETTINGS)
    dist.init_process_group("gloo", init_method=f"file://{folder}/again", rank=rank, world_size=2)
    with pytest.raises(GpumoveError) as caught:
        ckpt.restore()
    return str(caught.value)


def test_a_process_group_that_comes_too_late_is_noticed(tmp_path: Path) -> None:
    for text in run(too_early, 2, str(tmp_path)):
        assert "call init_process_group before making the Checkpointer" in text


def other_numbers(rank: int, url: str) -> str:
    with Checkpointer(url, model=Odd(0, ""), **SETTINGS) as ckpt:
        ckpt.restore()
        with pytest.raises(GpumoveError) as caught:
            ckpt.save(7 + rank)
    return str(caught.value)


def test_ranks_that_count_differently_are_told(tmp_path: Path) -> None:
    first, second = run(other_numbers, 2, url_of(tmp_path))
    assert first == second
    assert first.startswith("rank 1 is at step 8 and rank 0 at step 7: ")


def restore_in_vain(rank: int, url: str) -> tuple[str, bool]:
    """On rank 1 the checkpoint does not fit; nothing may be changed on rank 0 either."""
    model = nn.Linear(4, 4 if rank == 0 else 5)
    optimizer = torch.optim.AdamW(model.parameters())
    before = [p.detach().clone() for p in model.parameters()]
    with Checkpointer(url, model=model, optimizer=optimizer, **SETTINGS) as ckpt:
        try:
            ckpt.restore()
        except GpumoveError as error:
            untouched = all(torch.equal(a, b) for a, b in zip(before, model.parameters()))
            return type(error).__name__, untouched and not optimizer.state
    return "", False


def save_one_step(rank: int, url: str) -> None:
    model = equal_linear(4)
    optimizer = torch.optim.AdamW(model.parameters())
    model(torch.ones(1, 4)).sum().backward()
    optimizer.step()
    with Checkpointer(url, model=model, optimizer=optimizer, **SETTINGS) as ckpt:
        ckpt.save(1).wait()


def test_a_restore_that_does_not_fit_on_one_rank_changes_nothing_on_any(tmp_path: Path) -> None:
    url = url_of(tmp_path)
    run(save_one_step, 2, url)
    assert run(restore_in_vain, 2, url) == [("LayoutError", True)] * 2
