"""After a move: follows what the job at the target says of itself, until it is known whether it is the same job; takes
the run back if it is not and that was asked for. Everything that it knows lies in the two logs."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import replace

from gpumove.errors import FencedError, ParityError
from gpumove.format.manifest import Move
from gpumove.move.cutover import step_s
from gpumove.move.entries import Entries, OvertakenError
from gpumove.move.report import Event, Report, Wishes
from gpumove.parity.watch import Told, told
from gpumove.store.log import Log

_POLL_S = 1.0
_LEAST_S, _UNKNOWN_S = 120.0, 600.0
"""Silence that says nothing yet; and where nobody knows how often a word is to be expected."""
_WORD_S = 120.0
"""For a word that should be there: the first one, where a checkpoint is, and the last one, where a later one is."""
_GAPS, _STARTS = 5.0, 3
_FOR_GOOD = ("finished", ParityError.__name__)
"""Ends of a job that nobody starts again."""
_LEAVE_S = 60.0
"""For a job to leave that has stopped, or left, because of what it found."""


class Aftercare:
    """One move's.

    Args:
        source: the log that the run has left.
        target: where it is now.
        entries: of the move.
        wishes: of the user.
    """

    def __init__(self, source: Log, target: Log, entries: Entries, wishes: Wishes) -> None:
        self._source, self._target, self._entries = source, target, entries
        self._wishes, self._gone_after_s = wishes, wishes.gone_after_s
        self._findings: list[str] = []
        self._limits: list[str] = []
        self._discard = self._answered = False
        self._heard_at, self._gap_s, self._due_at = time.monotonic(), 0.0, 0.0
        self._head = self._epoch = self._starts = 0
        self._step: int | None = None
        self._told: Move | None = None

    # ---------------------------------------------------------------- what comes of it

    def run(self, report: Report, back: Callable[[Wishes], Report]) -> Report:
        """Until the comparison is over, or the run was taken back.

        Args:
            report: of the move.
            back: takes the run back.
        """
        here = self._source.view.move
        action = self._action(here)
        if here is None or not action:
            return report
        if here.state == "done":
            self._watch(here, action)
            took_back = "" if not self._findings or action != "rollback" else "discard" if self._discard else "newest"
            here = self._end(here, took_back)
        took_back, findings = str(here.facts.get("back", "")), tuple(map(str, here.facts.get("findings", ())))
        if not took_back:
            return replace(report, text=f"{report.text}; {here.text}", findings=findings, events=self._events())
        leave_s = min(self._wishes.leave_timeout_s, _LEAVE_S) if self._answered else self._wishes.leave_timeout_s
        wishes = replace(
            self._wishes, watch="", discard=took_back == "discard", force=True, leave_timeout_s=leave_s,
            max_blackout_s=None, every_step=False, slow_s=0.0,
        )  # fmt: skip
        done = back(wishes)
        text = f"{done.text}: it was taken back, because {'; '.join(findings)}"
        return replace(done, text=text, findings=findings, events=(*self._events(), *done.events))

    def _action(self, here: Move | None) -> str:
        """``warn`` or ``rollback``; "" if nobody is to watch, or it is over."""
        if here is None or not here.is_over:
            return ""
        if here.state == "watched":
            return str(here.facts.get("back", ""))  # what was begun is to be finished
        return self._wishes.watch or str(here.facts.get("on_parity", ""))

    def _end(self, here: Move, took_back: str) -> Move:
        """Say so at the source, with what follows; nothing is kept there any more unless the run comes back."""
        keeps = here.facts.get("keeps") if took_back else None
        facts = {**here.facts, "findings": self._findings, "back": took_back, "keeps": keeps}
        said = [*(self._findings or ["nothing was found that was not so before the move"]), *self._limits]
        text = f"the watch is over: {'; '.join(said)}" + ("; the run is taken back" if took_back else "")
        try:
            self._entries.enter("watched", facts=facts, text=text)
        except OvertakenError:
            raise FencedError(f"{self._source.store.url}: somebody else has carried on what this watch is of") from None
        assert self._source.view.move is not None
        return self._source.view.move

    def _events(self) -> tuple[Event, ...]:
        return tuple(self._entries.told)

    # ---------------------------------------------------------------- what is to be seen

    def _watch(self, here: Move, action: str) -> None:
        """Until it is over, or there is a reason to take the run back."""
        self._entries.event("watch", "following what the job at the target finds")
        if self._gone_after_s is None:
            self._gone_after_s = here.facts.get("gone_after_s")  # as the mover was told that has begun this
        while True:
            self._target.follow()
            view = self._target.view
            if view.sealed or view.move is None or view.move.move != here.move:
                self._breaks_off("the run is on its way to somewhere else: there is nothing to watch here")
                return
            if self._hears(view.move) or (self._findings and action == "rollback"):
                return
            time.sleep(_POLL_S)

    def _hears(self, move: Move) -> bool:
        """Take in what is new; whether it is over."""
        view, state, now = self._target.view, told(move), time.monotonic()
        if state is None and move.state == "handover" and not self._overdue(True, now):
            return False  # a checkpoint came before the job's first word
        if state is None:
            self._breaks_off(
                "the job at the target does not compare itself: its watch_steps is 0, or it is an older gpumove"
            )
            return True
        if view.head != self._head:
            self._gap_s = max(self._gap_s, now - self._heard_at) if self._head else 0.0
            self._head, self._heard_at = view.head, now
        self._starts_over(state)
        if move != self._told:
            self._told = move
            if move.state == "watched":
                self._say(move.text)
            self._take(state)
        if state.over or state.ended in _FOR_GOOD:
            return True
        newest = view.find()
        if self._overdue(newest is not None and newest.step >= state.handed + state.steps, now):
            self._breaks_off(
                "the job at the target has gone on past the watch, and did not say what it found to the end"
            )
            return True
        silent_s = now - self._heard_at
        if silent_s <= self._patience_s(state):
            return False
        text = f"nothing was heard of the job at the target for {silent_s:.0f} s, no commit and no word"
        if self._findings:
            self._say(text)
        else:
            self._find(text)
        return True

    def _overdue(self, due: bool, now: float) -> bool:
        """Whether a word that should be there now has not come for long."""
        self._due_at = (self._due_at or now) if due else 0.0
        return due and now - self._due_at > _WORD_S

    def _starts_over(self, state: Told) -> None:
        """Whether the job was started again, and whether that helps."""
        epoch = self._target.view.epoch
        if state.step != self._step:
            self._step, self._starts = state.step, 0
        if self._epoch and epoch != self._epoch:
            self._starts += 1
            self._say(f"the job at the target was started again, in epoch {epoch}")
            if self._starts == _STARTS:
                self._find(f"the job at the target was started {_STARTS} times, and got no further")
        self._epoch = epoch

    def _take(self, state: Told) -> None:
        for finding in state.findings:
            text = f"step {finding.get('step')}: {finding.get('text')}"
            self._discard |= finding.get("what") in ("loss", "nan")
            if text not in self._findings:
                self._findings.append(text)
        self._answered = bool(state.ended)
        self._limits = [f"not compared: {each}" for each in state.unjudged]
        if state.ended not in ("", "finished", "left") and not self._findings:
            self._find(f"the job at the target ended with {state.ended} after step {state.step}")

    def _patience_s(self, state: Told) -> float:
        if self._gone_after_s is not None:
            return self._gone_after_s
        there = state.standing.get("s") or state.standing.get("s_expected")
        each = there or step_s(self._source.view.checkpoints)  # at least roughly
        gap_s = max(self._gap_s, each * state.steps / 10 if each else 0.0)
        return max(_LEAST_S, _GAPS * gap_s) if gap_s else _UNKNOWN_S

    def _find(self, text: str) -> None:
        self._findings.append(text)
        self._say(text)

    def _breaks_off(self, text: str) -> None:
        """Nothing more is to be found, and not because all was compared."""
        self._limits.append(text)
        self._say(text)

    def _say(self, text: str) -> None:
        self._entries.event("watch", text)
