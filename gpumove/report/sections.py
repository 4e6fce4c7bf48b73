"""What each section of the page says: a chart, the same in words, and a table with the figures."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from itertools import groupby, pairwise
from statistics import median
from typing import Any

from gpumove.format.manifest import Move, Took
from gpumove.parity.watch import in_text
from gpumove.parity.watch import told as watched
from gpumove.report.bill import Bill
from gpumove.report.charts import Curve, bars, chart, curves, lanes
from gpumove.report.compare import Comparison, Line
from gpumove.report.cost import cost_so_far
from gpumove.report.history import Event, Saved
from gpumove.report.markup import Markup, tag
from gpumove.report.tables import UNKNOWN, moment, table, tiles
from gpumove.words import count, lasting, size, when

_LANES = ("save", "start", "restore", "notice", "move", "health", "parity", "note")
_MOST_ROWS, _MOST_BARS, _MOST_GAPS = 500, 40, 5
_EXPLAINED = (
    "Sent is what a checkpoint added to the store; state is what it stands for. Stall is the training time that rank 0 "
    "lost to it. After the time under Ready all of it was in the store; the commit followed. "
)
_UNITS = ((172800.0, 86400.0, "days"), (7200.0, 3600.0, "hours"), (120.0, 60.0, "minutes"), (0.0, 1.0, "seconds"))


def summary(found: Comparison, bill: Bill, verdict: tuple[str, str, str]) -> Markup:
    """The run at a glance."""
    saves = [save for line in found.lines for save in line.saves]
    newest = max(saves, key=lambda s: (s.at.time, s.at.number), default=None)
    sent = sum(save.at.new_bytes for save in saves)
    state = sum(save.at.state_bytes for save in saves)
    looked = [save.sound for save in saves]
    blackout = _blackout(found)
    return tiles([
        ("Newest checkpoint", f"step {newest.at.step}" if newest else "none", moment(newest.at.time) if newest else ""),
        ("Checkpoints", str(len(saves)), _soundness(looked)),
        ("Sent to the store", size(sent) if saves else UNKNOWN,
         f"{sent / state:.1%} of the {size(state)} that they stand for" if state else ""),
        ("Last loss", _last_loss(found), ""),
        ("Blackout of the move", UNKNOWN if blackout is None else lasting(blackout),
         "" if found.move else "no move"),
        _stall(saves),
        cost_so_far(bill),
        verdict,
    ])  # fmt: skip


def _soundness(looked: Sequence[bool | None]) -> str:
    bad = looked.count(False)
    if bad:
        return f"{bad} damaged"
    return "not all were looked at" if None in looked else "all sound, as far as looked" if looked else ""


def _stall(saves: Sequence[Saved]) -> tuple[str, str, str]:
    known = [s.took.stall_s for s in saves if s.took is not None and s.took.stall_s is not None]
    name = "Training stood still for a save"
    if not known:
        return name, UNKNOWN, ""
    return name, lasting(median(known)), f"median of {len(known)}; {lasting(max(known))} at most"


def _last_loss(found: Comparison) -> str:
    told = [(p.step, p.loss) for line in found.lines for p in line.points if p.loss is not None]
    return UNKNOWN if not told else f"{max(told)[1]:.6g} (step {max(told)[0]})"


def _blackout(found: Comparison) -> float | None:
    """As the job at the new place has measured it: from the last step there to its own first."""
    for history in reversed(found.histories):
        for move in reversed(history.moves):
            if isinstance(told := move.facts.get("blackout_s"), (int, float)):
                return float(told)
    return None


def timeline(found: Comparison) -> list[Markup]:
    """What happened when."""
    events = _events(found)
    if not events:
        return [tag("p", "Nothing has happened that the store knows of.", cls="unknown")]
    began, ended = events[0].time, events[-1].time
    _, unit, name = next(u for u in _UNITS if ended - began >= u[0])
    kinds = [kind for kind in _LANES if any(e.kind == kind for e in events)]
    rows = [(kind, [(e.time - began) / unit for e in events if e.kind == kind]) for kind in kinds]
    told = ", ".join(count(len(times), kind) for kind, times in rows)
    title = f"Events from {when(began)} to {when(ended)}: {told}."
    shown = events[-_MOST_ROWS:]
    cut = "" if len(shown) == len(events) else f"; the {_MOST_ROWS} newest of {len(events)}"
    return [
        chart("timeline", "Timeline", title, partial(lanes, rows=rows, x=f"{name} since {when(began)}")),
        table(f"Events{cut}", ("Time", "Kind", "What"), [(moment(e.time), e.kind, e.text) for e in shown]),
    ]


def _events(found: Comparison) -> list[Event]:
    """Of both ends, in order; a checkpoint that was copied is told once."""
    seen = {(e.time, e.kind, e.text): e for history in found.histories for e in history.events}
    return sorted(seen.values(), key=lambda e: e.time)


def losses(found: Comparison) -> list[Markup]:
    """The loss of both sides on one axis."""
    lines = [line for line in found.lines if any(p.loss is not None for p in line.points)]
    if not lines:
        return [tag("p", "Unknown: no loss was recorded. Give it to ckpt.step(step, loss=...).", cls="unknown")]
    told = "; ".join(_say_loss(line) for line in lines)
    if found.cut is not None:
        told += f". The move is marked after step {found.cut}"
    drawn = [Curve(line.label, [p.step for p in line.points], [p.loss for p in line.points]) for line in lines]
    rows = [(line.label, *row) for line in lines for row in _stretches(line)]
    return [
        chart("loss", "Loss by step", f"{told}.", partial(curves, lines=drawn, x="step", y="loss", cut=found.cut)),
        table(
            "Loss in tenths of what each side has trained",
            ("Side", "Steps", "Recorded", "Lowest", "Median", "Highest"), rows, right="llrrrr",
        ),
    ]  # fmt: skip


def _say_loss(line: Line) -> str:
    known = [(p.step, p.loss) for p in line.points if p.loss is not None]
    odd = sum(p.loss is None for p in line.points)
    more = f", and {count(odd, 'step')} without a finite loss" if odd else ""
    return f"{line.label}: {known[0][1]:.4g} at step {known[0][0]}, {known[-1][1]:.4g} at step {known[-1][0]}{more}"


def _stretches(line: Line) -> list[tuple[str, ...]]:
    each = max(1, -(-len(line.points) // 10))
    rows = []
    for at in range(0, len(line.points), each):
        part = line.points[at : at + each]
        known = [p.loss for p in part if p.loss is not None]
        figures = [f"{f(known):.6g}" for f in (min, median, max)] if known else [UNKNOWN] * 3
        rows.append((f"{part[0].step} to {part[-1].step}", str(len(known)), *figures))
    return rows


def paces(found: Comparison) -> list[Markup]:
    """Step times of both sides."""
    lines = [line for line in found.lines if line.paces]
    if not lines:
        return [tag("p", "Unknown: it takes recorded step times, or two commits of one job.", cls="unknown")]
    drawn = [Curve(line.label, [p.step for p in line.paces], [p.seconds for p in line.paces]) for line in lines]
    how = ["each step was timed" if line.measured else "means between commits" for line in lines]
    usual = [line.usual_s or 0.0 for line in lines]
    told = "; ".join(f"{line.label}: {lasting(s)} per step ({h})" for line, s, h in zip(lines, usual, how))
    if len(lines) == 2:
        told += (
            f". After the move a step takes {usual[1] / usual[0]:.2f} times what it took before" if found.move else ""
        )
    rows = [
        (
            line.label,
            lasting(s),
            lasting(min(p.seconds for p in line.paces)),
            lasting(max(p.seconds for p in line.paces)),
            h,
        )
        for line, s, h in zip(lines, usual, how)
    ]
    draw = partial(curves, lines=drawn, x="step", y="seconds per step", cut=found.cut)
    return [
        chart("pace", "Step time", f"{told}.", draw),
        table("Step time", ("Side", "Median", "Shortest", "Longest", "From"), rows, right="lrrrl"),
    ]


def checkpoints(found: Comparison) -> list[Markup]:
    """Every checkpoint, what it cost, and whether it can be read."""
    saves = [(line.label, save) for line in found.lines for save in line.saves]
    if not saves:
        return [tag("p", "None has been committed yet.", cls="unknown")]
    drawn = [save for _, save in saves][-_MOST_BARS:]
    sent, state = sum(s.at.new_bytes for _, s in saves), sum(s.at.state_bytes for _, s in saves)
    of = "" if len(drawn) == len(saves) else f", the {_MOST_BARS} newest of {len(saves)} drawn"
    share = f", {sent / state:.1%} of {size(state)} of state" if state else ""
    told = f"{count(len(saves), 'checkpoint')}{of}: {size(sent)} were sent{share}."
    unit, name = next(u for u in ((1 << 30, "GiB"), (1 << 20, "MiB"), (1 << 10, "KiB"), (1, "bytes"))
                      if max(s.at.state_bytes for s in drawn) >= u[0] or u[0] == 1)  # fmt: skip
    heights = [("sent", [s.at.new_bytes / unit for s in drawn]), ("state", [s.at.state_bytes / unit for s in drawn])]
    draw = partial(bars, groups=heights, names=[str(s.at.step) for s in drawn], x="checkpoint of step", y=name)
    caption = "Checkpoints" if len(saves) <= _MOST_ROWS else f"The {_MOST_ROWS} newest checkpoints of {len(saves)}"
    heads = ("Step", "Side", "Time", "Ranks", "State", "Sent", "Ratio", "Stall", "Ready", "Verification")
    return [
        chart("checkpoints-bytes", "Bytes of each checkpoint", told, draw),
        table(caption, heads, [_checkpoint(label, s) for label, s in saves[-_MOST_ROWS:]], right="rllrrrrrrl"),
        tag("p", _EXPLAINED, _say_sound(found)),
    ]


def _checkpoint(label: str, save: Saved) -> tuple[str, ...]:
    style = {True: "good", False: "bad", None: "unknown"}[save.sound]
    at, took = save.at, save.took or Took()
    words = ("sound" if save.sound else save.condition) + (", pinned" if at.pinned else "")
    return (
        str(at.step), label, moment(at.time), str(at.world_size), size(at.state_bytes), size(at.new_bytes),
        UNKNOWN if save.ratio is None else f"{save.ratio:.1%}", _lasting(took.stall_s), _lasting(took.ready_s),
        tag("span", words, cls=style),
    )  # fmt: skip


def _lasting(seconds: float | None) -> str:
    return UNKNOWN if seconds is None else lasting(seconds)


def _say_sound(found: Comparison) -> str:
    told = {save.condition for line in found.lines for save in line.saves if save.sound}
    return f"Sound means that {' or '.join(sorted(told))}." if told else ""


def moves(found: Comparison) -> list[Markup]:
    """Each move, step by step, with what was measured."""
    told = {(m.time, m.move, m.state): m for h in found.histories for m in h.moves}
    if not told:
        return [tag("p", "The run was not moved, as far as its log goes back.")]
    ordered = sorted(told.values(), key=lambda m: m.time)
    starts = {name: min(m.time for m in ordered if m.move == name) for name in {m.move for m in ordered}}
    parts = []
    for name, entries in groupby(sorted(ordered, key=lambda m: (starts[m.move], m.move, m.time)), key=lambda m: m.move):
        rows = [(m.state, f"{m.time - starts[name]:.1f} s", m.text, _measured(m)) for m in entries]
        caption = f"Move {name}, begun {when(starts[name])}"
        parts.append(table(caption, ("State", "After", "What", "Measured"), rows, right="lrll"))
    return parts


def _measured(move: Move) -> str:
    """Its figures. What the job's steps are compared with is for programs; how they compare is said in words."""
    facts = {name: value for name, value in move.facts.items() if name not in ("baseline", "watch")}
    if isinstance(parts := facts.get("forecast_parts"), dict):
        facts["forecast_parts"] = {f"{name}_s": value for name, value in parts.items()}
    watch = watched(move)
    compared = "" if watch is None else in_text(watch.standing, watch.unjudged)
    return "; ".join(words for words in (_facts(facts), compared) if words)


