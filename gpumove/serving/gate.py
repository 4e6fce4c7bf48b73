"""The output probe as a gate: what another process computed, compared with what a checkpoint recorded."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from gpumove.config import Config
from gpumove.errors import ConfigError
from gpumove.format.manifest import Manifest
from gpumove.format.outputs import read_outputs
from gpumove.format.pointer import Pointer
from gpumove.inspection.run import open_run, pick
from gpumove.parity.outputs import Array, ProbeResult, compare, names
from gpumove.store.records import read_manifest


def check_probe(
    url: str,
    outputs: Any,
    *,
    step: int | Pointer | None = None,
    name: str | None = None,
    tolerance: float | None = None,
    config: Config | None = None,
    storage_options: Mapping[str, Any] | None = None,
) -> ProbeResult:
    """Compare a model's outputs with those that a checkpoint recorded: is what is served what was trained?

    Args:
        url: the run.
        outputs: what the model gives for the probe's inputs: a tensor or array, a dict or tuple of them, or the path of
            a safetensors file that has them by name.
        step: which checkpoint: its step, a pointer, or the newest if None.
        name: of the probe; may be left out if the checkpoint has recorded one only.
        tolerance: the largest difference that passes for rounding, as a share of the largest recorded value.
        config: bounds; by default from the environment.
        storage_options: for fsspec.

    Returns:
        How they compare: ``verdict``, ``ok``, ``text``, and each output's numbers.

    Raises:
        ConfigError: no such run or checkpoint, no such probe in it (code ``config.no_probe``), or no such outputs.
        IntegrityError: the checkpoint's manifest is damaged.
    """
    live = read(outputs)
    with open_run(url, config=config, storage_options=storage_options) as log:
        checkpoint = pick(log.read(), step, url=log.store.url)
        return judge(read_manifest(log.store, checkpoint), live, name=name, tolerance=tolerance)


def read(outputs: Any) -> dict[str, Array]:
    """Outputs as a caller has them, or as a file has them."""
    if isinstance(outputs, (str, os.PathLike)):
        return {k: Array(*found) for k, found in read_outputs(Path(outputs)).items()}
    from gpumove.parity.arrays import to_arrays  # torch is not needed for files

    return to_arrays(outputs)


def judge(
    manifest: Manifest, live: Mapping[str, Array], *, name: str | None = None, tolerance: float | None = None
) -> ProbeResult:
    """Compare with what a manifest has recorded.

    Raises:
        ConfigError: it has no such probe, or several and none was named; or a tolerance that is none.
    """
    known = manifest.probes
    if tolerance is not None and not 0 <= tolerance < float("inf"):
        raise ConfigError(f"tolerance is a share of the largest value, from 0 on, not {tolerance!r}")
    if not known:
        raise ConfigError(
            f"the checkpoint of step {manifest.step} has recorded no probe: register one with ckpt.probe() where it "
            "trains, and save again",
            code="config.no_probe",
        )
    if name is None and len(known) > 1:
        raise ConfigError(f"step {manifest.step} has several probes, {names(known)}: name one", code="config.no_probe")
    recorded = known[0] if name is None else next((probe for probe in known if probe.name == name), None)
    if recorded is None:
        raise ConfigError(f"step {manifest.step} has no probe {name!r}; it has {names(known)}", code="config.no_probe")
    return compare(recorded, live, step=manifest.step, tolerance=tolerance)
