"""The picture of the move: both loss curves with the cut, their difference, and what happened when."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import matplotlib

matplotlib.use("Agg")  # a file, no window
from matplotlib import pyplot
from matplotlib.axes import Axes

if TYPE_CHECKING:
    from examples.demo import Life
    from examples.move_between_clouds.__main__ import Trip

# Okabe and Ito's palette, as in the other demonstration: told apart with any kind of colour vision.
WHOLE, BEFORE, AFTER, CUT, INK = "#E69F00", "#0072B2", "#009E73", "#D55E00", "#444444"


def draw(path: Path, trip: Trip) -> None:
    """Draw and write it."""
    truth = _numbers(trip.whole)
    pyplot.rcParams.update({"font.size": 10, "axes.edgecolor": INK, "axes.labelcolor": INK})
    figure, (top, middle, bottom) = pyplot.subplots(
        3, figsize=(11, 7.5), height_ratios=(6, 1.3, 2.2), layout="constrained"
    )
    gaps = [(step, loss - truth[step]) for one in (trip.before, trip.after) for step, loss in _numbers(one).items()]
    same = sum(gap == 0 for _, gap in gaps)
    words = f"{same} of {len(gaps)} losses of the moved run are equal to the last bit"
    if same < len(gaps):
        worst = max(abs(gap) / truth[step] for step, gap in gaps)
        words = f"{len(gaps)} losses of the moved run, none further off than {100 * worst:.1g} %"
    figure.suptitle(words, x=0.012, ha="left", fontsize=15, fontweight="bold")
    _curves(top, truth, trip)
    _differences(middle, gaps)
    _clock(bottom, trip)
    middle.sharex(top)
    for axes in (top, middle):
        axes.axvline(trip.step, color=CUT, linewidth=0.8, linestyle=":", zorder=0)
        axes.set_xlim(0, trip.whole.last * 1.01)
    for axes in (top, middle, bottom):
        axes.spines[["top", "right"]].set_visible(False)
        axes.tick_params(colors=INK)
    figure.savefig(path, dpi=130)
    pyplot.close(figure)


def _numbers(life: Life) -> dict[int, float]:
    return {step: float.fromhex(loss) for step, loss in sorted(life.losses.items())}


def _curves(axes: Axes, truth: Mapping[int, float], trip: Trip) -> None:
    """The moved run thin and dark upon the other one, thick and pale."""
    axes.plot(list(truth), list(truth.values()), color=WHOLE, linewidth=5, alpha=0.5, label="never moved")
    for one, colour in ((trip.before, BEFORE), (trip.after, AFTER)):
        mine = _numbers(one)
        axes.plot(list(mine), list(mine.values()), color=colour, linewidth=1.0, label=f"in {one.name}")
    words = f"stopped after step {trip.step},\nresumed {trip.blackout_s:.1f} s later"
    height = max(loss for step, loss in truth.items() if abs(step - trip.step) < len(truth) / 8)
    style: dict[str, Any] = {
        "ha": "center",
        "color": INK,
        "bbox": {"facecolor": "white", "edgecolor": "none", "pad": 2},
    }
    axes.annotate(words, (trip.step, height), (0, 40), textcoords="offset points", **style)
    axes.plot(trip.step, truth[trip.step], "X", color=CUT, mec="white", markersize=10, zorder=5, linestyle="none")
    axes.set_ylabel("loss")
    axes.grid(axis="y", color="#DDDDDD", linewidth=0.7)
    axes.legend(frameon=True, framealpha=1, edgecolor="none", loc="upper right")


def _differences(axes: Axes, gaps: Sequence[tuple[int, float]]) -> None:
    """Loss of the moved run minus that of the other, at every step."""
    worst = max(abs(gap) for _, gap in gaps)
    axes.axhline(0, color="#DDDDDD", linewidth=0.7)
    axes.plot(*zip(*gaps), ".", color=CUT if worst else BEFORE, markersize=3)
    axes.set_ylim(-1.3 * (worst or 1), 1.3 * (worst or 1))
    ticks = [-worst, 0.0, worst] if worst else [0.0]
    axes.set_yticks(ticks, [f"{tick:.1g}" for tick in ticks])
    axes.set_ylabel("difference")
    axes.set_xlabel("step")


def _clock(axes: Axes, trip: Trip) -> None:
    """Who did what when: the first job, the rounds of the copy, the second job."""
    began = min(trip.before.at.values())
    for row, one, colour in ((0, trip.before, BEFORE), (2, trip.after, AFTER)):
        times = sorted(one.at.values())
        axes.barh(row, times[-1] - times[0], left=times[0] - began, height=0.5, color=colour, alpha=0.35)
        axes.plot([at - began for at in times], [row] * len(times), "|", color=colour, markersize=9, linewidth=0)
    rounds = iter(trip.report["rounds"])
    for event in trip.report["events"]:
        if event["state"] == "round" and (found := next(rounds, None)) is not None:
            axes.barh(
                1, found["seconds"], left=event["at"] - began - found["seconds"], height=0.5, color=INK, alpha=0.5
            )
    axes.axvspan(trip.stopped_at - began, trip.resumed_at - began, color=CUT, alpha=0.25, linewidth=0, label="blackout")
    axes.set_yticks(range(3), [f"training in {trip.before.name}", "copying", f"training in {trip.after.name}"])
    axes.invert_yaxis()
    axes.set_xlabel("seconds")
    axes.legend(frameon=False, loc="lower left")
