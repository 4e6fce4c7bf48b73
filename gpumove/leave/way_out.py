"""All of a Checkpointer that has to do with leaving: who tells it, when all ranks do, and what is said of it then."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import msgspec

from gpumove.config import Config
from gpumove.errors import ConfigError, GpumoveError, StoreError
from gpumove.from_env import Worker
from gpumove.handle import SaveHandle
from gpumove.leave.board import open_board
from gpumove.leave.departure import Departure
from gpumove.leave.leaving import Leaving
from gpumove.leave.messages import Result, outcome
from gpumove.leave.requests import Requests, answer
from gpumove.meeting import Told
from gpumove.notices.notice import MOVE, Notice, Outcome
from gpumove.notices.sources import parse
from gpumove.notices.watcher import Watcher
from gpumove.saver import Saver
from gpumove.state.peers import Peers
from gpumove.store.log import Log
from gpumove.store.retry import in_thread

_log = logging.getLogger("gpumove")
_LEAST_S, _THANKS_S = 0.2, 5.0


class WayOut:
    """One rank's. The training thread reads ``departure.limit`` at every step, and comes here beyond it."""

    def __init__(self, config: Config, peers: Peers, saver: Saver, log: Log) -> None:
        self.departure = Departure(grace_s=config.grace_s, peer_s=config.peer_s)
        took, sights = saver.runner.took, saver.runner.sights
        self.requests = Requests(log, self.departure, patience_s=config.peer_s, took=took, sights=sights)
        self._leaving = Leaving(self.departure, saver, log, config, requests=self.requests)
        self._peers, self._saver, self._book = peers, saver, log
        first_here = peers.rank % config.ranks_here() == 0
        self._watcher = Watcher(parse(config.notices, first_here=first_here), self.departure.request)
        self._watching = False
        folder = config.run_place()[1]
        self._worker = None if folder is None else Worker(folder, peers.rank)
        self._left: tuple[int, Outcome] | None = None
        self._turned = False

    @property
    def _gave_up(self) -> bool:
        """Whether the job has left without waiting for what was in flight."""
        return self._left is not None and not self._left[1].durable

    @contextmanager
    def busy(self) -> Iterator[None]:
        """What runs inside takes long, and is no hang."""
        self.departure.busy += 1
        try:
            yield
        finally:
            self.departure.busy -= 1

    def open(self) -> None:
        """Begin, on all ranks, now that the run is theirs: no two epochs of a run have the same board."""
        board = open_board(f"gpumove/{self._book.run}/{self._book.epoch}", self._peers.world_size)
        mine = msgspec.msgpack.encode(board is not None)
        everywhere = self._peers.ask(mine, lambda told: min(told))  # False sorts before True
        self.departure.open(board if msgspec.msgpack.decode(everywhere) else None, self._peers)
        self.watch()
        if self._peers.rank == 0:
            self.requests.open()

    def watch(self) -> None:
        """Look out for notices; other ranks learn of them only when they ask, until ``open``."""
        if not self._watching:
            self._watcher.start()
        self._watching = True

    def known(self) -> Told | None:
        """The notice with the nearest deadline, as ranks tell it one another."""
        return self.departure._known

    def turn_back(self, told: Told) -> None:
        """The job has to leave before the run is its own: with nothing to save, on all ranks after their first step."""
        self.departure.hear(told)
        self.departure.over(None, left=True)
        self._turned = True

    def met(self, step: int) -> None:
        """The ranks have met: a good time to tell ``gpumove run`` how far the training is."""
        if self._worker is not None:
            self._worker.training(step)
        self.requests.slow_down()

    def saved(self, step: int) -> bool:
        """Whether the job has left, with just this step saved.

        Raises:
            ConfigError: it has left, and should do nothing more.
        """
        if self._turned:
            raise ConfigError("the job had to leave before the run was its own: end the loop when step() returns True")
        if self._left is None:
            return False
        after, what = self._left
        if after == step and what.durable and self._saver.last is not None:
            return True
        raise ConfigError(
            f"the job had to leave after step {after} ({what}) and goes on: end the loop when step() returns True"
        )

    def due(self, step: int) -> bool:
        """The slow way of a step: whether the job leaves after it, and if so all that belongs to it."""
        self._leave_empty_handed(step)
        if self._left is not None and self._left[0] == step:
            return True
        self.saved(step)
        target = self.departure.target(step)
        if target is not None and step < target:
            return False
        if target is None:
            missing = ", ".join(str(rank) for rank in self.departure.missing()) or "unknown"
            why = f"the ranks could not agree on a step in time: rank {missing} did not answer"
            self._end(step, outcome(step, self._leaving.look_up(step, why)))
        else:
            self._end(step, self._leaving.leave(step))
        return True

    def leave_from_meeting(self, told: Told, step: int, save: Callable[[int], SaveHandle]) -> None:
        """Without a board: all ranks have heard of a notice at this meeting, and save once more, as usual."""
        stopped_at = time.time()
        self.departure.hear(told)
        self._leaving.hurry()
        why = "the save was not done in time"
        try:
            handle = save(step)
            durable = self.departure.wait(handle.join) and self._is_kept(handle)
            handle.mark_seen()  # the outcome says it
            why = str(handle.error or why)
        except GpumoveError as error:
            durable, why = False, str(error)
        what = outcome(step, Result(True, step) if durable else self._leaving.look_up(step, why))
        if self._peers.rank == 0:
            self._leaving.put_down(step, what, stopped_at=stopped_at)
        self._end(step, what)

    def lost(self, step: int, error: StoreError) -> bool:
        """Whether the job leaves, so that ranks which do not come to a meeting are no failure. Those that did leave."""
        if error.code != "store.peers" or self.departure.notice is None:
            return False
        self._end(step, self._leaving.leave(step))
        return True

    # ---------------------------------------------------------------- the end

    def _leave_empty_handed(self, step: int) -> None:
        if self._turned and self._left is None:
            self._end(step, Outcome(False, 0, 0, "it waited for the run, which was not handed over in time"))

    def _end(self, step: int, what: Outcome) -> None:
        self.departure.over(what, left=True)
        self._left = step, what
        if self._worker is not None and self.departure.notice is not None:
            self._worker.left(step, what, self.departure.notice.source)
        _log.warning("leaving after step %d: %s%s", step, what, f" ({what.reason})" if what.reason else "")
        self._tell()

    def _tell(self) -> None:
        """Acknowledge the notice, whose outcome is known."""
        notice = self.departure.notice
        if notice is None:
            return
        seconds = max(_LEAST_S, min(_THANKS_S, self.departure.left_s(margin=0.1)))
        try:
            in_thread(lambda ticket: self._watcher.acknowledge(notice), seconds)
        except TimeoutError:
            _log.info("%s did not take the acknowledgement in time", notice.source)

    def finish(self, step: int, error: BaseException | None) -> bool:
        """The job ends: wait for its last save, as long as a notice leaves that may come meanwhile, and say what
        became of a notice that it did not come to leave on.

        Args:
            step: the last one.
            error: what ended it, if not the end of its loop.

        Returns:
            Whether nothing was given up that may still run.
        """
        self._leave_empty_handed(step)
        if error is not None or self._left is not None:
            self.departure.end()  # the others need not wait for this rank
        runner, last, gave_up = self._saver.runner, self._saver.last, self._gave_up
        runner.drop(last)
        ended = self.departure.wait(lambda s: runner.settle(last, abandon=gave_up, timeout_s=s), margin=0.5)
        self._watcher.close()  # not before: a signal would end the process now, and the save with it
        self.requests.close()
        self.departure.end()
        if self._left is None:
            self._settle(step, error)
        if self._worker is not None:
            self._worker.finished(step) if error is None else self._worker.failed(error)
        return ended and not gave_up

    def _settle(self, step: int, error: BaseException | None) -> None:
        notice = self.departure.notice
        if notice is None:
            self.departure.over(None, left=False)
            return
        finished = error is None and self._is_kept(self._saver.last)
        why = "the training ended with " + type(error).__name__ if error else "the last save was not done in time"
        found = outcome(step, self._leaving.look_up(step, "the job came to its end" if finished else why))
        what = Outcome(found.durable, found.step, found.lost_steps, found.reason, finished=finished)
        self.departure.over(what, left=False)
        if self._worker is not None and error is None and not finished:
            self._worker.left(step, what, notice.source)
        if notice.source == MOVE and error is None and self._peers.rank == 0:
            answer(self._book, step, found, stopped_at=time.time(), seconds=_THANKS_S)
        _log.warning("a notice from %s was not followed: %s", notice.source, what)
        self._tell()

    def _is_kept(self, last: SaveHandle | None) -> bool:
        """Whether the last save, if there is one, is in the log; ranks other than the first have to ask for it."""
        if last is None or last.committed:
            return True
        if not last.finished or last.error is not None:
            return False
        seconds = self.departure.left_s(margin=0.5)
        try:
            in_thread(lambda ticket: last.wait(seconds), seconds)
        except Exception as error:  # noqa: BLE001 - whatever it is: what is not known to be durable is not said to be
            _log.debug("the commit of step %d was not seen: %s", last.step, error)
        return last.committed


def request(deadline: float | None, in_s: float | None, detail: str, *, now: float) -> Notice:
    """A notice of the job's own.

    Raises:
        ConfigError: the time is no number, or there are two.
    """
    if deadline is not None and in_s is not None:
        raise ConfigError("request_leave takes deadline or in_s, not both")
    for name, value in (("deadline", deadline), ("in_s", in_s)):
        known = isinstance(value, (int, float)) and not isinstance(value, bool) and abs(value) < float("inf")
        if value is not None and not known:
            raise ConfigError(f"{name} is a number of seconds, not {value!r}")
    return Notice("request", deadline if in_s is None else now + in_s, detail)
