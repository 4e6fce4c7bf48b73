"""Is this machine, and this store, fit for a run? A list of checks, each with what to do about it. Torch is optional.

It tries things out rather than guess: what it writes to a store lies below ``probe/`` and is deleted at once.
"""

from __future__ import annotations

import importlib
import os
import platform
import resource
import shutil
import tempfile
import time
import uuid
from collections.abc import Callable, Iterator, Mapping
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from gpumove.config import Config
from gpumove.environment import packages
from gpumove.errors import ConfigError, GpumoveError, IntegrityError, StoreError
from gpumove.store.log import Log
from gpumove.store.objects import Store
from gpumove.version import __version__

_MIB, _GIB = 1 << 20, 1 << 30
_RATE_BYTES = 8 * _MIB
_SLOW = 10 * _MIB
_SKEW_S = 5.0
_PATIENCE_S = 20.0
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


def doctor(url: str | None = None, *, storage_options: Mapping[str, Any] | None = None) -> Iterator[Check]:
    """Look at this machine and, if a URL is given, at the store there. Failures are checks, not exceptions.

    Args:
        url: a run, or where one is to lie.
        storage_options: for fsspec.

    Yields:
        The checks, each as soon as it is done.
    """
    yield Check("gpumove", "ok", f"{__version__}, python {platform.python_version()}, {platform.platform()}")
    for look in (_packages, _torch, _memory, _memlock, _disk):
        yield look()
    try:
        config = Config.from_env()
    except ConfigError as error:
        yield _failure("settings", error)
        return
    yield Check("settings", "ok", "the GPUMOVE_* variables, where set, are valid")
    if url is not None:
        yield from _store(url, config, storage_options)


def _failure(name: str, error: GpumoveError) -> Check:
    return Check(name, "fail", str(error), exit_code=error.exit_code)


# -------------------------------------------------------------------- the machine


def _packages() -> Check:
    have = packages()
    missing = [n for n in _NEEDED if n not in have and n != "rich"]
    text = ", ".join(f"{n} {v}" for n, v in have.items() if n != "torch")
    if missing:
        return Check("packages", "fail", f"missing: {', '.join(missing)}", "reinstall gpumove", ConfigError.exit_code)
    absent = [f"{n} (gpumove[{extra}])" for n, extra in _CLOUDS.items() if n not in have]
    return Check("packages", "ok", text + (f"; not installed: {', '.join(absent)}" if absent else ""))


def _torch() -> Check:
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


def _memory() -> Check:
    page = os.sysconf("SC_PAGE_SIZE")
    total, free = os.sysconf("SC_PHYS_PAGES") * page, os.sysconf("SC_AVPHYS_PAGES") * page
    try:
        lines = dict(line.split(":", 1) for line in Path("/proc/meminfo").read_text().splitlines())
        free = int(lines["MemAvailable"].split()[0]) << 10
    except (OSError, KeyError, ValueError):
        pass  # not Linux: free pages are the lower bound
    limit = _container_limit()
    text = f"{free / _GIB:.1f} of {total / _GIB:.1f} GiB available"
    if limit is not None and limit < total:
        text += f", limited to {limit / _GIB:.1f} GiB in this container"
        free = min(free, limit)
    if free < 2 * _GIB:
        return Check("memory", "warn", text, "a save holds a copy of the rank's state in host memory: get more")
    return Check("memory", "ok", text)


def _container_limit() -> int | None:
    for name in ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes"):
        try:
            return int(Path(name).read_text())
        except (OSError, ValueError):
            continue
    return None


def _memlock() -> Check:
    limit = resource.getrlimit(resource.RLIMIT_MEMLOCK)[0]
    if limit == resource.RLIM_INFINITY:
        return Check("memlock", "ok", "unlimited")
    text = f"at most {limit / _MIB:.0f} MiB may be locked"
    if limit < _GIB and Path("/dev/infiniband").exists():
        return Check("memlock", "warn", text, "RDMA needs more: ulimit -l unlimited")
    return Check("memlock", "ok", f"{text}, which does not bind CUDA's pinned memory")


