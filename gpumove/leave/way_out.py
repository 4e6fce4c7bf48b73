"""All of a Checkpointer that has to do with leaving: who tells it, when all ranks do, and what is said of it then."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import msgspec

from gpumove.config import Config
from gpumove.errors import ConfigError, GpumoveError
from gpumove.from_env import Worker
from gpumove.handle import SaveHandle
from gpumove.leave.board import open_board
from gpumove.leave.departure import Departure
from gpumove.leave.leaving import Leaving
from gpumove.leave.messages import Result, outcome
from gpumove.meeting import Told
from gpumove.notices.notice import Notice, Outcome
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
        self._leaving = Leaving(self.departure, saver, log, config)
        self._peers, self._book = peers, log
        first_here = peers.rank % config.ranks_here() == 0
        self._watcher = Watcher(parse(config.notices, first_here=first_here), self.departure.request)
        self._watching = False
        folder = config.run_place()[1]
        self._worker = None if folder is None else Worker(folder, peers.rank)
        self._left: tuple[int, Outcome] | None = None

    @property
    def gave_up(self) -> bool:
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
        if not self._watching:
            self._watcher.start()
        self._watching = True

    def met(self, step: int) -> None:
        """The ranks have met: a good time to tell ``gpumove run`` how far the training is."""
        if self._worker is not None:
            self._worker.training(step)

    def saved(self, step: int) -> bool:
        """Whether the job has left, with just this step saved.

        Raises:
            ConfigError: it has left, and should do nothing more.
        """
        if self._left is None:
            return False
        after, what = self._left
        if after == step and what.durable:
            return True
        raise ConfigError(
            f"the job had to leave after step {after} ({what}) and goes on: end the loop when step() returns True"
        )

    def due(self, step: int) -> bool:
        """The slow way of a step: whether the job leaves after it, and if so all that belongs to it."""
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
        self.departure.hear(told)
        try:
            save(step).wait(self.departure.left_s())
            result = Result(True, step)
        except GpumoveError as error:
            result = self._leaving.look_up(step, str(error))
        self._end(step, outcome(step, result))

    # ---------------------------------------------------------------- the end

    def _end(self, step: int, what: Outcome) -> None:
        self.departure.over(what, left=True)
        self._left = step, what
        if self._worker is not None and self.departure.notice is not None:
            self._worker.left(step, what, self.departure.notice.source)
        _log.warning("leaving after step %d: %s%s", step, what, f" ({what.reason})" if what.reason else "")
        self._tell(what)

    def _tell(self, what: Outcome) -> None:
        notice = self.departure.notice
        if notice is None:
            return
        seconds = max(_LEAST_S, min(_THANKS_S, self.departure.left_s(margin=0.1)))
        try:
            in_thread(lambda ticket: self._watcher.acknowledge(notice), seconds)
        except TimeoutError:
            _log.info("%s did not take the acknowledgement in time", notice.source)

    def close(self) -> None:
        """No more notices."""
        self._watcher.close()
        self.departure.end()

    def settle(self, step: int, error: BaseException | None) -> None:
        """The job ends, and its last save has ended: what became of a notice that it did not come to leave on."""
        if self._worker is not None:
            self._worker.finished(step) if error is None else self._worker.failed(error)
        notice = self.departure.notice
        if notice is None or notice.outcome is not None:
            return
        why = "the job came to its end" if error is None else f"the training ended with {type(error).__name__}"
        found = outcome(step, self._leaving.look_up(step, why))
        self._tell(Outcome(found.durable, found.step, found.lost_steps, found.reason, finished=error is None))
        _log.warning("a notice from %s was not followed: %s", notice.source, notice.outcome)


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
