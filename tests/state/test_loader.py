from __future__ import annotations

import gc
import itertools
import math
import pickle
import random
from collections import Counter
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.data import Dataset, IterableDataset, Subset, TensorDataset, get_worker_info

from gpumove.errors import ConfigError, LayoutError
from gpumove.state.loader import ElasticLoader, _order, _SeededDataset


class Numbers:
    """Sample i is i."""

    def __init__(self, length: int) -> None:
        self.length = length

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: int) -> int:
        return index


class Augmented(Dataset[torch.Tensor]):
    """Sample i is (i, and a draw of each of the three RNGs that transforms use)."""

    def __init__(self, length: int) -> None:
        self.length = length

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: int) -> torch.Tensor:
        draws = [random.random(), np.random.rand(), torch.rand((), dtype=torch.float64).item()]
        return torch.tensor([index, *draws], dtype=torch.float64)


def noisy_collate(samples: list[torch.Tensor]) -> torch.Tensor:
    return torch.stack([sample + torch.randn(()) for sample in samples])


def steps(loaders: list[ElasticLoader], count: int) -> list[list[list[int]]]:
    """The next `count` global batches: per step, per rank, the indices. Goes on over ends of passes; all in step."""
    out: list[list[list[int]]] = []
    while len(out) < count:
        for batches in zip(*loaders, strict=True):
            out.append([batch.tolist() for batch in batches])
            if len(out) == count:
                break
    return out


def ranks(length: int, batch_size: int, world_size: int, **options: Any) -> list[ElasticLoader]:
    return [
        ElasticLoader(Numbers(length), batch_size, rank=rank, world_size=world_size, **options)
        for rank in range(world_size)
    ]


def flat(batches: list[list[list[int]]]) -> list[int]:
    return [index for step in batches for slice_ in step for index in slice_]


def rng_states() -> tuple[Any, ...]:
    kind, keys, *rest = np.random.get_state()
    return random.getstate(), kind, keys.tobytes(), rest, torch.get_rng_state().numpy().tobytes()


# ---- the stream ---------------------------------------------------------------------------------------------------

shapes = {
    "length": st.integers(1, 40),
    "batch_size": st.integers(1, 7),
    "world_size": st.integers(1, 5),
    "shuffle": st.booleans(),
}


@settings(deadline=None, max_examples=60)
@given(**shapes, seed=st.integers(-(2**70), 2**70))
def test_every_epoch_has_every_sample_once(length, batch_size, world_size, shuffle, seed):
    loaders = ranks(length, batch_size, world_size, shuffle=shuffle, seed=seed)
    count = math.ceil(3 * length / (batch_size * world_size)) + 1
    stream = flat(steps(loaders, count))
    assert stream == loaders[0].indices(0, count * batch_size * world_size).tolist()
    for epoch in range(3):
        assert sorted(stream[epoch * length : (epoch + 1) * length]) == list(range(length))


