"""At the step that all ranks leave after: decide on what the time is used for, do it, and find out what came of it.

All of it goes over the board, in rounds of those ranks that are there. When one is found to be gone in the middle, a
new round begins without it; where replicas have what it had, the others still save all. Whatever happens, the answer
is read from the log, or was, by whoever committed.
"""

from __future__ import annotations

import itertools
import logging
import time
from collections.abc import Iterator, Sequence
from functools import partial

import msgspec

from gpumove.config import Config
from gpumove.errors import ConfigError, StoreError, describe, rebuild
from gpumove.handle import SaveHandle
from gpumove.leave.board import Board
from gpumove.leave.council import Council, Late, Regrouped
from gpumove.leave.deadline import WORDS, Plan, Situation, expected, plan, remaining, together
from gpumove.leave.departure import Departure
from gpumove.leave.messages import Decision, Result, Standing, outcome
from gpumove.leave.requests import Requests, answer
from gpumove.notices.notice import Outcome
from gpumove.saver import Saver
from gpumove.staged import Cut, Seat
from gpumove.state.capture import Capture
from gpumove.state.layout import Planner
from gpumove.store.log import Log
from gpumove.store.retry import in_thread

_log = logging.getLogger("gpumove")
_POLL_S = (0.01, 0.1)
_NOTE_S, _FAREWELL_S, _LOOK_S = 5.0, 2.0, 1.0


