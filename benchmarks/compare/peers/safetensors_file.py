"""safetensors' save_file and load_file of one flat dict."""

from __future__ import annotations

from pathlib import Path

from safetensors.torch import load_file, save_file

from benchmarks.compare.peers import flat
from benchmarks.compare.peers.contract import Peer, Wait


class Safetensors(Peer):
    """Blocks for the whole write; the harness adds the fsync that it leaves out."""

    @property
    def _folder(self) -> Path:
        if self.place.local is None:
            raise ValueError("safetensors writes local files")
        self.place.local.mkdir(parents=True, exist_ok=True)
        return self.place.local

    def save(self) -> Wait:
        name = self.next_name()
        save_file(flat.flatten(self.job), self._folder / name)
        return lambda: self.sync(name)

    def restore(self) -> dict[str, float]:
        flat.load(self.job, load_file(self._folder / self.place.newest()))
        return {}
