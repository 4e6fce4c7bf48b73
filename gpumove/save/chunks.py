"""How what a rank writes is cut: items into chunks, chunks of a family into units that are coded together."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol

from gpumove.format.boxes import Box, split
from gpumove.format.manifest import INLINE_BYTES
from gpumove.state.plan import Item

_BATCH_CHUNKS = 256


class ChunkKey(NamedTuple):
    """What makes a chunk the successor of another: the same box of the same tensor."""

    fqn: str
    dtype: str
    shape: tuple[int, ...]
    box: Box
    local: bool


class Task(NamedTuple):
    """One chunk to write: ``nbytes`` from byte ``start`` on of a source of the snapshot."""

    item: int
    key: ChunkKey
    source: int
    start: int
    nbytes: int


class Bytes(Protocol):
    """A finished snapshot."""

    def view(self, index: int) -> memoryview:
        """The bytes of one source."""


def data_of(task: Task, snapshot: Bytes) -> memoryview:
    """A chunk's bytes in the snapshot."""
    return snapshot.view(task.source)[task.start : task.start + task.nbytes]


@dataclass(frozen=True)
class Cut:
    """All chunks of a rank.

    ``batches`` are runs of units worth a thread's while, and a unit is a list of tasks that are coded together; tasks
    that travel inline or are ``twins`` (tied tensors: another task has the same bytes) are in none.
    """

    tasks: list[Task]
    batches: list[list[list[int]]]
    twins: dict[int, int]
    places: dict[ChunkKey, Task]
    unit_bytes: int


def cut(items: Sequence[Item], chunk_bytes: int) -> Cut:
    """Cut what a rank writes.

    Args:
        items: boxes of tensors.
        chunk_bytes: what a chunk's size aims at.
    """
    tasks = [task for number, item in enumerate(items) for task in _tasks(number, item, chunk_bytes)]
    first: dict[tuple[int, int, int], int] = {}
    units: dict[object, list[int]] = {}
    twins = {}
    for index, task in enumerate(tasks):
        if task.nbytes <= INLINE_BYTES:
            continue
        if (twin := first.setdefault((task.source, task.start, task.nbytes), index)) != index:
            twins[index] = twin
            continue
        kin = items[task.item].kin
        units.setdefault(index if kin is None else (kin.family, task.key.box), []).append(index)
    sizes = [sum(tasks[i].nbytes for i in unit) for unit in units.values()]
    batches = list(_batches(list(units.values()), sizes, chunk_bytes))
    return Cut(tasks, batches, twins, {t.key: t for t in tasks}, max(sizes, default=0))


def _tasks(number: int, item: Item, chunk_bytes: int) -> Iterator[Task]:
    grain = item.grain or item.item_bytes
    for box, at in split(item.box, grain, chunk_bytes):
        key = ChunkKey(item.fqn, item.dtype, item.shape, box, item.local)
        yield Task(number, key, item.source, at // grain * item.item_bytes, box.volume() * item.item_bytes)


def _batches(units: Sequence[list[int]], sizes: Sequence[int], limit: int) -> Iterator[list[list[int]]]:
    batch: list[list[int]] = []
    size = 0
    for unit, nbytes in zip(units, sizes):
        if batch and (size + nbytes > limit or len(batch) >= _BATCH_CHUNKS):
            yield batch
            batch, size = [], 0
        batch.append(unit)
        size += nbytes
    if batch:
        yield batch
