"""What a function of the model gives for fixed inputs: as it is recorded, and how far from the record something is.

Knows bytes and numbers, neither torch nor stores.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from gpumove.format.codec import digest
from gpumove.format.dtypes import item_bytes
from gpumove.format.probes import MOST_VALUES, Output, Probe
from gpumove.parity.verdict import BITWISE, DIFFERENT, WITHIN

_ORDER = (BITWISE, WITHIN, DIFFERENT)
TOLERANCES = {
    "float64": 1e-6,
    "float32": 1e-3,
    "float16": 5e-3,
    "bfloat16": 2e-2,
    "complex64": 1e-3,
    "complex128": 1e-6,
}
"""The largest difference that is taken for rounding, as a share of the largest recorded value. Of dtypes that are not
here every bit counts."""


class Array(NamedTuple):
    """One output: torch's name of its dtype, and its elements in row-major order, little-endian."""

    dtype: str
    shape: tuple[int, ...]
    data: bytes | memoryview


@dataclass(frozen=True)
class OutputResult:
    """How one output compares with the record. ``difference`` is the largest, ``relative`` its share of the largest
    recorded value; None where there are no numbers to compare. ``compared`` elements of it were looked at."""

    name: str
    verdict: str
    difference: float | None
    relative: float | None
    tolerance: float
    compared: int
    text: str


@dataclass(frozen=True)
class ProbeResult:
    """How a probe's outputs compare with those that a checkpoint recorded; the verdict is that of the worst."""

    name: str
    step: int
    verdict: str
    outputs: tuple[OutputResult, ...]

    @property
    def ok(self) -> bool:
        """Whether it is the same model, as far as its outputs tell."""
        return self.verdict != DIFFERENT

    @property
    def worst(self) -> OutputResult:
        """The output that the verdict is of."""
        return max(self.outputs, key=lambda o: (_ORDER.index(o.verdict), o.relative or 0.0))

    @property
    def text(self) -> str:
        """In one line."""
        return f"probe {self.name} against step {self.step}: {self.verdict} ({self.worst.name}: {self.worst.text})"

    @property
    def facts(self) -> dict[str, Any]:
        """What a pointer keeps of it."""
        worst = self.worst
        return {
            "probe": self.name, "verdict": self.verdict, "output": worst.name, "difference": _plain(worst.difference),
            "relative": _plain(worst.relative), "tolerance": worst.tolerance,
        }  # fmt: skip


def record(name: str, outputs: Mapping[str, Array]) -> Probe:
    """What a manifest keeps of a probe."""
    return Probe(name, tuple(_record(word, array) for word, array in outputs.items()))


def _record(name: str, array: Array) -> Output:
    return Output(name, array.dtype, array.shape, digest(array.data), _sample(array))


def _sample(array: Array) -> bytes:
    size = item_bytes(array.dtype)
    count = math.prod(array.shape)
    most = min(count, MOST_VALUES)
    elements = np.frombuffer(array.data, dtype=f"V{size}", count=count)
    return elements[[i * count // most for i in range(most)]].tobytes() if most else b""


def compare(recorded: Probe, live: Mapping[str, Array], *, step: int, tolerance: float | None = None) -> ProbeResult:
    """Compare outputs with those that were recorded.

    Args:
        recorded: of a manifest.
        live: the outputs by name. A single one is compared with a single recorded one whatever their names.
        step: the checkpoint's.
        tolerance: the largest difference that passes, as a share of the largest recorded value; by default that of the
            coarser of both dtypes.
    """
    return between(recorded, record(recorded.name, live), step=step, tolerance=tolerance)


def between(recorded: Probe, found: Probe, *, step: int, tolerance: float | None = None) -> ProbeResult:
    """The same of two records."""
    there = {output.name: output for output in found.outputs}
    if len(recorded.outputs) == len(there) == 1:
        there = {recorded.outputs[0].name: found.outputs[0]}
    results = [_one(output, there.pop(output.name, None), tolerance) for output in recorded.outputs]
    results += [_unlike(name, "it is not in the record", tolerance) for name in there]
    if not results:
        results = [_unlike("none", "the record has no outputs", tolerance)]
    verdict = max((result.verdict for result in results), key=_ORDER.index)
    return ProbeResult(recorded.name, step, verdict, tuple(results))


def _unlike(name: str, why: str, tolerance: float | None, *, compared: int = 0) -> OutputResult:
    return OutputResult(name, DIFFERENT, None, None, tolerance or 0.0, compared, why)


def _one(before: Output, after: Output | None, given: float | None) -> OutputResult:
    if after is None:
        return _unlike(before.name, "it is missing", given)
    if before.shape != after.shape:
        return _unlike(before.name, f"its shape is {list(after.shape)}, and {list(before.shape)} was recorded", given)
    count = math.prod(before.shape)
    if (before.dtype, before.digest) == (after.dtype, after.digest):
        return OutputResult(before.name, BITWISE, 0.0, 0.0, 0.0, count, "equal in every bit")
    old, new = numbers(before.dtype, before.values), numbers(after.dtype, after.values)
    if old is None or new is None:
        dtypes = before.dtype if before.dtype == after.dtype else f"{after.dtype}, and was {before.dtype}"
        return _unlike(before.name, f"other bits, and of {dtypes} every bit counts", given)
    tolerance = max(TOLERANCES[before.dtype], TOLERANCES[after.dtype]) if given is None else given
    return _distance(before.name, old, new, tolerance, count * (2 if before.dtype.startswith("complex") else 1))


def _distance(
    name: str, old: npt.NDArray[np.float64], new: npt.NDArray[np.float64], tolerance: float, count: int
) -> OutputResult:
    finite = np.isfinite(old) & np.isfinite(new)
    odd = ~finite & ~((old == new) | (np.isnan(old) & np.isnan(new)))
    if odd.any():
        why = f"{int(odd.sum())} of {len(old)} recorded values are not finite on one side only"
        return _unlike(name, why, tolerance, compared=len(old))
    largest = float(np.abs(old[finite]).max(initial=0.0))
    difference = float(np.abs(old[finite] - new[finite]).max(initial=0.0))
    relative = difference / largest if largest else math.inf if difference else 0.0
    verdict = WITHIN if relative <= tolerance else DIFFERENT
    looked = "" if len(old) == count else f", over {len(old)} of {count} values"
    text = f"differs by up to {difference:.3g}, {relative:.2g} of the largest value; {tolerance:.2g} passes{looked}"
    return OutputResult(name, verdict, difference, relative, tolerance, len(old), text)


def numbers(dtype: str, values: bytes) -> npt.NDArray[np.float64] | None:
    """Recorded values as numbers; None of a dtype of which every bit counts."""
    if dtype not in TOLERANCES:
        return None
    if dtype == "bfloat16":
        found: npt.NDArray[Any] = (np.frombuffer(values, "<u2").astype(np.uint32) << 16).view(np.float32)
    elif dtype.startswith("complex"):
        found = np.frombuffer(values, {"complex64": "<f4", "complex128": "<f8"}[dtype])
    else:
        found = np.frombuffer(values, np.dtype(dtype).newbyteorder("<"))
    return found.astype(np.float64)


def _plain(number: float | None) -> float | None:
    return number if number is not None and math.isfinite(number) else None


def names(known: Sequence[Probe]) -> str:
    """The probes that a checkpoint has recorded, for messages."""
    return ", ".join(probe.name for probe in known) or "none"
