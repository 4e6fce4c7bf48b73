"""One rank's save: staged snapshot -> digest -> encode -> pack -> put -> part. Runs in the background.

::

    chunks --(workers)--> digest: equal to the predecessor? -> a reference, nothing is sent
                          else encode --> pack --(uploads, within the byte budget)--> put --> part

It knows bytes, boxes and a Store, never live tensors. Whoever calls it decides what to write and commits it.
"""

from __future__ import annotations

import base64
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any, NamedTuple, Protocol

import msgspec

from gpumove.budget import ByteBudget
from gpumove.config import Config
from gpumove.errors import GpumoveError, IntegrityError, StoreError
from gpumove.format import keys
from gpumove.format.boxes import Box, split
from gpumove.format.codec import Buffer, digest, encode
from gpumove.format.manifest import FORMAT, INLINE_BYTES, Chunk, Pack, Part, TensorEntry
from gpumove.format.manifest import encode as to_json
from gpumove.format.pack import PackItem, box_name, build
from gpumove.state.plan import Item
from gpumove.store.objects import Store
from gpumove.store.records import Ref

_BATCH_CHUNKS = 256


class ChunkKey(NamedTuple):
    """What makes a chunk the successor of another: the same box of the same tensor."""

    fqn: str
    dtype: str
    shape: tuple[int, ...]
    box: Box
    local: bool


class Bytes(Protocol):
    """A finished snapshot."""

    def view(self, index: int) -> memoryview:
        """The bytes of one source."""


@dataclass(frozen=True)
class Request:
    """What one rank is to write in one attempt."""

    run: str
    attempt: str
    rank: int
    world_size: int
    step: int
    plan: str
    items: Sequence[Item]
    values: dict[str, Any]
    cancelled: threading.Event = field(default_factory=threading.Event)
    confirm: Callable[[], None] = lambda: None
    """Raises if the snapshot turns out not to be whole; called when all else is written."""

    def check(self) -> None:
        """Stop here if nobody wants the save any more."""
        if self.cancelled.is_set():
            raise StoreError(f"the save of step {self.step} was abandoned", code="store.abandoned")


@dataclass
class PartStats:
    """Bytes of one part, by what became of them, and seconds spent."""

    state_bytes: int = 0
    clean_bytes: int = 0
    new_bytes: int = 0
    packs: int = 0
    peak_bytes: int = 0
    seconds: float = 0.0


class _Task(NamedTuple):
    item: int
    key: ChunkKey
    start: int
    nbytes: int


class _Coded(NamedTuple):
    digest: str
    codec: str
    stored: Buffer | None
    """None: clean, the predecessor's chunk serves."""


class _OpenPack:
    """Chunks on their way into one pack."""

    def __init__(self) -> None:
        self.items: list[PackItem] = []
        self.tasks: list[tuple[int, _Coded]] = []
        self.nbytes = 0


