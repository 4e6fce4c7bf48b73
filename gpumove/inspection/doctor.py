"""Is this machine, and this store, fit for a run? A list of checks, each with what to do about it. Torch is optional.

It tries things out rather than guess: what it writes to a store lies below ``probe/`` and is deleted at once.
"""

from __future__ import annotations

import os
import platform
import time
import uuid
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import closing
from dataclasses import asdict
from typing import Any, Literal

from gpumove.config import Config
from gpumove.environment.compare import Facts, compare, of
from gpumove.environment.grades import Grade
from gpumove.errors import ConfigError, GpumoveError, IntegrityError, StoreError
from gpumove.estimates.probing import probe
from gpumove.inspection.fitness import (
    Check,
    check_disk,
    check_machine,
    check_memlock,
    check_memory,
    check_packages,
    check_torch,
)
from gpumove.store.log import Log
from gpumove.store.objects import Store
from gpumove.store.records import read_manifest
from gpumove.version import __version__
from gpumove.words import count, size

__all__ = ["Check", "doctor"]
_MIB = 1 << 20
_RATE_BYTES = 8 * _MIB
_SLOW = 10 * _MIB
_SKEW_S = 5.0
_PATIENCE_S = 20.0
_WORDS: dict[Grade, str] = {
    "fatal": "by which it will not run or not fit", "numerics": "that may change numbers",
    "unknown": "of which nothing can be told", "speed": "that may change the speed", "exact": "of no effect",
}  # fmt: skip


def doctor(
    url: str | None = None, *, storage_options: Mapping[str, Any] | None = None, bandwidth: bool = False
) -> Iterator[Check]:
    """Look at this machine and, if a URL is given, at the store there. Failures are checks, not exceptions.

    Args:
        url: a run, or where one is to lie.
        storage_options: for fsspec.
        bandwidth: send 64 MB to the store and back.

    Yields:
        The checks, each as soon as it is done.
    """
    yield Check("gpumove", "ok", f"{__version__}, python {platform.python_version()}, {platform.platform()}")
    for look in (check_packages, check_torch, check_memory, check_memlock):
        yield look()
    yield (here := check_machine())
    try:
        config = Config.from_env()
    except ConfigError as error:
        yield check_disk(None)
        yield _failure("settings", error)
        return
    yield check_disk(config.predecessor_dir)
    yield Check("settings", "ok", "the GPUMOVE_* variables, where set, are valid")
    if url is not None:
        yield from _store(url, config, storage_options, here.facts, bandwidth=bandwidth)


def _failure(name: str, error: GpumoveError) -> Check:
    return Check(name, "fail", str(error), exit_code=error.exit_code)


# -------------------------------------------------------------------- the store


def _store(
    url: str, config: Config, storage_options: Mapping[str, Any] | None, here: Facts, *, bandwidth: bool
) -> Iterator[Check]:
    """Each check builds on the one before: a store that fails is not asked further."""
    # Whoever asks for a diagnosis does not want to wait as long as a training job would.
    config = config.replace(retry_s=min(config.retry_s, _PATIENCE_S), deadline_s=min(config.deadline_s, _PATIENCE_S))
    try:
        store = Store.open(url, config, options=storage_options)
    except GpumoveError as error:
        yield _failure("address", error)
        return
    steps: list[tuple[str, Callable[[Store], Check]]] = [
        ("reach", _reach),
        ("run", _run),
        ("same job", lambda store: _same_job(store, here)),
        ("create-only", _create),
        ("write", _write),
        ("rate", _rate),
    ]
    if bandwidth:
        steps.append(("bandwidth", lambda _: _bandwidth(url, config, storage_options)))
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
    known = count(len(view.checkpoints), "checkpoint")
    return Check("run", "ok", f"{log.run}, readable: {known}, {what}, epoch {view.epoch}")


def _same_job(store: Store, here: Facts) -> Check:
    """What is not as it was where the newest checkpoint was made. Threads, flags and ranks are the job's to set."""
    log = Log(store)
    newest = log.read().find() if log.open(create=False) else None
    if newest is None:
        return Check("same job", "ok", "no checkpoint to compare this machine with")
    found = compare(of(read_manifest(store, newest)), here)
    grades = Counter(d.grade for d in found)
    what = "; ".join(f"{count(grades[g], 'difference')} {words}" for g, words in _WORDS.items() if grades[g])
    text = f"compared with where step {newest.step} was saved: {what or 'alike'}"
    told = [d.text for d in found if d.grade != "exact"]
    facts = {"step": newest.step, "differences": [asdict(d) for d in found]}
    status: Literal["ok", "warn", "fail"] = "ok"
    if {"numerics", "unknown"} & set(grades):
        status = "warn"
    if grades["fatal"]:
        return Check("same job", "fail", text, "", ConfigError.exit_code, tuple(told), facts)
    return Check("same job", status, text, details=tuple(told), facts=facts)


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
        listed = [entry.key for entry in store.list("probe/")]
    finally:
        store.delete([key])
    if found != data or info is None:
        raise IntegrityError(f"{store.url}/{key} does not read back as it was written: this store cannot be used")
    if key not in listed:
        raise StoreError(f"{store.url}/{key} was written and is not listed: allow listing, or commits find no parts")
    if store.exists(key) is not None:
        raise StoreError(f"{store.url}/{key} is still there after it was deleted: allow deletes, or gc frees nothing")
    if info.mtime is None:
        return Check("write", "ok", "written, listed, read back and deleted; the store tells no times")
    skew_s = info.mtime - min(max(info.mtime, before), after)
    text = f"written, listed, read back and deleted; the store's clock is {skew_s:+.1f} s from this machine's"
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


def _bandwidth(url: str, config: Config, storage_options: Mapping[str, Any] | None) -> Check:
    """Several calls at once, as saves and restores make them."""
    found = probe(url, storage_options=storage_options, config=config)
    up, down, entry = found.up_bytes_s, found.down_bytes_s, found.entry_s
    if up is None or down is None or entry is None:
        return Check("bandwidth", "fail", f"not measured: {found.problem}", exit_code=StoreError.exit_code)
    text = f"64 MB go there at {size(up.value)}/s and come back at {size(down.value)}/s; a small object takes "
    facts = {"up_bytes_s": up.value, "down_bytes_s": down.value, "entry_s": entry.value}
    return Check("bandwidth", "ok", f"{text}{entry.value * 1e3:.0f} ms", facts=facts)
