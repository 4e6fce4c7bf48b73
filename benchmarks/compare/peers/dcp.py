"""torch.distributed.checkpoint as its tutorial uses it, and with what its options offer to make it faster."""

from __future__ import annotations

from concurrent.futures import Future
from time import perf_counter
from typing import Any

import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint._fsspec_filesystem import FsspecReader, FsspecWriter  # not public in torch 2.13
from torch.distributed.checkpoint.default_planner import DefaultSavePlanner
from torch.distributed.checkpoint.staging import DefaultStager, StagingOptions
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.checkpoint.state_dict_saver import AsyncCheckpointerType
from torch.optim.optimizer import register_optimizer_step_pre_hook

from benchmarks.compare.peers.contract import Peer, Wait
from benchmarks.compare.world import World
from benchmarks.places import Place
from benchmarks.workload import Job

_STAGERS = {"kept": (False, False), "background": (False, True), "shared": (True, False)}
"""Shared memory, and whether the copy runs beside the training; all keep their buffers. Pinned memory needs a GPU."""


class TimedPlanner(DefaultSavePlanner):
    """The default, and how long the plan took, the exchange between ranks included."""

    plan_s = 0.0

    def set_up_planner(self, *arguments: Any, **keywords: Any) -> None:
        self._began = perf_counter()
        super().set_up_planner(*arguments, **keywords)

    def finish_plan(self, new_plan: Any) -> Any:
        plan = super().finish_plan(new_plan)
        self.plan_s = perf_counter() - self._began
        return plan


class Dcp(Peer):
    """dcp.save, or with a stager dcp.async_save. ``"own"`` is what it takes by itself."""

    def __init__(
        self,
        job: Job,
        place: Place,
        world: World,
        *,
        stager: str | None = None,
        threads: int = 1,
        process: bool = False,
        keep_plan: bool = False,
    ) -> None:
        super().__init__(job, place, world)
        self._stager_name, self._threads, self._process, self._keep_plan = stager, threads, process, keep_plan
        self._stager: DefaultStager | None = None
        self._staged: Future[Any] | None = None
        self._planner: TimedPlanner | None = None
        self._group: Any = None

    def open(self) -> None:
        self._group = self.world.group()  # a background save on the training's own group deadlocks
        if self._stager_name in _STAGERS:
            shared, beside = _STAGERS[self._stager_name]
            self._stager = DefaultStager(StagingOptions(False, shared, beside, False))
            register_optimizer_step_pre_hook(self._wait_until_staged)
        if self._process and not dist.is_initialized():
            dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)

    def _wait_until_staged(self, *_: object) -> None:
        """What a user has to do where the copy runs beside the training."""
        if self._staged is not None:
            self._staged.result()
            self._staged = None

    def state(self) -> dict[str, Any]:
        """As both loading and saving want it."""
        model, optimizer = get_state_dict(self.job.model, self.job.optimizer)
        return {"model": model, "optimizer": optimizer}

    def target(self, name: str) -> dict[str, Any]:
        """Where to save to."""
        if self.place.local is None:
            return {
                "storage_writer": FsspecWriter(self.place.child(name), thread_count=self._threads, **self.place.options)
            }
        path = str(self.place.local / name)
        if self._threads == 1:
            return {"checkpoint_id": path}
        return {"storage_writer": dcp.FileSystemWriter(path, thread_count=self._threads)}

    def source(self, name: str) -> dict[str, Any]:
        """Where to load from."""
        if self.place.local is not None:
            return {"checkpoint_id": str(self.place.local / name)}
        return {"storage_reader": FsspecReader(self.place.child(name), **self.place.options)}

    def save(self) -> Wait:
        name = self.next_name()
        # A planner cannot be sent to another process with a clock in it.
        self._planner = None if self._process else TimedPlanner(enable_plan_caching=self._keep_plan)
        if self._stager_name is None:
            dcp.save(self.state(), planner=self._planner, **self.target(name))
            return lambda: self.sync(name)
        future = self._begin(name)

        def wait() -> None:
            future.result()
            self.sync(name)

        return wait

    def _begin(self, name: str) -> Future[Any]:
        kind = AsyncCheckpointerType.PROCESS if self._process else AsyncCheckpointerType.THREAD
        found: Any = dcp.async_save(
            self.state(),
            planner=self._planner,
            process_group=self._group,
            async_checkpointer_type=kind,
            async_stager=self._stager,
            **self.target(name),
        )
        if isinstance(found, Future):
            return found
        self._staged = found.staging_completion
        uploaded: Future[Any] = found.upload_completion
        return uploaded

    def own_figures(self) -> dict[str, float]:
        return {} if self._planner is None else {"plan_s": self._planner.plan_s}

    def restore(self) -> dict[str, float]:
        began = perf_counter()
        state = self.state()  # a fresh optimizer takes a step on zeros here, to have a state to load into
        ready = perf_counter()
        dcp.load(state, **self.source(self.place.newest()))
        loaded = perf_counter()
        set_state_dict(
            self.job.model,
            self.job.optimizer,
            model_state_dict=state["model"],
            optim_state_dict=state["optimizer"],
        )
        return {"prepare_s": ready - began, "load_call_s": loaded - ready, "apply_s": perf_counter() - loaded}

    def close(self) -> None:
        if self._stager is not None:
            self._stager.close()
