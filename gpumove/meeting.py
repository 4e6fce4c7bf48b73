"""What the ranks tell rank 0 when they meet, and what it decides. Who carries the messages is not known here."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence

import msgspec

from gpumove.cadence import Cadence, Past
from gpumove.config import Config
from gpumove.errors import ConfigError, FencedError, GpumoveError, describe
from gpumove.format.manifest import Checkpoint
from gpumove.handle import SaveHandle
from gpumove.health import Vitals
from gpumove.parity.watching import Watching
from gpumove.steplog import Asked, StepLog

_log = logging.getLogger("gpumove")
_SOON_S, _SELDOM_S = 2.0, 30.0
"""Most between two meetings, while a move is under way and otherwise: what it asks for waits for no save to be due."""

Described = tuple[str, str, str]
"""An error as ``errors.describe`` gives it."""


class Told(msgspec.Struct, frozen=True, array_like=True):
    """A notice as ranks tell it one another; ``until`` is its deadline, or what was made of having none."""

    until: float
    source: str
    deadline: float | None
    detail: str


class Report(msgspec.Struct):
    """What rank 0 must know of a rank before it decides on a save."""

    step: int = 0
    replan: bool = False
    error: Described | None = None
    notice: Told | None = None
    """A reason to leave, where there is no quicker way to tell it."""
    vitals: Vitals = Vitals()
    probes: list[str] = []
    """Those that the rank has."""


class Verdict(msgspec.Struct):
    """What rank 0 decided."""

    save: bool = False
    replan: bool = False
    next_meeting: int = 0
    serial: int = 0
    told: bool = False
    """The failure of the last save is dealt with: nobody raises it again."""
    error: Described | None = None
    notice: Told | None = None
    """The job leaves after this step."""
    thrift: int = 0
    """What a move asks of the writers, as ``Asked`` has it."""
    probing: list[str] = []
    """The probes to run with the save."""


class Claimed(msgspec.Struct):
    """What rank 0 found in the log."""

    run: str = ""
    epoch: int = 0
    candidates: list[Checkpoint] = []
    past: Past = Past()
    error: Described | None = None


def first_error(reports: Sequence[Report]) -> Described | None:
    """The error of the lowest rank that has one, with the rank's name; or that the ranks are not at one step."""
    for rank, report in enumerate(reports):
        if report.error is not None:
            kind, code, text = report.error
            return kind, code, f"rank {rank}: {text}"
    for rank, report in enumerate(reports):
        if report.step != reports[0].step:
            text = f"rank {rank} is at step {report.step} and rank 0 at step {reports[0].step}"
            return describe(ConfigError(f"{text}: call step() and save() with the same numbers on all ranks"))
    return None


