"""How the command line shows things: tables and colours at a terminal, plain text and JSON for everything else.

It knows what to show, never where it comes from. Besides ``cli.py`` it is the only place that prints.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager

import msgspec
from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn
from rich.table import Table
from rich.text import Text

from gpumove.environment.said import lines
from gpumove.errors import GpumoveError
from gpumove.format.manifest import Checkpoint
from gpumove.inspection.doctor import Check
from gpumove.inspection.export import ExportReport
from gpumove.inspection.groups import Way
from gpumove.inspection.run import VerifyReport
from gpumove.inspection.summary import Detail, Overview, Row, TensorRow
from gpumove.store.gc import Plan
from gpumove.words import age, count, size, when

Cell = str | tuple[str, str]
"""Text, or text and its style."""

_MANY = 12
_STATUS = {"ok": ("ok", "green"), "warn": ("warn", "yellow"), "fail": ("FAIL", "bold red")}


class Screen:
    """Where a verb's answer goes: standard output, as tables, plain text or JSON; progress and errors on the other."""

    def __init__(self, *, json: bool = False) -> None:
        self.json = json
        self._console = Console(highlight=False, markup=False, emoji=False)
        self._errors = Console(highlight=False, markup=False, emoji=False, stderr=True)

    def give(self, data: object, show: Callable[[Screen], None]) -> None:
        """A verb's whole answer: the data as JSON if so asked, else what ``show`` makes of it."""
        if self.json:
            self._write(msgspec.json.format(msgspec.json.encode(data), indent=2).decode())
        else:
            show(self)

    def line(self, *cells: Cell) -> None:
        """One line of text."""
        if self._console.is_terminal:
            self._console.print(Text.assemble(*cells), soft_wrap=True)
        else:
            self._write("".join(map(_plain, cells)))

    def table(self, heads: Sequence[str], rows: Iterable[Sequence[Cell]], *, right: str = "") -> None:
        """A table. ``right`` has one letter per column, ``r`` for those that are aligned to the right."""
        sides = right.ljust(len(heads), "l")
        rows = list(rows)
        if not self._console.is_terminal:
            self._plain_table(heads, [list(map(_plain, row)) for row in rows], sides)
            return
        table = Table(box=None, pad_edge=False, header_style="bold", padding=(0, 2, 0, 0))
        for head, side in zip(heads, sides):
            table.add_column(head, justify="right" if side == "r" else "left", overflow="fold")
        for row in rows:
            table.add_row(*(Text.assemble(cell) for cell in row))
        self._console.print(table)

    def _plain_table(self, heads: Sequence[str], rows: Sequence[Sequence[str]], sides: str) -> None:
        widths = [max(map(len, column)) for column in zip(heads, *rows)]
        for row in (heads, *rows):
            cells = [c.rjust(w) if s == "r" else c.ljust(w) for c, w, s in zip(row, widths, sides)]
            self._write("  ".join(cells).rstrip())

    def _write(self, text: str) -> None:
        sys.stdout.write(text + "\n")

    def note(self, text: str) -> None:
        """Something that is said while the work goes on, above the bar if there is one: on standard error, unless it
        is for a program, which gets a line of it each time."""
        if self.json:
            self._write(text)
            sys.stdout.flush()
        elif self._errors.is_terminal:
            self._errors.print(text, soft_wrap=True)
        else:
            sys.stderr.write(text + "\n")

    @property
    def notes_are_beside(self) -> bool:
        """Whether what was noted is read where the answer is: at one terminal, or in one log."""
        try:
            return os.path.sameopenfile(sys.stdout.fileno(), sys.stderr.fileno())
        except (OSError, ValueError):  # something in python's own memory, or closed
            return False

    def fail(self, message: str, *, code: str) -> None:
        """The one line that says what went wrong."""
        if self.json:
            self._write(msgspec.json.encode({"error": message, "code": code}).decode())
        if self._errors.is_terminal:
            self._errors.print(Text.assemble(("error: ", "bold red"), " ".join(message.split())), soft_wrap=True)
        else:
            sys.stderr.write(f"error: {' '.join(message.split())}\n")

    @contextmanager
    def progress(self, title: str) -> Iterator[Callable[[int, int], None]]:
        """A bar on standard error while it is a terminal; told (bytes done, bytes in all)."""
        if not self._errors.is_terminal:
            yield lambda done, total: None
            return
        columns = (TextColumn(title), BarColumn(), DownloadColumn(True), TransferSpeedColumn(), TimeRemainingColumn())
        with Progress(*columns, console=self._errors, transient=True) as bar:
            task = bar.add_task(title, total=None)
            yield lambda done, total: bar.update(task, completed=done, total=total)


