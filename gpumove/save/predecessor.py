"""What the next save is compared with: where each chunk lies, and, if they are kept, its bytes.

The bytes are those of the last snapshot itself, which the stager then does not overwrite, or a file on a local disk, or
nowhere: then an unchanged chunk is still recognised by its digest, but a changed one is coded by itself.
"""

from __future__ import annotations

import logging
import os
import tempfile
import threading
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Protocol

from gpumove.config import Config
from gpumove.format.stored import Stored
from gpumove.memory import available_bytes
from gpumove.save.chunks import Bytes, ChunkKey, Task, data_of

_log = logging.getLogger("gpumove")
_SHARE = 4
"""Unless told otherwise the kept bytes may take one part in so many of the memory that is free."""


class Held(Protocol):
    """Bytes of a save that is over."""

    def get(self, key: ChunkKey) -> memoryview | None:
        """A chunk's bytes, valid until ``close``; None if they are not there."""

    def close(self) -> None:
        """They are not needed any more."""


class InMemory:
    """The snapshot itself."""

    def __init__(self, snapshot: Bytes, places: Mapping[ChunkKey, Task]) -> None:
        self._snapshot, self._places = snapshot, places

    def get(self, key: ChunkKey) -> memoryview | None:
        """A chunk's bytes."""
        task = self._places.get(key)
        return None if task is None else data_of(task, self._snapshot)

    def close(self) -> None:
        """The stager reuses the memory."""


class OnDisk:
    """A file without a name, so that nothing is left of it whatever happens."""

    def __init__(self, folder: str) -> None:
        self._file = tempfile.TemporaryFile(dir=folder, prefix="gpumove-", buffering=0)  # noqa: SIM115 - see close()
        self._at: dict[ChunkKey, tuple[int, int]] = {}
        self._end = 0
        self._lock = threading.Lock()
        self._broken = False

    def put(self, key: ChunkKey, data: memoryview) -> None:
        """Keep a chunk's bytes. A disk that fails costs nothing but the differences."""
        with self._lock:
            at, self._end = self._end, self._end + len(data)
        try:
            written = 0
            while written < len(data) and not self._broken:
                written += os.pwrite(self._file.fileno(), data[written:], at + written)
        except OSError as error:
            if not self._broken:
                _log.warning("the last save's bytes cannot be kept on disk, so what changed is sent whole: %s", error)
            self._broken = True
            return
        with self._lock:
            self._at[key] = at, len(data)

    def get(self, key: ChunkKey) -> memoryview | None:
        """A chunk's bytes, read back; what the disk made of them is for the caller to check."""
        place = self._at.get(key)
        if place is None or self._broken:
            return None
        at, nbytes = place
        out = memoryview(bytearray(nbytes))
        got = 0
        try:
            while got < nbytes:
                count = os.preadv(self._file.fileno(), [out[got:]], at + got)
                if not count:
                    return None
                got += count
        except OSError:
            return None
        return out

    def close(self) -> None:
        """Give the space back."""
        self._file.close()


@dataclass
class Predecessor:
    """The last part that this rank wrote, or restored; ``rules`` and ``steps`` are the optimizers' state then."""

    table: Mapping[ChunkKey, Stored] = field(default_factory=dict)
    held: Held | None = None
    rules: Mapping[str, Mapping[str, float]] = field(default_factory=dict)
    steps: Mapping[str, float] = field(default_factory=dict)

    def close(self) -> None:
        """Give the bytes back."""
        if self.held is not None:
            self.held.close()


def keeps_in_memory(config: Config, nbytes: int, *, held: int = 0) -> bool:
    """Whether a second copy of ``nbytes`` may stay in host memory between saves.

    Args:
        config: settings.
        nbytes: the size of a snapshot.
        held: memory that snapshots have already: what is left of the machine's is so much less.
    """
    if not config.delta or config.codec == "raw":
        return False
    if config.predecessor_bytes is not None:
        return nbytes <= config.predecessor_bytes
    free = available_bytes()
    return free is None or nbytes <= (free + held) // (_SHARE * config.ranks_here())
