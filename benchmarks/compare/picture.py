"""The comparison as a picture: one panel of bars per figure."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from benchmarks.compare.figures import FIGURES, Figure, Table
from benchmarks.compare.plan import DISK, Section
from benchmarks.compare.report import number, ranked, title

_PANELS = ("stall_s", "lost_s", "durable_s", "restore_again_s")
_OURS, _OTHERS, _DISK = "#d1495b", "#2e4057", "#a9b0ba"
_FLOOR = 1e-3


def picture(table: Table, path: Path) -> None:
    """W1 on local files, or what comes first if that was not measured."""
    import matplotlib as mpl

    mpl.use("Agg")
    import matplotlib.pyplot as plt

    wanted = Section("W1", "file")
    section = wanted if wanted in table.sections else table.sections[0]
    figures = [f for f in FIGURES if f.name in _PANELS]
    height = 1.4 + 0.26 * len(ranked(table, section))
    canvas, axes = plt.subplots(2, 2, figsize=(12, 2 * height))
    for ax, figure in zip(axes.flat, figures):
        _panel(ax, table, section, figure)
    canvas.suptitle(title(table, section) + "; seconds, logarithmic, shorter is better", fontsize=10)
    canvas.tight_layout(rect=(0, 0, 1, 0.98))
    canvas.savefig(path, dpi=130)
    plt.close(canvas)


def _panel(ax: Any, table: Table, section: Section, figure: Figure) -> None:
    """Fastest on top."""
    found = {peer: table.median(section, peer, figure.name) for peer in ranked(table, section)}
    known = sorted(((v, p) for p, v in found.items() if v is not None), reverse=True)
    if not known:
        ax.set_axis_off()
        return
    widths = [max(value, _FLOOR) for value, _ in known]
    bars = ax.barh([peer for _, peer in known], widths, color=[_colour(peer) for _, peer in known])
    ax.bar_label(bars, [number(value, figure.unit) for value, _ in known], fontsize=7, padding=3)
    ax.set_xscale("log")
    ax.set_xlim(_FLOOR / 2, 4 * max(widths))
    ax.tick_params(labelsize=8)
    ax.set_title(figure.label, fontsize=10, loc="left")
    for side in ("top", "right"):
        ax.spines[side].set_visible(False)


def _colour(peer: str) -> str:
    if peer == DISK:
        return _DISK
    return _OURS if peer.startswith("gpumove") else _OTHERS
