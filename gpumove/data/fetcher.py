"""Fetches shards into the folder, in the order in which they are wanted, with threads of its own.

A shard is looked for in the folder, claimed, read in ranges by all threads at once, compared with what is known of its
bytes, and given its name. Failures ahead of use are kept quiet: whoever asks for the shard has it tried again, and
hears of it then.
"""

from __future__ import annotations

import logging
import math
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial

from gpumove.config import Config
from gpumove.data.folder import Folder, Lease, Not, Part, said
from gpumove.data.shard import Shard, ranges
from gpumove.data.sums import wrong
from gpumove.errors import GpumoveError, IntegrityError, ObjectNotFoundError, StoreError, describe, rebuild
from gpumove.fetch import Buffers
from gpumove.store import retry
from gpumove.store.objects import Store

_log = logging.getLogger("gpumove")

_LOOK_S = 0.1
"""Between two looks whether somebody else has fetched a shard, or made room for it."""
_TRIES = 2
"""How often a shard is read whole that does not have its checksum."""
_FULL_TRIES = 10
"""On a full disk, so many looks apart: what is given up for it takes a moment to go."""
_MIB = 1 << 20


class Fetcher:
    """One process's fetching. ``want`` says what is to be there, ``wait`` waits for it.

    Args:
        store: where shards come from.
        folder: where they go.
        config: how many calls may be in flight, and how patient to be.
        sizes: of shards, where they are known.
        digests: of shards, where they are known.
    """

    def __init__(
        self, store: Store, folder: Folder, config: Config, *, sizes: Mapping[str, int], digests: Mapping[str, str]
    ) -> None:
        self._store, self._folder, self._sizes, self._digests = store, folder, sizes, digests
        self._patience_s = config.retry_s
        self._shards: dict[str, Shard] = {}
        self._changed = threading.Condition()
        self._closed = False
        self._buffers = Buffers()
        self.fetched = self.fetched_bytes = 0
        count = config.concurrency if store.parallel else config.workers
        self._threads = [threading.Thread(target=self._run, name="gpumove-stage", daemon=True) for _ in range(count)]
        for thread in self._threads:
            thread.start()

    def want(self, names: Sequence[str]) -> None:
        """From now on these are wanted, the first one first, and no others: those are let go."""
        done: list[Lease] = []
        with self._changed:
            for rank, name in enumerate(names):
                self._shards.setdefault(name, Shard(name, rank)).rank = rank
            for name in set(self._shards) - set(names):
                shard = self._shards[name]
                shard.rank = math.inf
                if shard.state not in ("opening", "loading", "closing"):
                    del self._shards[name]
                    done += [shard.lease] if shard.lease else []
            self._changed.notify_all()
        for lease in done:
            self._folder.release(lease)

    def wait(self, name: str) -> Lease:
        """Wait for a shard that is wanted.

        Raises:
            StoreError: it cannot be read, or not be written. IntegrityError: its bytes are wrong.
            ConfigError: a file is in its place that was not staged.
        """
        with self._changed:
            shard = self._shards[name]
            shard.asked = True
            if shard.state in ("failed", "parked"):
                shard.state, shard.error, shard.tries, shard.full = "wanted", None, 0, 0
            shard.parked_since = 0.0
            self._changed.notify_all()
            while shard.lease is None:
                if shard.state == "failed" and shard.error is not None:
                    shard.asked = False
                    raise rebuild(describe(shard.error))
                if self._closed:
                    raise StoreError(f"{self._store.url}: staging was closed", code="store.closed")
                self._check_patience(shard)
                self._changed.wait(1.0)
            return shard.lease

    def _check_patience(self, shard: Shard) -> None:
        """Nothing else bounds the wait for another process."""
        if shard.state != "parked" or shard.parked_for is not Not.ALONE or shard.info is None:
            return
        waited_s = time.monotonic() - shard.parked_since
        if waited_s > self._patience_s + shard.info.nbytes / _MIB:
            raise StoreError(
                f"{self._folder.path / shard.name}: another process of this machine has been fetching it for "
                f"{waited_s:.0f} s; look for one that was stopped",
                code="store.timeout",
            )

    def close(self) -> None:
        """Let go of everything. Calls in flight end soon, by themselves."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()
        until = time.monotonic() + 5.0
        for thread in self._threads:
            thread.join(timeout=max(0.0, until - time.monotonic()))
        for shard in list(self._shards.values()):
            if shard.lease is not None:
                self._folder.release(shard.lease)
            elif shard.part is not None and shard.state == "loading" and not shard.busy:
                self._folder.drop(shard.part)

    # ---------------------------------------------------------------- threads

    def _run(self) -> None:
        with retry.unless(lambda: self._closed):
            while (job := self._next()) is not None:
                job()

    def _next(self) -> Callable[[], None] | None:
        """The next piece of work; None at the end."""
        with self._changed:
            while not self._closed:
                for shard in sorted(self._shards.values(), key=lambda s: s.rank):
                    if (job := self._job(shard)) is not None:
                        return job
                parked = any(shard.state == "parked" for shard in self._shards.values())
                self._changed.wait(_LOOK_S if parked else None)
            return None

    def _job(self, shard: Shard) -> Callable[[], None] | None:
        """What is to be done for a shard now, if anything."""
        unwanted = shard.rank == math.inf
        if shard.state == "wanted" or (shard.state == "parked" and time.monotonic() >= shard.look_at):
            shard.state = "opening"
            return partial(self._open, shard)
        if shard.state != "loading":
            return None
        if not shard.busy and (unwanted or not shard.ranges):
            shard.state = "closing"
            return partial(self._settle, shard)
        if unwanted or not shard.ranges:
            return None
        shard.busy += 1
        return partial(self._read, shard, *shard.ranges.pop())

    def _open(self, shard: Shard) -> None:
        """Find it in the folder, or become the one who fetches it."""
        try:
            found: Lease | Part | Not | None = self._folder.hold(shard.name, self._sizes.get(shard.name))
            if found is None:
                shard.info = shard.info or self._store.exists(shard.name)
                if shard.info is None:
                    raise ObjectNotFoundError(f"{self._store.url}/{shard.name} does not exist")
                found = self._folder.claim(shard.name, shard.info.nbytes, must=shard.asked)
        except Exception as error:  # noqa: BLE001 - kept for whoever asks for the shard
            self._end(shard, error=error)
            return
        if isinstance(found, Lease):
            self._end(shard, lease=found)
            return
        with self._changed:
            if isinstance(found, Part):
                shard.state, shard.part, shard.tries = "loading", found, shard.tries + 1
                shard.ranges = ranges(found.nbytes)
            else:
                now = time.monotonic()
                shard.state, shard.parked_for, shard.look_at = "parked", found, now + _LOOK_S
                shard.parked_since = shard.parked_since or now
            self._changed.notify_all()

    def _read(self, shard: Shard, start: int, stop: int) -> None:
        """One range, from the store to the part."""
        error: Exception | None = None
        try:
            (got,) = self._store.get_ranges(shard.name, [(start, stop)], [self._buffers.take(stop - start)])
            view = memoryview(got)
            with said(self._folder.path / shard.name):
                assert shard.part is not None
                shard.part.write(start, view)
            self._buffers.give(view)
        except Exception as caught:  # noqa: BLE001 - kept for whoever asks for the shard
            error = caught
        with self._changed:
            shard.busy -= 1
            if error is not None:
                shard.ranges, shard.error = [], shard.error or rebuild(describe(error))
            self._changed.notify_all()

    def _settle(self, shard: Shard) -> None:
        """Nobody reads ranges of it any more: publish it, or give it up."""
        part, error = shard.part, shard.error
        assert part is not None
        if error is None and not shard.ranges:
            try:
                if (lease := self._checked(shard, part)) is not None:
                    with self._changed:
                        self.fetched, self.fetched_bytes = self.fetched + 1, self.fetched_bytes + part.nbytes
                    self._end(shard, lease=lease)
                    return
            except Exception as caught:  # noqa: BLE001 - kept for whoever asks for the shard
                error = rebuild(describe(caught))
        self._folder.drop(part)
        if error is None:
            shard.info = None  # damaged on the way, or replaced meanwhile: once more, if it is still wanted
        self._end(shard, error=error)

    def _checked(self, shard: Shard, part: Part) -> Lease | None:
        """Publish a part if its bytes are right; None if it is to be read again."""
        known = shard.info.sum if shard.info else ""
        with said(self._folder.path / shard.name):
            problem = wrong(part.fd, part.nbytes, [self._digests.get(shard.name, ""), known])
        if not problem:
            return self._folder.publish(part)
        if shard.tries < _TRIES:
            _log.warning("%s/%s is read again: %s", self._store.url, shard.name, problem)
            return None
        raise IntegrityError(
            f"{self._store.url}/{shard.name} is damaged: {problem}, {shard.tries} times in a row; put it there again",
            code="integrity.transfer",
        )

    def _end(self, shard: Shard, *, lease: Lease | None = None, error: Exception | None = None) -> None:
        """What an attempt came to: the shard, a failure, or neither, which means another attempt."""
        full = isinstance(error, GpumoveError) and error.code in (retry.FULL.code, retry.QUOTA.code)
        if full and shard.asked and self._make_room(shard):
            error = None
        with self._changed:
            shard.part, shard.error, shard.lease = None, None, lease
            if shard.rank == math.inf:
                self._shards.pop(shard.name, None)
            elif error is not None:
                shard.state, shard.error = "failed", rebuild(describe(error))
                if not shard.asked:
                    _log.info("%s/%s could not be fetched ahead: %s", self._store.url, shard.name, error)
            elif lease is None:
                shard.state, shard.parked_for, shard.look_at = "parked", None, time.monotonic() + _LOOK_S
            else:
                shard.state = "ready"
            self._changed.notify_all()
        if lease is not None and shard.rank == math.inf:
            self._folder.release(lease)

    def _make_room(self, shard: Shard) -> bool:
        """On a full disk, give up what nobody has asked for yet, and what is kept. Whether to try again."""
        given_up: list[Lease] = []
        with self._changed:
            shard.full += 1
            for other in self._shards.values():
                if other.asked or other.state not in ("loading", "ready"):
                    continue
                other.ranges, other.error = [], StoreError("the disk is full", code=retry.FULL.code)
                if other.lease is not None:
                    given_up.append(other.lease)
                    other.state, other.lease = "failed", None
        for lease in given_up:
            self._folder.release(lease)
        if shard.info is not None:
            self._folder.make_room(shard.info.nbytes)
        return shard.full < _FULL_TRIES
