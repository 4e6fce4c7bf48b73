"""What the job runs on, as plain values for manifests and for ``gpumove doctor``. Never any secret."""

from __future__ import annotations

import platform
import sys
from importlib.metadata import PackageNotFoundError, version
from typing import Any

from gpumove.version import __version__

_PACKAGES = ("torch", "numpy", "fsspec", "s3fs", "gcsfs", "adlfs", "safetensors", "zstandard", "xxhash", "msgspec")


def packages() -> dict[str, str]:
    """Installed versions of the packages that matter here; absent ones are left out."""
    found = {}
    for name in _PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


def fingerprint() -> dict[str, Any]:
    """Versions, machine and devices, in a form that two machines can be compared by."""
    facts: dict[str, Any] = {
        "gpumove": __version__,
        "python": platform.python_version(),
        "machine": platform.machine(),
        "kernel": platform.release(),
        "packages": packages(),
    }
    torch = sys.modules.get("torch")  # never imported for this: the torch-free verbs stay torch-free
    if torch is not None:
        facts["threads"] = torch.get_num_threads()
        if torch.cuda.is_available():
            facts["cuda"] = torch.version.cuda
            facts["devices"] = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    return facts
