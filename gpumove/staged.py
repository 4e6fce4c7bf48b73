"""What the training thread hands to the background for one save."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from gpumove.format.probes import Probe
from gpumove.handle import SaveHandle
from gpumove.parity.recorder import Recorded
from gpumove.state.capture import Capture
from gpumove.state.layout import Agreement, Layout
from gpumove.state.snapshot import Snapshot


@dataclass(frozen=True)
class Seat:
    """This rank's place among those that save together: all ranks of the job, or those that are left of them."""

    rank: int
    world_size: int
    patience_s: float
    """Bound on waiting for the parts of the others."""


class Cut(NamedTuple):
    """What is to be saved, and where each rank's part of it is."""

    capture: Capture
    layout: Layout
    agreed: Agreement


@dataclass(frozen=True)
class Staged:
    """What the training thread hands over."""

    handle: SaveHandle
    snapshot: Snapshot
    cut: Cut
    trace: Sequence[Recorded]
    trace_after: str
    """The attempt of the checkpoint that it begins after."""
    began: float
    pinned: bool
    seat: Seat
    health: Sequence[Mapping[str, Any]]
    probes: Sequence[Probe] = ()
