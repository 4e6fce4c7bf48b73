"""The torch_checkpointing package: shared memory, a copy beside the training, a process that writes."""

from __future__ import annotations

from typing import Any

from torch.optim.optimizer import register_optimizer_step_pre_hook
from torch_checkpointing import CheckpointManager
from torch_checkpointing.storage.filesystem import LocalFileSystemStorageConfig

from benchmarks.compare.peers.contract import Peer, Wait
from benchmarks.compare.world import World
from benchmarks.places import Place
from benchmarks.workload import Job


class TorchCheckpointing(Peer):
    """Its defaults, with the lock around the optimizer's step that its documentation asks for.

    But for direct I/O: with it, version 0.1.1 fails on file systems such as ext4 (EINVAL at the first unaligned write).
    """

    def __init__(self, job: Job, place: Place, world: World) -> None:
        super().__init__(job, place, world)
        storage = LocalFileSystemStorageConfig(use_direct_io=False)
        self._manager = CheckpointManager(CheckpointManager.Config(storage_config=storage))
        self._held: Any = None

    def open(self) -> None:
        self._manager.prewarm_staging(self._state())
        register_optimizer_step_pre_hook(self._enter)
        self.job.optimizer.register_step_post_hook(self._leave)

    def _enter(self, *_: object) -> None:
        self._held = self._manager.lock()
        self._held.__enter__()

    def _leave(self, *_: object) -> None:
        self._held.__exit__(None, None, None)

    def _state(self) -> dict[str, Any]:
        return {"model": self.job.model.state_dict(), "optimizer": self.job.optimizer.state_dict()}

    def save(self) -> Wait:
        name = self.next_name()
        if self.place.local is None:
            raise ValueError("torch_checkpointing writes local files")
        future = self._manager.save(str(self.place.local / name), self._state())

        def wait() -> None:
            if future is not None:
                future.result()
            self.sync(name)

        return wait

    def restore(self) -> dict[str, float]:
        if self.place.local is None:
            raise ValueError("torch_checkpointing reads local files")
        # Into what is there: tensors are filled in place. A fresh optimizer has no state yet, and takes what comes.
        into: dict[str, Any] = {"model": self.job.model.state_dict(), "optimizer": None}
        found = self._manager.load(str(self.place.local / self.place.newest()), into=into)
        self.job.optimizer.load_state_dict(found["optimizer"])
        return {}

    def close(self) -> None:
        self._manager.close()
