"""The other ranks of the job: small messages between training threads, over a gloo group of gpumove's own.

A group of its own, because collectives of a background library and of the trainer on one group deadlock, and because
NCCL would put checkpoint traffic into the GPU's queue. Every wait is bounded and its error names who is missing.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import TypeVar

import msgspec
import torch
import torch.distributed as dist

from gpumove.errors import ConfigError, StoreError, describe, rebuild

T = TypeVar("T")


class Peers:
    """Rank, world size and three collectives on bytes. Use it only in the training thread, by all ranks alike."""

    def __init__(self, *, timeout_s: float) -> None:
        self._timeout = timedelta(seconds=timeout_s)
        self._group: dist.ProcessGroup | None = None
        self.rank, self.world_size = 0, 1
        if dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1:
            self.rank, self.world_size = process_rank(), dist.get_world_size()
            self._group = dist.new_group(backend="gloo", timeout=self._timeout)

    def meet(self, where: str, *, most_s: float = math.inf) -> None:
        """Wait until all ranks are here, for ``most_s`` if that is less than the timeout.

        Raises:
            StoreError: some are not, within the timeout; it names them (code ``store.peers``).
            ConfigError: the process group is not the one that was there when this was made.
        """
        if dist.is_available() and dist.is_initialized() and dist.get_world_size() != self.world_size:
            raise ConfigError(
                f"the process group has {dist.get_world_size()} ranks, and had {self.world_size} when the Checkpointer "
                "was made: call init_process_group before making the Checkpointer"
            )
        if self._group is None:
            return
        try:
            limit = min(self._timeout, timedelta(seconds=min(most_s, 1e9)))
            dist.monitored_barrier(self._group, timeout=limit, wait_all_ranks=True)
        except RuntimeError as error:
            raise StoreError(f"not all ranks reached {where}: {_first_line(error)}", code="store.peers") from error

    def gather(self, message: bytes) -> list[bytes]:
        """Everybody's message, in the order of ranks, on rank 0; an empty list elsewhere."""
        if self._group is None:
            return [message]
        sizes = [torch.zeros(1, dtype=torch.int64, device="cpu") for _ in range(self.world_size)]
        with _bounded():
            dist.all_gather(sizes, torch.tensor([len(message)], device="cpu"), group=self._group)
            width = max(int(n) for n in sizes)
            mine = _tensor(message.ljust(width, b"\0"))
            into = [torch.empty(width, dtype=torch.uint8, device="cpu") for _ in sizes] if self.rank == 0 else None
            dist.gather(mine, into, dst=0, group=self._group)
        return [bytes(t.numpy())[: int(n)] for t, n in zip(into or [], sizes)]

    def broadcast(self, message: bytes) -> bytes:
        """Rank 0's message, on every rank."""
        if self._group is None:
            return message
        size = torch.tensor([len(message)], device="cpu")
        with _bounded():
            dist.broadcast(size, src=0, group=self._group)
            body = _tensor(message) if self.rank == 0 else torch.empty(int(size), dtype=torch.uint8, device="cpu")
            dist.broadcast(body, src=0, group=self._group)
        return bytes(body.numpy())

    def ask(self, message: bytes, answer: Callable[[list[bytes]], bytes]) -> bytes:
        """Everybody's message to rank 0, and to everybody what it makes of them.

        Short ones, as at every meeting, take two collectives: nobody has to be told first how long they are.
        """
        if self._group is None:
            return answer([message])
        word = _slot(message, len(message))
        into = [torch.empty_like(word) for _ in range(self.world_size)] if self.rank == 0 else None
        with _bounded():
            dist.gather(word, into, dst=0, group=self._group)
        reply = b""
        if into is not None:
            found = [_read(slot) for slot in into]
            short = all(size <= _ROOM for size, _ in found)
            reply = answer([text for _, text in found]) if short else b""
            word = _slot(reply, len(reply) if short else -1)
        with _bounded():
            dist.broadcast(word, src=0, group=self._group)
        size, text = _read(word)
        if size < 0:
            messages = self.gather(message)
            reply = answer(messages) if self.rank == 0 else b""
        return text if 0 <= size <= _ROOM else self.broadcast(reply)

    def agree(self, where: str, work: Callable[[], T]) -> T:
        """Do the same work on all ranks and meet; its result, or on all of them the error that it raised on one.

        Anything but an IntegrityError weighs more than one, since only damage has a fall-back.
        """
        mine: Exception | None = None
        results: list[T] = []
        try:
            results.append(work())
        except Exception as error:  # noqa: BLE001 - whatever it is, the other ranks must not wait for this one
            mine = error
        self.meet(where)
        worst = msgspec.msgpack.decode(self.ask(msgspec.msgpack.encode(describe(mine) if mine else None), _worst))
        if worst is None:
            return results[0]
        rank, described = worst
        if mine is not None and rank == self.rank:
            raise mine
        raise rebuild((described[0], described[1], f"rank {rank}: {described[2]}"))

    def close(self) -> None:
        """Give the group back."""
        if self._group is not None and dist.is_initialized():
            dist.destroy_process_group(self._group)
        self._group = None


@contextmanager
def _bounded() -> Iterator[None]:
    """Name what torch's collectives raise when a rank is lost or late after it was at the barrier."""
    try:
        yield
    except RuntimeError as error:
        raise StoreError(f"another rank was lost while all met: {_first_line(error)}", code="store.peers") from error


def _worst(answers: list[bytes]) -> bytes:
    """Of the errors of all ranks (or None), the one to raise, with its rank."""
    found = [(rank, msgspec.msgpack.decode(a)) for rank, a in enumerate(answers)]
    failed = sorted((e[0] == "IntegrityError", rank, e) for rank, e in found if e is not None)
    return msgspec.msgpack.encode(failed[0][1:] if failed else None)


def process_rank() -> int:
    """This process's rank in the job; 0 if there is no process group."""
    return dist.get_rank() if dist.is_available() and dist.is_initialized() else 0


_SLOT = 512
_ROOM = _SLOT - 8


def _slot(message: bytes, size: int) -> torch.Tensor:
    """A tensor of one size for everybody: a number, and the message as far as there is room."""
    return _tensor((size.to_bytes(8, "little", signed=True) + message[:_ROOM]).ljust(_SLOT, b"\0"))


def _read(slot: torch.Tensor) -> tuple[int, bytes]:
    """The number, and the message if there was room for it."""
    data = bytes(slot.numpy())
    size = int.from_bytes(data[:8], "little", signed=True)
    return size, data[8 : 8 + max(0, size)]


def _tensor(message: bytes) -> torch.Tensor:
    return (
        torch.frombuffer(bytearray(message), dtype=torch.uint8)
        if message
        else torch.empty(0, dtype=torch.uint8, device="cpu")
    )


def _first_line(error: BaseException) -> str:
    return str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