@settings(deadline=None, max_examples=60)
@given(**shapes, before=st.integers(0, 12))
def test_len_is_what_the_next_for_yields_and_a_pass_ends_at_the_epoch(length, batch_size, world_size, shuffle, before):
    loader = ranks(length, batch_size, world_size, shuffle=shuffle)[-1]
    if before:
        steps([loader], before)
    start, step = loader.position, batch_size * world_size
    promised = len(loader)
    left = [len(loader) for _ in loader][:-1]  # the last value is of the next pass
    assert left == list(range(promised - 1, 0, -1))
    assert loader.position == start + promised * step
    end = (start // length + 1) * length
    assert end <= loader.position < end + step


def test_a_batch_straddles_the_epoch():
    loader = ElasticLoader(Numbers(5), 2)
    assert [[batch.tolist() for batch in loader] for _ in range(2)] == [[[0, 1], [2, 3], [4, 0]], [[1, 2], [3, 4]]]
    assert (loader.position, loader.epoch) == (10, 2)


def test_an_epoch_smaller_than_the_global_batch():
    loaders = ranks(3, 4, 2)
    assert [len(loader) for loader in loaders] == [1, 1]
    assert steps(loaders, 1) == [[[0, 1, 2, 0], [1, 2, 0, 1]]]
    assert loaders[0].epoch == 2


@settings(deadline=None, max_examples=40)
@given(
    length=st.integers(1, 60),
    legs=st.lists(st.tuples(st.integers(1, 5), st.integers(1, 5), st.integers(0, 6)), min_size=2, max_size=5),
    shuffle=st.booleans(),
)
def test_world_and_batch_size_change_anywhere_and_the_stream_stays_exact(length, legs, shuffle):
    state, stream = ranks(length, 1, 1, shuffle=shuffle, seed=5)[0].state_dict(), []
    for world_size, batch_size, count in legs:
        loaders = ranks(length, batch_size, world_size, shuffle=shuffle, seed=5)
        for loader in loaders:
            loader.load_state_dict(state)
        stream += flat(steps(loaders, count)) if count else []
        states = [loader.state_dict() for loader in loaders]
        assert all(other == states[0] for other in states)
        state = states[0]
    assert state["position"] == len(stream)
    assert stream == ranks(length, 1, 1, shuffle=shuffle, seed=5)[0].indices(0, len(stream)).tolist()


def test_a_pass_of_many_batches():
    loaders = ranks(5000, 3, 2, shuffle=True)
    assert flat(steps(loaders, 900)) == loaders[0].indices(0, 5400).tolist()


def test_two_ranks_then_four_then_one_within_an_epoch():
    stream, state = [], None
    for world_size in (2, 4, 1):
        loaders = ranks(32, 2, world_size, shuffle=True)
        for loader in loaders:
            if state:
                loader.load_state_dict(state)
        stream += flat(steps(loaders, 2))
        state = loaders[-1].state_dict()
    while loaders[0].epoch == 0:
        stream += flat(steps(loaders, 1))
    assert sorted(stream) == list(range(32))


# ---- the order ----------------------------------------------------------------------------------------------------


def test_the_order_is_frozen():
    """Checkpoints of released versions resume for ever: a change here needs a new version of the state."""
    loader = ElasticLoader(Numbers(10), 1, shuffle=True, seed=7)
    assert loader.indices(0, 20).tolist() == [*[1, 9, 2, 4, 0, 3, 7, 5, 6, 8], *[9, 2, 7, 0, 1, 5, 8, 6, 4, 3]]
    large = ElasticLoader(Numbers(10**12), 1, shuffle=True)
    assert large.indices(10**12 - 2, 10**12 + 2).tolist() == [514357962558, 990218743129, 365651850659, 107667738444]


def test_a_trillion_samples_cost_no_memory():
    loader = ElasticLoader(Numbers(10**12), 4, shuffle=True)
    batch = next(iter(loader))
    assert batch.unique().numel() == 4
    assert batch.max() > 10**9


@pytest.mark.parametrize("length", [1, 2, 3, 4, 5, 127, 128, 129, 4096, 4097])
def test_the_order_is_a_bijection_that_differs_by_seed_and_epoch(length):
    orders = [
        _order(np.arange(length) + epoch * length, length=length, seed=seed) for seed in (0, 1) for epoch in (0, 1)
    ]
    for order in orders:
        assert np.array_equal(np.sort(order), np.arange(length))
    if length > 100:
        assert len({order.tobytes() for order in orders}) == 4


def test_small_orders_are_uniform():
    draws, length = 24_000, 4
    order = _order(np.arange(draws * length), length=length, seed=11).reshape(draws, length)
    counts = Counter(map(tuple, order.tolist()))
    expected = draws / math.factorial(length)
    chi2 = sum((count - expected) ** 2 / expected for count in counts.values())
    assert len(counts) == math.factorial(length)
    assert chi2 < 50  # 23 degrees of freedom: p < 0.001


def test_large_orders_look_random():
    length = 100_000
    order = _order(np.arange(length), length=length, seed=0)
    assert abs(np.corrcoef(order, np.arange(length))[0, 1]) < 0.015
    assert abs(np.corrcoef(order[:-1], order[1:])[0, 1]) < 0.015
    assert np.count_nonzero(np.diff(order) == 1) < 10  # 1 expected
    # Samples that lie together in the dataset are spread evenly over the epoch: chi-square over 100 x 100 boxes.
    boxes = np.histogram2d(np.arange(length), order, bins=100)[0]
    assert abs(((boxes - 10) ** 2 / 10).sum() - 99 * 99) < 6 * math.sqrt(2 * 99 * 99)


# ---- position, loops, states --------------------------------------------------------------------------------------


@pytest.mark.parametrize("persistent", [False, True])
def test_workers_that_fetch_ahead_do_not_move_the_position(persistent):
    loader = ElasticLoader(
        Numbers(40), 2, shuffle=True, num_workers=2, prefetch_factor=4, persistent_workers=persistent
    )
    seen: list[int] = []
    for batch in loader:
        seen += batch.tolist()
        assert loader.state_dict()["position"] == len(seen)
        if len(seen) == 10:
            break
    for batch in loader:  # what was fetched ahead and not handed out comes again, from the same workers if persistent
        seen += batch.tolist()
        assert loader.position == len(seen)
    assert seen == loader.indices(0, 40).tolist()


def test_state_is_plain_and_explains_itself():
    loader = ElasticLoader(Numbers(10), 4, seed=np.int64(3), rank=np.int64(1), world_size=np.int64(2))
    steps([loader], 2)
    assert loader.state_dict() == {
        "version": 1,
        "seed": 3,
        "shuffle": False,
        "length": 10,
        "position": 16,
        "epoch": 1,
        "next": [6, 7, 8, 9, 0, 1, 2, 3],
    }
    assert {type(value) for value in loader.state_dict().values()} == {int, bool, list}
    assert {type(value) for value in loader.state_dict()["next"]} == {int}
    assert ElasticLoader.elastic is True


def test_the_batch_in_the_body_counts_as_consumed():
    loader = ElasticLoader(Numbers(4), 2)
    for batch in loader:
        state = loader.state_dict()
        if batch.tolist() == [2, 3]:
            break
    resumed = ElasticLoader(Numbers(4), 2)
    resumed.load_state_dict(state)
    assert resumed.epoch == 1
    assert len(list(resumed)) == 2


def test_load_state_dict_ends_an_open_loop():
    loader = ElasticLoader(Numbers(10), 2)
    start = loader.state_dict()
    loop = iter(loader)
    next(loop)
    loader.load_state_dict(start)
    with pytest.raises(ConfigError, match="ended by load_state_dict") as caught:
        next(loop)
    assert caught.value.code == "config.stale_iterator"
    assert next(iter(loader)).tolist() == [0, 1]


@pytest.mark.parametrize("workers", [0, 2])
def test_a_newer_loop_ends_an_open_loop(workers):
    loader = ElasticLoader(Numbers(10), 2, num_workers=workers, persistent_workers=workers > 0)
    first, second = iter(loader), iter(loader)
    assert next(first).tolist() == [0, 1]
    assert next(second).tolist() == [2, 3]
    with pytest.raises(ConfigError, match="newer loop"):
        next(first)
    assert next(second).tolist() == [4, 5]
    assert loader.position == 6


def test_a_sample_that_raises_is_not_lost():
    class Flaky(Numbers):
        broken = True

        def __getitem__(self, index: int) -> int:
            if index == 2 and self.broken:
                raise OSError("no such file")
            return index

    data = Flaky(6)
    loader = ElasticLoader(data, 2)
    with pytest.raises(OSError, match="no such file"):
        list(loader)
    assert loader.position == 2
    data.broken = False
    assert [batch.tolist() for batch in loader] == [[2, 3], [4, 5]]


def test_the_loader_is_freed_without_the_cycle_collector():
    """Persistent workers live as long as the loader: a reference cycle would leave them behind."""
    gc.collect()
    gc.disable()
    try:
        loader = ElasticLoader(Numbers(4), 1, num_workers=1, persistent_workers=True)
        next(iter(loader))
        workers = loader._loader._iterator._workers
        del loader
        assert not any(worker.is_alive() for worker in workers)
    finally:
        gc.enable()


def test_other_data_is_refused_with_all_differences():
    state = ElasticLoader(Numbers(10), 2, shuffle=True, seed=1).state_dict()
    loader = ElasticLoader(Numbers(11), 2, seed=2)
    steps([loader], 1)
    with pytest.raises(LayoutError) as caught:
        loader.load_state_dict(state)
    assert caught.value.code == "layout.loader"
    for part in (
        "seed is 1 in the checkpoint and 2 here",
        "shuffle is True in the checkpoint and False here",
        "length is 10 in the checkpoint and 11 here",
    ):
        assert part in str(caught.value)
    assert loader.position == 2


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"seed": 2}, "seed is 2"),
        ({"version": 2}, "version is 2"),
        ({"next": [0, 1, 2, 3, 4, 5, 6, 7]}, "next samples are"),
        ({"next": None}, "next samples are None"),
        ({"position": -1}, "position is -1"),
        ({"position": 1.5}, "position is 1.5"),
        ({"position": True}, "position is True"),
        ({"position": 1 << 64}, "position is 18446744073709551616"),
    ],
)
def test_a_state_of_another_order_is_refused(change, message):
    loader = ElasticLoader(Numbers(10), 2, shuffle=True)
    with pytest.raises(LayoutError, match=message):
        loader.load_state_dict({**loader.state_dict(), **change})


