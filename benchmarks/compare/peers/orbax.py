"""Orbax, which is JAX's checkpointer: it gets the tensors as numpy arrays without a copy, and gives numpy arrays."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import orbax.checkpoint as ocp
import torch

from benchmarks.compare.peers import flat
from benchmarks.compare.peers.contract import Peer, Wait
from benchmarks.compare.world import World
from benchmarks.places import Place
from benchmarks.workload import Job


class Orbax(Peer):
    """A tree of arrays, in the foreground or with its AsyncCheckpointer."""

    def __init__(self, job: Job, place: Place, world: World, *, background: bool) -> None:
        super().__init__(job, place, world)
        kind = ocp.AsyncCheckpointer if background else ocp.Checkpointer
        self._saver: Any = kind(ocp.PyTreeCheckpointHandler())
        self._background = background

    def _path(self, name: str) -> Path:
        if self.place.local is None:
            raise ValueError("here Orbax writes local files")
        self.place.local.mkdir(parents=True, exist_ok=True)
        return self.place.local / name

    def save(self) -> Wait:
        name = self.next_name()
        self._saver.save(self._path(name), {key: _array(tensor) for key, tensor in flat.flatten(self.job).items()})

        def wait() -> None:
            if self._background:
                self._saver.wait_until_finished()
            self.sync(name)

        return wait

    def restore(self) -> dict[str, float]:
        found = self._saver.restore(self._path(self.place.newest()))
        flat.load(self.job, {key: _tensor(array) for key, array in found.items()})
        return {}

    def close(self) -> None:
        self._saver.close()


def _array(tensor: torch.Tensor) -> np.ndarray:
    if tensor.dtype is torch.bfloat16:
        return tensor.view(torch.int16).numpy().view(ml_dtypes.bfloat16)
    return tensor.numpy()


def _tensor(array: Any) -> torch.Tensor:
    found = np.asarray(array)
    if found.dtype == ml_dtypes.bfloat16:
        return torch.from_numpy(found.view(np.int16)).view(torch.bfloat16)
    return torch.from_numpy(found)