def _plain(cell: Cell) -> str:
    return cell if isinstance(cell, str) else cell[0]


# -------------------------------------------------------------------- one function per verb


def claimed(epoch: int, host: str) -> str:
    """Who has the run. An epoch without a host was opened by a move: nobody has claimed the run since."""
    if not epoch:
        return "nobody has claimed it"
    return f"epoch {epoch}, claimed by {host}" if host else f"epoch {epoch}, for which the log names no owner"


def show_overview(screen: Screen, data: Overview) -> None:
    """``ls``."""
    screen.line(("run   ", "bold"), f"{data.run} at {data.url}")
    screen.line(("owner ", "bold"), claimed(data.epoch, data.host))
    if data.condition:
        screen.line(("moving ", "bold yellow"), data.condition)
    if data.checkpoints:
        heads = ("step", "entry", "age", "ranks", "state", "new", "epoch", "pinned", "condition")
        screen.line("")
        screen.table(heads, (_row(row, data) for row in data.checkpoints), right="rrrrrrrll")
        screen.line("")
    for found in data.broken:
        screen.line((f"log entry {found.number} cannot be read", "bold red"), f": {found.error}")
    if data.resume.entry is None:
        screen.line(("resume ", "bold"), data.resume.why)
    else:
        screen.line(("resume ", "bold"), f"step {data.resume.step} (entry {data.resume.entry}): {data.resume.why}")


def _row(row: Row, data: Overview) -> tuple[Cell, ...]:
    chosen = row.entry == data.resume.entry
    condition: Cell = (row.damage, "bold red") if row.damage else ("resumed next", "green") if chosen else ""
    return (
        str(row.step), str(row.entry), age(data.now - row.time), str(row.world_size), size(row.state_bytes),
        size(row.new_bytes), str(row.epoch), "pinned" if row.pinned else "", condition,
    )  # fmt: skip


def show_detail(screen: Screen, data: Detail) -> None:
    """``show``."""
    facts = {
        "checkpoint": f"step {data.step}, entry {data.entry}{', pinned' if data.pinned else ''}",
        "written": f"{when(data.time)}, epoch {data.epoch}, attempt {data.attempt}, {count(data.world_size, 'rank')}",
        "state": f"{size(data.state_bytes)}, stored in {size(data.stored_bytes)}",
        "sent": f"{size(data.new_bytes)} of packs; {size(data.older_stored_bytes)} unchanged lie in older ones",
        "restore": f"fetches {size(data.restore_bytes)}, through up to {count(data.chain, 'earlier save')}",
        "values": ", ".join(data.values) or "none",
        "losses": _say_trace(data),
        "manifest": data.manifest,
    }
    facts |= {"moving": data.condition} if data.condition else {}
    for name, fact in facts.items():
        screen.line((f"{name:<11}", "bold"), fact)
    for found in data.health:
        where = f"step {found.get('step')}, rank {found.get('rank')}"
        screen.line((f"{found.get('kind', ''):<11}", "bold yellow"), f"{where}: {found.get('text')}")
    for name, text in lines(data.fingerprint):
        screen.line((f"{name:<11}", "dim"), text)
    screen.line("")
    heads = ("group", "tensors", "bytes", "stored", "ratio", "new", "how")
    screen.table(heads, (
        (g.name, str(g.tensors), size(g.nbytes), size(g.stored_bytes), _ratio(g.stored_bytes, g.nbytes),
         size(g.new_stored_bytes), ", ".join(_say_way(name, way) for name, way in sorted(g.ways.items())))
        for g in data.groups
    ), right="lrrrrrl")  # fmt: skip
    screen.line("")
    per_rank = ("rank", "tensors", "own", "packs", "older packs", "sent", "part")
    screen.table(per_rank, (
        (str(p.rank), str(p.tensors), str(p.local), str(p.packs), str(p.older_packs), size(p.new_bytes), size(p.nbytes))
        for p in data.parts
    ), right="rrrrrrr")  # fmt: skip
    if data.tensors is not None:
        screen.line("")
        per_tensor = ("tensor", "dtype", "shape", "bytes", "chunks", "rank")
        screen.table(per_tensor, (_tensor(row) for row in data.tensors), right="lllrrr")


