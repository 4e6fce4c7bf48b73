"""The descendants of this process: found, however they were orphaned or renamed, and ended. Knows no torchrun.

This process adopts orphans, so that every descendant stays below it. A pid that was read from ``/proc`` may belong to a
stranger by the time it is signalled: signals go through a pidfd, opened before the process is looked at once more.
"""

from __future__ import annotations

import contextlib
import os
import signal
import time
from collections import defaultdict
from pathlib import Path
from typing import NamedTuple

from gpumove.prctl import adopt_orphans

_POLL_S = 0.05
_UNKILLABLE_S = 5.0


class Member(NamedTuple):
    """A process, told apart from a later one with its pid by when it was started."""

    pid: int
    started: int


class _Stat(NamedTuple):
    parent: int
    state: str
    started: int


def _stat(pid: int) -> _Stat | None:
    try:
        text = Path(f"/proc/{pid}/stat").read_text(errors="replace")
    except OSError:
        return None
    words = text.rpartition(")")[2].split()  # the name may hold blanks and brackets
    return _Stat(int(words[1]), words[0], int(words[19]))


class Family:
    """All processes below this one that were not there when it was made."""

    def __init__(self) -> None:
        adopt_orphans()
        self._strangers = {member.pid for member in _below(os.getpid())}

    def members(self) -> set[Member]:
        """The living ones, in all generations."""
        return {m for m in _below(os.getpid()) if m.pid not in self._strangers}

    def end(self, *, until: float, child: int) -> int:
        """End them all: SIGTERM once to each, and from ``until`` (monotonic) on SIGKILL.

        Args:
            until: when patience ends.
            child: the one whose status somebody else waits for.

        Returns:
            How many did not go by themselves and were killed, or are even then still there: the kernel holds them.
        """
        told: set[Member] = set()
        killed: set[Member] = set()
        while (left := self.members()) and time.monotonic() < until + _UNKILLABLE_S:
            number = signal.SIGTERM if time.monotonic() < until else signal.SIGKILL
            done = told if number == signal.SIGTERM else killed
            for member in left - done:
                send(member, number)
            done |= left
            time.sleep(_POLL_S)
            self.reap(child)
        self.reap(child)
        return len(killed)

    def reap(self, child: int) -> None:
        """Let adopted orphans that have died go."""
        for listing in Path("/proc/self/task").glob("*/children"):
            with contextlib.suppress(OSError):
                for name in map(int, listing.read_text().split()):
                    if name != child and name not in self._strangers:
                        os.waitpid(name, os.WNOHANG)


def _pids() -> list[int]:
    return [int(name) for name in os.listdir("/proc") if name.isdigit()]


def _below(root: int) -> set[Member]:
    children: dict[int, list[tuple[int, _Stat]]] = defaultdict(list)
    for pid in _pids():
        if (stat := _stat(pid)) is not None:
            children[stat.parent].append((pid, stat))
    found, todo = set(), [root]
    while todo:
        for pid, stat in children.pop(todo.pop(), ()):
            todo.append(pid)
            if stat.state not in "ZX":
                found.add(Member(pid, stat.started))
    return found


def send(member: Member, number: signal.Signals) -> None:
    """Signal this very process; nothing if it is gone, whoever has its pid now."""
    with contextlib.suppress(ProcessLookupError, PermissionError):
        descriptor = os.pidfd_open(member.pid)
        try:
            found = _stat(member.pid)
            if found is not None and found.started == member.started:
                signal.pidfd_send_signal(descriptor, number)
        finally:
            os.close(descriptor)
