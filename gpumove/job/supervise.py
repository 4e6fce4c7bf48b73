"""Attempt after attempt of torchrun, until the job is finished, has to leave, or gets nowhere.

The order of an end: the request to leave; shortly before the deadline, when workers have given up what they could not
finish, one SIGTERM to every process; then SIGKILL to what is left. What workers have written down counts in any case.
"""

from __future__ import annotations

import logging
import shutil
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from math import inf
from typing import Any

from gpumove.config import Config
from gpumove.errors import ConfigError
from gpumove.from_env import RunFolder, Word
from gpumove.job.family import Family
from gpumove.job.inbox import Inbox
from gpumove.job.launch import Torchrun, environment
from gpumove.job.outcome import DURABLE, FINISHED, MOVED, NOT_DURABLE, Verdict, crash_code, judge, quote, stayed
from gpumove.job.progress import Look, Progress
from gpumove.leave.deadline import margin_of
from gpumove.notices.notice import Notice, Outcome
from gpumove.notices.sources import parse
from gpumove.notices.watcher import Watcher
from gpumove.store import address

_log = logging.getLogger("gpumove")

_TICK_S = 0.5
"""The end of a child wakes the supervisor at once, unless the kernel gives the signal to another thread."""
_LEAST_S = 2.0
"""For workers to see a request and to put down how it ended, where the deadline is now or was already."""
_REST_S = 10.0
"""For what outlives torchrun, where there is no nearer deadline."""
_LOOK_S = 30.0
_LAST_LOOK_S = 0.2
_MAX_PAUSE_S = 60.0


@dataclass(frozen=True, kw_only=True)
class Job:
    """What to run."""

    url: str
    torchrun: Sequence[str]
    config: Config = field(default_factory=Config)
    options: Mapping[str, Any] = field(default_factory=dict)
    max_restarts: int = 3
    """Restarts in a row that bring no newer checkpoint."""


@dataclass(frozen=True)
class Result:
    """What came of it."""

    exit_code: int
    text: str
    outcome: Outcome | None
    notice: Notice | None
    restarts: int
    certificate: bytes | None = None
    """Of a job that was only certified."""


@dataclass(frozen=True)
class _Ended:
    """One attempt, over."""

    status: int
    words: Sequence[Word]
    tail: str
    overdue: bool
    """The deadline came before its end."""


def run(job: Job) -> Result:
    """Run a job to one of its ends. Call it in the main thread of a process that does nothing else.

    Raises:
        ConfigError: it cannot be started like this.
    """
    address.parse(job.url)
    if not job.torchrun:
        raise ConfigError("there is nothing to run: give torchrun's arguments after --, such as -- train.py")
    sources = parse(f"signals,{job.config.notices}")
    folder = RunFolder(tempfile.mkdtemp(prefix="gpumove-run-"))
    try:
        inbox = Inbox()
        inbox.open()
        watcher = Watcher(sources, inbox.put)
        watcher.start()
        result = Supervisor(job, folder, inbox).run()
        if result.notice is not None:
            watcher.acknowledge(result.notice)
        return replace(result, certificate=folder.certificate())
    finally:
        shutil.rmtree(folder.path, ignore_errors=True)


