"""The comparison as terminal tables and as markdown. Knows figures, not how they were measured."""

from __future__ import annotations

from statistics import median
from typing import Any

from rich.console import Console
from rich.table import Table as RichTable

from benchmarks.compare.figures import FIGURES, Figure, Table
from benchmarks.compare.plan import Section
from benchmarks.compare.workloads import LABELS

_WIDE = 200


def number(value: float, unit: str) -> str:
    """Short, with its unit where the heading does not say it."""
    if unit == "s":
        return f"{value * 1e3:.3g} ms" if abs(value) < 0.1 else f"{value:.2f} s"
    return f"{value:.2f}"


def cell(table: Table, section: Section, peer: str, figure: Figure) -> str:
    """The median, and the median ratio to the base in brackets."""
    value = table.median(section, peer, figure.name)
    if value is None:
        return ""
    text = number(value, figure.unit)
    if figure.base is not None and peer != figure.base:
        ratios = table.ratios(section, peer, figure.name, (figure.base,))
        text += f" ({median(ratios):.2f}x)" if ratios else ""
    return text


def present(table: Table, section: Section) -> list[Figure]:
    """Without those that this section does not have: a server in memory has no cold cache."""
    peers = table.peers(section)
    return [f for f in FIGURES if any(table.median(section, peer, f.name) is not None for peer in peers)]


def ranked(table: Table, section: Section) -> list[str]:
    """Peers that have a figure, in the order of the registry."""
    from benchmarks.compare.peers import PEERS
    from benchmarks.compare.plan import DISK

    order = [*PEERS, DISK]
    known = [p for p in table.peers(section) if any(table.values(section, p, f.name) for f in FIGURES)]
    return sorted(known, key=order.index)


def missing(table: Table, section: Section) -> list[str]:
    """What could not be measured, and why; nothing is left out in silence."""
    found = []
    for peer in table.peers(section):
        samples = table.of(section, peer)
        if errors := [s["error"] for s in samples if s.get("error")]:
            word = "" if errors[0] == "not installed" else f"{len(errors)} of {len(samples)} failed: "
            found.append(f"{peer}: {word}{errors[0]}")
        unequal = sum(row["unequal"] for s in samples for row in (s.get("restore") or {}).values())
        if unequal:
            found.append(f"{peer}: {unequal} restores were not bit for bit")
    return found


def heading(figure: Figure) -> str:
    """With the unit, where cells do not have it."""
    return f"{figure.label}, GB" if figure.unit == "GB" else figure.label


def title(table: Table, section: Section) -> str:
    """What was trained, how large, where to, and how often."""
    samples = table.of(section)
    rounds = len({s["round"] for s in samples})
    known = [s["save"]["state_bytes"] / 1e6 for s in samples if s.get("save")]  # a width is a multiple of 64
    size = f"{(known or [samples[0]['size_mb']])[0]:.0f} MB of state"
    return f"{section}: {LABELS[section.workload]}, {size}, {rounds} round{'s' * (rounds > 1)}"


def rows(table: Table, section: Section) -> list[list[str]]:
    """One per peer; a peer that was not in every round says so."""
    rounds = len({s["round"] for s in table.of(section)})
    found = []
    for peer in ranked(table, section):
        times = len(table.of(section, peer))
        name = peer if times == rounds else f"{peer} [{times}]"
        found.append([name, *(cell(table, section, peer, f) for f in present(table, section))])
    return found


def show(console: Console, table: Table) -> None:
    """One table per section, peers downwards."""
    if not console.is_terminal:
        console.width = _WIDE
    for section in table.sections:
        shown = RichTable(title=title(table, section), title_justify="left")
        shown.add_column("peer", no_wrap=True)
        for figure in present(table, section):
            shown.add_column(heading(figure), justify="right")
        for row in rows(table, section):
            shown.add_row(row[0].replace("[", "\\["), *row[1:], style="bold" if row[0].startswith("gpumove") else "")
        console.print(shown)
        for line in missing(table, section):
            console.print(f"  {line}", highlight=False, markup=False)


def markdown(table: Table, facts: dict[str, Any]) -> str:
    """The same tables for a page, with what they were measured on."""
    machine = f"{facts['cores']} cores ({facts['processor']}), {facts['memory_gb']} GB, Linux {facts['kernel']}"
    versions = ", ".join(f"{name} {version}" for name, version in facts["packages"].items())
    lines = [f"{machine}; Python {facts['python']}, {versions}; load before {facts['load_before']}.", ""]
    for section in table.sections:
        lines += [f"**{title(table, section)}**", ""]
        headings = ["peer", *(heading(f) for f in present(table, section))]
        lines += ["| " + " | ".join(headings) + " |", "|---" * len(headings) + "|"]
        lines += ["| " + " | ".join(row) + " |" for row in rows(table, section)]
        lines += ["", *(f"{line}." for line in missing(table, section)), ""]
    return "\n".join(lines)
