"""Plans: boxes cover exactly, writing is shared evenly, chunks are contiguous, and misfits are listed."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from gpumove.errors import ConfigError, LayoutError
from gpumove.format.boxes import Box, cover_problem, intersect, split
from gpumove.state.capture import Job
from gpumove.state.layout import Layout, Planner
from gpumove.state.peers import Peers
from gpumove.state.plan import Gathered, Kind, Piece, Table, check, share

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


class Shard(NamedTuple):
    """A rank's part of one tensor."""

    fqn: str
    kind: Kind
    box: Box
    family: str = ""
    probe: str = ""


def shard(fqn: str, shape: tuple[int, ...], offset: tuple[int, ...] | None = None, box: tuple[int, ...] | None = None,
          *, dtype: str = "float32", item_bytes: int = 4, family: str = "", probe: str = "") -> Shard:  # fmt: skip
    where = Box(offset or (0,) * len(shape), box or shape)
    return Shard(fqn, Kind(dtype, shape, item_bytes), where, family, probe)


def gather(layouts: list[list[Shard]]) -> Gathered:
    """What the ranks' planners would have told each other."""
    tables: list[Table] = []
    of, boxes = [], []
    for layout in layouts:
        cut = list(dict.fromkeys((s.kind, s.box) for s in layout))
        table = Table(
            [s.fqn for s in layout], [cut.index((s.kind, s.box)) for s in layout], [kind for kind, _ in cut],
            [s.family for s in layout], [s.probe for s in layout],
        )  # fmt: skip
        tables += [table] if table not in tables else []
        of.append(tables.index(table))
        boxes.append([box for _, box in cut])
    return Gathered(tables, of, boxes)


def planned(layouts: list[list[Shard]], *, split_bytes: int) -> list[list[Piece]]:
    found = gather(layouts)
    check(found)
    return [share(found, rank, split_bytes=split_bytes) for rank in range(len(layouts))]


def rows(piece: Piece, layout: list[Shard]) -> Box:
    box = layout[piece.tensor].box
    if not box.shape:
        return box
    return Box((box.offset[0] + piece.start, *box.offset[1:]), (piece.stop - piece.start, *box.shape[1:]))


def written(layouts: list[list[Shard]], pieces: list[list[Piece]]) -> dict[str, list[Box]]:
    found: dict[str, list[Box]] = {}
    for layout, mine in zip(layouts, pieces):
        for piece in mine:
            found.setdefault(layout[piece.tensor].fqn, []).append(rows(piece, layout))
    return found


def nbytes(layout: list[Shard], mine: list[Piece]) -> int:
    return sum(rows(p, layout).volume() * layout[p.tensor].kind.item_bytes for p in mine)


@pytest.mark.parametrize("ranks", [1, 2, 3, 8])
def test_replicas_are_written_once_and_evenly(ranks: int) -> None:
    layout = [shard("big", (1001, 64)), shard("scalar", ()), *(shard(f"t{i}", (i + 1, 16)) for i in range(50))]
    layouts = [layout] * ranks
    pieces = planned(layouts, split_bytes=4096)
    found = written(layouts, pieces)
    assert found.keys() == {s.fqn for s in layout}
    for fqn, boxes in found.items():
        assert cover_problem(next(s.kind.shape for s in layout if s.fqn == fqn), boxes) is None
    load = [nbytes(layout, mine) for mine in pieces]
    assert max(load) < 1.1 * sum(load) / ranks + 4096


def test_a_replica_is_not_cut_finer_than_chunks_are() -> None:
    layouts = [[shard("w", (1000, 4))]] * 100
    pieces = planned(layouts, split_bytes=4000)
    assert [len(mine) for mine in pieces] == [1] * 4 + [0] * 96
    assert cover_problem((1000, 4), written(layouts, pieces)["w"]) is None


def test_shards_are_written_by_their_holder_and_hybrid_replicas_by_one() -> None:
    halves = [shard("w", (5, 2), (0, 0), (3, 2)), shard("w", (5, 2), (3, 0), (2, 2))]
    layouts = [[halves[0]], [halves[1]], [halves[0]], [halves[1]]]
    pieces = planned(layouts, split_bytes=1 << 20)
    assert cover_problem((5, 2), written(layouts, pieces)["w"]) is None


def test_who_has_more_of_its_own_gets_less_of_what_all_have() -> None:
    heavy = shard("w", (100, 8), (0, 0), (90, 8)), shard("w", (100, 8), (90, 0), (10, 8))
    common = [shard(f"t{n}", (8,)) for n in range(80)]
    layouts = [[part, *common] for part in heavy]
    pieces = planned(layouts, split_bytes=1 << 20)
    assert [nbytes(layout, mine) for layout, mine in zip(layouts, pieces)] == [2880, 2880]