def _facts(facts: dict[str, Any]) -> str:
    return ", ".join(f"{name}: {said}" for fact, value in facts.items() if value is not None
                     for name, said in [_fact(fact, value)])  # fmt: skip


def _fact(name: str, value: Any) -> tuple[str, str]:
    """A figure of a move by the unit in its name."""
    words = name.replace("_", " ")
    if isinstance(value, dict):
        return words, f"({_facts(value)})"
    if isinstance(value, list):
        return words, str(len(value))
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return words, str(value)
    if name == "at" or name.endswith("_at"):
        return words, when(value)
    if name.endswith("_s"):
        return words[:-2], lasting(value)
    if name.endswith("_bytes"):
        return words[:-6], size(value)
    return words, f"{value:g}"


def unknowns(found: Comparison) -> list[Markup]:
    """What could not be told, so that nothing on the page looks more certain than it is."""
    said = [tag("li", tag("code", h.url), f": {text}.") for h in found.histories for text in h.unknown]
    if found.move is not None and found.cut is None:
        said.append(tag("li", "After which step the run was moved: give the URL that it came from too."))
    said += [tag("li", f"The losses of {text}: no manifest that is here has them.") for text in _gaps(found)]
    if silent := [save for line in found.lines for save in line.saves if save.took is None]:
        said.append(tag("li", f"What {count(len(silent), 'save')} took: their manifests do not say."))
    if not all(history.deep for history in found.histories):
        said.append(tag("li", "Whether every byte of the packs is undamaged: --deep reads them."))
    return [tag("ul", *said) if said else tag("p", "Nothing of what this page is made of was missing.")]


def _gaps(found: Comparison) -> list[str]:
    """Stretches of steps that no trace tells of, between the first step of all and the last that is told of."""
    steps = sorted({p.step for line in found.lines for p in line.points})
    gaps = [(a + 1, b - 1) for a, b in pairwise([0, *steps]) if b > a + 1]
    said = [f"step {a}" if a == b else f"steps {a} to {b}" for a, b in gaps[:_MOST_GAPS]]
    return [*said, f"{len(gaps) - _MOST_GAPS} more stretches"] if len(gaps) > _MOST_GAPS else said
