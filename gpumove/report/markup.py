"""HTML out of Python: every text is escaped, unless it is markup already. Knows nothing of reports."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape

_VOID = ("meta", "br", "hr")


class Markup(str):
    """Text that is HTML."""

    __slots__ = ()


def raw(text: str) -> Markup:
    """HTML that was made elsewhere, by us."""
    return Markup(text)


def tag(name: str, *inside: str, **attributes: str) -> Markup:
    """An element.

    Args:
        name: of the element.
        *inside: markup, or text, which is escaped.
        **attributes: ``cls`` stands for ``class``, other underscores for dashes.
    """
    given = "".join(
        f' {"class" if key == "cls" else key.replace("_", "-")}="{escape(value)}"' for key, value in attributes.items()
    )
    if name in _VOID:
        return Markup(f"<{name}{given}>")
    return Markup(f"<{name}{given}>{_join(inside)}</{name}>")


def _join(parts: Sequence[str]) -> Markup:
    return Markup("".join(part if isinstance(part, Markup) else escape(part) for part in parts))