def test_tensors_that_are_cut_alike_on_some_ranks_only_are_planned_too() -> None:
    """A strided shard and a plain one of one shape coincide on the first rank and nowhere else, say."""
    layouts = [
        [shard("a", (4, 2), (0, 0), (2, 2)), shard("b", (4, 2), (0, 0), (2, 2)), shard("c", (3,))],
        [shard("b", (4, 2), (3, 0), (1, 2)), shard("a", (4, 2), (2, 0), (2, 2)), shard("c", (3,))],
        [shard("a", (4, 2), (4, 0), (0, 2)), shard("b", (4, 2), (2, 0), (1, 2)), shard("c", (3,))],
    ]
    assert len(gather(layouts).tables) == 3
    found = written(layouts, planned(layouts, split_bytes=1 << 20))
    assert {fqn: cover_problem((3,) if fqn == "c" else (4, 2), boxes) for fqn, boxes in found.items()} == dict.fromkeys(
        "abc"
    )


def test_families_that_ranks_see_differently_are_written_once_all_the_same() -> None:
    one = [shard(f"t{n}", (8, 4), family="f" if n < 5 else "") for n in range(10)]
    layouts = [one, [s._replace(family="") for s in one], [s._replace(family="g") for s in one]]
    found = written(layouts, planned(layouts, split_bytes=64))
    assert found.keys() == {s.fqn for s in one}
    assert all(cover_problem((8, 4), boxes) is None for boxes in found.values())


