"""What a user asks of a move, what is told meanwhile, and what came of it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from gpumove.move.rounds import Round


@dataclass(frozen=True, kw_only=True)
class Wishes:
    """What the user asks for."""

    max_blackout_s: float | None = None
    leave_timeout_s: float = 600.0
    """How long the job may take to leave."""
    arrive_timeout_s: float = 600.0
    """How long to wait for the target's job; 0 not to."""
    hear_timeout_s: float = 5.0
    """How long to wait for a word of the job, before it is asked to leave."""
    force: bool = False
    """Go on without the answer of a job that gives none."""
    every_step: bool = False
    """Ask the job to save after every step before the cutover."""
    slow_s: float = 0.0
    """And to take so much longer over each."""
    watch: str = ""
    """Whether to stay until the job at the target has compared itself with what it was, and what to do if it is not
    the same: ``warn``, or ``rollback``."""
    step_ratio: float | None = None
    """What a step takes there, over what it takes here."""
    gone_after_s: float | None = None
    """Of a watch: how long the job there may be silent; by default what its steps' time suggests."""
    discard: bool = False
    """Of a way back: without what was trained since the run was handed over."""


@dataclass(frozen=True)
class Event:
    """Something has happened, for people."""

    at: float
    state: str
    text: str
    facts: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Report:
    """What came of it."""

    move: str
    source: str
    target: str
    phase: str
    text: str
    step: int | None
    rounds: tuple[Round, ...]
    sent_bytes: int
    forecast_s: float | None
    blackout_s: float | None
    events: tuple[Event, ...]
    findings: tuple[str, ...] = ()
    """What the watch has found that was not so before the move."""
