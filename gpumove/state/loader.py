"""The data position of a run as one number: an elastic layer over torch's DataLoader. Knows no checkpoint, no store."""

from __future__ import annotations

import hashlib
import operator
import random
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from typing import Any, ClassVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch.utils.data import DataLoader, IterableDataset, get_worker_info

from gpumove.errors import ConfigError, LayoutError

_VERSION = 1  # of the state, and with it of the sample order, the fingerprint and the seeds of the workers
_FINGERPRINT = 8  # samples
_ROUNDS = 16  # halves of one or two bits (tiny datasets) need more rounds than the usual 8 to look uniform
_BLOCK = 1 << 15  # positions: mapping needs ~200 bytes for each for a moment
_AHEAD = 2048  # positions mapped per numpy call: its cost (~0.5 ms) is mostly fixed, so that batches share it

# Arguments of DataLoader that would make the position untrue: the one value that changes nothing, and the reason.
_REFUSED: Mapping[str, tuple[object, str]] = {
    "sampler": (None, "the sample order is the loader's own; choose samples with torch.utils.data.Subset"),
    "batch_sampler": (None, "the loader makes the batches; choose samples with torch.utils.data.Subset"),
    "generator": (None, "seed= decides every random choice of the loader"),
    "drop_last": (False, "every batch is full: the last one of an epoch goes on into the next epoch"),
    "in_order": (True, "the position counts batches in their order"),
    "worker_method": ("multiprocessing", "the loader seeds its workers, and threads share the RNGs of the training"),
}


