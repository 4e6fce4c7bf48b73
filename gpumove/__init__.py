"""gpumove moves running PyTorch training jobs between GPU clouds.

Nothing happens at import: the names below are loaded when they are first used, so that tools which only read a run do
not load torch.
"""

from __future__ import annotations

import importlib
import logging
from typing import TYPE_CHECKING, Any

from gpumove.version import __version__

if TYPE_CHECKING:
    from gpumove.checkpointer import Checkpointer
    from gpumove.config import Config
    from gpumove.data.stage import stage
    from gpumove.errors import (
        ConfigError,
        FencedError,
        GpumoveError,
        IntegrityError,
        LayoutError,
        ParityError,
        StoreError,
    )
    from gpumove.estimates.estimate import estimate
    from gpumove.format.manifest import Manifest
    from gpumove.format.pointer import Pointer
    from gpumove.handle import SaveHandle
    from gpumove.inspection.run import checkpoints, verify
    from gpumove.move.replicate import replicate
    from gpumove.notices.notice import Notice
    from gpumove.parity.outputs import ProbeResult
    from gpumove.reader import load
    from gpumove.serving.following import follow, pointers, resolve
    from gpumove.serving.gate import check_probe
    from gpumove.serving.publishing import demote, promote, publish
    from gpumove.state.loader import ElasticLoader
    from gpumove.telemetry import metrics, observe

_HOMES = {
    "Checkpointer": "gpumove.checkpointer",
    "Config": "gpumove.config",
    "ConfigError": "gpumove.errors",
    "ElasticLoader": "gpumove.state.loader",
    "FencedError": "gpumove.errors",
    "GpumoveError": "gpumove.errors",
    "IntegrityError": "gpumove.errors",
    "LayoutError": "gpumove.errors",
    "Manifest": "gpumove.format.manifest",
    "Notice": "gpumove.notices.notice",
    "ParityError": "gpumove.errors",
    "Pointer": "gpumove.format.pointer",
    "ProbeResult": "gpumove.parity.outputs",
    "SaveHandle": "gpumove.handle",
    "StoreError": "gpumove.errors",
    "check_probe": "gpumove.serving.gate",
    "checkpoints": "gpumove.inspection.run",
    "demote": "gpumove.serving.publishing",
    "estimate": "gpumove.estimates.estimate",
    "follow": "gpumove.serving.following",
    "load": "gpumove.reader",
    "metrics": "gpumove.telemetry",
    "observe": "gpumove.telemetry",
    "pointers": "gpumove.serving.following",
    "promote": "gpumove.serving.publishing",
    "publish": "gpumove.serving.publishing",
    "replicate": "gpumove.move.replicate",
    "resolve": "gpumove.serving.following",
    "stage": "gpumove.data.stage",
    "verify": "gpumove.inspection.run",
}

__all__ = [
    "Checkpointer",
    "Config",
    "ConfigError",
    "ElasticLoader",
    "FencedError",
    "GpumoveError",
    "IntegrityError",
    "LayoutError",
    "Manifest",
    "Notice",
    "ParityError",
    "Pointer",
    "ProbeResult",
    "SaveHandle",
    "StoreError",
    "__version__",
    "check_probe",
    "checkpoints",
    "demote",
    "estimate",
    "follow",
    "load",
    "metrics",
    "observe",
    "pointers",
    "promote",
    "publish",
    "replicate",
    "resolve",
    "stage",
    "verify",
]

logging.getLogger("gpumove").addHandler(logging.NullHandler())


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'gpumove' has no attribute {name!r}")
    value = getattr(importlib.import_module(_HOMES[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
