"""Is it the same job: what compares both sides of a move says. None of it is made here, and unknown is never good."""

from __future__ import annotations

from collections.abc import Sequence

from gpumove.format.probes import Probe
from gpumove.parity.verdict import Certificate, Compared
from gpumove.report.compare import Comparison, Line
from gpumove.report.history import History
from gpumove.report.markup import Markup, tag
from gpumove.report.tables import UNKNOWN, moment, table
from gpumove.words import count, percent

_STYLES = {"bitwise": "good", "within tolerance": "good", "unknown": "unknown", "different": "bad"}
"""The worst last."""
_GRADES = {"fatal": "bad", "numerics": "bad", "unknown": "unknown"}


def verdict(found: Comparison, certificates: Sequence[Certificate]) -> tuple[str, str, str]:
    """In one line: name, value, and what it rests on. Of several certificates the worst counts."""
    name = "Is it the same job?"
    if _findings(found):
        return name, tag("span", "look", cls="bad"), "something was found after the move"
    mine = _of_this_run(found, certificates)
    if not mine:
        return name, UNKNOWN, "no certificate was given"
    worst = max(mine, key=lambda c: list(_STYLES).index(c.verdict))
    return name, _styled(worst.verdict), f"{count(len(worst.steps), 'step')} after step {worst.setting.step} compared"


def parity(found: Comparison, certificates: Sequence[Certificate]) -> list[Markup]:
    """Certificates, what was found after the move, probes, and what is not the same on both sides."""
    mine = _of_this_run(found, certificates)
    parts = [part for number, one in enumerate(mine, 1) for part in _certificate(number, one)]
    for other in certificates:
        if other not in mine:
            told = f", run {other.setting.run}, and tells nothing of this one."
            parts.append(tag("p", "A certificate is of another run, ", tag("code", other.setting.url), told))
    if not mine:
        told = ". gpumove certify makes a certificate, and --certificate shows it here."
        parts.append(tag("p", "Verdict: ", UNKNOWN, told))
    return [*parts, *_findings(found), *_probes(found), *_differences(found)]


def _of_this_run(found: Comparison, certificates: Sequence[Certificate]) -> list[Certificate]:
    runs = {history.run for history in found.histories}
    return [certificate for certificate in certificates if certificate.setting.run in runs]


def _styled(word: str) -> Markup:
    return tag("span", word, cls=_STYLES.get(word, "unknown"))


def _certificate(number: int, found: Certificate) -> list[Markup]:
    """One verdict with its evidence: every step that was compared."""
    said = found.setting
    words = f": {found.why} ({said.ranks}; a loss may differ by {percent(found.tolerance)})."
    parts = [tag("p", "Verdict of ", moment(found.time), ", ", _styled(found.verdict), words)]
    if found.steps:
        caption = f"Certificate {number}: steps after step {said.step} of {said.url}, trained again"
        heads = ("Step", "Loss recorded", "Loss now", "Difference", "What differs")
        parts.append(table(caption, heads, [_compared(step) for step in found.steps], right="rrrrl"))
    return parts


def _compared(found: Compared) -> tuple[str, ...]:
    relative = UNKNOWN if found.relative is None else percent(found.relative) if found.relative else "0"
    names = ", ".join(name.replace("_", " ") for name in found.differs)
    return str(found.step), _number(found.before), _number(found.after), relative, names or "nothing"


def _number(value: float | str | None) -> str:
    return UNKNOWN if value is None else value if isinstance(value, str) else repr(value)


def _findings(found: Comparison) -> list[Markup]:
    events = {(e.time, e.text): e for h in found.histories for e in h.events if e.kind == "parity"}
    if not events:
        return []
    rows = [(moment(e.time), e.text) for e in sorted(events.values(), key=lambda e: e.time)]
    return [table("Found after the move, by the job itself", ("Time", "What"), rows)]


def _probes(found: Comparison) -> list[Markup]:
    """What the newest checkpoint of each side has recorded of the model's outputs."""
    rows = []
    for line in found.lines:
        step, probes = _newest_probes(found.histories, line)
        rows += [(line.label, str(step), probe.name, _outputs(probe)) for probe in probes]
    if not rows:
        return []
    return [table("Outputs for fixed inputs (probes), of the newest checkpoint that has any",
                  ("Side", "Step", "Probe", "Outputs"), rows, right="lrll")]  # fmt: skip


def _newest_probes(histories: Sequence[History], line: Line) -> tuple[int, tuple[Probe, ...]]:
    for save in reversed(line.saves):
        for history in histories:
            if probes := history.probes.get(save.at.manifest):
                return save.at.step, probes
    return 0, ()


def _outputs(probe: Probe) -> str:
    return "; ".join(f"{o.name}: {o.dtype} {list(o.shape)}, {o.digest[:12]}" for o in probe.outputs)


def _differences(found: Comparison) -> list[Markup]:
    """Of the machines, graded."""
    if len(found.lines) < 2:
        return []
    if found.differences is None:
        return [tag("p", "What differs between the machines is unknown: one side has no fingerprint.", cls="unknown")]
    if not found.differences:
        return [tag("p", "The machines of both sides do not differ in anything that is recorded.")]
    rows = [
        (d.field, d.before or "-", d.after or "-", tag("span", d.grade, cls=_GRADES.get(d.grade, "grade")), d.why,
         d.what_to_do)
        for d in found.differences
    ]  # fmt: skip
    heads = ("Fact", *(line.label.capitalize() for line in found.lines), "Grade", "Why", "What to do")
    words = (
        "Exact: cannot change a bit. Speed: steps may take longer or shorter. Numerics: sums may be rounded otherwise. "
        "Fatal: will not run, or not fit."
    )
    return [table("What is not the same on both sides", heads, rows), tag("p", words)]
