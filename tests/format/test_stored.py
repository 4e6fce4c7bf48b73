"""The graph of stored chunks: to a part's record and back, in an order that can be decoded, and what is refused."""

from __future__ import annotations

import msgspec
import pytest

from gpumove.errors import IntegrityError
from gpumove.format.boxes import Box
from gpumove.format.manifest import FORMAT, Base, Chunk, Pack, Part, TensorEntry
from gpumove.format.stored import Shelf, Stored, Tables, closure

OLD, NEW = Pack("00000001-00000001", "ab" * 16, 1 << 20), Pack("00000001-00000002", "cd" * 16, 1 << 20)
BOX = Box((0,), (6,))


def node(pack: Pack, at: int, *bases: Stored) -> Stored:
    return Stored(pack, at, 10, "sub/1" if bases else "raw/1", f"{at:032x}", 24, bases)


def part_of(tables: Tables, *chunks: Chunk) -> Part:
    entries = tuple(TensorEntry(f"t{n}", "float32", (6,), (c,)) for n, c in enumerate(chunks))
    return Part(
        format=FORMAT, run="r", attempt=NEW.attempt, rank=0, world_size=1, step=2, packs=tables.packs, tensors=entries,
        bases=tables.bases,
    )  # fmt: skip


def test_a_graph_comes_back_and_shared_bases_are_listed_once() -> None:
    m0, v0, p0 = node(OLD, 0), node(OLD, 100), node(OLD, 200)
    m1 = node(NEW, 0, m0)
    v1 = node(NEW, 100, v0, m0, m1)
    p1 = node(NEW, 200, p0, m1, v1)
    tables = Tables()
    part = part_of(tables, *(tables.chunk(BOX, n) for n in (m1, v1, p1)))
    assert len(part.bases) == 5
    assert all(number < index for index, base in enumerate(part.bases) for number in base.bases)
    shelf = Shelf(part)
    found = [shelf.placed(entry)[0].stored for entry in part.tensors]
    assert all(a is not None and a.spot == b.spot and a.chain == 1 for a, b in zip(found, (m1, v1, p1)))
    assert list(closure(f for f in found if f)) == list(closure([m1, v1, p1]))
    assert [n.chain for n in (m0, m1, v1, p1)] == [0, 1, 1, 1]


def test_bases_come_before_what_needs_them_however_long_the_chain() -> None:
    at = node(OLD, 0)
    for n in range(1, 5000):
        at = node(Pack(f"00000001-{n + 1:08d}", "ab" * 16, 1 << 20), 0, at)
    assert at.chain == 4999
    order = list(closure([at]))
    assert len(order) == 5000
    assert order[-1] == at.spot
    tables = Tables()
    part = part_of(tables, tables.chunk(BOX, at))
    assert Shelf(part).placed(part.tensors[0])[0].stored.chain == 4999  # type: ignore[union-attr]


@pytest.mark.parametrize(
    "change",
    [
        {"bases": (0,)},  # itself
        {"bases": (1,)},  # later
        {"bases": (-1,)},
        {"pack": 2},
        {"pack": -1},
        {"at": -5},
        {"length": 1 << 21},
        {"nbytes": 1 << 40},
        {"nbytes": -1},
    ],
)
def test_records_that_point_nowhere_are_damage(change: dict[str, object]) -> None:
    base = Base(pack=0, at=0, length=10, digest="ab" * 16, nbytes=24)
    chunk = Chunk((0,), (6,), 1, 0, 10, "sub/1", "cd" * 16, (0,))
    part = Part(
        format=FORMAT, run="r", attempt=NEW.attempt, rank=0, world_size=1, step=2, packs=(OLD, NEW),
        tensors=(TensorEntry("t", "float32", (6,), (chunk,)),), bases=(base,),
    )  # fmt: skip
    Shelf(part).placed(part.tensors[0])
    with pytest.raises(IntegrityError):
        Shelf(msgspec.structs.replace(part, bases=(msgspec.structs.replace(base, **change),))).placed(part.tensors[0])


@pytest.mark.parametrize("change", [{"bases": (1,)}, {"pack": 2}, {"at": 1 << 20}, {"length": -1}])
def test_so_are_chunks_that_do(change: dict[str, object]) -> None:
    chunk = msgspec.structs.replace(Chunk((0,), (6,), 1, 0, 10, "sub/1", "cd" * 16, (0,)), **change)
    base = Base(pack=0, at=0, length=10, digest="ab" * 16, nbytes=24)
    entry = TensorEntry("t", "float32", (6,), (chunk,))
    part = Part(
        format=FORMAT, run="r", attempt=NEW.attempt, rank=0, world_size=1, step=2, packs=(OLD, NEW), bases=(base,)
    )  # fmt: skip
    with pytest.raises(IntegrityError):
        Shelf(part).placed(entry)
