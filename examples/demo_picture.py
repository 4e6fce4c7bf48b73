"""The picture of the demonstration: both loss curves, their difference, and which process did which steps."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

import matplotlib

matplotlib.use("Agg")  # a file, no window
from matplotlib import pyplot
from matplotlib.axes import Axes

if TYPE_CHECKING:
    from examples.demo import Life

# Okabe and Ito's palette: told apart with any kind of colour vision. Curves also differ in width, marks in shape.
WHOLE, RESUMED, KILL, START, INK = "#E69F00", "#0072B2", "#D55E00", "#009E73", "#444444"


def draw(path: Path, whole: Life, lives: Sequence[Life], *, every: int) -> None:
    """Draw and write it."""
    truth = _numbers(whole)
    pyplot.rcParams.update({"font.size": 10, "axes.edgecolor": INK, "axes.labelcolor": INK, "svg.fonttype": "none"})
    figure, (top, middle, bottom) = pyplot.subplots(
        3, sharex=True, figsize=(11, 7.5), height_ratios=(6, 1.3, 1.7), layout="constrained"
    )
    gaps = [(step, loss - truth[step]) for life in lives for step, loss in _numbers(life).items()]
    same = sum(gap == 0 for _, gap in gaps)
    headline = f"{same} of {len(gaps)} losses of the killed run are equal to the last bit"
    figure.suptitle(headline, x=0.012, ha="left", fontsize=15, fontweight="bold")
    _curves(top, truth, lives)
    _differences(middle, gaps)
    _lives(bottom, whole, lives, every)
    for axes in (top, middle, bottom):
        for step, colour in [
            *((life.last, KILL) for life in lives[:-1]),
            *((life.resumed, START) for life in lives[1:]),
        ]:
            axes.axvline(step, color=colour, linewidth=0.8, linestyle=":", zorder=0)
        axes.spines[["top", "right"]].set_visible(False)
        axes.tick_params(colors=INK)
    figure.savefig(path, dpi=130)
    pyplot.close(figure)


def _numbers(life: Life) -> dict[int, float]:
    return {step: float.fromhex(loss) for step, loss in sorted(life.losses.items())}


def _curves(axes: Axes, truth: Mapping[int, float], lives: Sequence[Life]) -> None:
    """The killed run thin and dark upon the uninterrupted one, thick and pale."""
    axes.plot(list(truth), list(truth.values()), color=WHOLE, linewidth=5, alpha=0.5, label="never interrupted")
    for number, life in enumerate(lives):
        mine = _numbers(life)
        label = "killed and resumed" if number == 0 else None
        axes.plot(list(mine), list(mine.values()), color=RESUMED, linewidth=1.0, label=label)
    kills = [life.last for life in lives if life.killed]
    starts = [life.resumed for life in lives[1:]]
    style: dict[str, Any] = {"linestyle": "none", "markersize": 10, "zorder": 5}
    axes.plot(kills, [truth[s] for s in kills], "X", color=KILL, mec="white", label="killed with SIGKILL", **style)
    axes.plot(starts, [truth[s] for s in starts], "o", mfc="white", mec=START, mew=2.5, label="resumed here", **style)
    for before, after in pairwise(lives):
        words = f"killed after step {before.last},\nresumed from step {after.resumed}"
        height = max(loss for step, loss in truth.items() if abs(step - before.last) < len(truth) / 8)
        box = {"facecolor": "white", "edgecolor": "none", "pad": 2}
        axes.annotate(
            words, (before.last, height), (0, 16), textcoords="offset points", ha="center", color=INK, bbox=box
        )
    axes.set_ylabel("loss")
    axes.grid(axis="y", color="#DDDDDD", linewidth=0.7)
    axes.legend(frameon=True, framealpha=1, edgecolor="none", loc="upper right")


def _differences(axes: Axes, gaps: Sequence[tuple[int, float]]) -> None:
    """Loss of the killed run minus that of the other, at every step."""
    worst = max(abs(gap) for _, gap in gaps)
    axes.axhline(0, color="#DDDDDD", linewidth=0.7)
    axes.plot(*zip(*gaps), ".", color=KILL if worst else RESUMED, markersize=3)
    axes.set_ylim(-1.3 * (worst or 1), 1.3 * (worst or 1))
    ticks = [-worst, 0.0, worst] if worst else [0.0]
    axes.set_yticks(ticks, [f"{tick:.1g}" for tick in ticks])
    axes.set_ylabel("difference")


def _lives(axes: Axes, whole: Life, lives: Sequence[Life], every: int) -> None:
    """One bar per process, the steps that were done twice hatched, a tick for every commit."""
    rows = [whole, *lives]
    for row, life in enumerate(rows):
        colour = WHOLE if life is whole else RESUMED
        axes.barh(row, life.last - life.resumed, left=life.resumed, height=0.55, color=colour, alpha=0.35)
        commits = [save["saved"] for save in life.saves if save["committed"]]
        label = f"commit, every {every} steps" if life is lives[0] else None
        axes.plot(commits, [row] * len(commits), "|", color=colour, markersize=9, label=label)
        if life.killed:
            axes.plot(life.last, row, "X", color=KILL, mec="white", markersize=10)
        if row > 1:
            lost = rows[row - 1].last - life.resumed
            again: dict[str, Any] = {"fill": False, "hatch": "////", "edgecolor": START, "linewidth": 0}
            label = "steps done again" if row == 2 else None
            axes.barh(row, lost, left=life.resumed, height=0.55, label=label, **again)
            axes.plot(life.resumed, row, "o", mfc="white", mec=START, mew=2.5, markersize=8)
    axes.set_yticks(range(len(rows)), [life.name for life in rows])
    axes.invert_yaxis()
    axes.set_xlabel("step")
    axes.set_xlim(0, whole.last * 1.01)
    axes.legend(frameon=False, ncols=2, loc="upper right", bbox_to_anchor=(1, -0.12))
