"""Two bonds between processes that Linux keeps for us: to end with the parent, and to inherit orphans. Knows no job."""

from __future__ import annotations

import ctypes
import os

from gpumove.errors import ConfigError

_PR_SET_PDEATHSIG, _PR_SET_CHILD_SUBREAPER = 1, 36


def end_with_parent(signal_number: int) -> None:
    """Have this signal sent to this process when its parent dies. Outlives exec, but not fork.

    More exactly it is the parent's *thread* that has to live on: start children from the main thread.
    """
    _prctl(_PR_SET_PDEATHSIG, signal_number)


def adopt_orphans() -> None:
    """Become the parent of every descendant whose own parent dies: none gets lost, and no pid of one is used again."""
    _prctl(_PR_SET_CHILD_SUBREAPER, 1)


def _prctl(option: int, value: int) -> None:
    if ctypes.CDLL(None, use_errno=True).prctl(option, value, 0, 0, 0) != 0:
        raise ConfigError(f"prctl({option}, {value}) was refused: {os.strerror(ctypes.get_errno())}")
