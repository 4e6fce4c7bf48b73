"""What the training thread does for a save: the cut, the layout, the copy, and the hand-over to the background."""

from __future__ import annotations

from collections.abc import Sequence

from gpumove.errors import StoreError, describe
from gpumove.handle import SaveHandle
from gpumove.health import Health
from gpumove.meeting import Report
from gpumove.parity.probe import Probes
from gpumove.parity.recorder import Recorder
from gpumove.runner import Runner
from gpumove.staged import Cut, Seat, Staged
from gpumove.state.capture import Capture, Job
from gpumove.state.layout import Layout, Planner
from gpumove.state.snapshot import Snapshot
from gpumove.state.staging import Stager
from gpumove.tracing import Trace


class Saver:
    """One rank's. Whether to save, and what the others do, is decided elsewhere."""

    def __init__(
        self,
        job: Job,
        planner: Planner,
        stager: Stager,
        runner: Runner,
        health: Health,
        recorder: Recorder,
        probes: Probes,
    ) -> None:
        self._job, self.planner, self._stager, self.runner = job, planner, stager, runner
        self._health = health
        self.recorder = recorder
        self.probes = probes
        self.last: SaveHandle | None = None
        """The newest save, running or finished."""
        self.snapshot: Snapshot | None = None
        """The newest copy."""

    def running(self) -> bool:
        """Whether a save runs in the background."""
        return self.last is not None and not self.last.finished

    def look(self, step: int) -> tuple[Capture | Exception, Report]:
        """The cut. A failure is told at the meeting: the other ranks must not wait for this one."""
        try:
            self._stager.awaited()
            capture = self._job.capture()
            vitals, probes = self._health.report(step), self.probes.names
            return capture, Report(step, replan=self.planner.changed(capture), vitals=vitals, probes=probes)
        except Exception as error:  # noqa: BLE001 - state_dict() of a user's object raises what it likes
            return error, Report(step, error=describe(error))

    def lay_out(self, capture: Capture) -> Layout:
        """By the plan that was agreed on last."""
        return self.planner.lay_out(capture, self.runner.mutable)

    def stage(self, layout: Layout, trace: Trace | None = None) -> Snapshot:
        """Begin to copy; nothing else may be in flight."""
        self.snapshot = self._stager.stage(layout.sources, layout.at_once, trace, steady=layout.steady)
        return self.snapshot

    def begin(
        self,
        step: int,
        serial: int,
        cut: Cut,
        seat: Seat,
        *,
        marks: Sequence[float] = (),
        pinned: bool = False,
        probing: Sequence[str] = (),
    ) -> SaveHandle:
        """Stage, and hand over to the background; nothing is in flight.

        Args:
            step: the number of steps done.
            serial: of this save, in this epoch.
            cut: what is there.
            seat: this rank's.
            marks: when the call began, and what came before this did.
            pinned: retention keeps it.
            probing: the probes to run with it, by all ranks alike.
        """
        handle = self.last = self.runner.begin(step, serial)
        began = marks[0] if marks else handle.began
        for name, start, end in zip(("capture", "meet", "plan"), marks, marks[1:]):
            handle.trace.add(name, start, end)
        try:
            probes = self.probes.take(probing, handle.trace)
            snapshot = self.stage(cut.layout, handle.trace)
            handle.watch(snapshot.sight)
            trace = self.recorder.since(self.runner.committed_step)
            after = self.runner.committed_attempt if trace else ""
            self.recorder.cut()
            notes = self._health.notes()
            staged = Staged(handle, snapshot, cut, trace, after, began, pinned, seat, health=notes, probes=probes)
            self.runner.start(staged)
        except BaseException as error:
            self.runner.fail(handle, seat, error)
            handle.mark_seen()
            raise
        handle.mark_called(began)
        return handle

    def refuse(self, step: int, why: str) -> SaveHandle:
        """A save that does not begin, for whoever waits for it."""
        handle = SaveHandle(step, "")
        handle.finish(StoreError(f"the save of step {step} did not begin: {why}", code="store.abandoned"))
        handle.mark_seen()
        return handle
