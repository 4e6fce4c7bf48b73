"""What a machine must have for a run: packages, torch, memory, a disk. Torch is optional, nothing is left behind."""

from __future__ import annotations

import importlib
import os
import resource
import shutil
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from gpumove.environment.fingerprint import machine, packages
from gpumove.environment.said import lines
from gpumove.errors import ConfigError
from gpumove.memory import available_bytes, limit_bytes, machine_bytes
from gpumove.words import size

_MIB, _GIB = 1 << 20, 1 << 30
_DISK_BYTES = 32 * _MIB
_SLOW_DISK = 200 * _MIB
_NEEDED = ("numpy", "fsspec", "safetensors", "zstandard", "xxhash", "msgspec", "rich")
_CLOUDS = {"s3fs": "s3", "gcsfs": "gcs", "adlfs": "azure"}


@dataclass(frozen=True)
class Check:
    """One thing that was looked at. ``exit_code`` is above 0 for a failure: that of its error class."""

    name: str
    status: Literal["ok", "warn", "fail"]
    found: str
    advice: str = ""
    exit_code: int = 0
    details: tuple[str, ...] = ()
    """What there is to add, line by line."""
    facts: dict[str, Any] = field(default_factory=dict)
    """The same for programs."""


def check_packages() -> Check:
    """What gpumove itself needs, and what else matters."""
    have = packages()
    missing = [n for n in _NEEDED if n not in have]
    text = ", ".join(f"{n} {v}" for n, v in have.items() if n != "torch")
    if missing:
        return Check("packages", "fail", f"missing: {', '.join(missing)}", "reinstall gpumove", ConfigError.exit_code)
    absent = [f"{n} (gpumove[{extra}])" for n, extra in _CLOUDS.items() if n not in have]
    return Check("packages", "ok", text + (f"; not installed: {', '.join(absent)}" if absent else ""))


def check_torch() -> Check:
    """Torch, which is loaded by this, and its devices."""
    try:
        torch = importlib.import_module("torch")
    except Exception as error:  # noqa: BLE001 - a broken installation raises anything
        text = f"cannot be imported ({type(error).__name__}: {error})"
        return Check("torch", "warn", text, "install torch to save and restore; reading verbs work without it")
    if not torch.cuda.is_available():
        return Check("torch", "ok", f"{torch.__version__}, no CUDA device")
    names = [torch.cuda.get_device_properties(i) for i in range(torch.cuda.device_count())]
    devices = ", ".join(f"{p.name} with {p.total_memory / _GIB:.0f} GiB" for p in names)
    return Check("torch", "ok", f"{torch.__version__}, CUDA {torch.version.cuda}: {devices}")


def check_memory() -> Check:
    """Host memory that is free."""
    free, total, limit = available_bytes(), machine_bytes(), limit_bytes()
    if free is None or total is None:
        return Check("memory", "ok", "how much is free is not known: there is no /proc/meminfo")
    text = f"{free / _GIB:.1f} of {total / _GIB:.1f} GiB available"
    if limit is not None and limit < total:
        text += f", limited to {limit / _GIB:.1f} GiB in this container"
    if free < 2 * _GIB:
        return Check("memory", "warn", text, "a save holds a copy of the rank's state in host memory: get more")
    return Check("memory", "ok", text)


def check_memlock() -> Check:
    """How much may be locked."""
    limit = resource.getrlimit(resource.RLIMIT_MEMLOCK)[0]
    if limit == resource.RLIM_INFINITY:
        return Check("memlock", "ok", "unlimited")
    text = f"at most {limit / _MIB:.0f} MiB may be locked"
    if limit < _GIB and Path("/dev/infiniband").exists():
        return Check("memlock", "warn", text, "RDMA needs more: ulimit -l unlimited")
    return Check("memlock", "ok", f"{text}, which does not bind CUDA's pinned memory")


def check_disk(predecessor_dir: str | None) -> Check:
    """Room and rate of the folder that a rank would keep its last save in; without one, of that for temporary files."""
    place = predecessor_dir or tempfile.gettempdir()
    if not Path(place).is_dir():
        advice = "make it, or change predecessor_dir"
        return Check("disk", "fail", f"{place} is no folder", advice, ConfigError.exit_code)
    free = shutil.disk_usage(place).free
    text = f"{free / _GIB:.1f} GiB free at {place}"
    if free < _GIB:
        advice = "the last save's bytes need room" if predecessor_dir else "logs and caches need room"
        return Check("disk", "warn", text, advice)
    try:
        rate = _disk_rate(place)
    except OSError as error:
        return Check("disk", "warn", f"{text}, and not writable: {error}", "another folder, or other rights")
    text += f", takes {size(rate)}/s"
    if predecessor_dir and rate < _SLOW_DISK:
        return Check("disk", "warn", text, "predecessor_dir wants a fast local disk, or saves wait for it")
    return Check("disk", "ok", text)


def _disk_rate(place: str) -> float:
    data = os.urandom(_MIB)
    with tempfile.TemporaryFile(dir=place) as file:  # it has no name: even if this is killed nothing is left
        began = time.perf_counter()
        for _ in range(_DISK_BYTES // _MIB):
            file.write(data)
        file.flush()
        os.fsync(file.fileno())
        return _DISK_BYTES / (time.perf_counter() - began)


def check_machine() -> Check:
    """The fingerprint, as far as there is one without a job."""
    facts = machine()
    told = tuple(f"{name}: {text}" for name, text in lines(facts) if name not in ("gpumove", "packages"))
    return Check("machine", "ok", "what a checkpoint's fingerprint is compared with", details=told, facts=facts)
