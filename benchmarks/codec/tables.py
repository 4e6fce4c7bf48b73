"""What was measured as terminal tables. Knows figures, not how they came about."""

from __future__ import annotations

from collections.abc import Sequence

from rich.console import Console
from rich.table import Table

from benchmarks.codec.peers import BASES, DELTAS
from benchmarks.codec.ratios import Total
from benchmarks.codec.speed import Pace
from benchmarks.codec.states import ORDER
from benchmarks.codec.targets import BASE, BEST, FP32, total_rate
from benchmarks.report import Verdict


def _percent(fraction: float | None) -> str:
    return "-" if fraction is None else f"{100 * fraction:.1f}"


def _bold(name: str) -> str:
    return "bold" if name.startswith("gpumove") else ""


def sizes(console: Console, title: str, totals: Sequence[Total], *, whole: bool) -> None:
    """One regime: per cent of raw that are stored, codecs downwards, distances across; below ours, where its bytes are.

    ``whole``: with the input embedding.
    """
    distances = sorted({t.distance for t in totals})
    scope = "whole state" if whole else "dense"
    shown = Table(title=f"{title}: % of raw stored, {scope}", title_justify="left")
    shown.add_column("codec")
    for distance in distances:
        shown.add_column("base" if not distance else f"+{distance}", justify="right")
    ours = {t.distance: t for t in totals if t.codec in (BASE, BEST)}
    for name in BASES + DELTAS:
        row = ours if name == BEST else {t.distance: t for t in totals if t.codec == name}
        if row:
            cells = (_percent(row[d].fraction(dense=not whole)) if d in row else "" for d in distances)
            shown.add_row(name, *cells, style=_bold(name))
    roles = [role for role in ORDER if any(role in (key[0] for key in t.raw) for t in ours.values())]
    for role in roles if len(roles) > 1 else ():
        cells = (_percent(ours[d].fraction(dense=not whole, role=role)) for d in distances)
        shown.add_row(f"  its {role}", *cells, style="dim")
    console.print(shown)


def speeds(console: Console, paces: Sequence[Pace]) -> None:
    """Per thread, for each kind of buffer: how much is stored, and raw MB/s."""
    shown = Table(title="one thread, raw MB/s", title_justify="left")
    shown.add_column("buffer")
    shown.add_column("codec")
    for name in ("stored, %", "encode", "decode"):
        shown.add_column(name, justify="right")
    for buffer in dict.fromkeys(p.buffer for p in paces):
        for n, pace in enumerate(p for p in paces if p.buffer == buffer):
            stored = _percent(pace.stored_bytes / pace.raw_bytes)
            rates = (f"{pace.encode_mb_s:.0f}", f"{pace.decode_mb_s:.0f}")
            shown.add_row("" if n else buffer, pace.codec, stored, *rates, style=_bold(pace.codec))
        shown.add_section()
    names = [name for name in dict.fromkeys(p.codec for p in paces) if total_rate(paces, FP32, name, "encode")]
    for n, name in enumerate(names):
        found = [p for p in paces if p.codec == name and p.buffer in FP32]
        stored = _percent(sum(p.stored_bytes for p in found) / sum(p.raw_bytes for p in found))
        rates = (f"{total_rate(paces, FP32, name, verb) or 0:.0f}" for verb in ("encode", "decode"))
        shown.add_row("" if n else "fp32 in all", name, stored, *rates, style=_bold(name))
    console.print(shown)


def outcome(console: Console, verdicts: Sequence[Verdict]) -> None:
    """What was met and what was not."""
    for verdict in verdicts:
        word = "[green]pass[/]" if verdict.met else "[red]FAIL[/]"
        console.print(f"{word} {verdict.store}, {verdict.peer}: {verdict.what}", highlight=False)
