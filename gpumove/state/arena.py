"""Host memory that snapshots are copied into: kept between saves, in huge pages, pinned if a CUDA device is in use."""

from __future__ import annotations

import mmap
from collections.abc import Callable, Sequence
from typing import Any

import torch

from gpumove.errors import ConfigError

_LINE, _PAGE = 64, 4096
_PAGED_BYTES = 64 << 10
"""Larger tensors start on a page: they can go to a disk from where they lie."""
PIECE_BYTES = 16 << 20
"""What is touched or copied between two looks whether it is still wanted: up to 0.05 s where memory is new."""


class Arena:
    """One growing run of host memory in huge pages, pinned once a CUDA device is in use."""

    def __init__(self) -> None:
        self._map: mmap.mmap | None = None
        self._bytes = torch.empty(0, dtype=torch.uint8, device="cpu")
        self._pinned = False

    @property
    def nbytes(self) -> int:
        """Its size."""
        return self._bytes.numel()

    def reserve(self, nbytes: int, *, pin: bool) -> torch.Tensor:
        """The arena, at least this large; the old one is given back first if it must grow."""
        if nbytes > self.nbytes:
            self.release()
            # A tenth more: values grow a little from save to save, and a new arena must be touched anew.
            size = -(-int(nbytes * 1.02 + 65536) // (2 << 20)) * (2 << 20)
            self._map = mmap.mmap(-1, size)
            if hasattr(mmap, "MADV_HUGEPAGE"):
                self._map.madvise(mmap.MADV_HUGEPAGE)
            self._bytes = torch.frombuffer(self._map, dtype=torch.uint8)
        if pin and not self._pinned:
            _check_cuda(_runtime().cudaHostRegister(self._bytes.data_ptr(), self.nbytes, 0))
            self._pinned = True
        return self._bytes

    def release(self) -> None:
        """Give the memory back."""
        if self._pinned:
            _check_cuda(_runtime().cudaHostUnregister(self._bytes.data_ptr()))
        self._bytes, self._map, self._pinned = torch.empty(0, dtype=torch.uint8, device="cpu"), None, False


def _runtime() -> Any:
    return torch.cuda.cudart()  # type: ignore[no-untyped-call]


def _check_cuda(result: Any) -> None:
    if int(result) != 0:
        raise ConfigError(f"the CUDA runtime could not pin host memory (error {int(result)}): raise the memlock limit")


Specs = list[tuple[torch.dtype, torch.Size]]


class Side:
    """One arena and how it is laid out."""

    def __init__(self) -> None:
        self.arena = Arena()
        self.slots: list[tuple[int, int]] = []
        self.nbytes = 0
        self.copies: list[torch.Tensor] = []
        self._specs: Specs = []

    def prepare(self, sources: Sequence[torch.Tensor], nbytes: int, *, pin: bool, wanted: Callable[[], bool]) -> None:
        """Touch this much memory, as long as that is wanted, and lay these sources out in it."""
        if nbytes > self.arena.nbytes:
            self._specs, self.copies = [], []  # they point into the arena that goes
            memory = self.arena.reserve(nbytes, pin=pin)
            for at in range(0, len(memory), PIECE_BYTES):
                if not wanted():
                    return
                memory[at : at + PIECE_BYTES].zero_()
        self.lay_out(sources, [(t.dtype, t.shape) for t in sources])

    def lay_out(self, sources: Sequence[torch.Tensor], specs: Specs) -> None:
        """Slots and destination views, kept while dtypes and shapes (``specs``) stay the same."""
        if self.copies and (specs is self._specs or specs == self._specs):
            self._specs = specs
            return
        slots = _slots(sources)
        self.copies = []  # views keep the old arena alive
        arena = self.arena.reserve(_end(slots), pin=any(t.is_cuda for t in sources))
        self.copies = _views(arena, slots, sources)
        self._specs, self.slots, self.nbytes = specs, slots, sum(n for _, n in slots)

    def release(self) -> None:
        """Give the memory back."""
        self._specs, self.copies = [], []
        self.arena.release()


def staged_bytes(sources: Sequence[torch.Tensor]) -> int:
    """Host memory that a snapshot takes."""
    return _end(_slots(sources))


def _slots(sources: Sequence[torch.Tensor]) -> list[tuple[int, int]]:
    """Where each source's copy starts, and its bytes."""
    slots, at = [], 0
    for t in sources:
        nbytes = t.numel() * t.element_size()
        align = _LINE if nbytes < _PAGED_BYTES else _PAGE
        at += -at % align
        slots.append((at, nbytes))
        at += nbytes
    return slots


def _views(
    arena: torch.Tensor, slots: Sequence[tuple[int, int]], sources: Sequence[torch.Tensor]
) -> list[torch.Tensor]:
    """The slots as tensors like their sources, by one operation each: there may be ten thousand."""
    typed = {dtype: arena[: arena.numel() // 16 * 16].view(dtype) for dtype in {t.dtype for t in sources}}
    empty = torch.empty(0, device="meta")
    shapes: dict[torch.Size, tuple[int, ...]] = {}
    for t in sources:
        if t.shape not in shapes:
            shapes[t.shape] = empty.new_empty(t.shape).stride()
    return [
        typed[t.dtype].as_strided(t.shape, shapes[t.shape], at // t.element_size())
        for (at, _), t in zip(slots, sources)
    ]


def _end(slots: Sequence[tuple[int, int]]) -> int:
    return slots[-1][0] + slots[-1][1] if slots else 0
