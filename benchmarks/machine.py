"""What a process and its machine can tell of themselves: versions, memory, descriptors, threads. No names, no paths."""

from __future__ import annotations

import os
import platform
import re
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

_PACKAGES = (
    "gpumove", "torch", "numpy", "fsspec", "s3fs", "safetensors", "zstandard", "xxhash", "msgspec", "zipnn",
    "torch_checkpointing", "torchsnapshot", "orbax-checkpoint", "s3torchconnector",
)  # fmt: skip
_STATUS = Path("/proc/self/status")


def facts() -> dict[str, Any]:
    """Enough to tell whether two results may be compared."""
    return {
        "cores": len(os.sched_getaffinity(0)),
        "processor": _processor(),
        "memory_gb": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 1e9, 1),
        "kernel": platform.release(),
        "machine": platform.machine(),
        "huge_pages": _huge_pages(),
        "python": platform.python_version(),
        "packages": _versions(),
        "load_before": round(os.getloadavg()[0], 2),
    }


def _versions() -> dict[str, str]:
    found = {}
    for name in _PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


def _processor() -> str:
    match = re.search(r"^model name\s*:\s*(.+)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE)
    return match[1] if match else platform.processor()


def _huge_pages() -> str:
    setting = Path("/sys/kernel/mm/transparent_hugepage/enabled")
    match = re.search(r"\[(\w+)\]", setting.read_text()) if setting.exists() else None
    return match[1] if match else "unknown"


@dataclass(frozen=True)
class Memory:
    """Resident bytes of this process: now, at the highest since ``reset_peak``, and by kind."""

    now: int
    peak: int
    anonymous: int
    mapped: int
    shared: int


def memory() -> Memory:
    """Read from the kernel's books; shared memory and mapped files count."""
    found = {k: int(v) * 1024 for k, v in re.findall(r"^(\w+):\s+(\d+) kB$", _STATUS.read_text(), re.MULTILINE)}
    return Memory(found["VmRSS"], found["VmHWM"], found["RssAnon"], found["RssFile"], found["RssShmem"])


def reset_peak() -> None:
    """Let the kernel take the highest mark anew from here: it misses nothing, as a sampler would."""
    Path("/proc/self/clear_refs").write_text("5")


def descriptors() -> int:
    """Open file descriptors of this process (the one that looks is not counted)."""
    return len(os.listdir("/proc/self/fd")) - 1


def threads() -> int:
    """Threads of this process, those of native libraries included."""
    return len(os.listdir("/proc/self/task"))
