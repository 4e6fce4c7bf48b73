"""Fingerprints and their differences in words: for logs and for people. It looks nothing up."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from typing import Any

from gpumove.environment.compare import Difference, Facts, compare, of, say
from gpumove.environment.devices import kinds, say_kinds
from gpumove.format.manifest import Manifest
from gpumove.words import count, size

_log = logging.getLogger("gpumove")
_LEVELS = {"fatal": logging.WARNING, "numerics": logging.WARNING}
_MOST = 12
"""More differences than these say less."""


def lines(facts: Facts) -> list[tuple[str, str]]:
    """A fingerprint for people: name and text, one line each. What it does not say is left out."""
    known = [("gpumove", _pick(facts, "gpumove")), ("python", _pick(facts, "python"))]
    known.append(("devices", say_kinds(found) if (found := kinds(facts)) is not None else ""))
    known.append(("CUDA", _join(facts, "cuda", "driver", "cudnn", "nccl", "hip")))
    processor = facts.get("processor")
    if isinstance(processor, Mapping):
        memory = processor.get("memory_bytes")
        parts = [_pick(processor, "model"), _pick(processor, "capability")]
        parts += [f"{processor['cores']} cores"] if "cores" in processor else []
        parts += [size(memory)] if isinstance(memory, int) else []
        known.append(("processor", ", ".join(part for part in parts if part)))
    known.append(("system", ", ".join(p for p in (_pick(facts, n) for n in ("machine", "kernel", "libc")) if p)))
    known.append(("packages", _all(facts.get("packages"))))
    known.append(("threads", _join(facts, "threads", "interop_threads")))
    known.append(("flags", _all(facts.get("torch"))))
    known.append(("variables", _all(facts.get("variables"), "=")))
    known.append(("script", _all(facts.get("script"))))
    peak = facts.get("peak")
    if isinstance(peak, Mapping):
        rows = {name.removesuffix("_bytes"): size(n) for name, n in peak.items() if isinstance(n, int)}
        known.append(("peak", _all(rows)))
    known.append(("ranks", _join(facts, "world_size", "ranks_here")))
    return [(name, text) for name, text in known if text]


def _pick(facts: Facts, name: str) -> str:
    return say(facts[name]) if facts.get(name) is not None else ""


def _join(facts: Facts, first: str, *more: str) -> str:
    rest = ", ".join(f"{name} {say(facts[name])}" for name in more if facts.get(name) is not None)
    return ", ".join(part for part in (_pick(facts, first), rest) if part)


def _all(found: Any, sign: str = " ") -> str:
    if not isinstance(found, Mapping):
        return ""
    return ", ".join(f"{name}{sign}{say(value)}" for name, value in found.items() if value is not None)


def listed(found: Sequence[Difference]) -> str:
    """The differences that may matter, one line each; "" if there are none."""
    rows = [d.text for d in found if d.grade != "exact"]
    more = [f"and {count(len(rows) - _MOST, 'more difference')}"] if len(rows) > _MOST else []
    return "\n  ".join(rows[:_MOST] + more)


def tell(manifest: Manifest, here: Facts) -> None:
    """One message in the log about what is not as it was where a checkpoint was made: a warning if numbers may change.

    Args:
        manifest: of the checkpoint.
        here: this job's fingerprint, taken before its first step.
    """
    before, after = of(manifest), dict(here)
    for facts in (before, after):  # nothing has run yet that could have been compiled
        if isinstance(facts.get("torch"), Mapping):
            facts["torch"] = {name: value for name, value in facts["torch"].items() if name != "compiled"}
    found = compare(before, after)
    if text := listed(found):
        level = max(_LEVELS.get(d.grade, logging.INFO) for d in found)
        _log.log(level, "what is not as it was when step %d was saved:\n  %s", manifest.step, text)
