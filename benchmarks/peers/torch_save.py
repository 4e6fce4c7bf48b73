"""torch.save and torch.load of one file, by path or through fsspec's open file."""

from __future__ import annotations

from typing import Any

import fsspec
import torch

from benchmarks.peers.contract import Peer, Wait


class TorchSave(Peer):
    """Blocks for the whole write; the harness adds the fsync that torch leaves out."""

    def save(self) -> Wait:
        name = f"step-{self.job.step}"
        self.saved.append(name)
        state = {"model": self.job.model.state_dict(), "optimizer": self.job.optimizer.state_dict()}
        if self.place.local is not None:
            self.place.local.mkdir(parents=True, exist_ok=True)
            torch.save(state, self.place.local / name)
        else:
            with fsspec.open(self.place.child(name), "wb", **self.place.options) as file:
                torch.save(state, file)
        return lambda: self.place.sync(name)

    def restore(self) -> dict[str, float]:
        state: dict[str, Any]
        name = self.place.newest()
        if self.place.local is not None:
            state = torch.load(self.place.local / name)
        else:
            with fsspec.open(self.place.child(name), "rb", **self.place.options) as file:
                state = torch.load(file)
        self.job.model.load_state_dict(state["model"])
        self.job.optimizer.load_state_dict(state["optimizer"])
        return {}
