"""gpumove, used as its README says."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from benchmarks.compare.peers.contract import Peer, Wait
from benchmarks.compare.world import World
from benchmarks.places import Place
from benchmarks.workload import Job
from gpumove.checkpointer import Checkpointer
from gpumove.handle import SaveHandle

_PLANNING = "plan"
"""The span of planning in a trace."""


class Gpumove(Peer):
    """Defaults, but for the moments of saving: the harness sets those."""

    def __init__(self, job: Job, place: Place, world: World, **settings: Any) -> None:
        super().__init__(job, place, world)
        self._settings: dict[str, Any] = {"every_s": None, **settings}
        self._traces: Path | None = None
        if world.group() is not None and place.local is not None:
            # Only where planning is a figure: several ranks. Beside the run, as a trace is no part of it.
            self._traces = place.local.with_name("traces")
            self._settings["trace_dir"] = str(self._traces)
        self._checkpointer: Checkpointer | None = None
        self._last: SaveHandle | None = None

    def _make(self) -> Checkpointer:
        return Checkpointer(
            self.place.url,
            model=self.job.model,
            optimizer=self.job.optimizer,
            storage_options=self.place.options,
            **self._settings,
        )

    def open(self) -> None:
        self._checkpointer = self._make()
        self._checkpointer.restore()

    @property
    def _open(self) -> Checkpointer:
        if self._checkpointer is None:
            raise RuntimeError("open() comes first")
        return self._checkpointer

    def stepped(self) -> None:
        self._open.step(self.job.step)

    def save(self) -> Wait:
        self._last = handle = self._open.save(self.job.step)

        def wait() -> None:
            handle.wait()

        return wait

    def own_figures(self) -> dict[str, float]:
        if self._last is None:
            return {}
        stats = self._last.stats
        return {
            "stall_s": stats.stall_s,
            "staged_s": stats.staged_s or 0.0,
            "uploaded_s": stats.uploaded_s or 0.0,
            "committed_s": stats.committed_s or 0.0,
            "new_bytes": stats.new_bytes,
            "clean_bytes": stats.clean_bytes,
            "peak_bytes": stats.peak_bytes,
            **self._planning(self._last),
        }

    def _planning(self, handle: SaveHandle) -> dict[str, float]:
        found = handle.trace.seconds()
        return {"plan_s": found[_PLANNING]} if _PLANNING in found else {}

    def restore(self) -> dict[str, float]:
        self.close()
        self._checkpointer = self._make()
        self.job.step = self._checkpointer.restore()
        return {}

    def close(self) -> None:
        if self._checkpointer is not None:
            self._checkpointer.close()
        self._checkpointer = None
