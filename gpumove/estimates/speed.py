"""What other GPUs would make of a job: faster or slower steps, and whether it fits. From peak figures, with the range
that they leave; a measured step time wins wherever there is one."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

from gpumove.estimates.interval import Range
from gpumove.estimates.tables import Gpu

_ALIKE = Range(0.95, 1.0, 1.1)
"""Steps on the same GPUs elsewhere: hosts and networks differ."""
_MODELS = 0.1
"""What peak figures do not say of how two models compare."""


@dataclass(frozen=True)
class Devices:
    """GPUs of one model."""

    gpu: Gpu
    count: int


def compare(here: Devices, there: Devices) -> Literal["same", "larger", "smaller", "different"]:
    """The target beside the source: by total memory and total TFLOP/s."""
    if (here.gpu.name, here.count) == (there.gpu.name, there.count):
        return "same"
    sizes = [
        (b * there.count, a * here.count)
        for a, b in [*_figures(here.gpu, there.gpu), (here.gpu.memory_gb, there.gpu.memory_gb)]
    ]
    if all(there_is >= here_is for there_is, here_is in sizes):
        return "larger"
    return "smaller" if all(there_is <= here_is for there_is, here_is in sizes) else "different"


def _figures(here: Gpu, there: Gpu) -> list[tuple[float, float]]:
    """What bounds a step, of both, where both have it."""
    pairs = [
        (here.bf16_tflops, there.bf16_tflops),
        (here.fp32_tflops, there.fp32_tflops),
        (here.bandwidth_gb_s, there.bandwidth_gb_s),
    ]
    return [(a, b) for a, b in pairs if a and b]


def ratio(here: Devices, there: Devices) -> Range:
    """A step's time at the target as a multiple of the source's, for the same global batch.

    A step is bound by one of the peak figures, and nobody knows by which: the least and the most that any of them gives
    is the range. More GPUs bring between half and all of what their number promises.
    """
    return _of_models(here.gpu, there.gpu) * _of_counts(there.count / here.count)


def _of_models(here: Gpu, there: Gpu) -> Range:
    if here.name == there.name:
        return _ALIKE
    ratios = [a / b for a, b in _figures(here, there)]
    low, high = min(ratios), max(ratios)
    return Range(low / (1 + _MODELS), math.sqrt(low * high), high * (1 + _MODELS))


def _of_counts(times: float) -> Range:
    if times < 1:
        return Range.exact(1.0) / _of_counts(1 / times)
    best = 1 / times
    return Range(best, best + (1 - best) / 4, best + (1 - best) / 2)


@dataclass(frozen=True)
class Fit:
    """Whether the job fits into the target's GPU memory."""

    answer: Literal["yes", "no", "unknown"]
    why: str


def fits(
    there: Devices, *, state_bytes: float | None, peak_bytes: float | None = None, here: Devices | None = None
) -> Fit:
    """By measured peak, by the source's memory, by the state: whichever tells first.

    Args:
        there: the target.
        state_bytes: of the whole state.
        peak_bytes: of one GPU at the source.
        here: the source.
    """
    room = there.gpu.memory_gb * 1e9
    each = f"each {there.gpu.name} has {there.gpu.memory_gb:g} GB"
    if state_bytes is not None and state_bytes > room * there.count:
        gb = state_bytes / 1e9
        return Fit("no", f"the state alone has {gb:.0f} GB, and {there.count} x {there.gpu.memory_gb:g} GB are less")
    fewer = here is None or there.count < here.count
    if peak_bytes is not None:
        peak, much = peak_bytes / 1e9, 1.0 if here is None else max(1.0, here.count / there.count)
        if peak_bytes * much <= room:
            return Fit("yes", f"the peak is {peak:.0f} GB, and {each}")
        if not fewer and peak_bytes > room and here is not None and here.count == there.count:
            return Fit("no", f"the peak is {peak:.0f} GB, and {each}")
        return Fit("unknown", f"the peak is {peak:.0f} GB, {each}, and the number of GPUs differs")
    if here is not None and not fewer and there.gpu.memory_gb >= here.gpu.memory_gb:
        return Fit("yes", f"as many GPUs, none with less memory than the {here.gpu.name} of now")
    return Fit("unknown", f"{each}, and the peak of the job is not known")
