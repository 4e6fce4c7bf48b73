"""How far a move has come, as its two logs say: nothing else is remembered. Pure: two views in, a phase out.

One direction at a time: from the ``source``'s store to the ``target``'s. To take a run back is a move the other way
round, or, as long as the target was not handed anything, the withdrawal of this one.
"""

from __future__ import annotations

from enum import Enum
from typing import NamedTuple

from gpumove.errors import ConfigError
from gpumove.format.manifest import Move
from gpumove.store.view import View

UNDER_WAY = ("begin", "request", "left")


class Phase(Enum):
    """What is reached; the value says what comes next."""

    FRESH = "nothing of a move is under way"
    COPYING = "the checkpoints are copied beside the training"
    ASKED = "the job was asked to leave"
    LEFT = "the job has left: what is lacking is copied"
    SEALED = "the source is sealed: the target is to be handed the run"
    RETURNING = "the move was withdrawn: the source is to be handed the run back"
    HANDED = "the target may be claimed: a job is to be started there"
    ARRIVED = "a job has trained at the target: the source is to be told"
    FORCED = "the run was handed over without a seal: the source is to be sealed"
    DONE = "the run has moved"


class Ends(NamedTuple):
    """The URLs of both logs, as their stores give them."""

    source: str
    target: str

    @property
    def swapped(self) -> Ends:
        """The other way round."""
        return Ends(self.target, self.source)


def phase(source: View, target: View, ends: Ends) -> Phase:
    """How far a move from ``source`` to ``target`` has come.

    Raises:
        ConfigError: what the logs say is no state of such a move; the message says what it is, and what to do.
    """
    if source.sealed:
        return _sealed(source, target, ends)
    if source.follows:
        raise ConfigError(
            f"{ends.source} is a replica of {source.follows}: the run lies there, and can be moved from there only",
            code="config.replica",
        )
    move = source.move
    if was_forced(target, ends) or was_handed(move, target):
        return Phase.FORCED
    if move is None or move.state not in UNDER_WAY:
        return Phase.FRESH
    if move.other != ends.target:
        raise ConfigError(
            f"a move of {ends.source} to {move.other} is under way: finish it with --resume, or withdraw it with "
            f"`gpumove move {ends.source} --to {move.other} --rollback`",
            code="config.moving",
        )
    if move.state == "begin" or source.epoch > move.epoch:
        return Phase.COPYING  # a job that was started again has been asked by nobody
    return Phase.ASKED if move.state == "request" else Phase.LEFT


def _sealed(source: View, target: View, ends: Ends) -> Phase:
    if source.sealed != ends.target:
        raise ConfigError(
            f"the run was moved from {ends.source} to {source.sealed}, not to {ends.target}", code="config.moved"
        )
    if target.follows == ends.source:
        return Phase.RETURNING if was_withdrawn(source, target) else Phase.SEALED
    if target.sealed:
        raise ConfigError(
            f"the run was moved from {ends.source} to {ends.target}, and from there to {target.sealed}",
            code="config.moved",
        )
    if not target.epoch:
        raise ConfigError(
            f"{ends.source} is sealed, as moved to {ends.target}, where no run is: check the URL and the storage "
            "options. If the target is lost, take the run back with --rollback --force",
            code="config.no_run",
        )
    told, handed = source.move is not None and source.move.is_over, target.move
    arrived = handed is None or handed.state != "handover" or any(c.epoch > handed.epoch for c in target.checkpoints)
    return Phase.HANDED if not arrived else Phase.DONE if told else Phase.ARRIVED


def was_withdrawn(source: View, target: View) -> bool:
    """Whether the target was told that what the source has sealed it for does not come."""
    there, here = target.move, source.move
    return there is not None and here is not None and there.state == "cancelled" and there.move == here.move


def was_forced(target: View, ends: Ends) -> bool:
    """Whether the target was handed the run while nobody could reach the source."""
    move = target.move
    if move is None or target.follows or target.sealed or move.other != ends.source:
        return False
    return (move.state == "handover" or move.is_over) and bool(move.facts.get("forced"))


def was_handed(move: Move | None, target: View) -> bool:
    """Whether the target was handed the run by this move: then the source was sealed, though that cannot be read."""
    there = target.move
    if move is None or move.state not in UNDER_WAY or there is None or target.follows or target.sealed:
        return False
    return there.move == move.move and (there.state == "handover" or there.is_over)


def goes_back(source: View, target: View, ends: Ends) -> bool:
    """Whether what is under way between these two goes from ``target`` to ``source``."""
    if source.follows == ends.target:
        return True
    move = target.move
    owned = not target.follows and not target.sealed
    return source.sealed == ends.target and owned and move is not None and _leads(move, ends.source)


def _leads(move: Move, to: str) -> bool:
    return move.state in UNDER_WAY and move.other == to


def lost_steps(source: View, target: View) -> list[int]:
    """Steps that were committed at the source after the last checkpoint that both have."""
    kept = {c.attempt for c in target.checkpoints}
    common = max((c.number for c in source.checkpoints if c.attempt in kept), default=0)
    return sorted({c.step for c in source.checkpoints if c.number > common})