@given(st.integers(1, 6), st.integers(1, 4), st.sampled_from([16, 200, 1 << 20]), st.data())
def test_every_element_is_written_once(across: int, along: int, split_bytes: int, data: st.DataObject) -> None:
    """Meshes of shards and replicas, any shapes, some tensors whole on all ranks."""
    shapes = data.draw(st.lists(SHAPES.filter(lambda s: len(s) > 0), min_size=1, max_size=8))
    whole = data.draw(st.lists(st.booleans(), min_size=len(shapes), max_size=len(shapes)))

    def part(number: int, rank: int) -> Shard:
        shape, name = shapes[number], f"t{number}"
        family = f"f{number // 3}"
        if whole[number]:
            return shard(name, shape, family=family)
        step = -(-shape[0] // along)
        start = min(shape[0], rank % along * step)
        box = (min(step, shape[0] - start), *shape[1:])
        return shard(name, shape, (start, *[0] * (len(shape) - 1)), box, family=family)

    layouts = [[part(n, rank) for n in range(len(shapes))] for rank in range(across * along)]
    found = written(layouts, planned(layouts, split_bytes=split_bytes))
    assert found.keys() == {f"t{n}" for n in range(len(shapes))}
    for n, shape in enumerate(shapes):
        assert cover_problem(shape, found[f"t{n}"]) is None


def test_empty_shards_write_nothing_and_empty_tensors_are_not_forgotten() -> None:
    layouts = [
        [shard("w", (1, 4), (0, 0), (1, 4)), shard("none", (0, 3))],
        [shard("w", (1, 4), (1, 0), (0, 4)), shard("none", (0, 3))],
    ]
    found = written(layouts, planned(layouts, split_bytes=1))
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
        planned(layouts, split_bytes=1)
    for words in (
        "gap lacks 1 of its 4",
        "twice has overlapping",
        "dtype is float32[2] on rank 0 and int32[2] on rank 1",
        "values has different values on ranks 0 and 1",
    ):
        assert words in str(caught.value)


def test_too_many_different_tables_are_an_error_and_not_compared() -> None:
    layouts = [[shard("w", (2,), probe=str(rank))] for rank in range(4)]
    found = gather(layouts)
    some = Gathered(found.tables[:2], [0, 1, -1, -1], found.boxes)
    with pytest.raises(LayoutError, match="w has different values on ranks 0 and 1"):
        check(some)
    with pytest.raises(LayoutError, match="2 ranks have other tensors"):
        check(Gathered(found.tables[:1], [0, 0, -1, -1], found.boxes))


def test_a_family_goes_to_one_rank_in_the_same_rows() -> None:
    def layout(n: int) -> list[Shard]:
        members = [("p", 2, "bfloat16"), ("p.m", 4, "float32"), ("p.v", 4, "float32")]
        return [
            shard(f"{k}{name}", (64 + k, 8), dtype=dtype, item_bytes=size, family=f"{k}p")
            for name, size, dtype in members
            for k in range(n)
        ]

    for ranks, split_bytes in ((2, 1 << 20), (3, 512)):
        layouts = [layout(5) for _ in range(ranks)]
        pieces = planned(layouts, split_bytes=split_bytes)
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


class Live:
    """A job of one rank, planned once: what its planner makes of changes."""

    def __init__(self, **options: torch.Tensor) -> None:
        self.net = nn.Sequential(nn.Linear(6, 6), nn.BatchNorm1d(6))
        self.optimizer = torch.optim.AdamW(self.net.parameters(), **options)  # type: ignore[arg-type]
        self.step()
        self.job = Job(model=self.net, optimizer=self.optimizer)
        self.planner = Planner(Peers(timeout_s=60), split_bytes=1 << 20)
        self.before = self.job.capture()
        self.planner.agree(self.before)
        self.planner.lay_out(self.before)

    def step(self) -> None:
        self.net(torch.randn(3, 6)).sum().backward()
        self.optimizer.step()

    @property
    def weight(self) -> nn.Parameter:
        return self.net[0].weight  # type: ignore[return-value]

    @property
    def state(self) -> dict[str, torch.Tensor]:
        return self.optimizer.state[self.weight]

    def bound(self) -> tuple[bool, Layout]:
        """Whether it had to be planned anew, and the layout."""
        capture = self.job.capture()
        changed = self.planner.changed(capture)
        if changed:
            self.planner.agree(capture)
        return changed, self.planner.lay_out(capture)


def replace(live: Live, key: str, value: torch.Tensor) -> None:
    live.state[key] = value


MOVES: dict[str, tuple[bool, Callable[[Live], object]]] = {
    "a parameter is replaced": (False, lambda x: setattr(x.net[0], "weight", nn.Parameter(torch.randn(6, 6)))),
    "a parameter is another view of it": (False, lambda x: setattr(x.net[0], "weight", nn.Parameter(x.weight.data))),
    "its data is swapped": (False, lambda x: setattr(x.weight, "data", torch.randn(6, 6))),
    "its data is turned in place": (False, lambda x: setattr(x.weight, "data", x.weight.data.t())),
    "its data begins later": (True, lambda x: setattr(x.weight, "data", x.weight.data[1:])),
    "its data ends earlier": (True, lambda x: setattr(x.weight, "data", x.weight.data[:5])),
    "its dtype changes": (True, lambda x: setattr(x.weight, "data", x.weight.data.bfloat16())),
    "a moment's bytes are read as another dtype": (
        True, lambda x: setattr(x.state["exp_avg"], "data", x.state["exp_avg"].data.view(torch.int32))
    ),
    "it is frozen": (False, lambda x: x.weight.requires_grad_(False)),
    "a moment is replaced": (False, lambda x: replace(x, "exp_avg", torch.randn(6, 6))),
    "a moment's data is swapped": (False, lambda x: setattr(x.state["exp_avg_sq"], "data", torch.randn(6, 6))),
    "a moment's dtype changes": (True, lambda x: replace(x, "exp_avg", x.state["exp_avg"].bfloat16())),
    "a step counter is replaced": (False, lambda x: replace(x, "step", torch.tensor(9.0))),
    "a state is new": (True, lambda x: replace(x, "more", torch.randn(6))),
    "a buffer is replaced": (False, lambda x: setattr(x.net[1], "running_var", torch.randn(6))),
    "the optimizer took its own state": (False, lambda x: x.optimizer.load_state_dict(x.optimizer.state_dict())),
    "all is made anew": (False, lambda x: x.net.to(torch.float64).to(torch.float32)),
}  # fmt: skip


@pytest.mark.parametrize("what", MOVES)
def test_whatever_moves_is_staged_from_where_it_is_now(what: str) -> None:
    live = Live()
    anew, move = MOVES[what]
    with torch.no_grad():
        move(live)
    changed, layout = live.bound()
    assert changed == anew
    sources = dict(zip(layout.names, layout.sources))
    there = {f"model.{n}": t for n, t in live.net.state_dict(keep_vars=True).items()}
    for name, tensor in live.net.named_parameters():
        there |= {f"optimizer.{name}.{k}": t for k, t in live.optimizer.state.get(tensor, {}).items()}
    assert there.keys() <= sources.keys()
    for number, (name, tensor) in enumerate(there.items()):
        with torch.no_grad():
            tensor.view(-1)[:1].fill_(number) if tensor.is_contiguous() else tensor.fill_(number)
        staged = sources[name]
        assert (staged.dtype, staged.shape, staged.data_ptr()) == (tensor.dtype, tensor.shape, tensor.data_ptr()), name
        assert torch.equal(staged, tensor.detach()), name
        if tensor.numel():
            assert staged._version == tensor._version, f"{name}: a change by hand would not be noticed"


@pytest.mark.parametrize("options", [{}, {"lr": torch.tensor(1e-3)}], ids=["number", "tensor"])
def test_steps_and_schedules_move_nothing(options: dict[str, torch.Tensor]) -> None:
    live = Live(**options)
    live.step()
    again = live.job.capture()
    assert all(a is b or not (a or b) for a, b in zip(again.sources, live.before.sources))
    assert not live.planner.changed(again)


def test_step_counters_that_are_plain_numbers_move_nothing() -> None:
    live = Live()
    for state in live.optimizer.state.values():
        state["count"] = 1
    first = live.job.capture()
    for state in live.optimizer.state.values():
        state["count"] += 1
    second = live.job.capture()
    assert all(a is b for a, b in zip(first.sources, second.sources))
    assert second.shared["optimizer"]["state"]["0.weight"] == {"count": 2}


def test_a_parameter_group_that_came_later_is_refused_by_name() -> None:
    live = Live()
    live.optimizer.add_param_group({"params": [nn.Parameter(torch.ones(3))]})
    with pytest.raises(ConfigError, match="add_param_group"):
        live.job.capture()
