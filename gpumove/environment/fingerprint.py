"""What the job runs on, as plain values for manifests and for ``gpumove doctor``. Never any secret.

A key that is missing was not known; None says that there is no such thing. docs/environment.md lists them.
"""

from __future__ import annotations

import os
import platform
import resource
import sys
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

from gpumove.config import Config
from gpumove.environment import torch_facts
from gpumove.environment.git import commit_of
from gpumove.environment.torch_facts import known
from gpumove.environment.variables import ALLOWED, COUNTED, shown
from gpumove.format.codec import digest
from gpumove.memory import total_bytes
from gpumove.version import __version__

CARRIERS = (
    "fsspec", "s3fs", "gcsfs", "adlfs", "safetensors", "zstandard", "xxhash", "msgspec", "rich", "pyyaml",
)  # fmt: skip
"""Carry bytes, whose digests are compared; they compute nothing."""
_NUMERIC = {
    "torch": "torch", "numpy": "numpy", "scipy": "scipy", "triton": "triton", "torchvision": "torchvision",
    "torchaudio": "torchaudio", "torchdata": "torchdata", "torchao": "torchao", "transformers": "transformers",
    "tokenizers": "tokenizers", "datasets": "datasets", "accelerate": "accelerate", "peft": "peft", "trl": "trl",
    "diffusers": "diffusers", "timm": "timm", "einops": "einops", "lightning": "lightning",
    "pytorch-lightning": "pytorch_lightning", "deepspeed": "deepspeed", "flash-attn": "flash_attn",
    "xformers": "xformers", "transformer-engine": "transformer_engine", "apex": "apex",
    "bitsandbytes": "bitsandbytes", "liger-kernel": "liger_kernel", "megatron-core": "megatron.core",
    "sentencepiece": "sentencepiece", "webdataset": "webdataset", "mosaicml-streaming": "streaming",
    "pillow": "PIL", "opencv-python": "cv2", "pandas": "pandas", "pyarrow": "pyarrow", "jax": "jax",
}  # fmt: skip
"""May have a part in what a step computes: the package, and the module by which one sees that a process uses it."""
_DRIVER = Path("/proc/driver/nvidia/version")
_MOST_SCRIPT = 16 << 20


def packages() -> dict[str, str]:
    """Installed versions of the packages that matter here; absent ones are left out."""
    return {name: found for name in (*_NUMERIC, *CARRIERS) if (found := _installed(name)) is not None}


def _installed(name: str) -> str | None:
    try:
        return version(name)
    except Exception:  # noqa: BLE001 - half-removed packages raise what they like, and it must cost no checkpoint
        return None


class Environment:
    """This process's. What cannot change while it lives is looked up once."""

    def __init__(self) -> None:
        self._constant: dict[str, Any] | None = None
        self._versions: dict[str, str | None] = {}

    def now(self, *, world_size: int | None = None) -> dict[str, Any]:
        """All that is known of a training process. It waits for no device, and may run in any thread."""
        torch = sys.modules.get("torch")  # never imported for this: the torch-free verbs stay torch-free
        if self._constant is None:
            self._constant = _machine(torch, look=False) | known({"script": _script})
        facts = self._constant | {"packages": self._used()} | known({"variables": _variables})
        if torch is not None:
            if not facts.get("devices") and torch.cuda.is_initialized():  # CUDA is in use since the last look
                self._constant |= torch_facts.libraries(torch, look=False)
                facts |= self._constant
            jobs: dict[str, Callable[[], Any]] = {
                "threads": lambda: torch_facts.threads(torch),
                "interop_threads": torch.get_num_interop_threads,
                "torch": lambda: torch_facts.flags(torch) | known({"compiled": torch_facts.compiled}),
            }
            facts |= known(jobs)
        peak = known({"host_bytes": lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss << 10})
        count = sum(kind["count"] for kind in facts.get("devices") or ())
        facts["peak"] = peak | known({"on": lambda: torch_facts.peaks(torch, count)}).get("on", {})
        if world_size is not None:
            facts |= {"world_size": world_size, "ranks_here": Config.ranks_here()}
        return facts

    def _used(self) -> dict[str, str]:
        """Versions of what this process has loaded, and of what carries its bytes."""
        names = [name for name, module in _NUMERIC.items() if module in sys.modules]
        for name in (*names, *CARRIERS):
            if name not in self._versions:
                self._versions[name] = _installed(name)
        return {name: found for name in (*names, *CARRIERS) if (found := self._versions[name]) is not None}


def fingerprint(*, world_size: int | None = None) -> dict[str, Any]:
    """Of this process, looked up anew."""
    return Environment().now(world_size=world_size)


def machine() -> dict[str, Any]:
    """What can be told of this machine without a job: all but what the script sets. It may begin to use CUDA."""
    found = _machine(sys.modules.get("torch"), look=True) | {"packages": packages()}
    return found | known({"variables": _variables})


def _machine(torch: Any, *, look: bool) -> dict[str, Any]:
    facts: dict[str, Any] = {"gpumove": __version__}
    facts |= known(
        {
            "python": platform.python_version,
            "machine": platform.machine,
            "kernel": platform.release,
            "libc": lambda: os.confstr("CS_GNU_LIBC_VERSION"),
            "processor": lambda: _processor(torch),
            "driver": _driver,
        }
    )
    return facts | (torch_facts.libraries(torch, look=look) if torch is not None else {})


def _processor(torch: Any) -> dict[str, Any]:
    facts: dict[str, Callable[[], Any]] = {
        "model": _processor_model,
        "cores": lambda: len(os.sched_getaffinity(0)),
        "memory_bytes": total_bytes,
    }
    if torch is not None:
        facts["capability"] = torch.backends.cpu.get_cpu_capability
    return known(facts)


def _processor_model() -> str:
    with Path("/proc/cpuinfo").open() as file:
        head = file.read(8192)
    rows = dict(line.split(":", 1) for line in reversed(head.splitlines()) if ":" in line)
    facts = {name.strip(): value.strip() for name, value in rows.items()}
    if "model name" in facts:
        return facts["model name"]
    return f"implementer {facts['CPU implementer']} part {facts['CPU part']}"  # ARM gives numbers only


def _driver() -> str | None:
    """Of NVIDIA, by its kernel module; None if there is none."""
    try:
        line = _DRIVER.read_text().splitlines()[0]
    except FileNotFoundError:
        return None
    return next(word for word in line.split() if word.count(".") in (1, 2) and word.replace(".", "").isdigit())


def _variables() -> dict[str, str]:
    return shown(Config.variables((*ALLOWED, COUNTED)))


def _script() -> dict[str, Any]:
    """The program that was started: its name, a digest of the file, and the commit of the repository that it lies in.

    Whether anything else was changed since that commit cannot be told without git; the digest tells it of this file.
    """
    path = Path(sys.modules["__main__"].__file__ or "")
    if path.stat().st_size > _MOST_SCRIPT:
        raise ValueError("this is no script")
    found = {"name": path.name, "digest": digest(path.read_bytes())[:16]}
    return found | known({"commit": lambda: commit_of(path.parent)})
