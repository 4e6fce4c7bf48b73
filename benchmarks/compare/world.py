"""The ranks of one trial: what they have to agree on beside the training. Alone, all of it is trivial."""

from __future__ import annotations

from datetime import timedelta
from typing import Any

import torch

_PATIENCE = timedelta(seconds=300)


class World:
    """One process."""

    rank, size = 0, 1

    def any(self, flag: bool) -> bool:
        """Whether it is so on some rank; all ranks ask together."""
        return flag

    def barrier(self) -> None:
        """All ranks are here."""

    def gather(self, row: Any) -> list[Any]:
        """Every rank's, on all ranks."""
        return [row]

    def group(self) -> Any:
        """A process group for somebody's background thread; None if there are no ranks."""
        return None

    def close(self) -> None:
        """Nobody speaks any more."""


class Ranks(World):
    """Processes with a gloo group. What is agreed here has a group of its own, apart from the training's."""

    def __init__(self, rank: int, size: int, meeting: str) -> None:
        import torch.distributed as dist

        self.rank, self.size, self._dist = rank, size, dist
        dist.init_process_group("gloo", init_method=meeting, rank=rank, world_size=size, timeout=_PATIENCE)
        self._group = dist.new_group(backend="gloo", timeout=_PATIENCE)

    def any(self, flag: bool) -> bool:
        found = torch.tensor(float(flag))
        self._dist.all_reduce(found, op=self._dist.ReduceOp.MAX, group=self._group)
        return bool(found)

    def barrier(self) -> None:
        self._dist.barrier(group=self._group)

    def gather(self, row: Any) -> list[Any]:
        rows: list[Any] = [None] * self.size
        self._dist.all_gather_object(rows, row, group=self._group)
        return rows

    def group(self) -> Any:
        return self._dist.new_group(backend="gloo", timeout=_PATIENCE)

    def close(self) -> None:
        self.barrier()
        self._dist.destroy_process_group()


def join(ranks: int, rank: int, meeting: str) -> World:
    """The world of one process of a trial; ``ranks`` is 0 for a training without process groups."""
    return Ranks(rank, ranks, meeting) if ranks else World()
