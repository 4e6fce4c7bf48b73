"""The ranks that are left, talking over the board: what ``Peers`` does with collectives, while ranks may vanish.

Every wait looks at three things besides what it waits for: whether somebody has called a new round, whether one of
those waited for is gone, and the time. Who finds that a rank is gone calls a round without it; the first call counts.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Collection, Sequence
from typing import TypeVar

import msgspec

from gpumove.errors import StoreError
from gpumove.leave.board import Board
from gpumove.leave.departure import Departure
from gpumove.leave.pulse import Pulses
from gpumove.state.peers import Peers
from gpumove.store.retry import in_thread

T = TypeVar("T")
_POLL_S = (0.01, 0.2)


class Regrouped(Exception):
    """A new round begins, of these ranks of the job."""

    def __init__(self, members: Sequence[int]) -> None:
        super().__init__(f"ranks {list(members)} go on without the others")
        self.members = list(members)


class Late(StoreError):
    """The time was over before all was said."""

    default_code = "store.peers"


class Council(Peers):
    """One round. ``rank`` and ``world_size`` are places among ``members``, which has the ranks of the job."""

    def __init__(self, departure: Departure, board: Board, *, number: int, members: Sequence[int]) -> None:
        self._group = None
        self._departure, self._board, self._number, self.members = departure, board, number, list(members)
        self.rank, self.world_size = self.members.index(departure.rank), len(members)
        self._pulses = Pulses(board)
        self._said = 0

    @property
    def turn(self) -> int:
        """A number that all members have in common, another one after everything that they ask."""
        return self._said

    def meet(self, where: str, *, most_s: float = math.inf) -> None:
        """Nothing: messages wait for those who are late."""

    def gather(self, message: bytes) -> list[bytes]:
        """Everybody's message, in the order of places, for the first."""
        self._said += 1
        told = f"{self._said}/{self.rank}"
        if self.rank:
            self.in_time(lambda: self.tell(told, message))
            return []
        keys = {f"{self._said}/{place}": place for place in range(1, self.world_size)}
        return [message, *self.in_time(lambda: [self.hear(key, [place]) for key, place in keys.items()])]

    def broadcast(self, message: bytes) -> bytes:
        """The first one's message, for everybody."""
        self._said += 1
        key = f"{self._said}/answer"
        if self.rank:
            return self.in_time(lambda: self.hear(key, [0]))
        self.in_time(lambda: self.tell(key, message))
        return message

    def ask(self, message: bytes, answer: Callable[[list[bytes]], bytes]) -> bytes:
        """Everybody's message to the first, and to everybody what it makes of them."""
        messages = self.gather(message)
        return self.broadcast(answer(messages) if self.rank == 0 else b"")

    def close(self) -> None:
        """Nothing: the board belongs to the departure."""

    def tell(self, key: str, message: bytes) -> None:
        """Leave word in this round."""
        self._board.put(f"{self._number}/{key}", message)

    def word(self, key: str) -> bytes | None:
        """What was left in this round."""
        return self._board.get(f"{self._number}/{key}")

    def hear(self, key: str, places: Collection[int]) -> bytes:
        """Wait for a word that one of these places is to leave.

        Raises:
            Regrouped: there is a new round.
            Late: it did not come in time.
        """
        pause = _POLL_S[0]
        while (found := self.word(key)) is None:
            self.watch(places)
            if self._departure.left_s() <= 0:
                raise Late(f"{self._named(places)} did not come to the step that all were to leave after")
            time.sleep(pause)
            pause = min(1.5 * pause, _POLL_S[1])
        return found

    def watch(self, places: Collection[int]) -> None:
        """Look whether these are there.

        Raises:
            Regrouped: some are not, or somebody has found so before.
        """
        ranks = [self.members[place] for place in places if place != self.rank]
        self._pulses.look(ranks)
        gone = self._pulses.silent(ranks, self._departure.silent_s)
        mine = msgspec.json.encode([rank for rank in self.members if rank not in gone])
        key = f"{self._number + 1}/members"
        found = self._board.swap(key, b"", mine) if gone else self._board.get(key)
        if found is not None:
            raise Regrouped(msgspec.json.decode(found, type=list[int]))

    def _named(self, places: Collection[int]) -> str:
        ranks = [self.members[place] for place in places]
        beats = self._pulses.beats(ranks)
        busy = [rank for rank in ranks if rank in beats and beats[rank].busy]
        return f"rank {', '.join(map(str, ranks))}" + (" (busy, as it says)" if busy else "")

    def in_time(self, work: Callable[[], T]) -> T:
        """Do what needs the board; if its connection hangs, leave it at that when time is up."""
        try:
            return in_thread(lambda ticket: work(), self._departure.left_s(margin=0.2) + _POLL_S[1])
        except TimeoutError:
            raise Late("the job's own store did not answer in time") from None
