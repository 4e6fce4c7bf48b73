"""The rounds before a cutover: what they have measured, what that leads to expect, and what comes next."""

from __future__ import annotations

import statistics
import time
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from gpumove.errors import ConfigError, IntegrityError, StoreError
from gpumove.format.manifest import Checkpoint
from gpumove.move.cutover import (
    Choice,
    Next,
    Rhythm,
    Standing,
    behind_s,
    decide,
    is_steady,
    lead_s,
    leave_s,
    ship_or_replay,
    step_s,
)
from gpumove.move.report import Wishes
from gpumove.move.rounds import Forecast, Round, Rounds, crowded_below

_COMMIT_S = 600.0
"""A commit is waited for at least so long."""
_WARM_S = 600.0
"""How long a job that waits at the target is given to read ahead what is there."""
_LOOKS, _RECENT = 7, 5
"""Looks from the last commit until the seal, listings of early packs among them; and how many are measured."""
_SINGLE_STEPS = 4
"""Commits of single steps after which it is known whether the link keeps up with them."""


@dataclass
class _Since:
    """Commits after an entry, counted as they are seen: retention takes old ones out of the view meanwhile."""

    number: int = -1
    """Of the newest entry that is not to be counted any more; below 0 for a count that has not begun."""
    counted: int = 0

    def count(self, commits: Sequence[Checkpoint]) -> int:
        """How many there were, with those that are new among ``commits``."""
        new = [commit.number for commit in commits if commit.number > self.number]
        self.number, self.counted = max([self.number, *new]), self.counted + len(new)
        return self.counted