def test_a_state_of_another_loader_is_refused():
    with pytest.raises(LayoutError, match=r"version is None.*position is None"):
        ElasticLoader(Numbers(10), 2).load_state_dict({"_sampler_iter_yielded": 3})


# ---- random augmentation ------------------------------------------------------------------------------------------


def collect(loader: ElasticLoader, count: int) -> list[torch.Tensor]:
    out: list[torch.Tensor] = []
    while len(out) < count:
        for batch in loader:
            out.append(batch)
            if len(out) == count:
                break
    return out


def same(ones: list[torch.Tensor], others: list[torch.Tensor]) -> bool:
    return len(ones) == len(others) and all(torch.equal(one, other) for one, other in zip(ones, others))


@pytest.mark.parametrize("fetch", ["single", "batched"])
def test_augmentation_resumes_bit_for_bit_with_any_number_of_workers(fetch):
    data: Dataset[torch.Tensor] = Augmented(12)
    if fetch == "batched":
        data = Subset(data, range(12))  # has __getitems__
    options: dict[str, Any] = {"shuffle": True, "seed": 3, "collate_fn": noisy_collate}
    first = ElasticLoader(data, 2, num_workers=2, **options)
    whole = collect(first, 10)
    state = ElasticLoader(data, 2, num_workers=2, **options)
    collect(state, 4)
    for workers in (1, 2):
        random.seed(workers), np.random.seed(workers), torch.manual_seed(workers)  # a resumed process is elsewhere
        resumed = ElasticLoader(data, 2, num_workers=workers, **options)
        resumed.load_state_dict(state.state_dict())
        assert same(collect(resumed, 6), whole[4:])
    draws = torch.cat(whole)[:, 1:]
    assert draws.unique().numel() == draws.numel()  # no two samples share a draw, in no epoch


