"""The picture of the move: both loss curves with the cut, their difference, and what happened when."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from matplotlib.axes import Axes

from examples.looks import BLUE, GREEN, INK, RED, curves, differences, gaps, headline, legend, note, numbers, picture

if TYPE_CHECKING:
    from examples.move_between_clouds.__main__ import Trip


def draw(path: Path, trip: Trip) -> None:
    """Draw and write it."""
    truth = numbers(trip.whole)
    found = gaps(truth, (trip.before, trip.after))
    same = sum(gap == 0 for _, gap in found)
    words = f"{same} of {len(found)} losses of the moved run are equal to the last bit"
    if same < len(found):
        worst = max(abs(gap) / truth[step] for step, gap in found)
        words = f"{len(found)} losses of the moved run, none further off than {100 * worst:.1g} %"
    with picture(path, (6, 1.3, 2.2)) as (figure, panels):
        top, middle, bottom = panels
        headline(figure, words)
        _curves(top, truth, trip)
        differences(middle, found)
        middle.set_xlabel("step")
        _clock(bottom, trip)
        middle.sharex(top)
        for axes in (top, middle):
            axes.axvline(trip.step, color=RED, linewidth=0.8, linestyle=":", zorder=0)
            axes.set_xlim(0, trip.whole.last * 1.01)


def _curves(axes: Axes, truth: Mapping[int, float], trip: Trip) -> None:
    """The moved run upon the other one."""
    both = ((trip.before, BLUE), (trip.after, GREEN))
    curves(axes, truth, "never moved", [(one, colour, f"in {one.name}") for one, colour in both])
    words = f"stopped after step {trip.step},\nresumed {trip.blackout_s:.1f} s later"
    note(axes, truth, trip.step, words, above=40)
    axes.plot(trip.step, truth[trip.step], "X", color=RED, mec="white", markersize=10, zorder=5, linestyle="none")
    legend(axes)


def _clock(axes: Axes, trip: Trip) -> None:
    """Who did what when: the first job, the rounds of the copy, the second job."""
    began = min(trip.before.at.values())
    for row, one, colour in ((0, trip.before, BLUE), (2, trip.after, GREEN)):
        times = sorted(one.at.values())
        axes.barh(row, times[-1] - times[0], left=times[0] - began, height=0.5, color=colour, alpha=0.35)
        axes.plot([at - began for at in times], [row] * len(times), "|", color=colour, markersize=9, linewidth=0)
    rounds = iter(trip.report["rounds"])
    for event in trip.report["events"]:
        if event["state"] == "round" and (found := next(rounds, None)) is not None:
            axes.barh(
                1, found["seconds"], left=event["at"] - began - found["seconds"], height=0.5, color=INK, alpha=0.5
            )
    axes.axvspan(trip.stopped_at - began, trip.resumed_at - began, color=RED, alpha=0.25, linewidth=0, label="blackout")
    axes.set_yticks(range(3), [f"training in {trip.before.name}", "copying", f"training in {trip.after.name}"])
    axes.invert_yaxis()
    axes.set_xlabel("seconds")
    axes.legend(frameon=False, loc="lower left")
