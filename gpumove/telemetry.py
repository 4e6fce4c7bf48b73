"""What saves cost, in numbers that leave the process: for loggers, OpenTelemetry, a file for Prometheus, and traces.

It only looks at handles. Whatever goes wrong here is logged and costs no save.
"""

from __future__ import annotations

import logging
import os
import time
import weakref
from collections.abc import Iterable
from functools import partial
from pathlib import Path
from typing import Any, Protocol

from gpumove.config import Config
from gpumove.errors import ConfigError
from gpumove.handle import SaveHandle
from gpumove.version import __version__

_log = logging.getLogger("gpumove")

NUMBERS = {
    "step": "step of the newest save",
    "saving": "1 until this rank's part of it is durable, or it has failed",
    "stall_s": "training time that it cost",
    "staged_s": "until the copy was complete",
    "uploaded_s": "until this rank's part was durable",
    "committed_s": "until the checkpoint existed",
    "state_bytes": "bytes that this rank answers for",
    "new_bytes": "bytes of packs that were sent",
    "upload_bytes_per_s": "bytes sent over the time that it took",
    "skipped": "saves that were due while one was running",
    "failed": "saves that failed and were not raised",
}
"""What :func:`metrics` gives, as far as it is known, and its meaning."""
_UNITS = {"bytes_per_s": "By/s", "_bytes": "By", "_s": "s"}
_TOTALS = {
    "committed_saves": "checkpoints that this process has committed",
    "failed_saves": "saves that failed",
    "sent_bytes": "bytes of packs that rank 0 has sent",
    "stalled_s": "training time that saves have cost on rank 0",
}


class Saves(Protocol):
    """What is looked at of a Checkpointer."""

    @property
    def last(self) -> SaveHandle | None:
        """The newest save."""

    @property
    def skipped(self) -> int:
        """Saves that were due too early."""

    @property
    def failed(self) -> int:
        """Saves that failed."""


def metrics(ckpt: Saves) -> dict[str, float]:
    """The numbers of the newest save on this rank, for a logger; none before the first one.

    Cheap, and waits for nothing: call it in the loop. Names are those of ``SaveStats``, with ``gpumove/`` before them.

    Args:
        ckpt: the Checkpointer.
    """
    if ckpt.last is None:
        return {}
    found = {**_of(ckpt.last), "skipped": float(ckpt.skipped), "failed": float(ckpt.failed)}
    return {f"gpumove/{name}": value for name, value in found.items()}


def observe(ckpt: Saves, meter: Any = None) -> None:
    """Offer the same numbers as OpenTelemetry gauges, ``gpumove.stall_s`` and so on, until the Checkpointer is gone.

    Args:
        ckpt: the Checkpointer.
        meter: an OpenTelemetry meter; by default that of the global provider.

    Raises:
        ConfigError: OpenTelemetry is not installed (``pip install 'gpumove[otel]'``).
    """
    try:
        from opentelemetry.metrics import Observation, get_meter
    except ImportError as error:
        raise ConfigError(
            f"metrics leave through OpenTelemetry ({error}): pip install 'gpumove[otel]'", code="config.missing"
        ) from error
    seen = weakref.ref(ckpt)

    def look(name: str, options: Any) -> Iterable[Observation]:
        found = seen()
        value = None if found is None else metrics(found).get(f"gpumove/{name}")
        return [] if value is None else [Observation(value)]

    meter = get_meter("gpumove", __version__) if meter is None else meter
    for name, meaning in NUMBERS.items():
        unit = next((unit for end, unit in _UNITS.items() if name.endswith(end)), "")
        meter.create_observable_gauge(f"gpumove.{name}", [partial(look, name)], unit=unit, description=meaning)


def _of(handle: SaveHandle) -> dict[str, float]:
    stats = handle.stats  # nothing is asked of it that counts as the training thread looking at it
    known = {
        "step": handle.step, "saving": not handle.uploaded and handle.error is None, "stall_s": stats.stall_s,
        "staged_s": stats.staged_s, "uploaded_s": stats.uploaded_s, "committed_s": stats.committed_s,
        "state_bytes": stats.state_bytes, "new_bytes": stats.new_bytes, "upload_bytes_per_s": stats.upload_bytes_per_s,
    }  # fmt: skip
    return {name: float(value) for name, value in known.items() if value is not None}


class Telemetry:
    """Of one rank: told of every save that has ended, in the background. Rank 0 keeps the file for Prometheus."""

    def __init__(self, config: Config, *, rank: int) -> None:
        self._rank, self._folder = rank, config.trace_dir
        self._file = config.metrics_file if rank == 0 else None
        self._totals = dict.fromkeys(_TOTALS, 0.0)
        self._committed_at: float | None = None

    def ended(self, handle: SaveHandle, *, run: str) -> None:
        """A save has ended, well or not."""
        self._totals["committed_saves" if handle.error is None else "failed_saves"] += 1
        self._totals["sent_bytes"] += handle.stats.new_bytes
        self._totals["stalled_s"] += handle.stats.stall_s
        self._committed_at = time.time() if handle.error is None else self._committed_at
        if self._folder is not None:
            name = f"step-{handle.step:010d}-{handle.attempt}-rank-{self._rank:06d}.json"
            write = partial(handle.trace.write, Path(self._folder) / name, rank=self._rank)
            _kept(write, f"the trace of step {handle.step}")
        if self._file is not None:
            _kept(partial(self._write, Path(self._file), handle, run), "the metrics")

    def _write(self, path: Path, handle: SaveHandle, run: str) -> None:
        """Whole or not at all: a collector may read at any time."""
        rows = [_row("info", "what this is of", 1, "gauge", f'{{run="{run}",version="{__version__}"}}')]
        rows += [_row(name, NUMBERS[name], value, "gauge") for name, value in _of(handle).items()]
        rows += [_row(name, meaning, self._totals[name], "counter") for name, meaning in _TOTALS.items()]
        if self._committed_at is not None:
            meaning = "when the newest checkpoint was committed"
            rows.append(_row("committed_timestamp_s", meaning, self._committed_at, "gauge"))
        path.parent.mkdir(parents=True, exist_ok=True)
        partial_file = path.with_name(f".{path.name}.part")
        partial_file.write_text("".join(rows), encoding="utf-8")
        os.replace(partial_file, path)


def _row(name: str, meaning: str, value: float, kind: str, labels: str = "") -> str:
    """In Prometheus' text format, by its rules for names: base units in full, counters end in ``_total``."""
    full = f"gpumove_{name}".replace("bytes_per_s", "bytes_per_second")
    full = f"{full[:-2]}_seconds" if full.endswith("_s") else full
    full += "_total" if kind == "counter" else ""
    return f"# HELP {full} {meaning}\n# TYPE {full} {kind}\n{full}{labels} {value!r}\n"


def _kept(write: partial[None], what: str) -> None:
    try:
        write()
    except OSError as error:  # it is for people: it never costs a save
        _log.warning("%s could not be written: %s", what, error)