class Precopy:
    """One move's, from its begin to its request; begun anew by a mover that takes over."""

    def __init__(self, rounds: Rounds, wishes: Wishes) -> None:
        self._rounds, self._max_blackout_s = rounds, wishes.max_blackout_s
        self._wants_steps, self._singles = wishes.every_step, _Since()
        self._heard, self._hear_s = False, min(wishes.hear_timeout_s, wishes.leave_timeout_s)
        self._since: float | None = None
        self._held = self._hoping = self._released = False
        self._expects = wishes.arrive_timeout_s > 0
        self._at_target: dict[str, float] | None = None
        self._steady = self._tries = 0
        self._current = False
        self._save_s: float | None = None
        self._sight_s = 0.0
        self._entry_s: float | None = None
        self._looks: deque[float] = deque(maxlen=_RECENT)
        self._waiting_since: tuple[int, float] = (0, 0.0)
        self._standing: Standing | None = None

    def hear(self, facts: Mapping[str, Any], *, entry_s: float | None) -> None:
        """What the begin entry has by now.

        Args:
            facts: the entry's; the job has put in what it has measured.
            entry_s: what an entry takes.
        """
        self._heard, self._held = "job" in facts, bool(facts.get("hold"))
        told = facts.get("job", {})
        self._save_s, self._sight_s = told.get("save_s", self._save_s), told.get("sight_s", self._sight_s)
        self._entry_s = entry_s
        if facts.get("every_step") and self._singles.number < 0:
            self._wants_steps = False
            self._singles = _Since(self._rounds.replica.source.view.head)

    def next_step(self) -> Next:
        """What to do now. ``steps`` and ``usual``: ask the job to save after every step, or no longer.

        Raises:
            IntegrityError: the newest checkpoint is damaged, and no job says that it is there.
        """
        began = time.monotonic()
        newest, view = self._rounds.replica.look(), self._rounds.replica.source.view
        self._looks.append(time.monotonic() - began)
        try:
            left = None if newest is None else self._rounds.left_bytes(newest)
        except IntegrityError:
            return self._unreadable(newest)
        done, delta_bytes = len(self._rounds.done), self._rounds.measured().delta_bytes or 0.0
        self._current |= left is None
        self._standing = Standing(self._forecast(left or 0), left, delta_bytes, done, self._steady, self._tries)
        following = decide(self._standing, self._max_blackout_s)
        more = Next("wait" if left is None else "round", "to see whether the link keeps up with single steps")
        self._hoping = following.is_end and self._hopes()
        if self._hoping:
            helps = left is not None and self._standing.forecast.converges
            return Next("round" if helps else "wait", "a job has not said yet what it will take")
        if following.is_end and self._wants_steps:  # until it stands in the log
            return Next("steps", "the copy is as current as it gets")
        if self._held and following.step == "wait":
            return Next("usual", "a later commit is waited for")
        if self._singles.number < 0:
            return following
        if self._singles.count(self._rounds.commits()) < _SINGLE_STEPS and not view.sealed:
            return more
        if not self._standing.forecast.converges and following.step != "cut":
            return Next("usual", self._standing.forecast.why)
        return following

    def _unreadable(self, newest: Checkpoint | None) -> Next:
        """The source's retention has passed by, or it is damaged: a job that is there commits another one."""
        now = time.monotonic()
        self._since, self._hoping = self._since or now, False
        if not self._heard and now >= self._since + self._hear_s:
            self._rounds.check_sound(newest)
        return Next("round", "the newest checkpoint cannot be read: a later one is waited for")

    def _hopes(self) -> bool:
        """Whether a job may still say that it is there and what it will take, or has begun to read ahead."""
        now = time.monotonic()
        self._since = self._since or now
        silent = not self._heard or (self._at_target is None and self._expects)
        if self._at_target is not None and "restore_s" not in self._at_target:
            return now < self._since + _WARM_S
        return silent and now < self._since + self._hear_s

    def crowded(self) -> bool:
        """Whether saves that are only due had better wait until the cutover.

        In the first round the rate is taken to be the most that it can be.
        """
        found, copier = self._rounds.measured(), self._rounds.replica.copier
        rate = found.rate_bytes_s if self._rounds.done else copier.rate.most_bytes_s
        if self._singles.number >= 0 or self._released or not rate or not found.every_s or not found.delta_bytes:
            return False
        return rate < crowded_below(found.delta_bytes, found.every_s)

    def usual(self) -> None:
        """The job saves as usual again, from now on."""
        self._singles, self._released = _Since(), True

    def count(self) -> None:
        """A round is over."""
        standing = self._standing
        self._steady += standing is not None and is_steady(standing)
        self._tries += self._current

    def wait(self, seconds: float) -> None:
        """Rest, until there is something to copy, or a job has said what it will take.

        Raises:
            StoreError: the job has committed nothing for too long.
        """
        head = self._rounds.replica.source.view.head
        if self._hoping or self._waiting_since[0] != head:
            self._waiting_since = head, time.monotonic()
        most_s = max(_COMMIT_S, 3 * (self._rounds.measured().every_s or 0.0))
        if time.monotonic() - self._waiting_since[1] > most_s:
            raise StoreError(
                f"the source has committed nothing for {most_s:g} s, and a later commit was waited for: "
                f"{self.expectation()}. The move stays begun: --resume it with a longer --max-blackout, or --rollback",
                code="store.no_answer",
            )
        time.sleep(seconds)

    # ---------------------------------------------------------------- what is known

    def _forecast(self, left_bytes: int) -> Forecast:
        target = self._rounds.replica.target.view
        self._at_target = target.move.facts.get("job") if target.follows and target.move is not None else None
        restore_s = (self._at_target or {}).get("restore_s")
        # The seal, the handover, and the job's claim.
        handover_s = None if self._entry_s is None else 3 * self._entry_s
        parts = {"leave": self._leave_s(), "handover": handover_s, "restore": restore_s}
        known = {name: seconds for name, seconds in parts.items() if seconds is not None}
        known["looks"] = _LOOKS * statistics.median(self._looks)
        if (late_s := self._behind_s(left_bytes)) > 0:
            known["behind"] = late_s
        return self._rounds.forecast(**known)

    def _leave_s(self) -> float | None:
        found = self._rounds.measured()
        if self._save_s is None or not found.rate_bytes_s:
            return self._save_s
        return leave_s(self._save_s, (found.delta_bytes or 0.0) / found.rate_bytes_s, self._packs)

    @property
    def _packs(self) -> int:
        """In how many pieces a save comes, as the newest commit has it."""
        return self._rounds.replica.needs.new_packs

    def _behind_s(self, left_bytes: int) -> float:
        """What older commits add to the blackout, were the job asked to leave now."""
        found, commits = self._rounds.measured(), self._rounds.commits()
        if not (rate := found.rate_bytes_s):
            return 0.0
        if (each := step_s(commits)) is None:  # the job may leave at once
            return left_bytes / rate
        save_s, every_s = self._save_s or 0.0, None if self._held else found.every_s
        commit_s = save_s + self._sight_s
        stepped = commits[-1].time - commit_s
        rhythm = Rhythm(
            time.time(), each, stepped, lead_s(save_s, self._packs), commit_s, every_s, self._entry_s or 0.0
        )
        return behind_s(
            rhythm, left_bytes, rate_bytes_s=rate, delta_bytes=found.delta_bytes or 0.0, rest_s=found.rest_s
        )

    def choose(self, now: float) -> Choice:
        """Whether the job is to save before it leaves."""
        found = self._rounds.measured()
        return ship_or_replay(
            self._rounds.commits(), now=now, rate_bytes_s=found.rate_bytes_s, delta_bytes=found.delta_bytes or 0.0,
            save_s=self._save_s or 0.0, packs=self._packs,
        )  # fmt: skip

    def expectation(self) -> str:
        """The blackout to expect, in words."""
        expected = self._standing.forecast if self._standing is not None else None
        if expected is None or expected.blackout_s is None:
            return "nothing is known of the blackout to expect"
        parts = ", ".join(f"{name.replace('_', ' ')} {seconds:.1f} s" for name, seconds in expected.parts.items())
        unsure = "" if self._heard else "; no job has said a word so far"
        also = "" if "restore" in expected.parts else " and the restore"  # no job waits at the target, or says so
        return f"a blackout of {expected.blackout_s:.1f} s{also} is to be expected ({parts}){unsure}"

    def too_long(self, why: str) -> ConfigError:
        """What to raise if no blackout is short enough."""
        return ConfigError(
            f"a blackout of at most {self._max_blackout_s:g} s cannot be had: {self.expectation()}; {why}. The job was "
            "not stopped; allow more, or give it a faster link or fewer bytes per commit",
            code="config.blackout",
        )

    def facts(self) -> dict[str, Any]:
        """The same for the log."""
        expected = self._standing.forecast if self._standing is not None else None
        if expected is None or expected.blackout_s is None:
            return {}
        parts = {name: round(seconds, 3) for name, seconds in expected.parts.items()}
        return {"forecast_s": round(expected.blackout_s, 3), "forecast_parts": parts}


def describe(done: Round) -> str:
    """A round in one line."""
    rate = f" ({done.nbytes / done.copy_s / 1e6:.1f} MB/s)" if done.copy_s > 0 else ""
    sent = f"{done.nbytes / 1e6:.1f} MB in {done.objects} objects, {done.seconds:.1f} s{rate}"
    return f"step {done.step}: {sent}" + (f"; {done.waiting} newer ones meanwhile" if done.waiting else "")
