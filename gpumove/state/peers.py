"""The other ranks of the job: small messages between training threads, over a gloo group of gpumove's own.

A group of its own, because collectives of a background library and of the trainer on one group deadlock, and because
NCCL would put checkpoint traffic into the GPU's queue. Every wait is bounded and its error names who is missing.
"""

from __future__ import annotations

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

    def meet(self, where: str) -> None:
        """Wait until all ranks are here.

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
            dist.monitored_barrier(self._group, timeout=self._timeout, wait_all_ranks=True)
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

    def scatter(self, messages: list[bytes]) -> bytes:
        """From rank 0's list, each rank's own message. Other ranks pass an empty list."""
        if self._group is None:
            return messages[0]
        sizes = torch.zeros(self.world_size, dtype=torch.int64, device="cpu")
        if self.rank == 0:
            sizes = torch.tensor([len(m) for m in messages], device="cpu")
        with _bounded():
            dist.broadcast(sizes, src=0, group=self._group)
            width = int(sizes.max())
            mine = torch.empty(width, dtype=torch.uint8, device="cpu")
            rows = [_tensor(m.ljust(width, b"\0")) for m in messages] if self.rank == 0 else None
            dist.scatter(mine, rows, src=0, group=self._group)
        return bytes(mine.numpy())[: int(sizes[self.rank])]

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
        answers = self.gather(msgspec.msgpack.encode(describe(mine) if mine else None))
        verdict = b""
        if self.rank == 0:
            found = [(rank, msgspec.msgpack.decode(a)) for rank, a in enumerate(answers)]
            failed = sorted((e[0] == "IntegrityError", rank, e) for rank, e in found if e is not None)
            verdict = msgspec.msgpack.encode(failed[0][1:] if failed else None)
        worst = msgspec.msgpack.decode(self.broadcast(verdict))
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


def process_rank() -> int:
    """This process's rank in the job; 0 if there is no process group."""
    return dist.get_rank() if dist.is_available() and dist.is_initialized() else 0


def _tensor(message: bytes) -> torch.Tensor:
    return (
        torch.frombuffer(bytearray(message), dtype=torch.uint8)
        if message
        else torch.empty(0, dtype=torch.uint8, device="cpu")
    )


def _first_line(error: BaseException) -> str:
    return str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
