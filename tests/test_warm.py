"""Chunks by digest: what is here is not fetched, nor what it is decoded from; and what a waiting job keeps of them."""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from gpumove.config import Config
from gpumove.errors import IntegrityError
from gpumove.fetch import fetch
from gpumove.format.boxes import Box
from gpumove.format.codec import digest
from gpumove.format.manifest import Pack
from gpumove.format.stored import Placed, Spot, Stored
from gpumove.ranges import Wanted, groups
from gpumove.restore import read_contents
from gpumove.store.log import Log
from gpumove.store.objects import Store
from gpumove.warm import Ground, Warm
from tests.runs import flip, train

SMALL: dict[str, Any] = {"chunk_bytes": 4096, "pack_bytes": 8192}


@pytest.fixture
def store(tmp_path: Path) -> Iterator[Store]:
    """A run with three checkpoints, the later ones mostly differences."""
    train(str(tmp_path / "run"), (1, 2, 3), codec="small")
    found = Store.open(str(tmp_path / "run"), Config(**SMALL))
    yield found
    found.close()


def needed(store: Store, step: int) -> list[Wanted]:
    """All chunks of a checkpoint; nobody uses them."""
    checkpoint = Log(store).read().find(step)
    assert checkpoint is not None
    contents = read_contents(store, checkpoint, rank=0, config=Config(**SMALL))
    tables = (contents.tensors, contents.local)
    return [Wanted(fqn, chunk, lambda _: None) for table in tables for fqn, chunks in table.items() for chunk in chunks]


def stored(wanted: list[Wanted]) -> list[Stored]:
    return [want.placed.stored for want in wanted if want.placed.stored is not None]


def read(store: Store, wanted: list[Wanted], warm: Warm | None = None) -> tuple[int, dict[str, bytes]]:
    """Bytes fetched, and every chunk by its digest."""
    found: dict[str, bytes] = {}

    def keep(want: Wanted) -> Wanted:
        node = want.placed.stored
        return want if node is None else want._replace(use=lambda data: found.update({node.digest: bytes(data)}))

    nbytes = fetch(store, [keep(w) for w in wanted], config=Config(**SMALL), held=None if warm is None else warm.get)
    return nbytes, found


@pytest.mark.parametrize("place", ["memory", "file"])
def test_what_is_here_is_not_fetched(place: str, store: Store, tmp_path: Path) -> None:
    config = Config(
        **SMALL, **({} if place == "memory" else {"predecessor_bytes": 0, "predecessor_dir": str(tmp_path)})
    )
    warm = Warm(store, config)
    first, second = needed(store, 1), needed(store, 3)
    cold, truth = read(store, second)
    assert warm.follow(first) > 0
    assert warm.follow(first) == 0, "nothing is new"
    part, found = read(store, second, warm)
    assert found == truth
    assert 0 < part < cold
    assert warm.follow(second) > 0
    none, found = read(store, second, warm)
    assert (none, found) == (0, truth)
    warm.close()
    assert read(store, second, warm) == (cold, truth)
    assert list(tmp_path.iterdir()) == [tmp_path / "run"], "the file has no name"


def test_only_what_the_newest_needs_is_kept(store: Store) -> None:
    warm = Warm(store, Config(**SMALL))
    for step in (1, 2, 3):
        wanted = needed(store, step)
        warm.follow(wanted)
        assert set(warm._kept) == {node.digest for node in stored(wanted)}
        assert warm.nbytes == sum({node.digest: node.nbytes for node in stored(wanted)}.values())
    assert all(digest(data) == name for name, data in warm._kept.items())


def test_a_checkpoint_that_was_left_out_is_no_loss(store: Store) -> None:
    warm = Warm(store, Config(**SMALL))
    warm.follow(needed(store, 1))
    warm.follow(needed(store, 3))
    assert set(warm._kept) == {node.digest for node in stored(needed(store, 3))}
    warm.follow(needed(store, 2))  # and back: what is decoded from nothing here is read whole
    assert all(digest(data) == name for name, data in warm._kept.items())


