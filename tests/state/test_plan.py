"""Plans: boxes cover exactly, writing is shared evenly, chunks are contiguous, and misfits are listed."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from gpumove.errors import LayoutError
from gpumove.format.boxes import Box, cover_problem, intersect, split
from gpumove.state.plan import Shard, assign

SHAPES = st.lists(st.integers(0, 7), max_size=4).map(tuple)


@given(SHAPES, st.integers(1, 64), st.sampled_from([1, 2, 4, 8]))
def test_chunks_are_contiguous_runs_that_cover_a_box(shape: tuple[int, ...], chunk_items: int, item_bytes: int) -> None:
    whole = np.arange(math.prod(shape)).reshape(shape)
    seen: list[int] = []
    for box, at in split(Box((0,) * len(shape), shape), item_bytes, chunk_items * item_bytes):
        part = whole[tuple(slice(o, o + n) for o, n in zip(box.offset, box.shape))].ravel()
        assert at == len(seen) * item_bytes
        assert part.size <= max(chunk_items, 1) or part.size == 0
        seen += part.tolist()
    assert seen == list(range(whole.size))


@given(SHAPES, st.data())
def test_intersections_are_what_sets_of_elements_say(shape: tuple[int, ...], data: st.DataObject) -> None:
    def draw() -> Box:
        offset = tuple(data.draw(st.integers(0, n)) for n in shape)
        return Box(offset, tuple(data.draw(st.integers(0, n - o)) for n, o in zip(shape, offset)))

    def elements(box: Box) -> set[tuple[int, ...]]:
        return set(itertools.product(*(range(o, o + n) for o, n in zip(box.offset, box.shape))))

    a, b = draw(), draw()
    common = intersect(a, b)
    assert (elements(common) if common else set()) == elements(a) & elements(b)
    total = elements(a) | elements(b) | {()} if not shape else elements(a) | elements(b)
    exact = len(total) == math.prod(shape) and not (elements(a) & elements(b))
    if shape:
        assert (cover_problem(shape, [a, b]) is None) == exact


def shard(fqn: str, shape: tuple[int, ...], offset: tuple[int, ...] | None = None, box: tuple[int, ...] | None = None,
          **more: str) -> Shard:  # fmt: skip
    return Shard(
        fqn, more.get("dtype", "float32"), shape, offset or (0,) * len(shape), box or shape, 4, more.get("probe", "")
    )


def written(layouts: list[list[Shard]], pieces: list[list[tuple[int, int, int]]]) -> dict[str, list[Box]]:
    found: dict[str, list[Box]] = {}
    for layout, mine in zip(layouts, pieces):
        for index, start, stop in mine:
            s = layout[index]
            box = Box(s.offset, s.box)
            if s.box:
                box = Box((s.offset[0] + start, *s.offset[1:]), (stop - start, *s.box[1:]))
            found.setdefault(s.fqn, []).append(box)
    return found


@pytest.mark.parametrize("ranks", [1, 2, 3, 8])
def test_replicas_are_written_once_and_evenly(ranks: int) -> None:
    layout = [shard("big", (1001, 64)), shard("scalar", ()), *(shard(f"t{i}", (i + 1, 16)) for i in range(50))]
    layouts = [layout] * ranks
    pieces = assign(layouts, split_bytes=4096)
    for fqn, boxes in written(layouts, pieces).items():
        assert cover_problem(next(s.shape for s in layout if s.fqn == fqn), boxes) is None
    load = [sum((b - a) * math.prod(layout[i].box[1:]) * 4 for i, a, b in mine) for mine in pieces]
    assert max(load) < 1.1 * sum(load) / ranks + 4096


def test_shards_are_written_by_their_holder_and_hybrid_replicas_by_one() -> None:
    halves = [shard("w", (5, 2), (0, 0), (3, 2)), shard("w", (5, 2), (3, 0), (2, 2))]
    layouts = [[halves[0]], [halves[1]], [halves[0]], [halves[1]]]
    pieces = assign(layouts, split_bytes=1 << 20)
    assert cover_problem((5, 2), written(layouts, pieces)["w"]) is None


def test_empty_shards_write_nothing_and_empty_tensors_are_not_forgotten() -> None:
    layouts = [
        [shard("w", (1, 4), (0, 0), (1, 4)), shard("none", (0, 3))],
        [shard("w", (1, 4), (1, 0), (0, 4)), shard("none", (0, 3))],
    ]
    found = written(layouts, assign(layouts, split_bytes=1))
    assert found["w"] == [Box((0, 0), (1, 4))]
    assert found["none"] == [Box((0, 0), (0, 3))]


def test_everything_that_does_not_fit_is_listed() -> None:
    layouts = [
        [shard("gap", (4,), (0,), (1,)), shard("twice", (4,), (0,), (3,)), shard("dtype", (2,)),
         shard("values", (2,), probe="a")],
        [shard("gap", (4,), (2,), (2,)), shard("twice", (4,), (2,), (2,)), shard("dtype", (2,), dtype="int32"),
         shard("values", (2,), probe="b")],
    ]  # fmt: skip
    with pytest.raises(LayoutError) as caught:
        assign(layouts, split_bytes=1)
    for words in (
        "gap lacks 1 of its 4",
        "twice has overlapping",
        "dtype is float32[2] on rank 0 and int32[2] on rank 1",
        "values has different values on ranks 0 and 1",
    ):
        assert words in str(caught.value)


def test_a_family_goes_to_one_rank_in_the_same_rows() -> None:
    def layout(n: int) -> list[Shard]:
        members = [("p", 2), ("p.m", 4), ("p.v", 4)]
        found = [shard(f"{k}{name}", (64 + k, 8))._replace(family=f"{k}p") for name, size in members for k in range(n)]
        return [s._replace(item_bytes=size) for s, size in zip(found, [size for _, size in members for _ in range(n)])]

    for ranks, split_bytes in ((2, 1 << 20), (3, 512)):
        layouts = [layout(5) for _ in range(ranks)]
        pieces = assign(layouts, split_bytes=split_bytes)
        for mine in pieces:
            runs: dict[str, set[tuple[int, int]]] = {}
            count: dict[str, int] = {}
            for index, start, stop in mine:
                family = layouts[0][index].family
                runs.setdefault(family, set()).add((start, stop))
                count[family] = count.get(family, 0) + 1
            assert all(len(found) == 1 for found in runs.values())
            assert set(count.values()) == {3}
        for fqn, boxes in written(layouts, pieces).items():
            assert cover_problem((64 + int(fqn[0]), 8), boxes) is None
