"""torch.distributed.checkpoint as its tutorial uses it, in the foreground or in the background."""

from __future__ import annotations

from concurrent.futures import Future
from time import perf_counter
from typing import Any

import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint._fsspec_filesystem import FsspecReader, FsspecWriter  # not public in torch 2.13
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict

from benchmarks.peers.contract import Peer, Wait
from benchmarks.places import Place
from benchmarks.workload import Job


class Dcp(Peer):
    """dcp.save or dcp.async_save, everything at its default: one writer thread, default stager, executor thread."""

    def __init__(self, job: Job, place: Place, *, background: bool) -> None:
        super().__init__(job, place)
        self._background = background

    def _state(self) -> dict[str, Any]:
        model, optimizer = get_state_dict(self.job.model, self.job.optimizer)
        return {"model": model, "optimizer": optimizer}

    def _target(self, name: str) -> dict[str, Any]:
        if self.place.local is not None:
            return {"checkpoint_id": str(self.place.local / name)}
        return {"storage_writer": FsspecWriter(self.place.child(name), **self.place.options)}

    def _source(self, name: str) -> dict[str, Any]:
        if self.place.local is not None:
            return {"checkpoint_id": str(self.place.local / name)}
        return {"storage_reader": FsspecReader(self.place.child(name), **self.place.options)}

    def save(self) -> Wait:
        name = f"step-{self.job.step}"
        self.saved.append(name)
        if not self._background:
            dcp.save(self._state(), **self._target(name))
            return lambda: self.place.sync(name)
        future = dcp.async_save(self._state(), **self._target(name))
        if not isinstance(future, Future):
            raise TypeError(f"dcp.async_save returned a {type(future).__name__}")

        def wait() -> None:
            future.result()
            self.place.sync(name)

        return wait

    def restore(self) -> dict[str, float]:
        began = perf_counter()
        state = self._state()  # a fresh optimizer takes a step on zeros here, to have a state to load into
        ready = perf_counter()
        dcp.load(state, **self._source(self.place.newest()))
        loaded = perf_counter()
        set_state_dict(
            self.job.model,
            self.job.optimizer,
            model_state_dict=state["model"],
            optim_state_dict=state["optimizer"],
        )
        return {"prepare_s": ready - began, "load_call_s": loaded - ready, "apply_s": perf_counter() - loaded}
