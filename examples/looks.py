"""How the demonstrations look: colours, bars, the marks of their checks, and what their pictures have in common."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import matplotlib

matplotlib.use("Agg")  # a file, no window
from matplotlib import pyplot
from matplotlib.axes import Axes
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

if TYPE_CHECKING:
    from examples.demo import Life

# Okabe and Ito's palette: told apart with any kind of colour vision. Curves also differ in width, marks in shape.
ORANGE, BLUE, RED, GREEN, INK, GRID = "#E69F00", "#0072B2", "#D55E00", "#009E73", "#444444", "#DDDDDD"
console = Console(highlight=False)


def bars() -> Progress:
    """A bar for each process."""
    columns = (TextColumn("{task.description:14}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    return Progress(*columns, console=console)


def say(wrong: Sequence[str], good: Iterable[str]) -> None:
    """What is wrong, and what is good, each line with its mark."""
    for words in wrong[:20]:
        console.print(f"[bold red]✗[/] {escape(words)}", soft_wrap=True)
    for words in good:
        console.print(f"[green]✓[/] {escape(words)}", soft_wrap=True)


def leave(folder: Path, drawn: str, report: Mapping[str, Any]) -> int:
    """Put the numbers down beside the picture, and say where both are; the exit code, by whether all has ``passed``."""
    (folder / "report.json").write_text(json.dumps(report, indent=1) + "\n")
    console.print(f"The picture is {folder / drawn}, the numbers are in report.json beside it.", soft_wrap=True)
    return 0 if report["passed"] else 1


# -------------------------------------------------------------------- pictures


@contextmanager
def picture(path: Path, heights: Sequence[float], **options: Any) -> Iterator[tuple[Any, Sequence[Axes]]]:
    """A figure of panels below each other, which is written at the end.

    Args:
        path: of the file.
        heights: of the panels, against each other.
        **options: of ``pyplot.subplots``.
    """
    pyplot.rcParams.update({"font.size": 10, "axes.edgecolor": INK, "axes.labelcolor": INK, "svg.fonttype": "none"})
    figure, panels = pyplot.subplots(
        len(heights), **{"figsize": (11, 7.5), "height_ratios": heights, "layout": "constrained", **options}
    )
    yield figure, panels
    for axes in panels:
        axes.spines[["top", "right"]].set_visible(False)
        axes.tick_params(colors=INK)
    figure.savefig(path, dpi=130)
    pyplot.close(figure)


def headline(figure: Any, words: str) -> None:
    """What there is to see."""
    figure.suptitle(words, x=0.012, ha="left", fontsize=15, fontweight="bold")


def numbers(life: Life) -> dict[int, float]:
    """Its losses by step."""
    return {step: float.fromhex(loss) for step, loss in sorted(life.losses.items())}


def gaps(truth: Mapping[int, float], lives: Iterable[Life]) -> list[tuple[int, float]]:
    """By step, a loss minus the true one."""
    return [(step, loss - truth[step]) for life in lives for step, loss in numbers(life).items()]


def curves(axes: Axes, truth: Mapping[int, float], label: str, others: Iterable[tuple[Life, str, str | None]]) -> None:
    """The true losses thick and pale, and others thin and dark upon them.

    Args:
        axes: where to.
        truth: by step.
        label: of the true ones.
        others: each with its colour and label.
    """
    axes.plot(list(truth), list(truth.values()), color=ORANGE, linewidth=5, alpha=0.5, label=label)
    for life, colour, name in others:
        mine = numbers(life)
        axes.plot(list(mine), list(mine.values()), color=colour, linewidth=1.0, label=name)
    axes.set_ylabel("loss")
    axes.grid(axis="y", color=GRID, linewidth=0.7)


def legend(axes: Axes) -> None:
    """In the corner that falling losses leave free."""
    axes.legend(frameon=True, framealpha=1, edgecolor="none", loc="upper right")


def note(axes: Axes, truth: Mapping[int, float], step: int, words: str, *, above: int) -> None:
    """Words above the curve, where it is highest around a step."""
    height = max(loss for at, loss in truth.items() if abs(at - step) < len(truth) / 8)
    box = {"facecolor": "white", "edgecolor": "none", "pad": 2}
    axes.annotate(words, (step, height), (0, above), textcoords="offset points", ha="center", color=INK, bbox=box)


def differences(axes: Axes, found: Sequence[tuple[int, float]]) -> None:
    """Losses minus the true ones, at every step."""
    worst = max(abs(gap) for _, gap in found)
    axes.axhline(0, color=GRID, linewidth=0.7)
    axes.plot(*zip(*found), ".", color=RED if worst else BLUE, markersize=3)
    axes.set_ylim(-1.3 * (worst or 1), 1.3 * (worst or 1))
    ticks = [-worst, 0.0, worst] if worst else [0.0]
    axes.set_yticks(ticks, [f"{tick:.1g}" for tick in ticks])
    axes.set_ylabel("difference")