class PartWriter:
    """Writes this rank's parts, one at a time; remembers the last one as the predecessor of the next."""

    def __init__(self, store: Store, config: Config) -> None:
        self._store, self._config = store, config
        self._workers = ThreadPoolExecutor(config.workers, thread_name_prefix="gpumove-encode")
        self._uploads = ThreadPoolExecutor(config.concurrency, thread_name_prefix="gpumove-put")
        self.predecessor: dict[ChunkKey, Ref] = {}
        self._counting = threading.Lock()
        self._cached: tuple[Sequence[Item], list[_Task]] | None = None

    def write(self, request: Request, snapshot: Bytes) -> tuple[str, PartStats]:
        """Write one part, durably.

        Returns:
            The part's key, and what it took.

        Raises:
            StoreError: the store failed for good, or the request was cancelled.
        """
        began = time.perf_counter()
        stats = PartStats()
        tasks = self._tasks(request.items)
        refs = self._write_chunks(request, tasks, snapshot, stats)
        part, table = _assemble(request, tasks, refs, snapshot)
        data = to_json(part)
        key = keys.part_key(
            request.attempt, rank=request.rank, digest=digest(data), plan=request.plan, new_bytes=stats.new_bytes
        )
        request.check()
        request.confirm()
        self._store.put(key, data)
        self.predecessor = table
        stats.seconds = time.perf_counter() - began
        return key, stats

    def close(self) -> None:
        """End the threads."""
        self._workers.shutdown()
        self._uploads.shutdown()

    def _tasks(self, items: Sequence[Item]) -> list[_Task]:
        """The items cut into chunks; kept while the items are the same object."""
        if self._cached is None or self._cached[0] is not items:
            tasks = [
                _Task(n, ChunkKey(i.fqn, i.dtype, i.shape, box, i.local), at, box.volume() * i.item_bytes)
                for n, i in enumerate(items)
                for box, at in split(i.box, i.item_bytes, self._config.chunk_bytes)
            ]
            self._cached = (items, tasks)
        return self._cached[1]

    def _write_chunks(
        self, request: Request, tasks: list[_Task], snapshot: Bytes, stats: PartStats
    ) -> list[Ref | None]:
        """Digest, encode, pack and put every chunk that is too large to travel inline. One Ref per task."""
        refs: list[Ref | None] = [None] * len(tasks)
        config = self._config
        in_codec = 2 * config.workers * config.chunk_bytes
        budget = ByteBudget(config.budget_bytes - config.pack_bytes - in_codec)
        puts: list[Future[None]] = []
        open_pack = _OpenPack()
        first: dict[tuple[int, int], int] = {}
        twins: dict[int, int] = {}

        def flush() -> None:
            nonlocal open_pack
            full, open_pack = open_pack, _OpenPack()
            if full.items:
                budget.acquire(full.nbytes)
                puts.append(self._uploads.submit(self._put_pack, request, full, refs, budget, stats))
                _raise_first(puts)

        try:
            for index, coded in self._coded(request, tasks, snapshot):
                task, item = tasks[index], request.items[tasks[index].item]
                stats.state_bytes += task.nbytes
                if coded.stored is None:
                    refs[index] = self.predecessor[task.key]
                    stats.clean_bytes += task.nbytes
                    continue
                # Tied tensors share a source: the second name points at the first one's bytes.
                if (twin := first.setdefault((item.source, task.start), index)) != index:
                    twins[index] = twin
                    continue
                open_pack.items.append(_pack_item(request, task, item, coded))
                open_pack.tasks.append((index, coded))
                open_pack.nbytes += len(coded.stored)
                if open_pack.nbytes >= config.pack_bytes:
                    flush()
            flush()
        finally:
            failures = [f.exception() for f in puts]  # waits for all of them: none may outlive the save
        for failure in failures:
            if failure is not None:
                raise failure
        for index, twin in twins.items():
            refs[index] = refs[twin]
        stats.peak_bytes = budget.peak_bytes
        return refs

    def _coded(self, request: Request, tasks: list[_Task], snapshot: Bytes) -> Iterator[tuple[int, _Coded]]:
        """Digests and encodings in the order of tasks, computed a few batches ahead."""
        waiting: deque[tuple[list[int], Future[list[_Coded]]]] = deque()

        def code(batch: list[int]) -> list[_Coded]:
            request.check()
            return [self._code(tasks[i], snapshot.view(request.items[tasks[i].item].source)) for i in batch]

        def drain(limit: int) -> Iterator[tuple[int, _Coded]]:
            while len(waiting) > limit:
                batch, future = waiting.popleft()
                yield from zip(batch, future.result())

        try:
            for batch in _batches(tasks, self._config.chunk_bytes):
                waiting.append((batch, self._workers.submit(code, batch)))
                yield from drain(2 * self._config.workers - 1)
            yield from drain(0)
        finally:
            for _, future in waiting:
                future.cancel()
            for _, future in waiting:
                if not future.cancelled():
                    future.exception()

    def _code(self, task: _Task, source: memoryview) -> _Coded:
        data = source[task.start : task.start + task.nbytes]
        if len(data) != task.nbytes:
            raise IntegrityError(f"the copy of {task.key.fqn} has {len(data)} bytes where its box needs {task.nbytes}")
        found = digest(data)
        before = self.predecessor.get(task.key)
        if before is not None and before.chunk.digest == found:
            return _Coded(found, before.chunk.codec, None)
        codec, stored = encode(data, self._config.codec)
        return _Coded(found, codec, stored)

    def _put_pack(
        self, request: Request, full: _OpenPack, refs: list[Ref | None], budget: ByteBudget, stats: PartStats
    ) -> None:
        try:
            request.check()
            image = build(full.items)
            pack = Pack(request.attempt, image.digest, image.nbytes)
            self._store.put(pack.key, image.buffers)
        finally:
            budget.release(full.nbytes)
        for (index, coded), item, at in zip(full.tasks, full.items, image.positions):
            chunk = Chunk(pack=0, at=at, length=len(item.stored), codec=coded.codec, digest=coded.digest)
            refs[index] = Ref(chunk, (pack,))
        with self._counting:
            stats.new_bytes += image.nbytes
            stats.packs += 1