class ElasticLoader:
    """Batches of a map-style dataset whose state is one global sample position, valid at any world size.

    The sample stream is the concatenation of epochs: position ``p`` is number ``p % N`` of the order of epoch
    ``p // N``, with ``N = len(dataset)``.
    The global batch at position ``P`` is ``[P, P + batch_size * world_size)``; data-parallel rank ``r`` gets its
    ``r``-th slice of ``batch_size`` samples. A global batch may straddle the end of an epoch, so every epoch has each
    sample exactly once, every batch is full, and all ranks have the same number of batches.

    One ``for`` is one pass: from the position until the next epoch's start is reached or passed. After a ``break`` the
    next ``for`` goes on with the first batch that was not handed out. A newer ``for`` or :meth:`load_state_dict` ends a
    loop that is still open: its next step raises :class:`ConfigError`.

    Iterating draws nothing from this process's RNGs, except in the code of the dataset and of ``collate_fn`` with
    ``num_workers=0``. In workers ``random``, ``numpy.random`` and ``torch`` are seeded from (seed, position) before
    every sample, or before every batch where the dataset fetches whole batches (``__getitems__``).

    Args:
        dataset: map-style: has ``__getitem__`` and a constant ``__len__`` > 0.
        batch_size: samples per rank and batch. May change between runs.
        shuffle: a new order in every epoch; otherwise the dataset's own.
        seed: of the order and of the workers' RNGs. The same on every rank and for the whole run.
        rank: data-parallel rank, given together with ``world_size``; ranks that share one model replica (tensor or
            pipeline parallel) pass the same value. Default: that of torch.distributed at every pass, else 0 of 1.
        world_size: number of data-parallel ranks. May change between runs.
        **options: of ``torch.utils.data.DataLoader``: ``num_workers``, ``collate_fn``, ``pin_memory``, ...

    Raises:
        ConfigError: the dataset is not map-style or empty, or an argument is wrong or would make the position untrue.
    """

    elastic: ClassVar[bool] = True
    """The state is the same on every rank and loads at any world size."""

    def __init__(
        self,
        dataset: Any,
        batch_size: int,
        *,
        shuffle: bool = False,
        seed: int = 0,
        rank: int | None = None,
        world_size: int | None = None,
        **options: Any,
    ) -> None:
        """Check the arguments, which the class explains. Starts no worker."""
        self.dataset = dataset
        self.batch_size = _whole("batch_size", batch_size, least=1)
        self.shuffle = bool(shuffle)
        self.seed = _whole("seed", seed)
        self._length = _length(dataset)
        self._given = _pair(rank, world_size)
        self._order = partial(_order, length=self._length, seed=self.seed if self.shuffle else None)
        self._slices = _Slices(self._order, self.batch_size)
        self._loader = self._build(options)
        self._position = 0
        self._turn = object()  # the newest pass; replaced by whatever else moves the position

    def _build(self, options: dict[str, Any]) -> DataLoader[Any]:
        for name, (harmless, reason) in _REFUSED.items():
            if (value := options.pop(name, harmless)) != harmless:
                raise ConfigError(f"ElasticLoader cannot take {name}={value!r}: {reason}.")
        dataset: Any = _SeededDataset(self.dataset, self.seed)
        # A DataLoader draws a seed whenever an iterator is made, by default from the RNG of this process. A resumed run
        # makes its iterators at other points than the first run, so that this draw would break a bit-exact resume.
        generator = torch.Generator().manual_seed(0)
        try:
            return DataLoader(dataset, batch_sampler=self._slices, generator=generator, **options)
        except (TypeError, ValueError) as error:
            raise ConfigError(f"torch's DataLoader refused the arguments of ElasticLoader: {error}") from error

    @property
    def position(self) -> int:
        """Samples handed out to the training loop, over all ranks, since the start of the run."""
        return self._position

    @property
    def data_rank(self) -> int:
        """Which data-parallel rank this is. Ranks that share it read the same samples, and draw the same dropout."""
        return self._ranks()[0]

    @property
    def epoch(self) -> int:
        """Epoch of the next sample, from 0: ``position // len(dataset)``."""
        return self._position // self._length

    def __len__(self) -> int:
        """Batches from the position to the end of the pass: what a ``for`` yields from here. Falls while one runs."""
        return len(range(self._position, self._end(), self.batch_size * self._ranks()[1]))

    def __iter__(self) -> Iterator[Any]:
        """Yield this rank's batches from the position to the end of the pass; each moves the position when yielded."""
        rank, world_size = self._ranks()
        step, offset = self.batch_size * world_size, self.batch_size * rank
        self._slices.starts = range(self._position + offset, self._end() + offset, step)
        self._turn = turn = object()
        for batch in self._loader:
            self._position += step
            yield batch
            if self._turn is not turn:
                raise ConfigError(
                    "This loop over an ElasticLoader was ended by load_state_dict() or by a newer loop."
                    " Leave it (break) and start a new `for`.",
                    code="config.stale_iterator",
                )

    def indices(self, start: int, stop: int) -> NDArray[np.int64]:
        """Dataset indices of the global positions ``[start, stop)``, in order: exactly which samples are used there.

        Result int64 of shape ``(stop - start,)``. Raises ConfigError if ``start`` is negative.
        """
        start, stop = _whole("start", start, least=0), _whole("stop", stop)
        blocks = (range(at, min(at + _BLOCK, stop)) for at in range(start, stop, _BLOCK))
        return np.concatenate([np.empty(0, np.int64), *(self._order(np.arange(b.start, b.stop)) for b in blocks)])

    def state_dict(self) -> dict[str, Any]:
        """The position, the same on every rank, as plain values: ints, one bool, one list of ints.

        ``position`` counts a batch once it is yielded, never what workers fetched ahead; ``epoch`` is for people;
        ``next`` has the dataset indices of the next 8 samples, the fingerprint of the order.
        """
        position = {"position": self._position, "epoch": self.epoch, "next": self._next(self._position)}
        return self._identity() | position

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go to the position of ``state``, saved at any world size, batch size and number of workers.

        Raises LayoutError, with all differences, if the state is of another dataset length, seed, shuffle or sample
        order; the position then stays as it was. An open loop is ended: its next step raises ConfigError.
        """
        differences = [
            f"{name} is {state.get(name)!r} in the checkpoint and {own!r} here"
            for name, own in self._identity().items()
            if state.get(name) != own
        ]
        position = state.get("position")
        if type(position) is not int or position not in range(1 << 62):
            differences.append(f"position is {position!r} in the checkpoint, not a number of samples")
        elif not differences and state.get("next") != (own := self._next(position)):
            differences.append(f"next samples are {state.get('next')} in the checkpoint and {own} here")
        if differences:
            raise LayoutError(
                f"The data position in the checkpoint does not fit this ElasticLoader: {'; '.join(differences)}."
                " Build the loader with the dataset, seed and shuffle that the run was started with.",
                code="layout.loader",
            )
        self._position = state["position"]
        self._turn = object()

    def _identity(self) -> dict[str, Any]:
        return {"version": _VERSION, "seed": self.seed, "shuffle": self.shuffle, "length": self._length}

    def _next(self, position: int) -> list[int]:
        indices: list[int] = self.indices(position, position + _FINGERPRINT).tolist()
        return indices

    def _end(self) -> int:
        return (self.epoch + 1) * self._length

    def _ranks(self) -> tuple[int, int]:
        # Looked up late: a loader made before init_process_group() would otherwise give rank 0's samples to every rank.
        return self._given or _group()


def _order(positions: NDArray[np.int64], *, length: int, seed: int | None) -> NDArray[np.int64]:
    """Dataset index of every position, same shape: per epoch a bijection of [0, length), identity if seed is None.

    Computed, not stored: a Feistel network over the smallest power of two that covers the dataset, repeated for values
    that fall outside ("cycle walking"). So an order costs no memory and no time at the start of an epoch, however large
    the dataset, and depends on integer arithmetic alone: the permutations of a library's generator may change with the
    library's release, and a moved run meets other releases.
    """
    within = positions % length
    if seed is None or not positions.size:
        return within
    bits = max(2, (length - 1).bit_length())
    epochs, which = np.unique(positions.ravel() // length, return_inverse=True)
    keys = np.stack([_round_keys(seed, epoch) for epoch in epochs.tolist()], axis=1)[:, which]
    values = _feistel(within.ravel().astype(np.uint64), keys, bits)
    while (outside := np.flatnonzero(values >= np.uint64(length))).size:
        values[outside] = _feistel(values[outside], keys[:, outside], bits)
    return values.astype(np.int64).reshape(positions.shape)


def _round_keys(seed: int, epoch: int) -> NDArray[np.uint64]:
    digests = b"".join(_digest(f"order {seed} {epoch} {part}") for part in range(_ROUNDS // 8))
    return np.frombuffer(digests, dtype="<u8").astype(np.uint64)


def _feistel(values: NDArray[np.uint64], keys: NDArray[np.uint64], bits: int) -> NDArray[np.uint64]:
    low_bits = np.uint64(bits // 2)
    low_mask, high_mask = np.uint64((1 << bits // 2) - 1), np.uint64((1 << bits - bits // 2) - 1)
    high, low = values >> low_bits, values & low_mask
    for first, second in zip(keys[::2], keys[1::2]):
        high = high ^ (_mix(low + first) & high_mask)
        low = low ^ (_mix(high + second) & low_mask)
    return (high << low_bits) | low


def _mix(values: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """Spread every input bit over the low bits: multiply modulo 2**64, fold the high half back, twice."""
    for factor in (np.uint64(0x9E3779B97F4A7C15), np.uint64(0xD6E8FEB86659FD93)):
        values = values * factor
        values ^= values >> np.uint64(32)
    return values


class _Slices:
    """The batch sampler of the inner DataLoader: one rank's slices as (first position, dataset indices)."""

    def __init__(self, order: Callable[[NDArray[np.int64]], NDArray[np.int64]], size: int) -> None:
        self._order, self._size = order, size
        self.starts = range(0)  # first positions of this rank's slices in the pass that begins next

    def __iter__(self) -> Iterator[Any]:
        return self._walk(self.starts)

    def _walk(self, starts: range) -> Iterator[tuple[int, list[int]]]:
        ahead = max(1, _AHEAD // self._size)
        for at in range(0, len(starts), ahead):
            firsts = np.asarray(starts[at : at + ahead], dtype=np.int64)
            indices = self._order(firsts[:, None] + np.arange(self._size))
            yield from zip(firsts.tolist(), indices.tolist())


class _SeededDataset:
    """The user's dataset, read by position: in a worker process the RNGs are seeded from it first.

    Attributes are read from and written to the user's dataset, as ``worker_init_fn`` gets this object from torch.
    """

    __slots__ = ("_gpumove_dataset", "_gpumove_seed")

    def __init__(self, dataset: Any, seed: int) -> None:
        object.__setattr__(self, "_gpumove_dataset", dataset)
        object.__setattr__(self, "_gpumove_seed", seed)

    def __reduce__(self) -> tuple[object, ...]:
        return (_SeededDataset, (self._gpumove_dataset, self._gpumove_seed))

    def __getattr__(self, name: str) -> Any:
        return getattr(self._gpumove_dataset, name)

    def __setattr__(self, name: str, value: object) -> None:
        setattr(self._gpumove_dataset, name, value)

    def __getitems__(self, batch: tuple[int, list[int]]) -> Any:
        first, indices = batch
        if fetch_all := getattr(self._gpumove_dataset, "__getitems__", None):
            self._seed_rngs(first)
            return fetch_all(indices)
        samples = []
        for position, index in enumerate(indices, start=first):
            self._seed_rngs(position)
            samples.append(self._gpumove_dataset[index])
        return samples

    def _seed_rngs(self, position: int) -> None:
        if get_worker_info() is None:
            return  # the RNGs of the main process belong to the training, and are in its checkpoints
        bits = int.from_bytes(_digest(f"sample {self._gpumove_seed} {position}")[:16], "little")
        random.seed(bits)
        np.random.seed(bits & 0xFFFF_FFFF)
        # Not torch.manual_seed: it visits every kind of device (100 us), and this runs for every sample (7 us in all).
        torch.default_generator.manual_seed(bits >> 64)


def _digest(text: str) -> bytes:
    return hashlib.blake2b(text.encode(), digest_size=64).digest()


def _group() -> tuple[int, int]:
    import torch.distributed as dist

    if dist.is_available() and dist.is_initialized():
        return dist.get_rank(), dist.get_world_size()
    return 0, 1


def _pair(rank: int | None, world_size: int | None) -> tuple[int, int] | None:
    if rank is None and world_size is None:
        return None
    if rank is None or world_size is None:
        raise ConfigError(f"ElasticLoader got rank={rank} and world_size={world_size}. Give both, or none.")
    pair = _whole("rank", rank, least=0), _whole("world_size", world_size, least=1)
    if pair[0] >= pair[1]:
        raise ConfigError(f"rank is {rank}, and must be below world_size, which is {world_size}.")
    return pair


def _length(dataset: Any) -> int:
    name = type(dataset).__name__
    if isinstance(dataset, IterableDataset) or not hasattr(dataset, "__getitem__") or not hasattr(dataset, "__len__"):
        raise ConfigError(
            f"ElasticLoader needs a map-style dataset (__getitem__ and __len__), and {name} is none. Use torchdata's"
            " StatefulDataLoader instead: gpumove takes it too, at a fixed world size."
        )
    if not len(dataset):
        raise ConfigError(f"The dataset {name} of ElasticLoader is empty. Give it at least one sample.")
    return len(dataset)


def _whole(name: str, value: Any, *, least: int | None = None) -> int:
    try:
        number = operator.index(value)
    except TypeError:
        raise ConfigError(f"{name} is {value!r}, and must be a whole number.") from None
    if isinstance(value, bool) or (least is not None and number < least):
        raise ConfigError(f"{name} is {value!r}, and must be a whole number{'' if least is None else f' >= {least}'}.")
    return number