class Chair:
    """Rank 0's side of the meetings: whether to save, whether to plan anew, and when to meet again."""

    def __init__(
        self,
        config: Config,
        now: float,
        hear: Callable[[Sequence[Vitals], int], None],
        asked: Asked | None = None,
        watching: Watching | None = None,
    ) -> None:
        """Nothing was decided yet.

        Args:
            config: the run's.
            now: seconds of a monotonic clock.
            hear: is told how all ranks are doing.
            asked: what a move asks for.
            watching: the comparison after a move, which may object to going on.
        """
        self._config, self._hear = config, hear
        self.cadence = Cadence(config, now)
        self._asked, self._watching = asked or Asked(), watching
        self._step_log = StepLog(config, self._asked)
        self.choose: Callable[[Sequence[Sequence[str]], int, bool, int], list[str]] = lambda *args: []
        """Which probes to run with a save: from what each rank has, its serial, whether it was asked, the thrift."""
        self._counted: SaveHandle | None = None
        self.serial = 0
        self.skipped = 0
        self.failed = 0
        self._warned = False

    def decide(
        self, step: int, messages: Sequence[bytes], last: SaveHandle | None, *, force: bool, now: float
    ) -> Verdict:
        """Answer the ranks' reports. It never raises: the other ranks wait for the answer.

        Args:
            step: where the ranks are.
            messages: their encoded reports.
            last: the newest save.
            force: a save was asked for.
            now: seconds of a monotonic clock.
        """
        try:
            reports = [msgspec.msgpack.decode(m, type=Report) for m in messages]
            problem = first_error(reports) or (self._watching.objection if self._watching is not None else None)
            if problem is None:
                problem, told, again = self._look_back(last)
                if problem is None:
                    return self._answer(step, reports, last, wanted=force or again, told=told, now=now)
                return Verdict(error=problem, told=told, next_meeting=step + 1)
            return Verdict(error=problem, next_meeting=step + 1)
        except Exception as error:  # noqa: BLE001 - told to all ranks
            return Verdict(error=describe(error), next_meeting=step + 1)

    def _look_back(self, last: SaveHandle | None) -> tuple[Described | None, bool, bool]:
        """What became of the last save: (an error to raise, whether it is dealt with, whether to save again)."""
        failure = last.unseen_error() if last is not None and last.finished else None
        if last is None or failure is None:
            return None, False, False
        if isinstance(failure, GpumoveError) and failure.code == "config.torn":
            self.failed += 1
            _log.warning("the save of step %d is discarded and taken again: %s", last.step, failure)
            return None, True, True
        if self._config.on_save_error == "warn" and not isinstance(failure, FencedError):
            self.failed += 1
            _log.error("the save of step %d failed: %s", last.step, failure)
            return None, True, False
        return describe(failure), True, False

    def _answer(
        self, step: int, reports: Sequence[Report], last: SaveHandle | None, *, wanted: bool, told: bool, now: float
    ) -> Verdict:
        notices = [r.notice for r in reports if r.notice is not None]
        nearest = min(notices, key=lambda n: n.until, default=None)
        self._hear([r.vitals for r in reports], step)
        verdict = Verdict(replan=any(r.replan for r in reports), told=told, notice=nearest, thrift=self._asked.thrift)
        self._count(step, last, now)
        single = self._step_log.wants() and (last is None or last.finished)
        due = self.cadence.due(step, now)
        if due or wanted or single:
            self.cadence.took(step, now)
            if self._asked.hold and not wanted:
                _log.info("no save at step %d, since a move copies and asks for none meanwhile", step)
            elif last is not None and not last.finished:
                self._skip(step, last)
            else:
                self.serial += 1
                verdict.save, verdict.serial, self._warned = True, self.serial, False
                verdict.probing = self.choose([r.probes for r in reports], self.serial, wanted, verdict.thrift)
        most_s = _SOON_S if self._asked.under_way or self._presses() else _SELDOM_S
        verdict.next_meeting = self.cadence.next_meeting(step, now, most_s=most_s)
        if self._step_log.watching:
            verdict.next_meeting = step + 1
        return verdict

    def _presses(self) -> bool:
        return self._watching is not None and self._watching.presses

    def _count(self, step: int, last: SaveHandle | None, now: float) -> None:
        """Learn from a save that was committed since the last meeting."""
        if last is None or last is self._counted or not last.committed or not last.stats.state_bytes:
            return
        self._counted = last
        stats = last.stats
        if self._config.every_s == "auto":
            took_s = stats.committed_s or 0.0
            self.cadence.interval.measured(stall_s=stats.stall_s, took_s=took_s, grace_s=self._config.grace_s, now=now)
        ratio = stats.new_bytes / stats.state_bytes
        self._step_log.came_out(last.step, ratio, in_time=step <= last.step + 1)

    def _skip(self, step: int, last: SaveHandle) -> None:
        self.skipped += 1
        say = _log.debug if self._warned else _log.warning  # once for a row of them
        say("a save is due at step %d while that of step %d still runs: skipped and counted", step, last.step)
        self._warned = True