class Supervisor:
    """One job from its first attempt to its end."""

    def __init__(self, job: Job, folder: RunFolder, inbox: Inbox) -> None:
        self._job, self._folder, self._inbox = job, folder, inbox
        self._family = Family()
        self._progress = Progress(job.url, job.config, job.options)
        self._env = environment(job.url, folder, job.config)
        folder.put_options(dict(job.options))
        self._notice: Notice | None = None
        self._terminate_at = self._kill_at = self._deadline = inf
        self._interrupts = self._restarts = self._fruitless = 0

    def run(self) -> Result:
        """Until there is a verdict that another attempt would not change."""
        while True:
            before = self._progress.look()
            ended = self._attempt()
            verdict = judge(ended.status, ended.words, asked=self._notice is not None)
            if verdict.exit_code == MOVED and verdict.outcome is not None and self._progress.stays(_LOOK_S):
                verdict = stayed(verdict.outcome)
            if verdict.exit_code not in (FINISHED, DURABLE, NOT_DURABLE, MOVED):
                _log.error("%s", quote(ended.status, ended.words, ended.tail))
            if verdict.exit_code is None:
                verdict = self._after_a_crash(verdict, ended, before)
            if verdict.exit_code is not None:
                return self._result(verdict, verdict.exit_code, ended)
            self._restarts += 1

    def _attempt(self) -> _Ended:
        """torchrun from its start to the end of the last process below it."""
        self._folder.forget()
        torchrun = Torchrun(self._job.torchrun, self._env)
        while (status := torchrun.poll()) is None and (left := self._terminate_at - time.time()) > 0:
            self._take(self._inbox.wait(min(left, _TICK_S)))
            self._family.reap(torchrun.pid)
        patience = min(_REST_S, self._kill_at - time.time())
        killed = self._family.end(until=time.monotonic() + patience, child=torchrun.pid)
        if killed:
            _log.warning("%d processes did not end by themselves and were killed", killed)
        overdue, status = status is None, torchrun.poll()
        return _Ended(-9 if status is None else status, self._folder.words(), torchrun.tail(), overdue)

    # ---------------------------------------------------------------- notices

    def _take(self, notices: Sequence[Notice]) -> None:
        for notice in notices:
            self._interrupts += notice.source == "sigint"
            if self._interrupts > 1:
                notice = replace(notice, deadline=time.time(), detail="SIGINT was sent again")
            self._consider(notice)

    def _consider(self, notice: Notice) -> None:
        """Ask the workers to leave, if this is the first notice or a nearer deadline."""
        now = time.time()
        deadline = now + self._job.config.grace_s if notice.deadline is None else notice.deadline
        known = self._notice
        if known is not None and known.deadline is not None and deadline >= known.deadline:
            _log.info("the notice from %s changes nothing: it leaves more time than the one before", notice.source)
            return
        self._notice = replace(notice, deadline=deadline)
        _log.warning(
            "notice from %s, %.0f s left: asking the job to leave (%s)",
            notice.source, max(0.0, deadline - now), notice.detail,
        )  # fmt: skip
        self._folder.ask(self._notice)
        left = max(_LEAST_S, deadline - now)
        # Within the workers' own margin: what they could not finish they have given up at its beginning.
        margin = margin_of(left)
        self._deadline = now + left
        self._terminate_at, self._kill_at = self._deadline - 0.8 * margin, self._deadline - 0.5 * margin

    # ---------------------------------------------------------------- crashes

    def _after_a_crash(self, verdict: Verdict, ended: _Ended, before: Look) -> Verdict:
        """Wait before another attempt; or the verdict that there is to be none."""
        if self._job.config.certify:
            return Verdict(crash_code(ended.words), verdict.text)
        had, has = before.step(_LOOK_S), self._progress.look().step(_LOOK_S)
        newer = had is not None and has is not None and has > had
        self._fruitless = 0 if newer else self._fruitless + 1
        if self._fruitless > self._job.max_restarts:
            times = f"{self._fruitless} attempts in a row" if self._fruitless > 1 else "the attempt"
            return Verdict(crash_code(ended.words), f"gave up, as {times} brought no newer checkpoint: {verdict.text}")
        pause = min(_MAX_PAUSE_S, 2.0 ** max(0, self._fruitless - 1))
        step = "an unknown step" if has is None else f"step {has}"
        _log.warning("starting again in %.0f s, from %s", pause, step)
        until = time.monotonic() + pause
        while (left := until - time.monotonic()) > 0 and self._notice is None:
            self._take(self._inbox.wait(left))
        if self._notice is not None:
            return Verdict(NOT_DURABLE, f"it had crashed before the notice came: {verdict.text}")
        return verdict

    # ---------------------------------------------------------------- the end

    def _result(self, verdict: Verdict, exit_code: int, ended: _Ended) -> Result:
        outcome, text = verdict.outcome, verdict.text
        if exit_code == NOT_DURABLE and outcome is None:
            # No rank could say anything: what the log has is what stands.
            reason = "it did not leave in time" if ended.overdue else text
            step = self._progress.look().step(max(_LAST_LOOK_S, self._deadline - _LAST_LOOK_S - time.time()))
            reached = max((w.step for w in ended.words), default=0)
            text = f"not durable: {reason}; the newest checkpoint stands"
            if step is not None:
                outcome = Outcome(durable=False, step=step, lost_steps=max(0, reached - step), reason=reason)
                text = f"{outcome} ({reason})"
        if self._notice is not None:
            self._notice.outcome = outcome
        return Result(exit_code, text, outcome, self._notice, self._restarts)