class Leaving:
    """One rank's side."""

    def __init__(self, departure: Departure, saver: Saver, log: Log, config: Config, *, requests: Requests) -> None:
        self._departure, self._saver, self._runner, self._book = departure, saver, saver.runner, log
        self._config, self._requests = config, requests
        self._stopped_at = 0.0
        saver.runner.leaving = lambda: departure.notice is not None
        self._step, self._newest = 0, 0
        self._members: Sequence[int] = ()

    def leave(self, step: int) -> Outcome:
        """Leave after this step, where all ranks are, or as many as are left. What fails is told in the outcome."""
        board = self._departure.board
        self._step, self._stopped_at = step, time.time()
        self.hurry()
        self._newest, self._members = max(0, self._runner.committed_step), self._departure.ranks
        if board is None or self._departure.left_s() <= 0:
            return outcome(step, self.look_up(step, "no time was left"))
        try:
            result = self._rounds(board)
        except Exception as error:  # noqa: BLE001 - whatever it is, the job leaves, and what is in the log stands
            _log.debug("leaving failed", exc_info=True)
            result = self.look_up(step, str(error) or type(error).__name__)
        self._say(board, result)
        return outcome(step, result)

    def hurry(self) -> None:
        """No call to the store outlasts the deadline, whoever made it; of the log there is one look in any case."""
        self._book.store.hurry(max(_LOOK_S, self._departure.left_s(margin=0.0)))

    def look_up(self, step: int, reason: str, *, margin: float = 0.2, least_s: float = _LOOK_S) -> Result:
        """What the log says, if it can be read in the time that is left, or in ``least_s`` if there is none."""
        seconds = min(_NOTE_S, self._departure.left_s(margin=margin)) or least_s
        if seconds <= 0:
            return Result(False, self._newest, reason)
        try:
            view = in_thread(lambda ticket: Log(self._book.store).read(), seconds)
        except Exception as error:  # noqa: BLE001 - whatever it is: what is not known to be durable is not said to be
            return Result(False, self._newest, f"{reason}; the log cannot be read ({error})")
        durable = any(c.step == step and c.epoch == self._book.epoch for c in view.checkpoints)
        newest = view.find()
        return Result(durable, 0 if newest is None else newest.step, "" if durable else reason)

    # ---------------------------------------------------------------- rounds

    def _rounds(self, board: Board) -> Result:
        departure = self._departure
        members: Sequence[int] = departure.ranks
        for number in itertools.count():
            if departure.rank not in members:
                return self._wait_for_others(board)
            council, self._members = Council(departure, board, number=number, members=members), members
            try:
                result = self._round(council, whole=len(members) == len(departure.ranks))
            except Regrouped as change:
                gone = ", ".join(str(rank) for rank in members if rank not in change.members)
                _log.warning("rank %s is gone; the others go on", gone)
                members = change.members
                self._drop()
                continue
            if council.rank == 0:
                board.put("result", msgspec.msgpack.encode(result))
            return result
        raise AssertionError("unreachable")

    def _wait_for_others(self, board: Board) -> Result:
        """This rank counts as gone, as it did not answer. What the others achieve counts for it too."""
        self._drop()
        while self._departure.left_s(margin=0.5) > 0:
            if (found := board.get("result")) is not None:
                return msgspec.msgpack.decode(found, type=Result)
            time.sleep(_POLL_S[1])
        return self.look_up(self._step, "this rank did not answer, and the others went on without it")

    def _round(self, council: Council, *, whole: bool) -> Result:
        """Decide, do, and decide again where what was done first was to wait."""
        while True:
            capture, standing = self._standing()
            answer = partial(self._decide, council, whole)
            decision = msgspec.msgpack.decode(council.ask(msgspec.msgpack.encode(standing), answer), type=Decision)
            kind, self._newest = decision.plan.kind, decision.newest
            if decision.error is not None:
                raise rebuild(decision.error)
            if council.rank == 0:
                _log.warning("leaving after step %d: %s (%s)", self._step, WORDS[kind], decision.plan.why)
            if kind == "nothing":
                self._runner.abandon(self._saver.last)
                return Result(decision.newest == self._step, decision.newest, decision.plan.why)
            if kind in ("new", "instead") and not isinstance(capture, Exception):
                self._drop()
                return self._see_through(council, self._begin(council, capture, decision))
            if self._saver.last is None:
                raise StoreError("there is no save in flight on this rank, and there is one on others")
            result = self._see_through(council, self._saver.last, decision.plan.reserve_s)
            if kind == "finish":
                return result if result.durable else msgspec.structs.replace(result, reason=decision.plan.why)

    def _standing(self) -> tuple[Capture | Exception, Standing]:
        capture, report = self._saver.look(self._step)
        new_s, last = expected(self._runner.took), self._saver.last
        flying = last is not None and not last.finished
        flight_s = None
        if last is not None and flying and new_s is not None:
            flight_s = remaining(new_s, time.perf_counter() - last.began)
        codes = self._config.codec == "small" or bool(self._requests.asked.thrift)
        now = Situation(new_s, flying, flight_s, codes)
        serial = 0 if last is None else int(last.attempt.partition("-")[2])
        bound = isinstance(capture, Capture) and "loader" in capture.own
        return capture, Standing(self._step, now, serial, report.replan, bound, report.error)

    def _decide(self, council: Council, whole: bool, messages: Sequence[bytes]) -> bytes:
        """The first one's. An error is part of the answer: the others wait for it."""
        try:
            decision = self._decision(council, whole, [msgspec.msgpack.decode(m, type=Standing) for m in messages])
        except Exception as error:  # noqa: BLE001 - told to all
            decision = Decision(newest=self._newest, error=describe(error))
        return msgspec.msgpack.encode(decision)

    def _decision(self, council: Council, whole: bool, ranks: Sequence[Standing]) -> Decision:
        if (odd := next((s.step for s in ranks if s.step != self._step), None)) is not None:
            raise ConfigError(f"a rank is at step {odd}, and another at {self._step}: count alike on all ranks")
        if self._departure.rank != 0:
            self._book.read()  # whoever was the first may have committed before it went
        found = self._book.view.find()
        newest, serial = 0 if found is None else found.step, max(s.serial for s in ranks) + (1 if whole else 2)
        now = together(s.situation for s in ranks)
        if found is not None and found.step == self._step and found.epoch == self._book.epoch:
            return Decision(Plan("nothing", why="it is saved already"), newest=newest)
        if self._requests.forgoes_save:
            why = f"the move goes on from step {newest}, since to train again takes less than to send a save"
            return Decision(Plan("nothing", why=why), newest=newest)
        if self._saver.last is not None and self._saver.last.step == self._step and now.flying:
            return Decision(Plan("finish", now.flight_s, "it is being saved already"), newest=newest)
        if not whole and any(s.bound for s in ranks):
            why = "the loader's position is that of all ranks, and some are gone: use gpumove.ElasticLoader"
            return Decision(Plan("nothing", why=why), newest=newest)
        if (broken := next((s.error for s in ranks if s.error), None)) is not None:
            if not now.flying:
                return Decision(newest=newest, error=broken)
            return Decision(Plan("finish", now.flight_s, broken[2]), newest=newest)
        replan = not whole or any(s.replan for s in ranks)
        thrift = self._requests.asked.thrift
        probing = self._saver.probes.parting() if whole and thrift else []  # where machines vanish, none is waited for
        return Decision(plan(self._departure.left_s(), now), serial, replan, newest, thrift, probing=probing)

    # ---------------------------------------------------------------- one save

    def _begin(self, council: Council, capture: Capture, decision: Decision) -> SaveHandle:
        self._runner.writer.heed(decision.thrift)
        if decision.plan.hurried:
            self._runner.hurry()
        planner = self._saver.planner
        if decision.replan:
            planner = Planner(council, split_bytes=self._config.chunk_bytes)
            planner.agree(capture)
        layout = council.agree("the layout", lambda: planner.lay_out(capture, self._runner.mutable))
        seat = Seat(council.rank, council.world_size, self._departure.left_s())
        cut = Cut(capture, layout, planner.agreement())
        return self._saver.begin(self._step, decision.serial, cut, seat, probing=decision.probing)

    def _drop(self) -> None:
        """Give up what is in flight.

        Raises:
            Late: it does not end in time, and until then its memory is in use.
        """
        last = self._saver.last
        self._runner.drop(last)
        if not self._departure.wait(lambda s: self._runner.settle(last, abandon=True, timeout_s=s), margin=0.5):
            raise Late("the save in flight could not be stopped in time")

    def _see_through(self, council: Council, handle: SaveHandle, reserve_s: float = 0.0) -> Result:
        """Wait for a save of all members, and for what the first one says of it, until only the reserve is left."""
        self._departure.wait(handle.join_copy)  # here, since only this thread can say that it changes nothing
        key = f"{council.turn}/ended"
        work = partial(self._finish, reserve_s=reserve_s) if council.rank == 0 else self._follow
        result = council.in_time(lambda: work(council, handle, key))
        handle.mark_seen()  # the outcome says it
        return result

    def _finish(self, council: Council, handle: SaveHandle, key: str, *, reserve_s: float) -> Result:
        late = set(range(1, council.world_size))
        for pause in _pauses():
            if handle.join(pause):
                break
            if 0 < self._departure.left_s() <= reserve_s:
                break
            if self._departure.left_s() <= 0:
                handle.cancelled.set()
                handle.join(self._departure.left_s(margin=0.75))
                break
            late = {place for place in late if council.word(_part(handle, place)) is None}
            council.watch(late)
        result = self._found(handle)
        council.tell(key, msgspec.msgpack.encode(result))
        return result

    def _found(self, handle: SaveHandle) -> Result:
        if handle.committed:
            return Result(handle.step == self._step, handle.step)
        late = f"the save of step {handle.step} was not done in time"
        if not handle.finished and not handle.cancelled.is_set():
            return Result(False, self._newest, late)
        # The answer to what put it into the log may have been lost, or have come too late. If the link is still full of
        # what was given up, the log cannot be read in time either, and the others wait for a word.
        reason = late if handle.cancelled.is_set() else str(handle.error)
        return self.look_up(self._step, reason, margin=0.5, least_s=0.0)

    def _follow(self, council: Council, handle: SaveHandle, key: str) -> Result:
        told = False
        for pause in _pauses():
            if not told and handle.join(pause):
                council.tell(_part(handle, council.rank), b"failed" if handle.error is not None else b"done")
                told = True
            elif told:
                time.sleep(pause)
            if (found := council.word(key)) is not None:
                return msgspec.msgpack.decode(found, type=Result)
            council.watch([0])
            if self._departure.left_s(margin=0.5) <= 0:
                break
        raise Late(f"the save of step {handle.step} was not done in time")

    # ---------------------------------------------------------------- the end

    def _say(self, board: Board, result: Result) -> None:
        """Put it down in the log, and let nobody who holds the job's store leave before the others know."""
        departure = self._departure
        if departure.rank == self._members[0]:
            self.put_down(self._step, outcome(self._step, result), stopped_at=self._stopped_at)
        seconds = min(_FAREWELL_S, departure.left_s(margin=0.1))
        try:
            in_thread(lambda ticket: self._take_leave(board, time.monotonic() + seconds), seconds + 0.1)
        except Exception as error:  # noqa: BLE001 - a courtesy
            _log.debug("no farewell: %s", error)

    def put_down(self, step: int, told: Outcome, *, stopped_at: float) -> None:
        """Say in the log that the job has left, to a move that waits for it or to whoever looks."""
        departure = self._departure
        seconds = min(_NOTE_S, departure.left_s(margin=0.2))
        if seconds <= 0 or answer(self._book, step, told, stopped_at=stopped_at, seconds=seconds):
            return
        source = "" if departure.notice is None else departure.notice.source
        seconds = min(_NOTE_S, departure.left_s(margin=0.2))
        self._runner.note(f"left after step {step} on a notice ({source}): {told}", seconds)

    def _take_leave(self, board: Board, until: float) -> None:
        board.put(f"bye/{self._departure.rank}", b"1")
        if self._departure.rank == 0:
            while time.monotonic() < until and any(board.get(f"bye/{rank}") is None for rank in self._members):
                time.sleep(_POLL_S[1])


def _part(handle: SaveHandle, place: int) -> str:
    return f"{handle.attempt}/{place}"


def _pauses() -> Iterator[float]:
    """Longer and longer ones."""
    pause = _POLL_S[0]
    while True:
        yield pause
        pause = min(1.5 * pause, _POLL_S[1])