def _raise_first(futures: list[Future[None]]) -> None:
    for future in futures:
        if future.done() and (error := future.exception()) is not None:
            raise error


def _batches(tasks: list[_Task], chunk_bytes: int) -> Iterator[list[int]]:
    """Tasks in runs worth a thread's while; those that travel inline are left out."""
    batch: list[int] = []
    size = 0
    for index, task in enumerate(tasks):
        if task.nbytes <= INLINE_BYTES:
            continue
        if batch and (size + task.nbytes > chunk_bytes or len(batch) >= _BATCH_CHUNKS):
            yield batch
            batch, size = [], 0
        batch.append(index)
        size += task.nbytes
    if batch:
        yield batch


def _pack_item(request: Request, task: _Task, item: Item, coded: _Coded) -> PackItem:
    name = box_name(item.fqn, shape=item.shape, offset=task.key.box.offset, box=task.key.box.shape)
    if item.local:
        name = f"{name}@{request.rank}"
    return PackItem(name, item.dtype, task.key.box.shape, coded.codec, coded.stored or b"")


def _assemble(
    request: Request, tasks: list[_Task], refs: list[Ref | None], snapshot: Bytes
) -> tuple[Part, dict[ChunkKey, Ref]]:
    """The part's record, and the table that the next save compares with."""
    table = PackTable()
    chunks: list[list[Chunk]] = [[] for _ in request.items]
    kept: dict[ChunkKey, Ref] = {}
    for task, ref in zip(tasks, refs):
        box = task.key.box
        if ref is None:
            data = snapshot.view(request.items[task.item].source)[task.start : task.start + task.nbytes]
            inline = base64.b64encode(data).decode()
            chunks[task.item].append(Chunk(offset=box.offset, shape=box.shape, inline=inline))
        else:
            chunk = table.add(ref)
            chunks[task.item].append(msgspec.structs.replace(chunk, offset=box.offset, shape=box.shape))
            kept[task.key] = ref
    entries = [(i.local, TensorEntry(i.fqn, i.dtype, i.shape, tuple(c))) for i, c in zip(request.items, chunks)]
    part = Part(
        format=FORMAT,
        run=request.run,
        attempt=request.attempt,
        rank=request.rank,
        world_size=request.world_size,
        step=request.step,
        packs=tuple(table.packs),
        tensors=tuple(e for local, e in entries if not local),
        local=tuple(e for local, e in entries if local),
        values=request.values,
    )
    return part, kept


class PackTable:
    """The packs that a part refers to, each once, and chunks renumbered to point into it."""

    def __init__(self) -> None:
        self._numbers: dict[Pack, int] = {}

    @property
    def packs(self) -> list[Pack]:
        """In the order of their numbers."""
        return list(self._numbers)

    def add(self, ref: Ref) -> Chunk:
        """The chunk with its own and its bases' pack numbers in this table."""
        return self._renumber(ref.chunk, ref.packs)

    def _renumber(self, chunk: Chunk, packs: Sequence[Pack]) -> Chunk:
        number = self._numbers.setdefault(packs[chunk.pack], len(self._numbers))
        base = None if chunk.base is None else self._renumber(chunk.base, packs)
        return msgspec.structs.replace(chunk, pack=number, base=base)


def say_failure(store: Store, attempt: str, rank: int, error: BaseException) -> None:
    """Leave word for the committer that this rank will not finish, so that it need not wait. Best effort."""
    code = error.code if isinstance(error, GpumoveError) else "error"
    record = {"format": FORMAT, "rank": rank, "code": code, "error": f"{type(error).__name__}: {error}"[:2000]}
    try:
        store.put(keys.failed_key(attempt, rank), msgspec.json.encode(record))
    except GpumoveError:
        pass  # the store is what failed; the committer's own bound ends its wait
