"""The losses recorded since the last commit, for the next manifest."""

from __future__ import annotations

import math
from collections import deque
from typing import Any

import torch

from gpumove.errors import ConfigError

_MOST = 10_000


class Losses:
    """Steps and losses, at most ``_MOST`` of them; a device tensor is not waited for."""

    def __init__(self) -> None:
        self._recorded: deque[tuple[int, Any]] = deque(maxlen=_MOST)

    def record(self, step: int, loss: torch.Tensor | float) -> None:
        """Keep a copy: a captured graph writes to the same tensor again.

        Raises:
            ConfigError: it is not one number.
        """
        if not isinstance(loss, torch.Tensor):
            self._recorded.append((step, float(loss)))
            return
        if loss.numel() != 1:
            raise ConfigError(f"the loss is recorded as one number, and this one has the shape {list(loss.shape)}")
        self._recorded.append((step, loss.detach().clone()))

    def since(self, step: int) -> list[tuple[int, Any]]:
        """What was recorded after a committed step; the rest is forgotten."""
        while self._recorded and self._recorded[0][0] <= step:
            self._recorded.popleft()
        return list(self._recorded)

    def clear(self) -> None:
        """Forget all."""
        self._recorded.clear()


def number(loss: Any) -> float | None:
    """A recorded loss as a number, if it is one. Here, in the background, a device value may be waited for."""
    try:
        value = float(loss)
    except (TypeError, ValueError, RuntimeError):
        return None  # a trace is for people: it never costs a save
    return value if math.isfinite(value) else None
