"""The move of a run: from what both logs say to the next entry, again and again, until it is done.

Every transition is one entry, made only if its log is still as it was when that was decided. So a move that was killed,
or that somebody else has carried on, is resumed by looking anew. Order and meaning: docs/design/0007-moving.md.
"""

from __future__ import annotations

import contextlib
import time
import uuid
from collections.abc import Callable

from gpumove.errors import ConfigError, IntegrityError, StoreError
from gpumove.format.manifest import Checkpoint, Move
from gpumove.move.aftercare import Aftercare
from gpumove.move.baggage import Baggage
from gpumove.move.checks import check_ends
from gpumove.move.copier import Progress
from gpumove.move.cutover import Choice, Next
from gpumove.move.entries import Entries, OvertakenError
from gpumove.move.herald import Herald
from gpumove.move.patience import Patience
from gpumove.move.phase import Ends, Phase, lost_steps, phase
from gpumove.move.precopy import Precopy, describe
from gpumove.move.report import Event, Report, Wishes
from gpumove.move.rounds import Rounds

_POLL_S, _SOON_S, _ASKED_S = 1.0, 0.2, 0.05
"""Between two looks at a log; where nobody trains meanwhile; and until the job has left, which ends with one."""


class Mover:
    """One move, in one direction.

    Args:
        ends: the logs' URLs.
        rounds: of the replica that the target is, or is to become.
        wishes: what the user asks for.
        allowed: raises if the run must not lie at the target, whatever else.
        tell: told what happens.
        progress: told how far a round is.
    """

    def __init__(
        self,
        ends: Ends,
        rounds: Rounds,
        wishes: Wishes,
        *,
        allowed: Callable[[], object] = lambda: None,
        tell: Callable[[Event], None] = lambda event: None,
        progress: Progress | None = None,
    ) -> None:
        self.ends, self.rounds, self.wishes = ends, rounds, wishes
        self.source, self.target = rounds.replica.source, rounds.replica.target
        self._allowed, self._progress = allowed, progress
        self._entries = Entries(ends, self.source, self.target, tell)
        self._precopy, self._baggage = Precopy(rounds, wishes), Baggage(self.source, self.target, wishes)
        self._patience = Patience(wishes.leave_timeout_s)

    # ---------------------------------------------------------------- the loop

    def run(self) -> Report:
        """From wherever it is to its end.

        Raises:
            ConfigError: the target cannot take the run, or the blackout would be longer than allowed.
            StoreError: a store failed, or a job does not answer.
            FencedError: somebody else has carried the move on, or has taken the target.
        """
        do: dict[Phase, Callable[[], None]] = {
            Phase.FRESH: self._begin,
            Phase.COPYING: self._copy,
            Phase.ASKED: self._wait_for_left,
            Phase.LEFT: self._seal,
            Phase.SEALED: self._hand_over,
            Phase.RETURNING: self._return,
            Phase.FORCED: self._seal_late,
            Phase.ARRIVED: self._finish,
        }
        returned = False
        with Herald(self.source, self._precopy.crowded) as herald:
            while (now := self.look()) is not Phase.DONE and not (returned and now is Phase.FRESH):
                herald.copying = now is Phase.COPYING
                self.rounds.as_source = herald.copying  # nothing is dropped at the target while nobody trains
                if now is Phase.HANDED and not self._wait_for_arrival():
                    return self.report(now, "handed over; nobody has trained at the target yet")
                returned = now is Phase.RETURNING
                with contextlib.suppress(OvertakenError):
                    do.get(now, lambda: None)()
        return self.report(now, "the run was handed back to the source" if returned else "the run has moved")

    def look(self) -> Phase:
        """Where it stands, as both logs say now."""
        self.source.follow()
        if self.target.run or self.target.open(create=False):
            if self.target.run != self.source.run:
                raise ConfigError(
                    f"{self.ends.target} holds another run than {self.ends.source}: use another URL",
                    code="config.other_run",
                )
            self.target.follow()
        self._entries.decided()
        now = phase(self.source.view, self.target.view, self.ends)
        move = self.target.view.move if now is Phase.FORCED else self.source.view.move
        self._entries.id = uuid.uuid4().hex[:16] if now is Phase.FRESH or move is None else move.move
        return now

    # ---------------------------------------------------------------- before the cutover

    def _begin(self) -> None:
        """Check the target, make it a replica, and say at the source that a move is under way."""
        check_ends(self.rounds, self._allowed)
        replica, view = self.rounds.replica, self.source.view
        replica.claim(view.epoch)
        idle = view.move is not None and view.move.state == "handover" and view.move.epoch == view.epoch
        facts = {**({"idle": True} if idle else {}), **self._baggage.begun()}
        self._entries.enter("begin", facts=facts, text="copying beside the training")

    def _copy(self) -> None:
        """Rounds until it is time to stop the job, and the request that does."""
        move, view = self.source.view.move, self.source.view
        assert move is not None
        if move.facts.get("idle") and move.epoch == view.epoch:
            self._seal()  # nobody has claimed it: there is nobody to ask
            return
        if (back := self._baggage.back_to) is not None:
            self._request(Choice(False, "nothing is copied"), f"back to step {back}, which is there")
            return
        self._precopy.hear(move.facts, entry_s=self._entries.entry_s)
        following = self._precopy.next_step()
        match following.step:
            case "round" | "wait":
                self._round(following)
            case "steps" | "usual":
                self._hasten(following.step == "steps", following.why)
            case "cut":
                self._request(self._precopy.choose(time.time()), following.why)
            case "stop":
                self._entries.enter("cancelled", text=following.why)
                raise self._precopy.too_long(following.why)

    def _round(self, following: Next) -> None:
        try:
            if following.step == "round" and self._bring():
                self._precopy.count()
                return
        except IntegrityError as error:
            self._entries.event("damaged", f"it is sent again: {error}")
        self._entries.wait(following.why)
        self._precopy.wait(_POLL_S)

    def _bring(self) -> bool:
        """Copy the source's newest checkpoint; whether there was anything to copy that can be."""
        try:
            found = self.rounds.once(progress=self._progress)
        except IntegrityError as error:
            if error.code == "integrity.transfer":
                raise
            self._entries.event("damaged", f"a checkpoint is passed over: {error}")
            return False
        if found is not None:
            self._entries.event("round", describe(found))
        return found is not None

    def _hasten(self, every_step: bool, why: str) -> None:
        """Ask the job to save after every step, or as usual."""
        assert self.source.view.move is not None
        self._baggage.look()
        facts = {**self.source.view.move.facts, "every_step": every_step, "slow_s": self.wishes.slow_s, "hold": False}
        text = f"{'a save after every step' if every_step else 'saves as usual'}, from now on: {why}"
        self._entries.enter("begin", facts=facts, text=text)
        if not every_step:
            self._precopy.usual()

    def _request(self, choice: Choice, why: str) -> None:
        begun = self.source.view.move
        assert begun is not None
        self._baggage.look()
        facts = {
            **{name: begun.facts.get(name) for name in ("every_step", "slow_s", "back_to")},
            **self._precopy.facts(),
            "rounds": [{"step": r.step, "bytes": r.nbytes, "seconds": round(r.seconds, 3)} for r in self.rounds.done],
        }
        text = f"{why}; {choice.why}; {self._precopy.expectation()}"
        self._entries.enter("request", save=choice.save, facts=facts, text=text)

    def _wait_for_left(self) -> None:
        """Until the job says that it has left; what it commits meanwhile is copied already."""
        asked = self.source.view.move
        assert asked is not None
        if not self._patience.ended(asked.number):
            if self._baggage.back_to is not None or not (self._bring() or self.rounds.replica.bring_early()):
                time.sleep(_ASKED_S)
            return
        late = f"the job did not leave within {self._patience.given_s:g} s"
        if self.wishes.force:
            self._entries.event("forced", f"{late}: going on without it, from its newest checkpoint")
            self._seal()
            return
        self._entries.enter("cancelled", text=late)
        raise StoreError(
            f"{late}, and the request is withdrawn: nothing has moved. If it does not run any more, move the run from "
            "its newest checkpoint with --force; it could not commit anything after that, even if it woke up",
            code="store.no_answer",
        )

    # ---------------------------------------------------------------- the cutover

    def _complete(self) -> tuple[Checkpoint, Move]:
        """The source's newest checkpoint, once the target would resume from it, and its newest word of a move."""
        while True:
            newest, there, move = self.source.view.find(), self.target.view.find(), self.source.view.move
            if move is not None and (back := self._baggage.back_to) is not None:
                return self._baggage.gone_back(back), move
            if newest is not None and there is not None and there.attempt == newest.attempt and move is not None:
                return newest, move
            if not self._bring():
                self.rounds.check_sound(newest)
                raise OvertakenError

    def _seal(self) -> None:
        """Copy what is lacking; then nobody is to write at the source any more."""
        began, before = time.monotonic(), self.rounds.sent_bytes
        newest, left = self._complete()
        facts = {
            "step": newest.step, "last_s": round(time.monotonic() - began, 3),
            "last_bytes": self.rounds.sent_bytes - before, "sent_bytes": self.rounds.sent_bytes,
            "stopped_at": left.facts.get("stopped_at"),
            "forecast_s": self._precopy.facts().get("forecast_s", left.facts.get("forecast_s")),
            **self._baggage.facts(newest),
        }  # fmt: skip
        self._entries.enter("sealed", facts=facts, text=f"nothing is written here after step {newest.step}")

    def _hand_over(self) -> None:
        """The right to write appears at the target, which has all that the source has ever committed."""
        newest, move = self._complete()
        text = f"to be resumed here from step {newest.step}: gpumove run {self.ends.target}"
        facts = {**move.facts, "keeps": None}  # what is kept is kept at the source
        self._entries.enter("handover", at=self.target, facts=facts, text=text)
        self.rounds.courier.bring_quietly()  # what was published until the seal

    def _return(self) -> None:
        """The move was withdrawn after the seal: the right to write appears at the source again."""
        self._entries.enter("handover", text="the move was withdrawn: to be resumed here")

    def _seal_late(self) -> None:
        """The target was handed the run while the source could not be reached; now it can."""
        newest, lost = self.source.view.find(), lost_steps(self.source.view, self.target.view)
        also = f"; what was committed here since the handover is not part of the run: steps {lost[-5:]}" if lost else ""
        facts = {"step": None if newest is None else newest.step, "forced": True}
        self._entries.enter("sealed", facts=facts, text=f"sealed late{also}")

    # ---------------------------------------------------------------- after it

    def _wait_for_arrival(self) -> bool:
        """Whether a job trains at the target now."""
        self.rounds.courier.bring_quietly()  # if the mover was killed before it had done that
        until = time.monotonic() + self.wishes.arrive_timeout_s
        while (now := self.look()) is Phase.HANDED and time.monotonic() < until:
            time.sleep(_SOON_S)
        return now is not Phase.HANDED

    def _finish(self) -> None:
        here, there = self.source.view.move, self.target.view.move
        known = {} if here is None else here.facts
        said = {name: known.get(name) for name in ("forecast_s", "on_parity", "gone_after_s", "keeps")}
        facts = said | {"handed": known.get("step")} | ({} if there is None or not there.is_over else there.facts)
        self._entries.enter("done", facts=facts, text=f"the job trains at {self.ends.target}")

    def watch(self, report: Report, back: Callable[[Wishes], Report]) -> Report:
        """If that is wanted, stay until the job at the target has compared itself; ``back`` takes the run back."""
        return Aftercare(self.source, self.target, self._entries, self.wishes).run(report, back)

    # ---------------------------------------------------------------- giving up

    def withdraw(self) -> Phase:
        """Take the run back as far as that needs no copying.

        Returns:
            ``FRESH`` if the source's job may go on, or else where it stands: then only a move the other way helps.

        Raises:
            ConfigError: there is nothing to take back.
        """
        if self.look() is Phase.FRESH:
            raise ConfigError(f"no move from {self.ends.source} is under way: there is nothing to take back")
        while True:
            now = self.look()
            try:
                if now in (Phase.COPYING, Phase.ASKED, Phase.LEFT):
                    self._entries.enter("cancelled", text="withdrawn")
                    return Phase.FRESH
                if now is Phase.SEALED:
                    # First at the target: whoever else carries this move on cannot hand over there any more.
                    self._entries.enter("cancelled", at=self.target, text="withdrawn after the seal")
                    now = self.look()
                if now is not Phase.RETURNING:
                    return now
                self._return()
                return Phase.FRESH
            except OvertakenError:
                continue

    def report(self, now: Phase, text: str) -> Report:
        """What has come of it so far."""
        told = self.source.view.move if now is Phase.DONE else self.target.view.move
        facts = {} if told is None else told.facts
        newest = self.target.view.find()
        return Report(
            move=self._entries.id, source=self.ends.source, target=self.ends.target, phase=now.name.lower(), text=text,
            step=None if newest is None else newest.step, rounds=tuple(self.rounds.done),
            sent_bytes=self.rounds.sent_bytes, forecast_s=facts.get("forecast_s"),
            blackout_s=facts.get("blackout_s"), events=tuple(self._entries.told),
        )  # fmt: skip
