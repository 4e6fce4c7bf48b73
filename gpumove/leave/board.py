"""Small keys that all ranks of a job see, from any thread and without waiting for anybody.

The store that the process group was made with, on a connection of our own: a thread that polls must not hold up what
torch does on its connection. Where there is no such store there is no board, and ranks learn of things when they meet.
"""

from __future__ import annotations

import logging
import threading
from datetime import timedelta
from typing import Protocol

import torch.distributed as dist
from torch.distributed import PrefixStore, TCPStore  # type: ignore[attr-defined]

from gpumove.errors import StoreError

_log = logging.getLogger("gpumove")
_CONNECT_S = 10.0


class Board(Protocol):
    """Keys and bytes. Every call may raise StoreError; a connection that hangs makes it hang."""

    @property
    def shared(self) -> bool:
        """Whether somebody else may write to it."""
        ...

    def put(self, key: str, value: bytes) -> None:
        """Write."""
        ...

    def get(self, key: str) -> bytes | None:
        """Read; None if there is nothing."""
        ...

    def swap(self, key: str, old: bytes, new: bytes) -> bytes:
        """Write ``new`` if ``old`` is what is there (b"": nothing), and read."""
        ...

    def count(self, key: str) -> int:
        """Add one to a number, and read it."""
        ...


class OwnBoard:
    """For a job of one rank."""

    shared = False

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._values: dict[str, bytes] = {}
        self._counts: dict[str, int] = {}

    def put(self, key: str, value: bytes) -> None:
        """Write."""
        self._values[key] = value

    def get(self, key: str) -> bytes | None:
        """Read."""
        return self._values.get(key)

    def swap(self, key: str, old: bytes, new: bytes) -> bytes:
        """Write if nothing has changed."""
        with self._lock:
            if self._values.get(key, b"") == old:
                self._values[key] = new
            return self._values[key]

    def count(self, key: str) -> int:
        """Add one."""
        with self._lock:
            self._counts[key] = self._counts.get(key, 0) + 1
            return self._counts[key]


class JobBoard:
    """The job's TCPStore. Operations are short, and one at a time: nothing here waits for a key to appear."""

    shared = True

    def __init__(self, store: PrefixStore) -> None:
        self._store = store

    def put(self, key: str, value: bytes) -> None:
        """Write."""
        try:
            self._store.set(key, value)  # type: ignore[arg-type]
        except RuntimeError as error:
            raise _lost(error) from error

    def get(self, key: str) -> bytes | None:
        """Read. A ``get`` of torch's waits for the key, so it is looked for first."""
        try:
            return self._store.get(key) if self._store.check([key]) else None
        except RuntimeError as error:
            raise _lost(error) from error

    def swap(self, key: str, old: bytes, new: bytes) -> bytes:
        """Write if nothing has changed."""
        try:
            return bytes(self._store.compare_set(key, old, new))  # type: ignore[arg-type]
        except RuntimeError as error:
            raise _lost(error) from error

    def count(self, key: str) -> int:
        """Add one."""
        try:
            return int(self._store.add(key, 1))
        except RuntimeError as error:
            raise _lost(error) from error


def _lost(error: BaseException) -> StoreError:
    text = (str(error).strip().splitlines() or [type(error).__name__])[0]
    return StoreError(f"the job's own store does not answer: {text}", code="store.peers")


def open_board(name: str, world_size: int) -> Board | None:
    """The board of this name: the same for all ranks that ask for it.

    Args:
        name: never used twice in one job.
        world_size: of the job.

    Returns:
        None where the process group was not made with a TCPStore.
    """
    if world_size == 1:
        return OwnBoard()
    try:
        store = dist.distributed_c10d._get_default_store()
        while isinstance(store, PrefixStore):
            store = store.underlying_store
        if not isinstance(store, TCPStore):
            return None
        own = TCPStore(
            store.host, store.port, is_master=False, timeout=timedelta(seconds=_CONNECT_S), wait_for_workers=False
        )
    except Exception as error:  # noqa: BLE001 - no name for it is public, and a job trains without a board
        _log.warning("no connection to the job's own store: ranks learn of notices only when they meet (%s)", error)
        return None
    return JobBoard(PrefixStore(name, own))
