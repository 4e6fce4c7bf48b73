"""Decoded chunks by digest, kept while a job waits for its run: what is here need not be fetched once it may begin.

It knows stored chunks and a Store, neither tensors nor logs. It keeps what the newest checkpoint that it was shown
needs, and while it takes up the next one, what that is decoded from.
"""

from __future__ import annotations

import logging
import mmap
import os
import sys
import tempfile
import threading
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from contextlib import suppress
from functools import partial
from itertools import accumulate

import numpy as np

from gpumove.config import Config
from gpumove.fetch import fetch
from gpumove.format.stored import Stored, closure
from gpumove.memory import available_bytes
from gpumove.ranges import Wanted
from gpumove.store.objects import Store

_log = logging.getLogger("gpumove")
_SLAB = 64 << 20
_ALIGN = 64
_SHARE = 2
"""Unless told otherwise it may take one part in so many of the host memory that is free."""


class Ground:
    """Room for bytes, in slabs of memory or of a nameless file; what is given back is used again.

    Fresh memory costs more to touch than to fill, and chunks have few sizes, so room is kept by its size.
    """

    def __init__(self, folder: str | None = None) -> None:
        """Nothing is taken yet; a folder is one on a local disk."""
        self._folder = folder
        self._rest = memoryview(b"")
        self._free: dict[int, list[memoryview]] = defaultdict(list)

    def take(self, nbytes: int) -> memoryview:
        """Room.

        Raises:
            OSError: there is none.
        """
        if self._free[nbytes]:
            return self._free[nbytes].pop()
        width = -(-nbytes // _ALIGN) * _ALIGN
        if len(self._rest) < width:
            self._rest = self._slab(max(_SLAB, width))
        room, self._rest = self._rest[:nbytes], self._rest[width:]
        return room

    def give(self, room: memoryview) -> None:
        """Nobody uses it any more."""
        self._free[len(room)].append(room)

    def _slab(self, nbytes: int) -> memoryview:
        if self._folder is None:
            slab = mmap.mmap(-1, nbytes)
            with suppress(OSError):  # not every kernel has huge pages
                slab.madvise(mmap.MADV_HUGEPAGE)
        else:
            with tempfile.TemporaryFile(dir=self._folder, prefix="gpumove-") as file:
                os.posix_fallocate(file.fileno(), 0, nbytes)  # a full disk says so here, and not by a signal later
                slab = mmap.mmap(file.fileno(), nbytes)
        return memoryview(slab)


class Warm:
    """What is kept of one rank's share. Any thread may ask; ``follow`` is one thread's at a time."""

    def __init__(self, store: Store, config: Config) -> None:
        self._store, self._config = store, config
        self._kept: dict[str, memoryview] = {}
        self._lock = threading.Lock()
        self._ground: Ground | None = None
        self._most_bytes = 0
        self._full = self._told = False

    def get(self, node: Stored) -> memoryview | None:
        """A chunk's bytes, if they are here. They stay as they are until the next ``follow``."""
        return self._kept.get(node.digest)

    @property
    def nbytes(self) -> int:
        """Bytes kept."""
        with self._lock:
            return sum(map(len, self._kept.values()))

    def follow(self, wanted: Sequence[Wanted]) -> int:
        """Fetch, verify and decode what is lacking of a newer checkpoint, and let go of what it does not need.

        What was taken up stays so if it fails.

        Args:
            wanted: all that this rank needs of it, in an order that lasts.

        Returns:
            Bytes fetched.

        Raises:
            IntegrityError: a chunk is missing or damaged.
            StoreError: the store failed, or nobody wants it any more.
        """
        newest = self._chosen(wanted)
        lacking = [(want, node) for want, node in newest.values() if node.digest not in self._kept]
        # All the way down, although most are decoded from what is here directly: what is here may turn out to be bad.
        bases = [{base.digest for base in closure(node.bases).values()} & self._kept.keys() for _, node in lacking]
        uses = Counter(digest for some in bases for digest in some)
        with self._lock:
            self._drop(digest for digest in [*self._kept] if digest not in newest and not uses[digest])

        def take(data: memoryview, digest: str, used: set[str]) -> None:
            room = self._room(len(data))
            if room is not None:
                np.copyto(np.frombuffer(room, dtype=np.uint8), np.frombuffer(data, dtype=np.uint8))
            with self._lock:
                if room is not None:
                    self._kept[digest] = room
                uses.subtract(used)
                self._drop(old for old in used if not uses[old] and old not in newest)

        todo = [
            Wanted(want.name, want.placed, partial(take, digest=node.digest, used=used))
            for (want, node), used in zip(lacking, bases)
        ]
        return fetch(self._store, todo, config=self._config, held=self.get)

    def _chosen(self, wanted: Sequence[Wanted]) -> dict[str, tuple[Wanted, Stored]]:
        """By digest, the chunks to keep: all, or the first ones if there is no room for all."""
        found = {node.digest: (want, node) for want in wanted if (node := want.placed.stored) is not None}
        if self._ground is None:
            self._ground, self._most_bytes = self._place(sum(node.nbytes for _, node in found.values()))
        sizes = accumulate(node.nbytes for _, node in found.values())
        chosen = {digest: found[digest] for digest, size in zip(found, sizes) if size <= self._most_bytes}
        if len(chosen) < len(found) and not self._told:
            self._told = True
            _log.warning("%d of %d chunks do not fit in memory and are fetched when the run is handed over: "
                         "set predecessor_dir", len(found) - len(chosen), len(found))  # fmt: skip
        return chosen

    def _place(self, nbytes: int) -> tuple[Ground, int]:
        """Where to keep so much, and how much of it at most."""
        most, free = self._config.predecessor_bytes, available_bytes()
        if most is None:
            most = nbytes if free is None else free // (_SHARE * self._config.ranks_here())
        if nbytes > most and self._config.predecessor_dir is not None:
            return Ground(self._config.predecessor_dir), sys.maxsize
        return Ground(), most

    def _room(self, nbytes: int) -> memoryview | None:
        with self._lock:
            if self._ground is None or self._full:
                return None
            try:
                return self._ground.take(nbytes)
            except OSError as error:
                _log.warning("no more can be kept while waiting, and is fetched when the run is handed over: %s", error)
                self._full = True
                return None

    def _drop(self, digests: Iterable[str]) -> None:
        """Let go; with the lock held."""
        for digest in digests:
            room = self._kept.pop(digest, None)
            if room is not None and self._ground is not None:
                self._ground.give(room)

    def close(self) -> None:
        """Let go of everything. Nobody may be fetching."""
        with self._lock:
            self._kept.clear()
            self._ground = None