def test_augmentation_of_a_sample_does_not_depend_on_world_or_batch_size():
    def stream(batch_size: int, world_size: int) -> torch.Tensor:
        loaders = [
            ElasticLoader(Augmented(8), batch_size, shuffle=True, rank=rank, world_size=world_size, num_workers=1)
            for rank in range(world_size)
        ]
        return torch.cat([torch.cat(batches) for batches in zip(*loaders)])

    alone = stream(4, 1)
    assert torch.equal(alone, stream(2, 2))
    assert torch.equal(alone, stream(1, 4))


def test_the_seeds_of_workers_are_frozen():
    """Like the order. Torch's own stream is left out: its numbers for a seed are torch's to change."""
    sample = collect(ElasticLoader(Augmented(4), 1, seed=7, num_workers=1), 2)[1][0]
    assert sample[:3].tolist() == [1.0, 0.8430240362354665, 0.5068314080676173]


def test_augmentation_differs_by_epoch_and_seed():
    def passes(seed: int) -> list[torch.Tensor]:
        return collect(ElasticLoader(Augmented(4), 4, seed=seed, num_workers=1), 2)

    (one, two), (other, _) = passes(0), passes(1)
    assert torch.equal(one[:, 0], two[:, 0])
    assert torch.equal(one[:, 0], other[:, 0])
    assert not (one[:, 1:] == two[:, 1:]).any()
    assert not (one[:, 1:] == other[:, 1:]).any()


def test_without_workers_the_process_rng_augments_and_resumes():
    def loader() -> ElasticLoader:
        return ElasticLoader(Augmented(7), 2, shuffle=True, collate_fn=noisy_collate)

    random.seed(1), np.random.seed(1), torch.manual_seed(1)
    first = loader()
    collect(first, 2)
    saved = random.getstate(), np.random.get_state(), torch.get_rng_state(), first.state_dict()
    rest = collect(first, 6)
    resumed = loader()
    collect(resumed, 1)
    random.setstate(saved[0]), np.random.set_state(saved[1]), torch.set_rng_state(saved[2])
    resumed.load_state_dict(saved[3])
    assert same(collect(resumed, 6), rest)


@pytest.mark.parametrize("workers", [0, 2])
def test_iterating_leaves_the_rngs_of_this_process_alone(workers):
    before = rng_states()
    data = Augmented(6) if workers else Numbers(6)
    loader = ElasticLoader(data, 2, shuffle=True, num_workers=workers)
    for _ in range(2):
        list(loader)
    loader.load_state_dict(loader.state_dict())
    next(iter(loader))
    assert rng_states() == before


# ---- DataLoader's own features ------------------------------------------------------------------------------------


class WithHandle(Numbers):
    handle: int | None = None

    def __getitem__(self, index: int) -> tuple[int, int]:
        assert self.handle is not None
        return index, self.handle


def open_handle(worker: int) -> None:
    info = get_worker_info()
    assert info is not None
    assert info.dataset.length == 6
    info.dataset.handle = 40 + worker


