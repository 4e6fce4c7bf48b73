"""Output probes: functions of the model with fixed inputs, recorded with checkpoints and compared after a restore.

They run in the training thread, on all ranks alike, and leave no trace in the training. One that fails costs a
warning, never a checkpoint.
"""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import msgspec
import torch

from gpumove.errors import ConfigError
from gpumove.format.manifest import Manifest
from gpumove.format.probes import Probe
from gpumove.parity.arrays import named, to_array
from gpumove.parity.outputs import Array, ProbeResult, compare, record
from gpumove.parity.verdict import DIFFERENT
from gpumove.state.aside import aside, whole
from gpumove.state.capture import Job
from gpumove.state.members import ModelMember
from gpumove.state.peers import Peers
from gpumove.tracing import Trace

_log = logging.getLogger("gpumove")
_PARTING = 10
"""A probe that took longer than this part of the time that is left is not run before the job leaves."""


@dataclass
class _Known:
    """A registered probe, and what is known of it."""

    run: Callable[[], Any]
    every: int
    tolerance: float | None
    took_s: float = math.inf
    barred: bool = False
    """It has written to the model, and is not to do so again."""


class Probes:
    """One rank's."""

    def __init__(self, job: Job, peers: Peers, busy: Callable[[], AbstractContextManager[None]] = nullcontext) -> None:
        """None are known yet.

        Args:
            job: whose modules are put aside while a probe runs.
            peers: the other ranks.
            busy: says meanwhile that this is no hang.
        """
        self._job, self._peers, self._busy = job, peers, busy
        self._known: dict[str, _Known] = {}
        self._common: list[str] = []
        self._said: set[str] = set()
        self.left_s: Callable[[], float] = lambda: math.inf
        """Until the job has to be gone."""
        self.results: dict[str, ProbeResult] = {}
        """What the last restore has found, by name; on all ranks."""

    def add(self, run: Callable[[], Any], name: str, *, every: int, tolerance: float | None) -> None:
        """Register one.

        Raises:
            ConfigError: a name that is taken, or something that cannot be.
        """
        if not isinstance(name, str) or not name or not callable(run):
            raise ConfigError(f"a probe is a function of no arguments and has a name, not {run!r} and {name!r}")
        if name in self._known:
            raise ConfigError(f"there is a probe {name!r} already: give each its own name")
        if type(every) is not int or every < 1:
            raise ConfigError(f"every is a whole number of checkpoints above 0, not {every!r}")
        if tolerance is not None and not 0 <= tolerance < math.inf:
            raise ConfigError(f"tolerance is a share of the largest value, from 0 on, not {tolerance!r}")
        self._known[name] = _Known(run, every, tolerance)

    @property
    def names(self) -> list[str]:
        """Those that this rank has and may run."""
        return [name for name, known in self._known.items() if not known.barred]

    # ---------------------------------------------------------------- which, on rank 0

    def choose(self, told: Sequence[Sequence[str]], serial: int, sure: bool, thrift: int) -> list[str]:
        """Those to run with a save.

        Args:
            told: what each rank has.
            serial: of the save.
            sure: it was asked for, and is not just due.
            thrift: what a move asks of the saves, as ``Asked`` has it.
        """
        self._common = [name for name in self._known if all(name in names for names in told)]
        if len(self._common) < len(set().union(*told)):
            self._warn("some ranks lack some of the probes: register the same ones on all; the others are left out")
        if self.left_s() < math.inf:
            return self.parting() if thrift else []
        if thrift > 1 and not sure:
            return []  # saves come after every step now, and the last one is asked for
        return [name for name in self._common if sure or (serial - 1) % self._known[name].every == 0]

    def parting(self) -> list[str]:
        """Those to run with the last save before the job leaves, where all ranks are still there."""
        may = set(self.names)
        return [name for name in self._common if name in may and _PARTING * self._known[name].took_s <= self.left_s()]

    # ---------------------------------------------------------------- running them

    def take(self, names: Sequence[str], trace: Trace | None = None) -> list[Probe]:
        """Run these on all ranks; what rank 0 is to record."""
        found = []
        for name in names:
            began = time.perf_counter()
            outputs = self._outputs(name)
            if outputs is not None and self._peers.rank == 0:
                found.append(record(name, outputs))
            self._known[name].took_s = time.perf_counter() - began
            if trace is not None:
                trace.add(f"probe {name}", began, time.perf_counter())
        return found

    def _outputs(self, name: str) -> dict[str, Array] | None:
        modules = [member.module for member in self._job.members if isinstance(member, ModelMember)]
        try:
            with self._busy(), aside(modules):
                # Whole on every rank, since that takes all of them; to the host on the one that records.
                found = named(self._known[name].run())
                found = {k: whole(v) if isinstance(v, torch.Tensor) else v for k, v in found.items()}
                return {k: to_array(v, k) for k, v in found.items()} if self._peers.rank == 0 else {}
        except Exception as error:  # noqa: BLE001 - it is the user's function, and a probe never costs a checkpoint
            self._known[name].barred = getattr(error, "code", "") == "config.probe_writes"
            self._warn(f"the probe {name!r} failed and is left out: {type(error).__name__}: {error}")
            return None

    def _warn(self, text: str) -> None:
        (_log.debug if text in self._said else _log.warning)("%s", text)  # once, and not with every save
        self._said.add(text)

    # ---------------------------------------------------------------- after a restore

    def compare(self, manifest: Manifest | None) -> None:
        """Run those that the restored checkpoint has recorded, and compare; collective."""
        self.results = {}
        recorded = {} if manifest is None else {probe.name: probe for probe in manifest.probes}
        if manifest is None or not recorded:
            return
        mine = msgspec.msgpack.encode([name for name in recorded if name in self.names])
        self._peers.meet("the probes after the restore")
        names = msgspec.msgpack.decode(self._peers.ask(mine, _common), type=list[str])
        found = []
        for name in names:
            outputs = self._outputs(name)
            if outputs is not None and self._peers.rank == 0:
                known = self._known[name]
                found.append(compare(recorded[name], outputs, step=manifest.step, tolerance=known.tolerance))
        if names:
            told = self._peers.broadcast(msgspec.msgpack.encode(found))
            self.results = {r.name: r for r in msgspec.msgpack.decode(told, type=list[ProbeResult])}
        for result in self.results.values():
            if self._peers.rank == 0:
                _log.log(logging.WARNING if result.verdict == DIFFERENT else logging.INFO, "%s", result.text)


def _common(told: list[bytes]) -> bytes:
    lists = [msgspec.msgpack.decode(message, type=list[str]) for message in told]
    return msgspec.msgpack.encode([name for name in lists[0] if all(name in names for names in lists)])
