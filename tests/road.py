"""A run on its way to another store, as the tools send it there; for tests of those who wait for it."""

from __future__ import annotations

from gpumove.config import Config
from gpumove.move.copier import Copier
from gpumove.move.replica import Replica
from gpumove.store.log import Log
from gpumove.store.objects import Store

MOVE = "0123456789abcdef"


class Road:
    """From a run to a replica of it."""

    def __init__(self, source: str, target: str) -> None:
        self._stores = [Store.open(url, Config()) for url in (source, target)]
        self.source, self.target = (Log(store) for store in self._stores)
        self.source.open(create=False)
        self.source.read()
        self.copier = Copier(*self._stores)
        self._replica = Replica(self.source, self.target, self.copier)

    def bring(self, step: int) -> None:
        """Bring one checkpoint over."""
        self._replica.look()
        checkpoint = self.source.view.find(step)
        assert checkpoint is not None
        assert self._replica.bring(checkpoint) is not None

    def hand_over(self) -> None:
        """The run may be claimed at the target, and nowhere else."""
        self.source.move("sealed", move=MOVE, other=self.target.store.url)
        self.target.move("handover", move=MOVE, other=self.source.store.url)

    def close(self) -> None:
        for store in self._stores:
            store.close()
