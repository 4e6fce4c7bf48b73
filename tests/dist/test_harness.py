"""The harness itself: a test that hangs or dies must say so, and say where."""

from __future__ import annotations

import os
import time

import pytest
import torch
import torch.distributed as dist

from tests.dist.harness import LOST, kill_self, run


def double(rank: int, number: float, *, plus: float = 0.0) -> torch.Tensor:
    total = torch.tensor([number * rank + plus])
    dist.all_reduce(total)
    return total


def hang_on_rank_1(rank: int) -> None:
    if rank == 1:
        time.sleep(120)


def die_on_rank_1(rank: int) -> None:
    if rank == 1:
        kill_self()
    dist.barrier()


def fail_on_rank_1(rank: int) -> int:
    if rank == 1:
        raise ValueError("an honest failure")
    return os.getpid()


def test_every_rank_answers() -> None:
    assert [answer.item() for answer in run(double, 3, 2.0, plus=1.0)] == [9.0] * 3
    assert run(fail_on_rank_1, 1, group=False)[0] != os.getpid()


def test_a_hang_is_killed_and_tells_where() -> None:
    began = time.monotonic()
    with pytest.raises(pytest.fail.Exception, match=r"ranks \[1\] did not end(.|\n)*in hang_on_rank_1"):
        run(hang_on_rank_1, 2, timeout_s=4.0)
    assert time.monotonic() - began < 40


def test_a_death_and_a_failure_are_told_apart() -> None:
    with pytest.raises(pytest.fail.Exception, match="rank 1 died"):
        run(die_on_rank_1, 2)
    with pytest.raises(pytest.fail.Exception, match="ValueError: an honest failure"):
        run(fail_on_rank_1, 2)
    with pytest.raises(pytest.fail.Exception, match="rank 0 was to be lost and is not"):
        run(double, 2, 1.0, lost=[0])
    assert repr(LOST) == "LOST"
