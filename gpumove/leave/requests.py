"""What a move asks of the job, read from the run's log by rank 0 beside the training, and what the job answers there.

A request becomes a notice like any other. It is of one epoch: a job that was started again since was asked by nobody.
Nothing here waits for anybody, and a log that cannot be read costs the job nothing but the request.
"""

from __future__ import annotations

import contextlib
import logging
import threading
import time
from collections.abc import Collection
from statistics import median
from typing import Any

from gpumove.errors import FencedError, GpumoveError
from gpumove.format.manifest import Move
from gpumove.leave.departure import Departure
from gpumove.notices.notice import MOVE, Notice, Outcome
from gpumove.parity.watching import Watching
from gpumove.steplog import Asked
from gpumove.store.log import Log
from gpumove.store.retry import in_thread
from gpumove.store.view import View

_log = logging.getLogger("gpumove")
_POLL_S, _GLANCE_S = 2.0, 0.02
"""Between two looks at the log, and at this rank's own step while the first one is waited for."""
_FAREWELL_S = 2.0
_RECENT, _NEWS = 3, 0.25
WISH_S = 900.0
"""What a move asks of the saves is done for so long after it has said so last, and held back for no longer in all."""


class Requests:
    """Rank 0's. The others hear of a request over the board, as of any notice."""

    def __init__(
        self,
        book: Log,
        departure: Departure,
        *,
        patience_s: float,
        took: Collection[float] = (),
        sights: Collection[float] = (),
    ) -> None:
        """Nothing is asked yet.

        Args:
            book: the job's log.
            departure: how all ranks leave.
            patience_s: what a request leaves for a save: nobody takes the machine.
            took: seconds of the last saves, as they will take where the job leaves; it grows.
            sights: what they took besides, while the job trains.
        """
        self._book, self._departure, self._took, self._sights = book, departure, took, sights
        self.patience_s = patience_s
        self.saves = True
        """Whether the move wants one."""
        self.watching: Watching | None = None
        """The comparison after a move: what it finds is said where the move is."""
        self.asked = Asked()
        """What it wants of the saves before that."""
        self._ended = threading.Event()
        self._thread: threading.Thread | None = None

    def open(self) -> None:
        """Begin, now that the run is this job's. Again, for a restore in mid-run: in its new epoch."""
        self.close()
        self._ended = threading.Event()
        watch = _Watch(self, self._book, self._departure, self._ended)
        self._thread = threading.Thread(target=watch.run, name="gpumove-requests", daemon=True)
        self._thread.start()

    @property
    def save_s(self) -> float | None:
        """What a save takes as the job leaves, by the last few."""
        last = list(self._took)[-_RECENT:]
        return median(last) if last else None

    @property
    def sight_s(self) -> float:
        """What it takes besides while the job trains."""
        return median(list(self._sights)[-_RECENT:] or [0.0])

    @property
    def forgoes_save(self) -> bool:
        """Whether it is a move that the job leaves for, and one that wants no save."""
        notice = self._departure.notice
        return not self.saves and notice is not None and notice.source == MOVE

    def slow_down(self) -> None:
        """Rest as long as a move wants it; nothing, as a rule."""
        if self.asked.every_step and self.asked.slow_s > 0:
            self._ended.wait(self.asked.slow_s)

    def close(self) -> None:
        """End. A store that hangs is left behind."""
        self._ended.set()
        if self._thread is not None:
            self._thread.join(min(_FAREWELL_S, self._departure.left_s(margin=0.5)))


