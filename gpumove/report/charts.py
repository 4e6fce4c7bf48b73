"""Charts as SVG that lies inside a page: colours are the page's, so that they are right in light and dark and in print.

Matplotlib draws; what it writes is made fit for HTML here. Every chart is drawn twice, for a desktop and for a phone:
one that is scaled down could not be read. Knows numbers, not runs.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from io import StringIO
from itertools import pairwise
from typing import Any
from xml.etree import ElementTree

from gpumove.errors import ConfigError
from gpumove.report.markup import Markup, raw, tag

INK, MUTED, GRID, FIRST, SECOND, ALARM = "#010101", "#020202", "#030303", "#040404", "#050505", "#060606"
"""Stand for colours of the page while matplotlib draws."""
_COLOURS = {
    INK: "ink", MUTED: "muted", GRID: "grid", FIRST: "first", SECOND: "second", ALARM: "alarm",
}  # fmt: skip
_SIZES = {"wide": (9.0, 3.2), "narrow": (4.2, 3.2)}
_MOST = 1200
"""Of a curve, so many points: more are not seen, but weigh."""


@dataclass(frozen=True)
class Curve:
    """Points from left to right; None breaks the line."""

    label: str
    xs: Sequence[float]
    ys: Sequence[float | None]


def chart(name: str, title: str, told: str, draw: Callable[[Any], None]) -> Markup:
    """A figure with a caption.

    Args:
        name: a word that no other chart of the page has.
        title: above it.
        told: what it shows, for those who do not see it.
        draw: draws on matplotlib axes.

    Raises:
        ConfigError: matplotlib is not installed.
    """
    both = [tag("div", _svg(f"{name}-{width}", title, told, size, draw), cls=width) for width, size in _SIZES.items()]
    return tag("figure", *both, tag("figcaption", told))


def curves(axes: Any, lines: Iterable[Curve], *, x: str, y: str, cut: float | None = None) -> None:
    """Lines over steps, told apart by colour and by dashes, and a mark where the run was cut over."""
    styles = ((FIRST, "-", "o"), (SECOND, (0, (5, 1.5)), "s"))
    for line, (colour, dashes, mark) in zip(lines, styles):
        xs, ys = thinned(line.xs, line.ys)
        marks = {"marker": mark, "markersize": 3} if len(xs) < 40 else {}
        axes.plot(xs, ys, color=colour, linestyle=dashes, linewidth=1.6, label=line.label, **marks)
    if cut is not None:
        axes.axvline(cut, color=INK, linewidth=1.2, linestyle=":", label=f"the move, after step {cut:g}")
    axes.set_xlabel(x)
    axes.set_ylabel(y)
    _legend(axes)


def lanes(axes: Any, rows: Sequence[tuple[str, Sequence[float]]], *, x: str) -> None:
    """When things of several kinds happened: a lane for each, the first one on top."""
    marks = "|^vDxo*s"
    for place, (label, times) in enumerate(rows):
        colour = ALARM if label in ("notice", "health", "parity") else SECOND if label == "move" else FIRST
        seen = _apart(times)
        axes.plot(seen, [-place] * len(seen), linestyle="", marker=marks[place % len(marks)], color=colour,
                  markersize=8, markeredgewidth=1.6, label=label)  # fmt: skip
    axes.set_yticks([-place for place in range(len(rows))], [f"{label} ({len(times)})" for label, times in rows])
    axes.set_ylim(-len(rows) + 0.4, 0.6)
    axes.set_xlabel(x)


def _apart(times: Sequence[float]) -> list[float]:
    """Of many marks, those that can be told apart."""
    if len(times) <= _MOST:
        return list(times)
    width = (max(times) - min(times)) / _MOST or 1.0
    return list({round(time / width): time for time in times}.values())


def bars(axes: Any, groups: Sequence[tuple[str, Sequence[float]]], names: Sequence[str], *, x: str, y: str) -> None:
    """Groups of bars side by side, told apart by colour and by hatching."""
    width = 0.8 / len(groups)
    looks = ((FIRST, ""), (SECOND, "////"))
    for place, ((label, heights), (colour, hatch)) in enumerate(zip(groups, looks)):
        at = [i + (place - (len(groups) - 1) / 2) * width for i in range(len(heights))]
        axes.bar(at, heights, width, facecolor="none" if hatch else colour, edgecolor=colour, hatch=hatch, label=label)
    every = max(1, math.ceil(len(names) / (8 if _is_narrow(axes) else 18)))
    axes.set_xticks(range(0, len(names), every), names[::every])
    axes.set_xlabel(x)
    axes.set_ylabel(y)
    _legend(axes)


def _legend(axes: Any) -> None:
    """Above the drawing, where it hides nothing; of a single line there is nothing to tell."""
    handles, labels = axes.get_legend_handles_labels()
    if len(labels) > 1:
        columns = 1 if _is_narrow(axes) else len(labels)
        axes.figure.legend(handles, labels, loc="outside upper left", frameon=False, labelcolor=INK, ncols=columns)


def _is_narrow(axes: Any) -> bool:
    return bool(axes.figure.get_figwidth() < 6)


def thinned(xs: Sequence[float], ys: Sequence[float | None]) -> tuple[list[float], list[float]]:
    """At most ``_MOST`` points, of each bucket the lowest and the highest, so that no spike is lost."""
    points = [(x, math.nan if y is None else y) for x, y in zip(xs, ys)]
    if len(points) > _MOST:
        edges = [round(i * len(points) / (_MOST // 2)) for i in range(_MOST // 2 + 1)]
        points = [p for a, b in pairwise(edges) for p in _extremes(points[a:b])]
    return [x for x, _ in points], [y for _, y in points]


def _extremes(bucket: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    finite = [p for p in bucket if not math.isnan(p[1])]
    if not finite:
        return [bucket[0]]
    both = {min(finite, key=lambda p: p[1]), max(finite, key=lambda p: p[1])}
    gaps = [p for p in bucket if math.isnan(p[1])][:1]
    return sorted([*both, *gaps], key=lambda p: p[0])


# -------------------------------------------------------------------- from matplotlib to HTML


def _svg(name: str, title: str, told: str, size: tuple[float, float], draw: Callable[[Any], None]) -> Markup:
    try:
        from matplotlib import rc_context
        from matplotlib.backends.backend_svg import FigureCanvasSVG
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ConfigError(
            f"the report's charts need matplotlib ({error}): pip install 'gpumove[report]'", code="config.missing"
        ) from error
    settings: Any = {
        "svg.fonttype": "none", "svg.hashsalt": name, "font.size": 10.0, "font.family": "sans-serif",
        "text.parse_math": False,
    }  # fmt: skip
    with rc_context(settings):
        figure = Figure(figsize=size, layout="constrained")
        canvas: Any = FigureCanvasSVG(figure)
        axes = figure.add_subplot()
        _dress(axes)
        draw(axes)
        out = StringIO()
        canvas.print_svg(out, metadata={"Date": None, "Creator": None, "Format": None, "Type": None})
    return _fit(out.getvalue(), name, title, told)


def _dress(axes: Any) -> None:
    axes.figure.patch.set_visible(False)
    axes.patch.set_visible(False)
    for side, spine in axes.spines.items():
        spine.set_visible(side in ("left", "bottom"))
        spine.set_color(MUTED)
    axes.tick_params(colors=MUTED, labelcolor=INK)
    axes.grid(True, color=GRID, linewidth=0.6)
    axes.set_axisbelow(True)
    axes.xaxis.label.set_color(INK)
    axes.yaxis.label.set_color(INK)


def _fit(text: str, name: str, title: str, told: str) -> Markup:
    """The drawing alone: names of its own, no sizes, no rules for the page around it, the page's colours."""
    root = ElementTree.fromstring(text)
    for parent in list(root.iter()):
        for child in list(parent):
            if child.tag.endswith(("}metadata", "}style")):
                parent.remove(child)
    for element in root.iter():
        element.tag = element.tag.rpartition("}")[2]
        element.attrib = {k.rpartition("}")[2]: _own(k, v, name) for k, v in element.attrib.items()}
    for size in ("width", "height", "version"):
        root.attrib.pop(size, None)
    for place, (kind, words) in enumerate((("title", title), ("desc", told))):
        child = ElementTree.Element(kind, {"id": f"{name}-{kind}"})
        child.text = words
        root.insert(place, child)
    root.attrib |= {"role": "img", "aria-labelledby": f"{name}-title {name}-desc", "class": "chart"}
    return raw(ElementTree.tostring(root, encoding="unicode"))


def _own(key: str, value: str, name: str) -> str:
    if key == "id":
        return f"{name}-{value}"
    value = value.replace("url(#", f"url(#{name}-")
    if key.endswith("href") and value.startswith("#"):
        return f"#{name}-{value[1:]}"
    for colour, variable in _COLOURS.items():
        value = value.replace(colour, f"var(--{variable})")
    return value
