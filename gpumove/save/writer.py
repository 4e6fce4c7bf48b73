"""One rank's save: staged snapshot -> digest -> code -> pack -> put -> part. Runs in the background.

::

    units --(workers)--> digests: equal to the predecessor's? -> references, nothing is sent
                         else code, against the predecessor --> pack --(uploads, within the byte budget)--> put --> part

It knows bytes, boxes and a Store, never live tensors. Whoever calls it decides what to write and commits it.
"""

from __future__ import annotations

import logging
import threading
import time
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextvars import copy_context
from functools import partial

import msgspec

from gpumove.budget import ByteBudget
from gpumove.config import Config
from gpumove.errors import GpumoveError
from gpumove.format import keys
from gpumove.format.codec import Buffer, digest
from gpumove.format.coding import Coder
from gpumove.format.manifest import FORMAT, Pack
from gpumove.format.manifest import encode as to_json
from gpumove.format.pack import PackItem, box_name, build
from gpumove.format.stored import Stored
from gpumove.save.assemble import Heading, Placement, Written, assemble
from gpumove.save.chain import Chain
from gpumove.save.chunks import Bytes, ChunkKey, Cut, Task, cut, data_of
from gpumove.save.pace import Pace
from gpumove.save.predecessor import InMemory, OnDisk, Predecessor
from gpumove.save.request import PartStats, Request
from gpumove.save.units import Answer, Material, UnitCoder, steps_of
from gpumove.state.plan import Item
from gpumove.store.objects import Store

_log = logging.getLogger("gpumove")


class _OpenPack:
    """Chunks on their way into one pack."""

    def __init__(self) -> None:
        self.items: list[PackItem] = []
        self.tasks: list[int] = []
        self.nbytes = 0

    def add(self, index: int, item: PackItem) -> None:
        """One more."""
        self.items.append(item)
        self.tasks.append(index)
        self.nbytes += len(item.stored)