class _Watch:
    """One epoch's thread, with a view of the log of its own: the Checkpointer's has one user at a time."""

    def __init__(self, wishes: Requests, book: Log, departure: Departure, ended: threading.Event) -> None:
        self._wishes, self._departure, self._ended = wishes, departure, ended
        self._log, self._epoch = Log(book.store), book.epoch
        self._log.view = book.view
        self._heard, self._heard_at = 0, 0.0
        self._wish: Move | None = None
        self._hold_at: float | None = None
        self._restored_at = 0.0
        self._first: tuple[int, float] | None = None
        self._failed = False

    def run(self) -> None:
        """Until the job ends, or is not the owner any more."""
        while not self._ended.is_set():
            if not self._look():
                _log.warning("%s: the run is not this job's any more, as its next save will say", self._log.store.url)
                return
            self._rest()
        if self._arrives() or self._has_news():
            self._look()

    def _rest(self) -> None:
        """Until the next look, or this job's first step, if that is waited for."""
        until = time.monotonic() + _POLL_S
        while (left := until - time.monotonic()) > 0:
            glance = self._first is None and self._due()
            if self._ended.wait(min(left, _GLANCE_S) if glance else left) or (glance and self._arrives()):
                return

    def _look(self) -> bool:
        """Read what is new, and answer; False if the run is somebody else's now."""
        try:
            self._log.follow()
            self._hear(self._log.view)
            self._ask()
            self._say_news(self._log.view.move)
            if self._first is not None and self._due():
                self._say_arrived(*self._first)
            self._say_watched()
            self._failed = False
        except GpumoveError as error:
            if not self._failed and not self._ended.is_set():
                _log.warning("what a move asks of this job is not seen meanwhile: %s", error)
            self._failed = True
        return self._log.view.epoch == self._epoch

    def _hear(self, view: View) -> None:
        move = view.move
        if move is None or move.number <= self._heard:
            return
        self._heard = move.number
        if move.state == "begin" and "job" not in move.facts and not self._ended.is_set():
            self._say_heard(move)
        if move.writer != self._log.writer:  # by its age: a job that is started again finds old ones too
            self._heard_at = time.monotonic() - max(0.0, time.time() - move.time)
        self._wish = move if move.state in ("begin", "request") else None
        self._ask()
        if standing(view, self._epoch) is not None and not self._ended.is_set():
            self._wishes.saves = move.save
            self._departure.request(Notice(MOVE, time.time() + self._wishes.patience_s, f"to {move.other}"))

    def _ask(self) -> None:
        """Put down what is wished now. Whoever wishes says so again and again, or is not there any more."""
        now, asked = time.monotonic(), self._wishes.asked
        if now - self._heard_at > WISH_S:
            self._wish = None
        facts = {} if self._wish is None else self._wish.facts
        self._hold_at = (self._hold_at or now) if facts.get("hold") else None
        asked.under_way = self._wish is not None
        asked.every_step = bool(facts.get("every_step"))
        asked.hold = self._hold_at is not None and now - self._hold_at < WISH_S
        asked.slow_s = float(facts.get("slow_s", 0.0))

    def _say_news(self, move: Move | None) -> None:
        """If saves take longer or shorter by now than the move was told, tell it."""
        if move is None or move.state != "begin" or "job" not in move.facts or self._ended.is_set():
            return
        told, now = move.facts["job"].get("save_s"), self._wishes.save_s
        if now is not None and (told is None or not (1 - _NEWS) * told <= now <= (1 + _NEWS) * told + 0.01):
            self._say_heard(move)

    def _say_heard(self, begun: Move) -> None:
        """Tell the move that somebody is there, and what a save takes: it foretells the blackout."""

        def check(view: View) -> None:
            if view.move != begun:
                raise FencedError(f"{self._log.store.url}: the move has gone on meanwhile")

        save_s = self._wishes.save_s
        facts = {name: value for name, value in begun.facts.items() if name != "idle"}
        facts["job"] = {} if save_s is None else {"save_s": round(save_s, 3), "sight_s": round(self._wishes.sight_s, 3)}
        with contextlib.suppress(FencedError):
            self._log.move("begin", move=begun.move, other=begun.other, facts=facts, text="heard", check=check)

    # ---------------------------------------------------------------- at the other end

    def _due(self) -> bool:
        """Whether the run was handed over to this store, and nobody has trained here yet."""
        move = self._log.view.move
        return move is not None and move.state == "handover" and self._log.view.epoch == self._epoch

    def _arrives(self) -> bool:
        """Whether this job has done a step since."""
        view = self._log.view
        begun = next((c for c in view.checkpoints if c.number == view.resumed), view.find())
        step, now, last = self._departure.step, time.time(), 0 if begun is None else begun.step
        if self._first is None and self._due() and step >= last:
            self._restored_at = self._restored_at or now
            if step > last:
                self._first = step, now
        return self._first is not None and self._due()

    def _say_arrived(self, step: int, at: float) -> None:
        move = self._log.view.move
        assert move is not None
        facts: dict[str, Any] = {"step": step, "at": at}
        if move.facts.get("forced"):
            facts["forced"] = True  # the source has still to be sealed
        if (stopped := move.facts.get("stopped_at")) is not None:
            facts["blackout_s"] = self._restored_at - float(stopped)
        if self._wishes.watching is not None:
            facts |= self._wishes.watching.facts(self._log.view.epoch)
        self._log.move("done", move=move.move, other=move.other, facts=facts, check=self._still_ours)
        _log.info("the run has moved here from %s", move.other)

    def _has_news(self) -> bool:
        return self._wishes.watching is not None and self._wishes.watching.news() is not None

    def _say_watched(self) -> None:
        """How far this job has compared itself with where it comes from, and what it found."""
        watching, move = self._wishes.watching, self._log.view.move
        if watching is None or move is None or not move.is_over or (news := watching.news()) is None:
            return
        facts, text = news

        def check(view: View) -> None:
            self._still_ours(view)
            if view.move != move:
                raise FencedError(f"{self._log.store.url}: another move has begun")

        facts = {**move.facts, "watch": facts}
        self._log.move("watched", move=move.move, other=move.other, facts=facts, text=text, check=check)
        watching.said()

    def _still_ours(self, view: View) -> None:
        if view.epoch != self._epoch:
            raise FencedError(f"{self._log.store.url}: the run was claimed by {view.host or 'a move'} meanwhile")


def standing(view: View, epoch: int | None) -> Move | None:
    """The request that the job of this epoch is to follow."""
    move = view.move
    wanted = move is not None and move.state == "request" and move.epoch == epoch == view.epoch
    return move if wanted else None


def answer(book: Log, step: int, what: Outcome, *, stopped_at: float, seconds: float) -> bool:
    """Tell a move that has asked for it that the job has left.

    Args:
        book: the job's log, as far as it was read.
        step: the last one.
        what: became of it.
        stopped_at: when it was done, in seconds since the epoch.
        seconds: that there are for it.

    Returns:
        Whether it is said: there may be no request, or no more, or the store may not answer.
    """
    log = Log(book.store)
    log.view = book.view

    def say(ticket: object) -> bool:
        log.follow()
        asked = standing(log.view, book.epoch)
        if asked is None:
            return False

        def check(view: View) -> None:
            if standing(view, book.epoch) is None:
                raise FencedError(f"{log.store.url}: the request to leave was withdrawn")

        facts: dict[str, Any] = {"step": step, "durable": what.durable, "newest": what.step, "stopped_at": stopped_at}
        if "back_to" in asked.facts:
            facts["back_to"] = asked.facts["back_to"]  # the request is not the newest word from here on
        log.move("left", move=asked.move, other=asked.other, facts=facts, text=str(what), check=check)
        return True

    try:
        return in_thread(say, seconds)
    except (GpumoveError, TimeoutError) as error:
        _log.warning("a move could not be told that this job has left: %s", error)
        return False
