"""What ranks tell one another at the step that they leave after, and what they are told in turn."""

from __future__ import annotations

import msgspec

from gpumove.leave.deadline import Plan, Situation
from gpumove.meeting import Described
from gpumove.notices.notice import Outcome


class Standing(msgspec.Struct, frozen=True):
    """What the first one must know of a rank."""

    step: int
    situation: Situation
    serial: int
    replan: bool = False
    bound: bool = False
    """It has a loader that cannot be resumed by fewer ranks."""
    error: Described | None = None


class Decision(msgspec.Struct, frozen=True):
    """What the first one decided."""

    plan: Plan = Plan("nothing")
    serial: int = 0
    replan: bool = False
    newest: int = 0
    """The step that a resume would begin from as it is."""
    thrift: int = 0
    """What a move asks of the writers."""
    error: Described | None = None
    probing: list[str] = []
    """The probes to run with the save."""


class Result(msgspec.Struct, frozen=True):
    """What came of it."""

    durable: bool
    newest: int
    reason: str = ""


def outcome(step: int, result: Result) -> Outcome:
    """What is said of leaving after this step."""
    lost = 0 if result.durable else max(0, step - result.newest)
    return Outcome(result.durable, result.newest, lost, result.reason)