def test_memory_that_went_bad_is_no_damage(store: Store) -> None:
    warm = Warm(store, Config(**SMALL))
    wanted = needed(store, 3)
    _, truth = read(store, wanted)
    for step in (2, 3):  # as a base, and as what is wanted itself
        warm.follow(needed(store, step))
        for data in warm._kept.values():
            np.frombuffer(data, dtype=np.uint8)[len(data) // 2] ^= 4
        nbytes, found = read(store, wanted, warm)
        assert found == truth
        assert nbytes > 0


def test_room_is_bounded_and_the_rest_is_fetched(store: Store, caplog: pytest.LogCaptureFixture) -> None:
    wanted = needed(store, 3)
    _, truth = read(store, wanted)
    whole = sum({node.digest: node.nbytes for node in stored(wanted)}.values())
    warm = Warm(store, Config(**SMALL, predecessor_bytes=whole // 2))
    for step in (1, 2, 3):
        warm.follow(needed(store, step))
        assert whole // 4 < warm.nbytes <= whole // 2
    assert read(store, wanted, warm)[1] == truth
    assert caplog.text.count("do not fit in memory") == 1


def test_a_full_disk_costs_nothing_but_the_head_start(
    store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.posix_fallocate", full)
    warm = Warm(store, Config(**SMALL, predecessor_bytes=0, predecessor_dir=str(tmp_path)))
    warm.follow(needed(store, 3))
    assert warm.nbytes == 0
    assert read(store, needed(store, 3), warm) == read(store, needed(store, 3))
    assert caplog.text.count("No space left") == 1


def test_damage_leaves_what_was_there(store: Store, tmp_path: Path) -> None:
    warm = Warm(store, Config(**SMALL))
    warm.follow(needed(store, 1))
    wanted = needed(store, 2)
    new = next(node for node in stored(wanted) if node.pack not in {n.pack for n in stored(needed(store, 1))})
    flip(tmp_path / "run" / new.pack.key, new.at + new.length // 2)
    with pytest.raises(IntegrityError):
        warm.follow(wanted)
    assert all(digest(data) == name for name, data in warm._kept.items())
    with unharmed(tmp_path / "run" / new.pack.key, new.at + new.length // 2):
        warm.follow(wanted)
    assert set(warm._kept) == {node.digest for node in stored(wanted)}


@contextmanager
def unharmed(path: Path, at: int) -> Iterator[None]:
    flip(path, at)
    yield
    flip(path, at)


def test_room_that_is_given_back_is_used_again() -> None:
    ground = Ground()
    rooms = [ground.take(n) for n in (1000, 1000, 64, 5)]
    for number, room in enumerate(rooms):
        room[:] = bytes([number]) * len(room)
    assert [bytes(r) for r in rooms] == [bytes([n]) * len(r) for n, r in enumerate(rooms)], "they do not overlap"
    ground.give(rooms[1])
    again = ground.take(1000)
    again[0] = 77
    assert rooms[1][0] == 77
    assert len(ground.take(200 << 20)) == 200 << 20


def test_groups_list_bases_before_what_needs_them() -> None:
    draw = random.Random(5)
    for _ in range(200):
        nodes: list[Stored] = []
        for number in range(draw.randint(1, 40)):
            bases = tuple(draw.sample(nodes, min(len(nodes), draw.choice((0, 0, 1, 2)))))
            nodes.append(Stored(Pack(f"{number % 3}", "d", 1 << 40), number, 1, "sub/1", f"{number}", 1, bases))
        wanted = [
            Wanted(node.digest, Placed(Box((), ()), 1, node), lambda _: None)
            for node in draw.sample(nodes, draw.randint(1, len(nodes)))
        ]
        here = {node.spot for node in draw.sample(nodes, len(nodes) // 4)}
        found = groups(wanted, here=here)
        for group in found:
            done: set[Spot] = set()
            for spot, node in group.nodes.items():
                assert all(base.spot in done or base.spot in here for base in node.bases)
                done.add(spot)
        listed = [spot for group in found for spot in group.nodes]
        assert len(listed) == len(set(listed))
        assert {w.placed.stored.spot for w in wanted if w.placed.stored} - here <= set(listed)
        assert not here & set(listed)
