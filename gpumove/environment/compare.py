"""Two fingerprints, graded: may the job's numbers change there, its speed, or will it not run at all? Pure.

What one side does not say is a difference too, of grade ``unknown``. Fingerprints of older versions have fewer facts.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from gpumove.environment.devices import compare_devices, kinds, same_devices
from gpumove.environment.difference import MISSING, Difference, Facts, at, part, whole
from gpumove.environment.fingerprint import CARRIERS
from gpumove.environment.grades import ROWS, VARIABLES, WORST_FIRST, Row
from gpumove.format.manifest import Manifest

__all__ = ["Difference", "Facts", "compare", "numeric", "of", "same_devices", "say"]
_MOST_TEXT = 120
_NEEDED = ("torch", "numpy")
"""Without them no job starts. Others may have been loaded only because they were there."""


def of(manifest: Manifest) -> dict[str, Any]:
    """A checkpoint's fingerprint, with what the manifest itself says."""
    return {"world_size": manifest.world_size, "state_bytes": manifest.state_bytes, **manifest.fingerprint}


def compare(before: Facts, after: Facts) -> list[Difference]:
    """What is not the same, worst first.

    Args:
        before: of the checkpoint: :func:`of` its manifest.
        after: of the job that goes on from it, with its ``world_size``; or of a machine where it is to, without.
    """
    found = [*compare_devices(before, after), *_python(before, after), *_packages(before, after)]
    found += _script(before, after)
    found += _variables(before, after)
    silent = list(_without_parts(before, after))
    for row in ROWS:
        if row.job and "world_size" not in after:
            continue
        if row.unless and all(at(facts, row.unless) is not None for facts in (before, after)):
            continue
        a, b = at(before, row.key, MISSING), at(after, row.key, MISSING)
        if a == b:
            continue
        if a is MISSING or b is MISSING:
            if (b if a is MISSING else a) is not None and row.grade == "numerics" and _counts(row, before, after):
                silent.append(("flags of torch" if row.key.startswith("torch.") else row.name, a is MISSING))
            continue
        found.append(_judged(row, say(a), say(b), before, after))
    found += _unknown(silent)
    return sorted(found, key=lambda d: WORST_FIRST.index(d.grade))


def numeric(before: Facts, after: Facts) -> list[Difference]:
    """What may have changed the numbers."""
    return [d for d in compare(before, after) if d.grade == "numerics"]


def say(value: Any) -> str:
    """A fact, in words."""
    if isinstance(value, bool):
        return "on" if value else "off"
    return "none" if value is None else str(value)[:_MOST_TEXT]


def _counts(row: Row, before: Facts, after: Facts) -> bool:
    """Whether what the row needs in order to matter may be there."""
    if "gpu" in row.of and [] in (kinds(before), kinds(after)):
        return False
    worlds = [whole(facts, "world_size") for facts in (before, after)]
    return "ranks" not in row.of or 0 in worlds or max(worlds) > 1


def _judged(row: Row, a: str, b: str, before: Facts, after: Facts) -> Difference:
    if _counts(row, before, after):
        return Difference(row.name, a, b, row.grade, row.why, row.what_to_do)
    what = "GPUs are used" if "gpu" in row.of and [] in (kinds(before), kinds(after)) else "several ranks train"
    return Difference(row.name, a, b, "exact", f"it counts only where {what}", "")


def _without_parts(before: Facts, after: Facts) -> Iterator[tuple[str, bool]]:
    """Parts of a fingerprint that only one side has: their name, and whether it is the checkpoint's that has none."""
    for key, name in (("packages", "packages"), ("variables", "environment variables"), ("script", "script")):
        there = [isinstance(facts.get(key), Mapping) for facts in (before, after)]
        if there[0] != there[1] and (key != "script" or "world_size" in after):
            yield name, not there[0]


def _unknown(silent: list[tuple[str, bool]]) -> Iterator[Difference]:
    """One line for each side, however much it does not say."""
    for first, side in ((True, "the checkpoint's side"), (False, "this side")):
        if names := list(dict.fromkeys(name for name, early in silent if early == first)):
            a, b = ("not recorded", "known") if first else ("known", "not known")
            why = f"{side} does not say: {', '.join(names)}"
            yield Difference("what cannot be compared", a, b, "unknown", why, "")


def _python(before: Facts, after: Facts) -> Iterator[Difference]:
    a, b = before.get("python"), after.get("python")
    if not isinstance(a, str) or not isinstance(b, str) or a == b:
        return
    if a.split(".")[:2] == b.split(".")[:2]:
        yield Difference("python", a, b, "exact", "releases of one minor version compute alike", "")
        return
    why = "of its random module only random() is promised to give the same; shuffle() and others are not"
    yield Difference("python", a, b, "numerics", why, "the same minor version, if python draws random numbers")


def _packages(before: Facts, after: Facts) -> Iterator[Difference]:
    one, other = part(before, "packages"), part(after, "packages")
    if not other:
        return
    for name in sorted(one, key=lambda name: (name != "torch", name)):
        a, b = one[name], other.get(name)
        if a == b or (b is None and "world_size" in after):  # a package may be loaded later, or not at all
            continue
        if name in CARRIERS:
            why = "it carries bytes, which are compared by their digests"
            yield Difference(name, a, b or "not installed", "exact", why, "")
        elif b is None:
            why, do = "the job had it loaded, and it is not installed here", f"install {name}=={a.partition('+')[0]}"
            yield Difference(name, a, "not installed", "fatal" if name in _NEEDED else "unknown", why, do)
        else:
            whys = {
                "torch": "torch promises equal results within one release and build only",
                "numpy": "streams of its random generators, and its sums, may change with versions",
            }
            why = whys.get(name, "it may have a part in what a step computes")
            yield Difference(name, a, b, "numerics", why, f"the same version: {a}")


def _script(before: Facts, after: Facts) -> Iterator[Difference]:
    one, other = part(before, "script"), part(after, "script")
    if not one or not other:
        return
    what = "look at what was changed; only the same program can continue bit for bit"
    if one.get("digest") != other.get("digest"):
        a, b = (f"{s.get('name', 'unnamed')} ({s.get('digest', 'no digest')[:8]})" for s in (one, other))
        yield Difference("script", a, b, "numerics", "the file of the program is not the same", what)
    a, b = one.get("commit", "")[:12], other.get("commit", "")[:12]
    if a and b and a != b:
        yield Difference("commit", a, b, "numerics", "the repository of the program is at another commit", what)


def _variables(before: Facts, after: Facts) -> Iterator[Difference]:
    if MISSING in (at(before, "variables", MISSING), at(after, "variables", MISSING)):
        return
    one, other = part(before, "variables"), part(after, "variables")
    for row in VARIABLES:
        a, b = one.get(row.name), other.get(row.name)
        if a != b:
            yield _judged(row, a or "not set", b or "not set", before, after)