def _ratio(stored: int, nbytes: int) -> str:
    return f"{stored / nbytes:.1%}" if nbytes else ""


def _say_way(name: str, way: Way) -> str:
    """Such as ``predicted 9.0 MB (12.1%)``; what was not sent at all has no ratio."""
    if name in ("clean", "inline"):
        return f"{name} {size(way.nbytes)}"
    return f"{name} {size(way.nbytes)} ({_ratio(way.stored_bytes, way.nbytes)})"


def _say_trace(data: Detail) -> str:
    t = data.trace
    if t is None:
        return "none recorded"
    lowest = "" if t.lowest is None or t.highest is None else f", between {t.lowest:.6g} and {t.highest:.6g}"
    return f"{t.count} of steps {t.first[0]} to {t.last[0]}{lowest}, last {t.last[1]}"


def _tensor(row: TensorRow) -> tuple[Cell, ...]:
    rank = "" if row.rank is None else str(row.rank)
    return row.fqn, row.dtype, str(list(row.shape)), size(row.nbytes), str(row.chunks), rank


def show_verify(screen: Screen, data: VerifyReport) -> None:
    """``verify``."""
    read = f"{size(data.read_bytes)} of packs were read" if data.deep else "packs were not read: --deep does that"
    looked = (
        f"{count(len(data.checkpoints), 'checkpoint')}, {count(data.objects, 'object')}, "
        f"{size(data.object_bytes)} in {data.seconds:.1f} s; {read}"
    )
    for found in data.damage:
        screen.line((found.object, "bold red"), f": {found.problem}")
        if found.steps:
            screen.line(f"    checkpoints of steps {', '.join(map(str, found.steps))}")
        if found.tensors:
            more = f" and {len(found.tensors) - _MANY} more" if len(found.tensors) > _MANY else ""
            screen.line(f"    tensors {', '.join(found.tensors[:_MANY])}{more}")
    if data.sound:
        screen.line(("sound", "bold green"), f": {looked}")
        return
    screen.line((f"{count(len(data.damage), 'object')} damaged", "bold red"), f": {looked}")
    newest = "no checkpoint is sound" if data.newest_sound is None else f"step {data.newest_sound}"
    screen.line(("newest sound checkpoint ", "bold"), newest)


def show_gc(screen: Screen, plan: Plan, *, done: bool) -> None:
    """``gc``."""
    screen.line(("keep   ", "bold"), _say_steps(plan.kept))
    screen.line(("drop   ", "bold"), _say_steps(plan.dropped))
    what = f"{count(len(plan.doomed), 'object')}, {size(plan.doomed_bytes)}"
    screen.line(("delete ", "bold"), what)
    screen.line("done" if done else "nothing was changed: this was a dry run, --yes does it")


def _say_steps(found: Sequence[Checkpoint]) -> str:
    steps = ", ".join(f"{c.step}{' (pinned)' if c.pinned else ' (published)' if c.pointers else ''}" for c in found)
    return f"{count(len(found), 'checkpoint')}{f', of steps {steps}' if steps else ''}"


def show_export(screen: Screen, data: ExportReport) -> None:
    """``export``."""
    screen.line(
        f"step {data.step}: {count(data.tensors, 'tensor')}, {size(data.tensor_bytes)} in "
        f"{count(len(data.files), 'file')} at {data.out} ({data.seconds:.1f} s)"
    )
    for name, first in data.tied.items():
        screen.line(f"left out {name}, which is tied to {first}")


def show_check(screen: Screen, check: Check) -> None:
    """One line of ``doctor``."""
    word, style = _STATUS[check.status]
    screen.line((f"{word:<5}", style), (f"{check.name:<12}", "bold"), " ".join(check.found.split()))
    for text in (*check.details, *([check.advice] if check.advice else [])):
        screen.line(f"{'':<17}{text}")


def show_error(screen: Screen, error: BaseException) -> int:
    """An error's one line; its exit code."""
    if isinstance(error, GpumoveError):
        screen.fail(str(error), code=error.code)
        return error.exit_code
    screen.fail(f"unexpected {type(error).__name__}: {error}; --debug shows where, please report it", code="error")
    return GpumoveError.exit_code