def test_worker_init_fn_reaches_the_users_dataset():
    loader = ElasticLoader(WithHandle(6), 1, num_workers=2, worker_init_fn=open_handle)
    assert [handle.item() for _, handle in loader] == [40, 41] * 3


def test_the_dataset_travels_to_spawned_workers():
    copy = pickle.loads(pickle.dumps(_SeededDataset(Numbers(3), 5)))
    assert (copy.length, copy._gpumove_seed, copy.__getitems__((0, [2, 1]))) == (3, 5, [2, 1])


def test_tuples_collate_and_pass_through():
    data = TensorDataset(torch.arange(6), torch.arange(6) * 10)
    loader = ElasticLoader(data, 3, collate_fn=lambda samples: [int(b) for _, b in samples], timeout=0)
    assert list(loader) == [[0, 10, 20], [30, 40, 50]]
    assert loader.dataset is data


def test_harmless_values_of_refused_arguments_are_taken():
    options = {"sampler": None, "batch_sampler": None, "generator": None, "drop_last": False, "in_order": True}
    assert len(list(ElasticLoader(Numbers(4), 2, **options))) == 2


# ---- ranks and bad arguments --------------------------------------------------------------------------------------


def test_ranks_come_from_the_process_group_whenever_it_was_made(monkeypatch):
    loader = ElasticLoader(Numbers(12), 2)
    explicit = ElasticLoader(Numbers(12), 2, rank=0, world_size=1)
    assert len(loader) == 6
    monkeypatch.setattr(dist, "is_initialized", lambda: True)
    monkeypatch.setattr(dist, "get_rank", lambda: 1)
    monkeypatch.setattr(dist, "get_world_size", lambda: 3)
    assert len(loader) == 2
    assert next(iter(loader)).tolist() == [2, 3]
    assert loader.position == 6
    assert next(iter(explicit)).tolist() == [0, 1]


class Endless(IterableDataset[int]):
    def __iter__(self) -> Iterator[int]:
        return itertools.count()


class Unsized:
    def __getitem__(self, index: int) -> int:
        return index


@pytest.mark.parametrize(
    ("dataset", "message"),
    [
        (Endless(), "StatefulDataLoader"),
        (Unsized(), "StatefulDataLoader"),
        (iter([1]), "StatefulDataLoader"),
        (Numbers(0), "empty"),
    ],
)
def test_bad_datasets(dataset, message):
    with pytest.raises(ConfigError, match=message):
        ElasticLoader(dataset, 2)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"batch_size": 0}, "batch_size is 0"),
        ({"batch_size": None}, "batch_size is None"),
        ({"batch_size": True}, "batch_size is True"),
        ({"batch_size": 2.0}, r"batch_size is 2\.0"),
        ({"seed": "x"}, "seed is 'x'"),
        ({"rank": 0}, "Give both"),
        ({"world_size": 2}, "Give both"),
        ({"rank": 2, "world_size": 2}, "below world_size"),
        ({"rank": -1, "world_size": 2}, "rank is -1"),
        ({"rank": 0, "world_size": 0}, "world_size is 0"),
        ({"sampler": [1, 2]}, "sampler"),
        ({"batch_sampler": [[1, 2]]}, "batch_sampler"),
        ({"generator": torch.Generator()}, "generator"),
        ({"drop_last": True}, "drop_last"),
        ({"in_order": False, "num_workers": 2}, "in_order"),
        ({"worker_method": "thread", "num_workers": 2}, "worker_method"),
        ({"num_workers": -1}, "num_workers"),
        ({"persistent_workers": True}, "persistent_workers"),
        ({"no_such_option": 1}, "no_such_option"),
    ],
)
def test_bad_arguments(options, message):
    with pytest.raises(ConfigError, match=message):
        ElasticLoader(Numbers(10), **{"batch_size": 2, **options})


def test_indices_of_nothing_and_of_the_past():
    with pytest.raises(ConfigError, match="start is -1"):
        ElasticLoader(Numbers(10), 2).indices(-1, 3)
    assert ElasticLoader(Numbers(10), 2, shuffle=True).indices(3, 3).tolist() == []


def test_indices_of_many_positions_come_in_blocks():
    loader = ElasticLoader(Numbers(70_000), 2, shuffle=True)
    many = loader.indices(10, 140_000)
    assert many.dtype == np.int64
    assert np.array_equal(np.sort(many[-70_000:]), np.arange(70_000))
    assert np.array_equal(many, _order(np.arange(10, 140_000), length=70_000, seed=0))
