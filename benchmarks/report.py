"""Results as a terminal table, markdown, JSON and a picture. Knows figures, not how they were measured."""

from __future__ import annotations

import json
from pathlib import Path
from statistics import median
from typing import Any

from rich.console import Console
from rich.table import Table as RichTable

from benchmarks.figures import FIGURES, Figure, Table, Verdict

_BARS = (
    "stall_s",
    "lost_s",
    "durable_s",
    "restore_first_s",
    "restore_again_s",
    "restore_cold_s",
)
_COLOURS = ("#d1495b", "#edae49", "#66a182", "#2e4057", "#8d96a3")


def _number(value: float, unit: str) -> str:
    if unit == "s" and abs(value) < 0.1:
        return f"{value * 1e3:.0f} ms"
    return f"{value:.2f}" + (" s" if unit == "s" else "")


def cell(table: Table, store: str, peer: str, figure: Figure) -> str:
    """The median, and the median ratio to the base in brackets."""
    value = table.median(store, peer, figure.name)
    if value is None:
        return "-"
    text = _number(value, figure.unit)
    if peer != figure.base and (ratios := table.ratios(store, peer, figure)):
        text += f" ({median(ratios):.2f}x)"
    return text


def _present(table: Table, store: str) -> list[Figure]:
    """Without those that this store does not have: a server in memory has no cold cache."""
    return [f for f in FIGURES if any(table.median(store, peer, f.name) is not None for peer in table.peers)]


def _heading(figure: Figure) -> str:
    unit = f", {figure.unit}" if figure.unit == "GB" else ""
    return figure.label + unit


def show(console: Console, table: Table, verdicts: list[Verdict]) -> None:
    """One table per store, figures downwards, peers across; then what was met and what was not."""
    for store in table.stores:
        shown = RichTable(title=f"{store}: median of rounds (ratio to the base)", title_justify="left")
        shown.add_column("figure")
        for peer in table.peers:
            shown.add_column(peer, justify="right", style="bold" if peer.startswith("gpumove") else "")
        for figure in _present(table, store):
            shown.add_row(_heading(figure), *(cell(table, store, peer, figure) for peer in table.peers))
        console.print(shown)
    for verdict in verdicts:
        word = "[green]pass[/]" if verdict.met else "[red]FAIL[/]"
        console.print(f"{word} {verdict.store} {verdict.peer}: {verdict.what}", highlight=False)


def markdown(table: Table, facts: dict[str, Any], settings: dict[str, Any]) -> str:
    """The same tables for docs/benchmarks.md, with what they were measured on."""
    machine = f"{facts['cores']} cores ({facts['processor']}), {facts['memory_gb']} GB, Linux {facts['kernel']}"
    versions = ", ".join(f"{name} {version}" for name, version in facts["packages"].items())
    rounds = f"medians of {settings['rounds']} interleaved rounds"
    lines = [f"{machine}; Python {facts['python']}, {versions}; {rounds}.", ""]
    for store in table.stores:
        lines += [f"**{store}**, {settings['size_mb'][store]} MB of state", ""]
        lines += ["| figure | " + " | ".join(table.peers) + " |", "|---" * (len(table.peers) + 1) + "|"]
        for figure in _present(table, store):
            cells = (cell(table, store, peer, figure) for peer in table.peers)
            lines.append(f"| {_heading(figure)} | " + " | ".join(cells) + " |")
        lines.append("")
    return "\n".join(lines)


def picture(table: Table, path: Path) -> None:
    """Bars of ratios, one panel per store; the base of each group is the line at 1."""
    import matplotlib as mpl

    mpl.use("Agg")
    import matplotlib.pyplot as plt

    figures = [figure for figure in FIGURES if figure.name in _BARS]
    canvas, axes = plt.subplots(len(table.stores), 1, figsize=(9, 3.6 * len(table.stores)), squeeze=False)
    for ax, store in zip(axes[:, 0], table.stores):
        width = 0.8 / len(table.peers)
        for n, peer in enumerate(table.peers):
            ratios = [table.ratios(store, peer, figure) for figure in figures]
            heights = [max(0.003, median(r)) if r else 0.0 for r in ratios]
            places = [x + (n - (len(table.peers) - 1) / 2) * width for x in range(len(figures))]
            bars = ax.bar(places, heights, width, label=peer, color=_COLOURS[n % len(_COLOURS)])
            ax.bar_label(bars, [f"{median(r):.2f}" if r else "" for r in ratios], fontsize=6)
        ax.axhline(1.0, color="black", linewidth=0.8)
        ax.set_yscale("log")
        ax.set_xticks(range(len(figures)), [f"{f.label}\n/ {_base_name(f)}" for f in figures], fontsize=8)
        ax.set_title(f"{store}: ratio, lower is better", fontsize=10, loc="left")
    canvas.legend(*axes[0, 0].get_legend_handles_labels(), loc="lower center", fontsize=8, ncols=len(table.peers))
    canvas.tight_layout(rect=(0, 0.04, 1, 1))
    canvas.savefig(path, dpi=150)
    plt.close(canvas)


def _base_name(figure: Figure) -> str:
    return "dcp.load" if figure.name.startswith("restore") else str(figure.base)


def write_json(path: Path, content: dict[str, Any]) -> None:
    """Readable, and the same for the same content."""
    path.write_text(json.dumps(content, indent=1, sort_keys=True) + "\n")
