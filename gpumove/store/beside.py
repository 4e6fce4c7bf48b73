"""Two calls at once, where each waits for a network."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextvars import copy_context
from typing import TypeVar

T = TypeVar("T")
U = TypeVar("U")


def both(one: Callable[[], T], other: Callable[[], U], *, at_once: bool) -> tuple[T, U]:
    """What both give; an error is raised when neither runs any more, that of ``other`` first."""
    if not at_once:
        return one(), other()
    with ThreadPoolExecutor(1, thread_name_prefix="gpumove-beside") as thread:
        try:
            asked = thread.submit(copy_context().run, one)
        except RuntimeError:  # the interpreter is on its way out, and takes no more work
            return one(), other()
        found = other()
    return asked.result(), found
