"""When to stop the job, and whether to send its last state or to train it anew: arithmetic over what was measured."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from gpumove.format.manifest import Checkpoint
from gpumove.move.rounds import Forecast

Step = Literal["round", "wait", "cut", "stop", "steps", "usual"]
_TRIES = 3
"""Commits that are waited for in the hope of a shorter blackout, once the target has had the newest one."""
_CATCH_UP = 30
"""Rounds that may take the target from one commit behind to none: they cost time only, and save a whole delta."""
_RECENT = 5
_HEARS_S = 1.0
"""From a request to when the job has read it: half the time between its looks at its log, on average."""


@dataclass(frozen=True)
class Standing:
    """What is known after a round."""

    forecast: Forecast
    """With what is lacking now as one of its parts."""
    left_bytes: int | None
    """What the newest checkpoint needs and the target lacks; None if the target has that checkpoint."""
    delta_bytes: float
    """What a commit brings."""
    rounds: int
    steady: int = 0
    """Rounds since no more than one commit was lacking."""
    tries: int = 0
    """Rounds since nothing was."""


@dataclass(frozen=True)
class Next:
    """What to do, and why."""

    step: Step
    why: str

    @property
    def is_end(self) -> bool:
        """Whether the copying beside the training is over."""
        return self.step in ("cut", "stop")


def is_steady(now: Standing) -> bool:
    """Whether no more than one commit is lacking."""
    return now.left_bytes is None or (now.rounds > 0 and now.left_bytes <= now.delta_bytes)


def decide(now: Standing, max_blackout_s: float | None) -> Next:
    """Another round, a wait for the next commit, the cutover, or the end of the attempt.

    Args:
        now: the move's standing.
        max_blackout_s: what the user allows.
    """
    expected, limit = now.forecast.blackout_s, max_blackout_s
    if not now.rounds and now.left_bytes is not None:
        return Next("round", "nothing is there yet")
    if limit is not None and expected is not None and expected <= limit:
        return Next("cut", f"a blackout of {expected:.1f} s is expected, and {limit:g} s are allowed")
    if not is_steady(now):
        if now.forecast.converges:
            return Next("round", now.forecast.why)
        if limit is None:
            return Next("cut", now.forecast.why)
        return Next("stop", now.forecast.why)
    # What is lacking and goes over before the job has left costs nothing: another round would only send more.
    helps = limit is not None or "behind" in now.forecast.parts
    if helps and now.left_bytes is not None and now.forecast.converges and now.steady < _CATCH_UP:
        return Next("round", f"catching up; {now.forecast.why}")
    if limit is None:
        return Next("cut", f"the copy is as current as it gets; {now.forecast.why}")
    if now.left_bytes is None and now.tries < _TRIES:
        return Next("wait", "a later commit may be smaller")
    return Next("stop", now.forecast.why)


@dataclass(frozen=True)
class Choice:
    """Whether the job saves before it leaves, and why."""

    save: bool
    why: str
    send_s: float | None = None
    replay_s: float | None = None


def step_s(commits: Sequence[Checkpoint]) -> float | None:
    """Seconds per step, as the last commits of one start of the job tell."""
    last = [c for c in commits if commits and c.epoch == commits[-1].epoch][-_RECENT:]
    steps, seconds = (last[-1].step - last[0].step, last[-1].time - last[0].time) if last else (0, 0.0)
    return seconds / steps if steps > 0 and seconds > 0 else None  # a clock may have been set back


@dataclass(frozen=True)
class Rhythm:
    """How the job goes on while it is asked to leave. Times are in seconds since the epoch."""

    now: float
    step_s: float
    """Of training."""
    stepped: float
    """When the step of the newest commit was done."""
    lead_s: float
    """From the last step until bytes of its save can be sent."""
    commit_s: float
    """From a step before it to its commit, which may wait to see the training thread."""
    every_s: float | None
    """Between two steps that are saved; None if none is before the last one."""
    entry_s: float
    """What the request takes."""

    @property
    def stop(self) -> float:
        """When the job's last step is done: it is the one under way as the job reads the request."""
        heard = max(self.now, self.stepped) + self.entry_s + _HEARS_S
        return self.stepped + (math.floor((heard - self.stepped) / self.step_s) + 1) * self.step_s

    def commits(self) -> list[float]:
        """When those come that are still to come before the last one."""
        if self.every_s is None:
            return []
        apart = max(1, round(self.every_s / self.step_s)) * self.step_s  # both were measured; commits come with steps
        most = math.ceil((self.stop - self.stepped) / apart - 1e-6) - 1
        # One that should have come long ago does not come: it was skipped, or not wanted.
        least = math.ceil((self.now - self.stepped - 2 * self.commit_s) / apart)
        return [self.stepped + number * apart + self.commit_s for number in range(max(1, least), most + 1)]


def lead_s(save_s: float, packs: int) -> float:
    """From the last step until its save's first pack is there: packs come one after the other."""
    return save_s / max(1, packs)


def leave_s(save_s: float, send_s: float, packs: int) -> float:
    """What leaving adds to the time that the last bytes take: they are sent while the save is still being written.

    Args:
        save_s: from the last step to its commit.
        send_s: what its bytes take on the link.
        packs: in how many pieces they come.
    """
    arrives = max(lead_s(save_s, packs) + send_s, save_s + send_s / max(1, packs))
    return arrives - send_s


def behind_s(rhythm: Rhythm, left_bytes: float, *, rate_bytes_s: float, delta_bytes: float, rest_s: float) -> float:
    """What the link has still to do of older commits once the last one is there: the blackout is longer by that.

    The link goes on while the job does its last step and saves it, so what is lacking now goes over then, or most of
    it. But steps that end before the last one may be saved too, and are to be sent as well.

    Args:
        rhythm: of the job.
        left_bytes: what the newest commit needs and the target lacks.
        rate_bytes_s: of the link.
        delta_bytes: what a commit brings.
        rest_s: what a round takes besides its bytes.
    """
    free = rhythm.now + rhythm.entry_s + (left_bytes / rate_bytes_s + rest_s if left_bytes else 0.0)
    for committed in rhythm.commits():
        free = max(free, committed) + delta_bytes / rate_bytes_s + rest_s
    return max(0.0, free - rhythm.stop - rhythm.lead_s)


def ship_or_replay(
    commits: Sequence[Checkpoint],
    *,
    now: float,
    rate_bytes_s: float | None,
    delta_bytes: float,
    save_s: float,
    packs: int = 1,
) -> Choice:
    """Send what the job has trained since the target's newest checkpoint, or train it once more there.

    Args:
        commits: of the source, oldest first; the last one is, or will be, the target's.
        now: seconds since the epoch.
        rate_bytes_s: of the link.
        delta_bytes: what the last save would bring.
        save_s: what a save takes, from its step to its commit.
        packs: in how many pieces its bytes come.
    """
    each = step_s(commits)
    if each is None or not rate_bytes_s:
        return Choice(True, "the last steps are sent, since nothing was measured that says otherwise")
    # The newest commit came some time after its step; what was trained meanwhile is lost too, and one step until then.
    steps = (now - commits[-1].time + save_s) / each + 1
    link_s = delta_bytes / rate_bytes_s
    send_s, replay_s = leave_s(save_s, link_s, packs) + link_s, steps * each
    facts = f"to send them takes {send_s:.1f} s, to train some {steps:.0f} steps once more {replay_s:.1f} s"
    if replay_s < send_s:
        return Choice(False, f"the last steps are not sent: {facts}", send_s, replay_s)
    return Choice(True, f"the last steps are sent: {facts}", send_s, replay_s)
