"""The list of peers. Their packages are imported only when one is made."""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from benchmarks.compare.peers.contract import Peer
from benchmarks.compare.world import World
from benchmarks.places import Place
from benchmarks.workload import Job


@dataclass(frozen=True)
class Entry:
    """One peer: the class behind it, with which settings, and where it can be used."""

    path: str
    """``module:class`` in this package."""
    settings: Mapping[str, Any] = field(default_factory=dict)
    stores: tuple[str, ...] = ("file", "s3")
    everywhere: bool = False
    """Whether it also takes part where there is only time for some: over ranks, and in W2 and W3 on S3."""
    needs: str = "torch"
    """The package that it is of."""

    @property
    def installed(self) -> bool:
        return importlib.util.find_spec(self.needs) is not None


def _ours(**settings: Any) -> Entry:
    return Entry("ours:Gpumove", settings, everywhere=True)


def _dcp(*stores: str, everywhere: bool = False, **settings: Any) -> Entry:
    return Entry("dcp:Dcp", settings, stores or ("file", "s3"), everywhere=everywhere)


PEERS: Mapping[str, Entry] = {
    "gpumove": _ours(),
    "gpumove-raw": _ours(codec="raw"),
    "torch.save": Entry("torch_save:TorchSave"),
    "safetensors": Entry("safetensors_file:Safetensors", stores=("file",), needs="safetensors"),
    "dcp.save": _dcp(everywhere=True),
    "dcp.save+2threads": _dcp(threads=2),
    "dcp.async_save": _dcp(everywhere=True, stager="own"),
    "dcp.async_save+cached": _dcp(stager="kept"),
    "dcp.async_save+background": _dcp("file", stager="background"),
    "dcp.async_save+2threads": _dcp("file", stager="own", threads=2),
    "dcp.async_save+process": _dcp("file", stager="shared", process=True),
    "dcp.async_save+best": _dcp(stager="kept", threads=2, keep_plan=True),
    "torch_checkpointing": Entry(
        "torch_checkpointing:TorchCheckpointing", stores=("file",), needs="torch_checkpointing"
    ),
    "torchsnapshot": Entry("torchsnapshot:TorchSnapshot", {"background": False}, needs="torchsnapshot"),
    "torchsnapshot.async": Entry("torchsnapshot:TorchSnapshot", {"background": True}, needs="torchsnapshot"),
    "orbax": Entry("orbax:Orbax", {"background": False}, stores=("file",), needs="orbax"),
    "orbax.async": Entry("orbax:Orbax", {"background": True}, stores=("file",), needs="orbax"),
    "s3torchconnector": Entry("s3torchconnector:S3File", stores=("s3",), needs="s3torchconnector"),
    "s3torchconnector+dcp": Entry("s3torchconnector:S3Dcp", {"threads": 2}, ("s3",), needs="s3torchconnector"),
}


def make(name: str, job: Job, place: Place, world: World) -> Peer:
    """A peer by its name."""
    entry = PEERS[name]
    module, _, kind = entry.path.partition(":")
    made: Peer = getattr(importlib.import_module(f"benchmarks.compare.peers.{module}"), kind)(
        job, place, world, **entry.settings
    )
    return made
