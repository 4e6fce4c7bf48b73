"""Measures a link: 64 MB up and down, in objects of 8 MB, several at once. What it writes lies below ``probe/`` and is
deleted at once. A place that cannot be reached is a result."""

from __future__ import annotations

import os
import time
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, contextmanager, suppress
from dataclasses import dataclass
from typing import Any

from gpumove.config import Config
from gpumove.errors import GpumoveError, IntegrityError
from gpumove.estimates.interval import Range
from gpumove.store.objects import Store

_OBJECT_BYTES, _BURST, _BURSTS = 8_000_000, 4, 2
_PATIENCE_S = 20.0
"""Whoever asks what a move would take does not want to wait as long as a training job would."""
_SLACK = 0.1
"""Minutes later a link carries that much more or less, if not worse."""


@dataclass(frozen=True)
class Probe:
    """What was measured at one store. ``problem`` says why nothing was."""

    url: str
    up_bytes_s: Range | None = None
    down_bytes_s: Range | None = None
    entry_s: Range | None = None
    """What a small object takes."""
    problem: str = ""


def probe(url: str, *, storage_options: Mapping[str, Any] | None = None, config: Config | None = None) -> Probe:
    """Send 64 MB to a store and read them back.

    Args:
        url: a run, or where one is to lie; or any place that may be written to.
        storage_options: for fsspec.
        config: of the calls; by default from the environment.
    """
    config = Config.from_env() if config is None else config
    config = config.replace(
        retry_s=min(config.retry_s, _PATIENCE_S), deadline_s=min(config.deadline_s, _PATIENCE_S), concurrency=_BURST
    )
    shown = ""  # what was given may hold a password
    try:
        with closing(Store.open(url, config, options=storage_options)) as store:
            shown = store.url
            return _measure(store)
    except GpumoveError as error:
        return Probe(shown, problem=str(error))


def _measure(store: Store) -> Probe:
    name, data = f"probe/{uuid.uuid4().hex}", os.urandom(_OBJECT_BYTES)
    bursts = [[f"{name}/{burst}-{i}" for i in range(_BURST)] for burst in range(_BURSTS)]
    small = [f"{name}/small-{i}" for i in range(3)]

    def read(key: str) -> None:
        if store.get(key) != data:
            raise IntegrityError(f"{store.url}/{key} does not read back as it was written: this store cannot be used")

    with _cleared(store, [*small, *(key for keys in bursts for key in keys)]):
        entries = [_timed(lambda key=key: store.put(key, b"0" * 500)) for key in small]  # type: ignore[misc]
        up = [_burst(lambda key: store.put(key, data), keys) for keys in bursts]
        down = [_burst(read, keys) for keys in bursts]
    return Probe(store.url, _rate(up), _rate(down), Range.over(sorted(entries)[1], *entries))


@contextmanager
def _cleared(store: Store, keys: Sequence[str]) -> Iterator[None]:
    """Afterwards nothing is left. What went wrong before says more than a delete that fails too."""
    try:
        yield
    except BaseException:
        with suppress(GpumoveError):
            store.delete(keys)
        raise
    store.delete(keys)


def _burst(work: Callable[[str], None], keys: Sequence[str]) -> float:
    with ThreadPoolExecutor(len(keys)) as pool:
        return _timed(lambda: list(pool.map(work, keys)))


def _timed(work: Callable[[], object]) -> float:
    began = time.perf_counter()
    work()
    return time.perf_counter() - began


def _rate(bursts: Sequence[float]) -> Range:
    """All bytes over all seconds; the bursts, and some slack, are the range."""
    each = [_BURST * _OBJECT_BYTES / seconds for seconds in bursts]
    likely = len(bursts) * _BURST * _OBJECT_BYTES / sum(bursts)
    return Range(min(each) / (1 + _SLACK), likely, max(each) * (1 + _SLACK))


def between(source: Probe | None, target: Probe) -> tuple[Range | None, str]:
    """The rate of a way from one store through here to another one, and how it is known."""
    for end in (source, target):
        if end is not None and end.problem:
            return None, f"the link could not be measured: {end.problem}"
    ends = [found for found in (source.down_bytes_s if source else None, target.up_bytes_s) if found is not None]
    slowest = Range(min(e.low for e in ends), min(e.value for e in ends), min(e.high for e in ends))
    what = f"64 MB to {target.url}" if source is None else f"64 MB from {source.url} and to {target.url}"
    return slowest, f"measured with {what}, from this machine"
