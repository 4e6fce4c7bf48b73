"""One fact that is not the same on two machines, and what that may do to the job."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from gpumove.environment.grades import Grade

Facts = Mapping[str, Any]
"""A fingerprint, with ``world_size`` and ``state_bytes`` of its checkpoint where there is one."""


MISSING = object()
"""Not known, where None says that there is none."""


def at(facts: Facts, key: str, default: Any = None) -> Any:
    """A fact, by its path such as ``processor.model``. Whoever wrote the manifest, nothing else is relied on."""
    found: Any = facts
    for name in key.split("."):
        if not isinstance(found, Mapping) or name not in found:
            return default
        found = found[name]
    return found


def part(facts: Facts, key: str) -> dict[str, str]:
    """Facts that are texts, by name."""
    found = at(facts, key)
    return {k: v for k, v in found.items() if isinstance(v, str)} if isinstance(found, Mapping) else {}


def whole(facts: Facts, key: str) -> int:
    """A fact that is a number; 0 if it is not known."""
    found = at(facts, key)
    return found if type(found) is int and found > 0 else 0


@dataclass(frozen=True)
class Difference:
    """``grade``: ``exact`` (cannot change a bit), ``speed``, ``numerics`` (sums may be rounded otherwise), ``fatal``
    (will not run, or not fit) or ``unknown``."""

    field: str
    before: str
    after: str
    grade: Grade
    why: str
    what_to_do: str

    @property
    def text(self) -> str:
        """In one line."""
        words = f"{self.grade}: {self.field}: {self.before or '-'} -> {self.after or '-'}: {self.why}"
        return f"{words} [{self.what_to_do}]" if self.what_to_do else words
