"""The page: one HTML document that needs no network and no script. It shows what is known and says what is not."""

from __future__ import annotations

from collections.abc import Sequence

from gpumove.parity.verdict import Certificate
from gpumove.report.bill import Bill
from gpumove.report.compare import Comparison
from gpumove.report.cost import costs
from gpumove.report.markup import Markup, tag
from gpumove.report.sections import (
    checkpoints,
    losses,
    moves,
    paces,
    summary,
    timeline,
    unknowns,
)
from gpumove.report.style import CSS
from gpumove.report.verdicts import parity, verdict
from gpumove.version import __version__
from gpumove.words import when

_POLICY = "default-src 'none'; style-src 'unsafe-inline'; base-uri 'none'; form-action 'none'"


def page(found: Comparison, bill: Bill, certificates: Sequence[Certificate] = ()) -> str:
    """The whole document.

    Args:
        found: what is known.
        bill: what it has cost.
        certificates: of steps that were trained again.

    Raises:
        ConfigError: the charts cannot be drawn.
    """
    parts = [
        ("timeline", "Timeline", timeline(found)),
        ("loss", "Loss", losses(found)),
        ("pace", "Step time", paces(found)),
        ("checkpoints", "Checkpoints", checkpoints(found)),
        ("moves", "Moves", moves(found)),
        ("parity", "Is it the same job?", parity(found, certificates)),
        ("cost", "Cost so far", costs(bill)),
        ("unknown", "What is not known", unknowns(found)),
    ]
    names = " and ".join(history.url for history in found.histories)
    links = [tag("li", tag("a", title, href=f"#{name}")) for name, title, _ in parts]
    body = [
        tag("header", tag("h1", "What this run has done so far"), *_whose(found)),
        tag("nav", tag("ul", *links), aria_label="Sections"),
        tag(
            "main",
            summary(found, bill, verdict(found, certificates)),
            *(
                tag("section", tag("h2", title, id=name), *inside, aria_labelledby=name)
                for name, title, inside in parts
            ),
        ),
        tag(
            "footer",
            tag("p", f"Made by gpumove {__version__} on {when(found.histories[0].now)}, from the stores alone."),
        ),
    ]
    head = [
        tag("meta", charset="utf-8"),
        Markup('<meta name="viewport" content="width=device-width, initial-scale=1">'),
        tag("meta", http_equiv="Content-Security-Policy", content=_POLICY),
        tag("title", f"gpumove report: {names}"),
        tag("style", Markup(CSS)),
    ]
    return "<!DOCTYPE html>\n" + tag("html", tag("head", *head), tag("body", *body), lang="en") + "\n"


def _whose(found: Comparison) -> list[Markup]:
    said = []
    for history in found.histories:
        words = [tag("code", history.url), f", run {history.run}"]
        if history.condition:
            words.append(f": {history.condition}")
        said.append(tag("p", *words))
    return said
