"""What a writer is asked for, and what it says of it afterwards."""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from gpumove.errors import StoreError
from gpumove.state.plan import Item
from gpumove.tracing import Trace


@dataclass(frozen=True)
class Request:
    """What one rank is to write in one attempt.

    ``rules`` are the optimizers' hyper-parameters by parameter group; ``keep`` says that the snapshot's memory is left
    alone until the next save is written, so that it can be coded against it.
    """

    run: str
    attempt: str
    rank: int
    world_size: int
    step: int
    plan: str
    items: Sequence[Item]
    values: dict[str, Any]
    rules: Mapping[str, Mapping[str, float]] = field(default_factory=dict)
    keep: bool = False
    unchanged: frozenset[int] = frozenset()
    """Sources known to have the bytes that they had in the last part of this writer."""
    trace: Trace = field(default_factory=lambda: Trace(on=False))
    cancelled: threading.Event = field(default_factory=threading.Event)
    confirm: Callable[[], None] = lambda: None
    """Raises if the snapshot turns out not to be whole; called when all else is written."""

    def check(self) -> None:
        """Stop here if nobody wants the save any more."""
        if self.cancelled.is_set():
            raise StoreError(f"the save of step {self.step} was abandoned", code="store.abandoned")


@dataclass
class PartStats:
    """Bytes of one part, by what became of them, and seconds spent."""

    state_bytes: int = 0
    clean_bytes: int = 0
    new_bytes: int = 0
    packs: int = 0
    peak_bytes: int = 0
    seconds: float = 0.0
    clean: frozenset[int] = frozenset()
    """Sources of which nothing changed."""
    compared: bool = False
    """Whether there was anything to compare them with."""