class PartWriter:
    """Writes this rank's parts, one at a time; remembers the last one as the predecessor of the next."""

    def __init__(self, store: Store, config: Config) -> None:
        self._store, self._config = store, config
        self._workers = ThreadPoolExecutor(config.workers, thread_name_prefix="gpumove-encode")
        self._uploads = ThreadPoolExecutor(config.concurrency, thread_name_prefix="gpumove-put")
        self._pace = Pace(always=config.codec == "small", never=config.codec == "raw", threads=config.workers)
        self._coder = Coder()
        self._chain = Chain(max_chain=config.max_chain, max_amplification=config.max_restore_amplification)
        self._predecessor = Predecessor()
        self._counting = threading.Lock()
        self._cached: tuple[Sequence[Item], Cut] | None = None
        self._warned = False

    def heed(self, thrift: int) -> None:
        """From the next save on: 1 to code everything, 2 also in chains of any length; 0 as the settings say."""
        self._pace.insist(always=thrift > 0 or self._config.codec == "small")
        self._chain.lift(lifted=thrift > 1)

    def adopt(self, predecessor: Predecessor) -> None:
        """From now on saves are compared with this."""
        self._predecessor.close()
        self._predecessor = predecessor

    def follow(
        self,
        table: dict[ChunkKey, Stored],
        items: Sequence[Item],
        snapshot: Bytes,
        *,
        rules: Mapping[str, Mapping[str, float]],
        keep: bool,
    ) -> None:
        """Go on from a part that was restored: ``snapshot`` is what ``table`` refers to."""
        pieces, disk = self.cut(items), self._disk(keep=keep)
        if disk is not None:
            for task in pieces.tasks:
                disk.put(task.key, data_of(task, snapshot))
        held = InMemory(snapshot, pieces.places) if keep else disk
        self.adopt(Predecessor(table, held, rules, steps_of(items, snapshot)))

    def cut(self, items: Sequence[Item]) -> Cut:
        """The items cut into chunks; kept while the items are the same object."""
        if self._cached is None or self._cached[0] is not items:
            self._cached = (items, cut(items, self._config.chunk_bytes))
        return self._cached[1]

    def write(self, request: Request, snapshot: Bytes) -> tuple[str, PartStats]:
        """Write one part, durably.

        Returns:
            The part's key, and what it took.

        Raises:
            StoreError: the store failed for good, or the request was cancelled.
        """
        began = time.perf_counter()
        stats = PartStats()
        pieces = self.cut(request.items)
        disk, steps = self._disk(keep=request.keep), steps_of(request.items, snapshot)
        before = self._predecessor
        stats.compared = bool(before.table)
        material = Material(
            request.items, pieces, snapshot, before, request.rules, steps, disk, request.trace,
            request.unchanged,
        )  # fmt: skip
        try:
            written = self._write_chunks(request, material, stats)
            heading = Heading(
                request.run, request.attempt, request.rank, request.world_size, request.step, request.values
            )
            with request.trace.span("assemble"):
                part, table = assemble(heading, request.items, pieces, written, snapshot)
                data = to_json(part)
            key = keys.part_key(
                request.attempt, rank=request.rank, digest=digest(data), plan=request.plan, new_bytes=stats.new_bytes
            )
            request.check()
            with request.trace.span("confirm"):
                request.confirm()
            with request.trace.span("put part", nbytes=len(data)):
                self._store.put(key, data)
        except BaseException:
            if disk is not None:
                disk.close()
            raise
        held = InMemory(snapshot, pieces.places) if request.keep else disk
        self.adopt(Predecessor(table, held, request.rules, steps))
        self._pace.end(stats.state_bytes - stats.clean_bytes)
        stats.seconds = time.perf_counter() - began
        return key, stats

    def _disk(self, *, keep: bool) -> OnDisk | None:
        """Where a save's bytes are kept for the next one, if memory is not the place."""
        config = self._config
        if keep or not config.delta or config.codec == "raw" or config.predecessor_dir is None:
            return None
        try:
            return OnDisk(config.predecessor_dir)
        except OSError as error:
            if not self._warned:
                _log.warning("predecessor_dir cannot be used, so what changed is sent whole: %s", error)
            self._warned = True
            return None

    def close(self) -> None:
        """End the threads."""
        self._workers.shutdown()
        self._uploads.shutdown()
        self._predecessor.close()

    def _write_chunks(self, request: Request, material: Material, stats: PartStats) -> Written:
        """Digest, code, pack and put every chunk that is too large to travel inline."""
        written = Written()
        config, pieces = self._config, material.pieces
        ahead = 2 * config.workers
        budget = ByteBudget(
            config.budget_bytes - config.pack_bytes - ahead * max(pieces.unit_bytes, config.chunk_bytes)
        )
        puts: list[Future[None]] = []
        open_pack = _OpenPack()

        def flush() -> None:
            nonlocal open_pack
            full, open_pack = open_pack, _OpenPack()
            if full.items:
                budget.acquire(full.nbytes)
                put = partial(self._put_pack, request, full, written, budget, stats)
                puts.append(self._uploads.submit(copy_context().run, put))
                _raise_first(puts)

        self._pace.begin()
        self._chain.begin()
        changed: set[int] = set()
        try:
            for index, answer in self._coded(request, material):
                task, item = pieces.tasks[index], request.items[pieces.tasks[index].item]
                written.outcomes[index] = answer.outcome
                stats.state_bytes += task.nbytes
                if answer.data is None:
                    stats.clean_bytes += task.nbytes
                    continue
                changed.add(task.source)
                open_pack.add(index, _pack_item(request, task, item, answer.outcome.codec, answer.data))
                if open_pack.nbytes >= config.pack_bytes:
                    flush()
            flush()
        finally:
            failures = [f.exception() for f in puts]  # waits for all of them: none may outlive the save
        for failure in failures:
            if failure is not None:
                raise failure
        stats.state_bytes += sum(pieces.tasks[i].nbytes for i in pieces.twins)
        stats.peak_bytes = budget.peak_bytes
        stats.clean = frozenset(pieces.tasks[i].source for i in written.outcomes) - changed
        return written

    def _coded(self, request: Request, material: Material) -> Iterator[tuple[int, Answer]]:
        """Outcomes in the order of batches, computed a few batches ahead."""
        waiting: deque[tuple[list[list[int]], Future[list[list[Answer]]]]] = deque()
        coder = UnitCoder(material, self._coder, self._chain, self._pace)

        def code(batch: list[list[int]]) -> list[list[Answer]]:
            request.check()
            return [coder.code(unit) for unit in batch]

        def drain(limit: int) -> Iterator[tuple[int, Answer]]:
            while len(waiting) > limit:
                batch, future = waiting.popleft()
                for unit, answers in zip(batch, future.result()):
                    yield from zip(unit, answers)

        try:
            for batch in material.pieces.batches:
                waiting.append((batch, self._workers.submit(code, batch)))
                yield from drain(2 * self._config.workers - 1)
            yield from drain(0)
        finally:
            for _, future in waiting:
                future.cancel()
            for _, future in waiting:
                if not future.cancelled():
                    future.exception()

    def _put_pack(
        self, request: Request, full: _OpenPack, written: Written, budget: ByteBudget, stats: PartStats
    ) -> None:
        sent = 0
        self._pace.put_begins()
        try:
            request.check()
            with request.trace.span("pack", nbytes=full.nbytes):
                image = build(full.items)
            pack = Pack(request.attempt, image.digest, image.nbytes)
            with request.trace.span("put", nbytes=image.nbytes):
                self._store.put(pack.key, image.buffers)
            sent = image.nbytes
        finally:
            self._pace.put_ends(sent)
            budget.release(full.nbytes)
        for index, item, at in zip(full.tasks, full.items, image.positions):
            written.places[index] = Placement(pack, at, len(item.stored))
        with self._counting:
            stats.new_bytes += image.nbytes
            stats.packs += 1


def _raise_first(futures: list[Future[None]]) -> None:
    for future in futures:
        if future.done() and (error := future.exception()) is not None:
            raise error


def _pack_item(request: Request, task: Task, item: Item, codec: str, data: Buffer) -> PackItem:
    name = box_name(item.fqn, shape=item.shape, offset=task.key.box.offset, box=task.key.box.shape)
    if item.local:
        name = f"{name}@{request.rank}"
    return PackItem(name, item.dtype, task.key.box.shape, codec, data)


def say_failure(store: Store, attempt: str, rank: int, error: BaseException) -> None:
    """Leave word for the committer that this rank will not finish, so that it need not wait. Best effort."""
    code = error.code if isinstance(error, GpumoveError) else "error"
    record = {"format": FORMAT, "rank": rank, "code": code, "error": f"{type(error).__name__}: {error}"[:2000]}
    try:
        store.put(keys.failed_key(attempt, rank), msgspec.json.encode(record))
    except GpumoveError:
        pass  # the store is what failed; the committer's own bound ends its wait
