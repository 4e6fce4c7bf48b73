"""A page of memory that a training process and its killer share: what the one was doing when the other struck.

It outlives a SIGKILL, which is the point: the killed process cannot say anything any more.
"""

from __future__ import annotations

import mmap
import re
import struct
import threading
from collections.abc import Callable
from functools import wraps
from typing import Any

ROOMS = (
    "log: checkpoint",
    "log: gc",
    "log: claim",
    "log: note",
    "delete",
    "manifests",
    "parts",
    "packs",
    "format",
    "probe",
    "read",
)
"""Store calls, those first that say most about a kill: several may be under way at once."""
PHASES = ("start", "restore", "step() call", "forward and backward", "optimizer step", "close")
_NUMBERS = ("done", "acknowledged", "restored", "phase")  # the middle two plus one, so that 0 is "never"
_KIND = re.compile(rb'"kind":\s*"(\w+)"')
_STEP = re.compile(rb'"step":\s*(\d+)')


class Board:
    """Numbers by name, and a count of store calls in flight by room. One writer at a time: the child."""

    def __init__(self) -> None:
        self._memory = mmap.mmap(-1, mmap.PAGESIZE)  # shared with every process forked from here on
        self._lock = threading.Lock()

    def clear(self) -> None:
        """For the next child."""
        self._memory[:] = bytes(mmap.PAGESIZE)

    def set(self, name: str, value: int) -> None:
        """Write one of the numbers."""
        struct.pack_into("<q", self._memory, 8 * _NUMBERS.index(name), value)

    def get(self, name: str) -> int:
        """Read one of the numbers; 0 if it was never written."""
        return int(struct.unpack_from("<q", self._memory, 8 * _NUMBERS.index(name))[0])

    def enter(self, phase: str) -> None:
        """What the training thread does from here on."""
        self.set("phase", PHASES.index(phase))

    def in_flight(self, room: str) -> int:
        """Store calls of a room that have begun and not ended."""
        return int(struct.unpack_from("<q", self._memory, self._at(room))[0])

    def count(self, room: str, change: int) -> None:
        """A store call begins (1) or ends (-1)."""
        with self._lock:
            struct.pack_into("<q", self._memory, self._at(room), self.in_flight(room) + change)

    @staticmethod
    def _at(room: str) -> int:
        return 8 * (len(_NUMBERS) + ROOMS.index(room))

    def interrupted(self) -> str:
        """What was under way, in one word: a store call if there was one, else the training thread's phase."""
        busy = [room for room in ROOMS if self.in_flight(room)]
        return busy[0] if busy else PHASES[self.get("phase")]


def _room_of(key: str, data: bytes = b"") -> str:
    head = key.partition("/")[0]
    if head != "log":
        return head.partition(".")[0]
    kind = _KIND.search(data)
    return f"log: {kind[1].decode()}" if kind else "log: note"


def watch(store: type[Any], board: Board) -> None:
    """Let every Store of this process keep the board. Only for a process that is there to be killed."""

    def put(call: Callable[..., Any]) -> Callable[..., Any]:
        @wraps(call)
        def traced(self: Any, key: str, *rest: Any, **named: Any) -> Any:
            return _counted(board, _room_of(key), lambda: call(self, key, *rest, **named))

        return traced

    def create(call: Callable[..., bool]) -> Callable[..., bool]:
        @wraps(call)
        def traced(self: Any, key: str, data: bytes) -> bool:
            room = _room_of(key, data)
            made: bool = _counted(board, room, lambda: call(self, key, data))
            if made and room == "log: checkpoint" and (step := _STEP.search(data)):
                board.set("acknowledged", int(step[1]) + 1)
            return made

        return traced

    def other(room: str, call: Callable[..., Any]) -> Callable[..., Any]:
        @wraps(call)
        def traced(self: Any, *rest: Any, **named: Any) -> Any:
            return _counted(board, room, lambda: call(self, *rest, **named))

        return traced

    store.put, store.create = put(store.put), create(store.create)
    store.delete, store.get_ranges = other("delete", store.delete), other("read", store.get_ranges)


def _counted(board: Board, room: str, call: Callable[[], Any]) -> Any:
    if room not in ROOMS:
        return call()
    board.count(room, 1)
    try:
        return call()
    finally:
        board.count(room, -1)
