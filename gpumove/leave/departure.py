"""From a notice on any rank to the step that all ranks leave after, without a collective and without slowing a step.

A thread of each rank (the agent) watches the board. When it sees a notice it first lowers ``limit``, so that the
training thread's next step goes the slow way, and then publishes the step that was told last: in this order, so that a
step which did not see the limit is seen itself. Who publishes last sets the target behind the farthest of them.
Training threads wait for agents only, never for one another: those ahead have issued their collectives already.
"""

from __future__ import annotations

import logging
import sys
import threading
import time
import weakref
from collections.abc import Callable
from contextlib import suppress

import msgspec

from gpumove.errors import GpumoveError
from gpumove.leave.board import Board
from gpumove.leave.countdown import LEAST_S, Countdown
from gpumove.leave.pulse import BEAT_S, Beat, Pulses, meeting_place
from gpumove.meeting import Told
from gpumove.notices.notice import Notice, Outcome
from gpumove.state.peers import Peers

_log = logging.getLogger("gpumove")
_NOW, _NEVER = -(1 << 62), sys.maxsize
_POLL_S = 0.2
_TELL_S = 2.0
"""A board that has not taken a notice by then does not answer."""


class Departure(Countdown):
    """One per rank. ``limit`` and ``step`` are all that the training thread touches while there is no notice."""

    def __init__(self, *, grace_s: float, peer_s: float) -> None:
        super().__init__()
        self.limit = _NEVER
        """Steps from here on go the slow way."""
        self.step = _NOW
        """The step that was told last."""
        self.notice: Notice | None = None
        """The one with the nearest deadline."""
        self.board: Board | None = None
        self.rank, self.ranks = 0, range(1)
        self._grace_s, self._peer_s = grace_s, peer_s
        self._changed = threading.Condition()
        self._wake = threading.Event()
        self._agent: _Agent | None = None
        self._at_exit: Callable[[], object] | None = None
        self._known: Told | None = None
        self._untold: Told | None = None
        self._untold_since = 0.0
        self._target: int | None = None
        self._waiting = self._over = False
        self.busy = 0
        """How often this rank is in something that takes long."""

    # ---------------------------------------------------------------- any thread

    def request(self, notice: Notice) -> None:
        """Somebody wants this rank, and so the job, to leave. The nearer deadline wins; the same again is no news."""
        until = notice.deadline if notice.deadline is not None else time.time() + self._grace_s
        post = Told(until, notice.source, notice.deadline, notice.detail)
        if self._take(post, notice):
            self._post(post)

    def _post(self, post: Told) -> None:
        with self._changed:
            self._untold, self._untold_since = post, time.monotonic()
        self._wake.set()

    # ---------------------------------------------------------------- training thread

    def open(self, board: Board | None, peers: Peers) -> None:
        """Begin: from here on notices of all ranks are seen. Without a board, only this rank's own. Again, for a
        restore in mid-run, there is another board: what was agreed on over the one before is void."""
        self.end()
        self.board, self.rank, self.ranks = board, peers.rank, range(peers.world_size)
        with self._changed:
            self._target, self.step, self.limit = None, _NOW, _NEVER
        if self._known is not None:
            self._post(self._known)
        if board is not None:
            self._agent = _Agent(self, board)
            self._agent.start()
            # A script may end without close(): what C++ does in a daemon thread at that time may abort the process.
            self._at_exit = weakref.finalize(self, self._agent.end)

    def target(self, step: int) -> int | None:
        """Wait for the agreement.

        Args:
            step: the one that was just told.

        Returns:
            The step to leave after, or None if there was no agreement in time.
        """
        began = time.monotonic()
        with self._changed:
            self._waiting = True
            self._wake.set()
            try:
                while self._target is None:
                    waited = time.monotonic() - began
                    left = min(max(self.left_s(), LEAST_S - waited), self._peer_s - waited)
                    if left <= 0:
                        break
                    self._changed.wait(min(left, 1.0))
            finally:
                self._waiting = False
            return self._target

    def told(self) -> Told | None:
        """What this rank knows and cannot tell the others but when they meet."""
        late = self.board is None or time.monotonic() - self._untold_since > _TELL_S
        return self._untold if late else None

    def hear(self, told: Told) -> None:
        """Learn what another rank told."""
        self._take(told, Notice(told.source, told.deadline, told.detail))

    def missing(self) -> list[int]:
        """The ranks that gave no sign, as far as this one has looked."""
        found = {} if self._agent is None else self._agent.pulses.beats(self.ranks)
        return [rank for rank in self.ranks if rank not in found] if found else []

    def over(self, what: Outcome | None, *, left: bool) -> None:
        """The job ends, with this outcome; later notices are none. If it has left, further steps go the slow way."""
        with self._changed:
            self._over, self.limit = True, _NOW if left else _NEVER
            if self.notice is not None:
                self.notice.outcome = what

    def end(self) -> None:
        """This rank's part is over. Safe to call twice."""
        if self._at_exit is not None:
            self._at_exit()
        self._agent = self._at_exit = None

    # ---------------------------------------------------------------- the agent's side

    def _take(self, post: Told, notice: Notice) -> bool:
        """Note a notice if it is nearer than what is known; whether it is."""
        with self._changed:
            if self._over or (self._known is not None and post.until >= self._known.until):
                return False
            left = max(0.0, post.until - time.time())
            self._known = post
            self.ends_in(left)
            self.notice = notice
            self._changed.notify_all()
        _log.warning("notice from %s%s: the job has to leave within %.0f s", notice.source,
                     f" ({notice.detail})" if notice.detail else "", left)  # fmt: skip
        return True

    def _agreed(self, target: int) -> None:
        with self._changed:
            if not self._over:
                self._target = self.limit = target
            self._changed.notify_all()


