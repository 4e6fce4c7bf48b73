"""One rank's side of a meeting: what it tells, and what it does with the answer. Collective; in the training thread."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

import msgspec

from gpumove.errors import describe, rebuild
from gpumove.health import Health
from gpumove.leave.way_out import WayOut
from gpumove.meeting import Chair, Report, Told, Verdict
from gpumove.saver import Saver
from gpumove.staged import Cut, Seat
from gpumove.state.capture import Capture
from gpumove.state.layout import Layout
from gpumove.state.peers import Peers
from gpumove.takeover import Takeover


@dataclass
class Rendezvous:
    """All ranks come here at steps that they know beforehand; rank 0 decides what follows."""

    peers: Peers
    chair: Chair
    saver: Saver
    takeover: Takeover
    health: Health
    way_out: WayOut
    seat: Seat
    next_step: int = 0
    """Of the next meeting."""
    cold: bool = False
    """Whether memory to stage into is still to be made ready."""

    def meet(self, step: int, *, began: float, force: bool, pinned: bool) -> Told | None:
        """Learn what rank 0 decides, and do it.

        Args:
            step: where all ranks are.
            began: when the call began, by ``perf_counter``.
            force: a save was asked for.
            pinned: retention keeps it.

        Returns:
            The notice by which all leave after this step.

        Raises:
            GpumoveError: a rank failed, or the save before did; on all ranks alike.
        """
        marks = [began]
        capture, report = self.saver.look(step)
        report.notice = self.way_out.departure.told()
        marks.append(time.perf_counter())
        verdict = self._ask(step, report, force=force)
        marks.append(time.perf_counter())
        if isinstance(capture, Exception):
            raise capture
        layout = self._heed(verdict, capture)
        marks.append(time.perf_counter())
        if verdict.save:
            self._save(step, verdict, capture, layout, marks, pinned=pinned)
        return verdict.notice

    def _ask(self, step: int, report: Report, *, force: bool) -> Verdict:
        self.peers.meet(f"the meeting at step {step}", most_s=self.way_out.departure.meet_s)
        decide = partial(self.chair.decide, step, last=self.saver.last, force=force, now=time.monotonic())
        answer = self.peers.ask(msgspec.msgpack.encode(report), lambda told: msgspec.msgpack.encode(decide(told)))
        verdict = msgspec.msgpack.decode(answer, type=Verdict)
        self.next_step = verdict.next_meeting
        self.saver.runner.writer.heed(verdict.thrift)
        self.way_out.met(step)
        self.health.met(step)
        return verdict

    def _heed(self, verdict: Verdict, capture: Capture) -> Layout:
        """What was decided, but the save itself; the layout by the plan that holds now."""
        if verdict.told and self.saver.last is not None:
            self.saver.last.mark_seen()
        if verdict.error is not None:
            self._raise(verdict.error)
        if verdict.replan:
            self.saver.planner.agree(capture)
        layout = self.saver.lay_out(capture)
        self.cold |= verdict.replan or self.takeover.resumed
        if self.cold and not verdict.save and not self.saver.running():
            # Also where the first meeting was a save: the second one stages into memory that nothing has touched yet.
            self.saver.runner.prepare(layout.sources)
            self.cold = self.takeover.resumed = False
        return layout

    def _save(
        self, step: int, verdict: Verdict, capture: Capture, layout: Layout, marks: Sequence[float], *, pinned: bool
    ) -> None:
        self.saver.runner.settle(self.saver.last, abandon=True)
        cut = Cut(capture, layout, self.saver.planner.agreement())
        probing = verdict.probing
        self.saver.begin(step, verdict.serial, cut, self.seat, marks=marks, pinned=pinned, probing=probing)

    def _raise(self, error: tuple[str, str, str]) -> None:
        """The same error on all ranks; on rank 0 it is the original."""
        original = None if self.saver.last is None else self.saver.last.error
        raise original if original is not None and describe(original) == error else rebuild(error)
