"""How much host memory there is to take. Reads the kernel's accounts; nothing is cached."""

from __future__ import annotations

from pathlib import Path

_CGROUPS = (
    ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory.current", "/sys/fs/cgroup/memory.stat"),
    (
        "/sys/fs/cgroup/memory/memory.limit_in_bytes",
        "/sys/fs/cgroup/memory/memory.usage_in_bytes",
        "/sys/fs/cgroup/memory/memory.stat",
    ),
)


def available_bytes() -> int | None:
    """Bytes that can be used without swapping, by the machine's and the container's account; None if not known."""
    known = [n for n in (_meminfo("MemAvailable"), *(_group(*names) for names in _CGROUPS)) if n is not None]
    return min(known, default=None)


def total_bytes() -> int | None:
    """Bytes that the machine has, or the container may take; None if not known."""
    return min((n for n in (machine_bytes(), limit_bytes()) if n is not None), default=None)


def machine_bytes() -> int | None:
    """Bytes that the machine has, whoever may take them; None if not known."""
    return _meminfo("MemTotal")


def limit_bytes() -> int | None:
    """Bytes that the container may take; None if nothing limits it."""
    limits = [_read(most) for most, *_ in _CGROUPS]
    return min((int(n) for n in limits if n is not None and n.strip().isdigit()), default=None)


def _meminfo(name: str) -> int | None:
    for line in (_read("/proc/meminfo") or "").splitlines():
        if line.startswith(f"{name}:"):
            return int(line.split()[1]) << 10
    return None


def _group(limit: str, used: str, stat: str) -> int | None:
    """What a control group may still take; clean page cache counts as used there, and is given back when asked for."""
    most, now = _read(limit), _read(used)
    if most is None or now is None or not most.strip().isdigit():
        return None
    counts = dict(line.split() for line in (_read(stat) or "").splitlines())
    cache = int(counts.get("total_inactive_file", counts.get("inactive_file", 0)))
    return max(0, int(most) - int(now) + cache)


def _read(path: str) -> str | None:
    try:
        return Path(path).read_text()
    except OSError:
        return None