class _Agent:
    """The thread that watches the board for one rank."""

    def __init__(self, departure: Departure, board: Board) -> None:
        self._departure, self._board = departure, board
        self._ended = threading.Event()
        self.pulses = Pulses(board)
        self._heard, self._beats = b"", 0
        self._published = self._last = self._done = self._failed = False
        self._still: tuple[object, float] = (None, 0.0)
        self._since: float | None = None
        self._thread = threading.Thread(target=self._run, name="gpumove-leave", daemon=True)

    def start(self) -> None:
        """Begin."""
        self._thread.start()

    def end(self) -> None:
        """Give the last sign, and end. A board that hangs is left behind."""
        self._ended.set()
        self._departure._wake.set()
        self._thread.join(1.0)

    def _run(self) -> None:
        departure = self._departure
        while not self._ended.is_set():
            try:
                self._turn()
                self._failed = False
            except GpumoveError as error:
                if not self._failed:
                    _log.warning("%s; notices of other ranks are not seen meanwhile", error)
                self._failed = True
            idle = departure.notice is None and not self._board.shared
            departure._wake.wait(None if idle else _POLL_S)
            departure._wake.clear()
        if departure.notice is not None:
            with suppress(GpumoveError):  # silence says the same, later
                self._beat(ended=True)

    def _turn(self) -> None:
        departure = self._departure
        self._tell()
        self._hear()
        if departure.notice is None:
            return
        if departure._target is None:
            departure.limit = _NOW  # before the step is read, see above
        self._beat()
        if self._done:
            return
        self._publish()
        if (found := self._board.get("target")) is not None:
            self._done = True
            departure._agreed(int(found))
            return
        self._since = self._since or time.monotonic()
        # All looking at all is too much for the board of a large job: the first ones will do, if they are there.
        if time.monotonic() - self._since > departure.silent_s * (2 + departure.rank.bit_length()) / 6:
            self._look_for_silent()

    def _tell(self) -> None:
        """Let the others know what this rank has learned, unless a nearer deadline is known to all."""
        departure = self._departure
        while (mine := departure._untold) is not None:
            told = self._board.get("notice") or b""
            if not told or msgspec.msgpack.decode(told, type=Told).until > mine.until:
                self._board.swap("notice", told, msgspec.msgpack.encode(mine))  # somebody else may have been quicker
                continue
            with departure._changed:
                if departure._untold is mine:
                    departure._untold = None

    def _hear(self) -> None:
        """Learn what the others told."""
        data = self._board.get("notice")
        if data is not None and data != self._heard:
            self._heard = data
            self._departure.hear(msgspec.msgpack.decode(data, type=Told))

    def _beat(self, *, ended: bool = False) -> None:
        departure = self._departure
        self._beats += 1
        beat = Beat(self._beats, departure.step, departure._waiting, departure.busy > 0, ended)
        self.pulses.show(departure.rank, beat)

    def _publish(self) -> None:
        """The step told last, which was not stopped by the limit. Who publishes last sets the target."""
        departure = self._departure
        if not self._published:
            self._board.put(f"at/{departure.rank}", str(departure.step).encode())
            self._published = True
            self._last = self._board.count("at") >= len(departure.ranks)
        if self._last:  # an answer may have been lost, and a rank be counted twice: all must be there
            told = [self._board.get(f"at/{rank}") for rank in departure.ranks]
            if None not in told:
                self._board.swap("target", b"", str(max(int(t) for t in told if t is not None) + 1).encode())

    def _look_for_silent(self) -> None:
        """If ranks are gone, the first of the others sets the target without them."""
        departure = self._departure
        self.pulses.look(departure.ranks)
        silent = self.pulses.silent(departure.ranks, departure.silent_s)
        there = {r: b for r, b in self.pulses.beats(departure.ranks).items() if r not in silent}
        standing = tuple(sorted((rank, beat.step, beat.waiting) for rank, beat in there.items()))
        if standing != self._still[0]:
            self._still = standing, time.monotonic()
        # Only once nothing moves any more: a rank on its way to the next step would be overtaken.
        if silent and there and min(there) == departure.rank and time.monotonic() - self._still[1] > 4 * BEAT_S:
            _log.warning("rank %s does not answer: the others leave without", ", ".join(map(str, silent)))
            self._board.swap("target", b"", str(meeting_place(there.values())).encode())