def _disk() -> Check:
    place = tempfile.gettempdir()
    free = shutil.disk_usage(place).free
    text = f"{free / _GIB:.1f} GiB free at {place}"
    if free < _GIB:
        return Check("disk", "warn", text, "gpumove itself stages in memory, but logs and caches need room")
    return Check("disk", "ok", text)


# -------------------------------------------------------------------- the store


def _store(url: str, config: Config, storage_options: Mapping[str, Any] | None) -> Iterator[Check]:
    """Each check builds on the one before: a store that fails is not asked further."""
    # Whoever asks for a diagnosis does not want to wait as long as a training job would.
    config = config.replace(retry_s=min(config.retry_s, _PATIENCE_S), deadline_s=min(config.deadline_s, _PATIENCE_S))
    try:
        store = Store.open(url, config, options=storage_options)
    except GpumoveError as error:
        yield _failure("address", error)
        return
    steps: tuple[tuple[str, Callable[[Store], Check]], ...] = (
        ("reach", _reach),
        ("run", _run),
        ("create-only", _create),
        ("write", _write),
        ("rate", _rate),
    )
    with closing(store):
        yield Check("address", "ok", store.url)
        for name, look in steps:
            try:
                yield look(store)
            except GpumoveError as error:
                yield _failure(name, error)
                if isinstance(error, StoreError):
                    return


def _reach(store: Store) -> Check:
    began = time.perf_counter()
    store.exists("format.json")
    return Check("reach", "ok", f"answered in {(time.perf_counter() - began) * 1e3:.0f} ms")


def _run(store: Store) -> Check:
    log = Log(store)
    if not log.open(create=False):
        return Check("run", "ok", "none lies here: the first save begins one")
    view = log.read()
    newest = view.find()
    what = f"the newest checkpoint is of step {newest.step}" if newest else "no checkpoint yet"
    return Check("run", "ok", f"{log.run}, readable: {len(view.checkpoints)} checkpoints, {what}, epoch {view.epoch}")


def _create(store: Store) -> Check:
    store.probe_create()
    return Check("create-only", "ok", "two writers can be told apart: of several creates of one key one wins")


def _write(store: Store) -> Check:
    """A small object there and back, and whose clock says what."""
    key, data = f"probe/{uuid.uuid4().hex}", uuid.uuid4().bytes
    try:
        before = time.time()
        store.put(key, data)
        after = time.time()
        info, found = store.exists(key), store.get(key)
    finally:
        store.delete([key])
    if found != data or info is None:
        raise IntegrityError(f"{store.url}/{key} does not read back as it was written: this store cannot be used")
    if store.exists(key) is not None:
        raise StoreError(f"{store.url}/{key} is still there after it was deleted: allow deletes, or gc frees nothing")
    if info.mtime is None:
        return Check("write", "ok", "written, read back and deleted; the store tells no times")
    skew_s = info.mtime - min(max(info.mtime, before), after)
    text = f"written, read back and deleted; the store's clock is {skew_s:+.1f} s from this machine's"
    if abs(skew_s) > _SKEW_S:
        return Check("write", "warn", text, "set this machine's clock (NTP): signed requests fail beyond minutes")
    return Check("write", "ok", text)


def _rate(store: Store) -> Check:
    key, data = f"probe/{uuid.uuid4().hex}", os.urandom(_RATE_BYTES)
    try:
        began = time.perf_counter()
        store.put(key, data)
        sent = time.perf_counter()
        (found,) = store.get_ranges(key, [(0, _RATE_BYTES)])
        got = time.perf_counter()
    finally:
        store.delete([key])
    if bytes(found) != data:
        raise IntegrityError(f"{store.url}/{key}: 8 MiB did not read back as they were written")
    put, get = _RATE_BYTES / (sent - began), _RATE_BYTES / (got - sent)
    text = f"one call puts {put / _MIB:.0f} MiB/s and gets {get / _MIB:.0f} MiB/s (8 MiB)"
    if min(put, get) < _SLOW:
        return Check("rate", "warn", text, "use a store in the region of the job; several calls run at once")
    return Check("rate", "ok", text)
