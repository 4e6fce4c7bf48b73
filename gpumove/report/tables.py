"""Tables of the page: a caption, heads with their scope, and a frame that scrolls and can be reached by keyboard."""

from __future__ import annotations

import time
from collections.abc import Sequence

from gpumove.report.markup import Markup, tag
from gpumove.words import when

UNKNOWN = tag("span", "unknown", cls="unknown")
_TALL = 12


def table(caption: str, heads: Sequence[str], rows: Sequence[Sequence[str]], *, right: str = "") -> Markup:
    """A table; the first cell of a row is its head.

    Args:
        caption: what it is.
        heads: of the columns.
        rows: text or markup.
        right: one letter per column, ``r`` for numbers.
    """
    sides = right.ljust(len(heads), "l")
    top = tag("thead", tag("tr", *(tag("th", head, scope="col", **_side(s)) for head, s in zip(heads, sides))))
    body = tag("tbody", *(_row(row, sides) for row in rows))
    return tag(
        "section", tag("table", tag("caption", caption), top, body), aria_label=f"Table: {caption}", tabindex="0",
        cls="scroll tall" if len(rows) > _TALL else "scroll",
    )  # fmt: skip


def _row(row: Sequence[str], sides: str) -> Markup:
    first, *others = row
    cells = [tag("td", cell, **_side(side)) for cell, side in zip(others, sides[1:])]
    return tag("tr", tag("th", first, scope="row", **_side(sides[0])), *cells)


def _side(side: str) -> dict[str, str]:
    return {"cls": "n"} if side == "r" else {}


def moment(at: float) -> Markup:
    """A time, for people and programs."""
    return tag("time", when(at), datetime=time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(at)))


def tiles(facts: Sequence[tuple[str, str, str]]) -> Markup:
    """Facts at a glance: name, value, and what belongs to it."""
    cells = (
        tag("div", tag("dt", name), tag("dd", value, *([tag("small", more)] if more else [])))
        for name, value, more in facts
    )
    return tag("dl", *cells, cls="tiles")
