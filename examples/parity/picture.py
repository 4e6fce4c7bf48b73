"""The picture of the certificates: how far each loss is from the recorded one, step by step."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from matplotlib.axes import Axes

from examples.looks import BLUE, GREEN, GRID, INK, ORANGE, RED, headline, picture
from examples.parity.cases import Case
from gpumove.parity.verdict import Certificate

_COLOURS = (BLUE, ORANGE, GREEN, RED, "#CC79A7", "#56B4E9", INK)
_MARKS = "osD^vPX"
_EQUAL = 1e-10
"""Where losses are drawn that are equal in every bit."""


def draw(path: Path, judged: Sequence[tuple[Case, Certificate]]) -> None:
    """Draw and write it."""
    machines = [one for one in judged if one[0].fault is None]
    broken = [one for one in judged if one[0].fault is not None]
    caught = sum(found.verdict == "different" for _, found in broken)
    with picture(path, (1, 1), sharex=True, sharey=True) as (figure, panels):
        headline(figure, f"{caught} of {len(broken)} broken resumes were caught; other machines were told from them")
        _panel(panels[0], machines, "other machines")
        _panel(panels[1], broken, "broken resumes")
        panels[1].set_xlabel("step after the checkpoint")


def _panel(axes: Axes, judged: Sequence[tuple[Case, Certificate]], title: str) -> None:
    for (case, found), colour, mark in zip(judged, _COLOURS, _MARKS):
        steps = [step.step - found.setting.step for step in found.steps]
        sizes = [max(step.relative or 0.0, _EQUAL) for step in found.steps]
        words = f"{case.what}: {found.verdict}" + (f" ({found.cause})" if found.verdict == "different" else "")
        axes.plot(steps, sizes, color=colour, marker=mark, markersize=5, linewidth=1.0, label=words)
    for tolerance, dashes in zip(sorted({found.tolerance for _, found in judged}), ("--", ":")):
        axes.axhline(tolerance, color=INK, linewidth=1.2, linestyle=dashes, label=f"tolerance, {100 * tolerance:g} %")
    axes.set_yscale("log")
    axes.set_ylim(_EQUAL / 3, 3)
    axes.set_yticks([_EQUAL, 1e-8, 1e-6, 1e-4, 1e-2, 1], ["equal", "1e-8", "1e-6", "0.01 %", "1 %", "100 %"])
    axes.minorticks_off()
    axes.xaxis.get_major_locator().set_params(integer=True)
    axes.set_ylabel("difference of the loss")
    axes.set_title(title, loc="left", color=INK)
    axes.grid(axis="y", color=GRID, linewidth=0.7)
    axes.legend(frameon=False, loc="center left", bbox_to_anchor=(1.01, 0.5))
