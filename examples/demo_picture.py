"""The picture of the demonstration: both loss curves, their difference, and which process did which steps."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

from matplotlib.axes import Axes

from examples.looks import BLUE, GREEN, ORANGE, RED, curves, differences, gaps, headline, legend, note, numbers, picture

if TYPE_CHECKING:
    from examples.demo import Life


def draw(path: Path, whole: Life, lives: Sequence[Life], *, every: int) -> None:
    """Draw and write it."""
    truth, found = numbers(whole), gaps(numbers(whole), lives)
    with picture(path, (6, 1.3, 1.7), sharex=True) as (figure, panels):
        top, middle, bottom = panels
        same = sum(gap == 0 for _, gap in found)
        headline(figure, f"{same} of {len(found)} losses of the killed run are equal to the last bit")
        _curves(top, truth, lives)
        differences(middle, found)
        _lives(bottom, whole, lives, every)
        ends, starts = [life.last for life in lives[:-1]], [life.resumed for life in lives[1:]]
        for axes in panels:
            for step, colour in [*((end, RED) for end in ends), *((start, GREEN) for start in starts)]:
                axes.axvline(step, color=colour, linewidth=0.8, linestyle=":", zorder=0)


def _curves(axes: Axes, truth: Mapping[int, float], lives: Sequence[Life]) -> None:
    """The killed run upon the uninterrupted one."""
    names = ["killed and resumed", *[None] * len(lives)]
    curves(axes, truth, "never interrupted", [(life, BLUE, name) for life, name in zip(lives, names)])
    kills = [life.last for life in lives if life.killed]
    starts = [life.resumed for life in lives[1:]]
    style: dict[str, Any] = {"linestyle": "none", "markersize": 10, "zorder": 5}
    axes.plot(kills, [truth[s] for s in kills], "X", color=RED, mec="white", label="killed with SIGKILL", **style)
    axes.plot(starts, [truth[s] for s in starts], "o", mfc="white", mec=GREEN, mew=2.5, label="resumed here", **style)
    for before, after in pairwise(lives):
        words = f"killed after step {before.last},\nresumed from step {after.resumed}"
        note(axes, truth, before.last, words, above=16)
    legend(axes)


def _lives(axes: Axes, whole: Life, lives: Sequence[Life], every: int) -> None:
    """One bar per process, the steps that were done twice hatched, a tick for every commit."""
    rows = [whole, *lives]
    for row, life in enumerate(rows):
        colour = ORANGE if life is whole else BLUE
        axes.barh(row, life.last - life.resumed, left=life.resumed, height=0.55, color=colour, alpha=0.35)
        commits = [save["saved"] for save in life.saves if save["committed"]]
        label = f"commit, every {every} steps" if life is lives[0] else None
        axes.plot(commits, [row] * len(commits), "|", color=colour, markersize=9, label=label)
        if life.killed:
            axes.plot(life.last, row, "X", color=RED, mec="white", markersize=10)
        if row > 1:
            lost = rows[row - 1].last - life.resumed
            again: dict[str, Any] = {"fill": False, "hatch": "////", "edgecolor": GREEN, "linewidth": 0}
            label = "steps done again" if row == 2 else None
            axes.barh(row, lost, left=life.resumed, height=0.55, label=label, **again)
            axes.plot(life.resumed, row, "o", mfc="white", mec=GREEN, mew=2.5, markersize=8)
    axes.set_yticks(range(len(rows)), [life.name for life in rows])
    axes.invert_yaxis()
    axes.set_xlabel("step")
    axes.set_xlim(0, whole.last * 1.01)
    axes.legend(frameon=False, ncols=2, loc="upper right", bbox_to_anchor=(1, -0.12))
