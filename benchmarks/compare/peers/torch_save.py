"""torch.save and torch.load of one file, by path or through fsspec's open file."""

from __future__ import annotations

from typing import Any

import fsspec
import torch

from benchmarks.compare.peers.contract import Peer, Wait


class TorchSave(Peer):
    """Blocks for the whole write; the harness adds the fsync that torch leaves out."""

    def save(self) -> Wait:
        name = self.next_name()
        state = {"model": self.job.model.state_dict(), "optimizer": self.job.optimizer.state_dict()}
        if self.place.local is not None:
            self.place.local.mkdir(parents=True, exist_ok=True)
            torch.save(state, self.place.local / name)
        else:
            with self.opened(name, "wb") as file:
                torch.save(state, file)
        return lambda: self.sync(name)

    def opened(self, name: str, mode: str) -> Any:
        """An object of the store as a file."""
        return fsspec.open(self.place.child(name), mode, **self.place.options)

    def restore(self) -> dict[str, float]:
        state: dict[str, Any]
        name = self.place.newest()
        if self.place.local is not None:
            state = torch.load(self.place.local / name)
        else:
            with self.opened(name, "rb") as file:
                state = torch.load(file)
        self.job.model.load_state_dict(state["model"])
        self.job.optimizer.load_state_dict(state["optimizer"])
        return {}
