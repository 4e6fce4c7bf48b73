"""What rank 0 records of every step, for the next manifest: the training thread keeps, the background makes rows of it.

Nothing here waits for a device in the training thread, and nothing costs a save: what cannot be read is not recorded.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable
from operator import itemgetter
from typing import Any

import numpy as np
import torch

from gpumove.errors import ConfigError
from gpumove.format.codec import mark
from gpumove.format.manifest import TraceRow
from gpumove.parity.trace import word
from gpumove.state.capture import Job
from gpumove.state.loader import ElasticLoader
from gpumove.state.locals import whole_tensor

_MOST = 10_000

Given = torch.Tensor | float | None
Recorded = tuple[int, Any, float | None, Any, dict[str, Any] | None]
"""Step, loss, seconds, gradient norm, and facts that are taken of the first steps after a cut only."""


Heard = tuple[int, Any, float | None, torch.cuda.Event | None]
"""Step, loss, seconds, and when the loss can be read."""


class Recorder:
    """At most ``_MOST`` steps, and as many of those that follow a cut: these are what a certificate is made of."""

    def __init__(self, job: Job, *, rng: bool, certify_steps: int) -> None:
        """Nothing was recorded yet.

        Args:
            job: its first optimizer's first group tells the learning rate, its elastic loader the samples.
            rng: whether generators belong to the job.
            certify_steps: how many steps after each cut are recorded in full.
        """
        self._optimizers, self._rng, self.certify_steps = job.optimizers(), rng, certify_steps
        self._loader = job.loader if isinstance(job.loader, ElasticLoader) else None
        self._closely: deque[Recorded] = deque(maxlen=_MOST)
        self._rows: deque[Recorded] = deque(maxlen=_MOST)
        self._left, self._position = 0, 0
        self.heard: deque[Heard] | None = None
        """For somebody else too, who takes them out again; None if nobody wants them."""
        self.cut()

    def cut(self) -> None:
        """A checkpoint begins here: the steps that follow are those that a certificate compares."""
        self._left = self.certify_steps
        self._position = 0 if self._loader is None else self._loader.position

    def record(
        self, step: int, loss: Given, seconds: float | None, grad_norm: Given = None, samples: Any = None
    ) -> None:
        """One step, in the training thread.

        Raises:
            ConfigError: a loss or a norm is not one number of this rank's.
        """
        if type(loss) is not float and loss is not None:
            loss = _kept("loss", loss)
        if grad_norm is not None:
            grad_norm = _kept("gradient norm", grad_norm)
        if self._left:
            self._left -= 1
            self._closely.append((step, loss, seconds, grad_norm, self._facts(samples)))
        else:
            self._rows.append((step, loss, seconds, grad_norm, None))
        if (heard := self.heard) is not None:
            heard.append((step, loss, seconds, _ready(loss)))

    def _facts(self, samples: Any) -> dict[str, Any]:
        facts: dict[str, Any] = {}
        if self._loader is not None:
            # The global batch, over all that was handed out: the same at another number of ranks.
            before, self._position = self._position, self._loader.position
            facts["samples"] = (self._loader, before, self._position)
        if samples is not None:
            facts["rank_samples"] = _ids(samples)
        if self._optimizers:
            lr = self._optimizers[0].param_groups[0].get("lr")
            facts["lr"] = lr.detach().clone() if isinstance(lr, torch.Tensor) else lr
        if self._rng:
            facts["rng"] = mark(torch.get_rng_state().numpy().data)
            if torch.cuda.is_available() and torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
                facts["rng_device"] = mark(torch.cuda.get_rng_state().numpy().data)
        return facts

    def since(self, step: int) -> list[Recorded]:
        """What was recorded after a committed step; the rest is forgotten."""
        for rows in (self._closely, self._rows):
            while rows and rows[0][0] <= step:
                rows.popleft()
        return sorted([*self._closely, *self._rows], key=itemgetter(0))  # two runs: little to do for 10,000

    def clear(self) -> None:
        """Forget all, and begin anew here."""
        self._closely.clear()
        self._rows.clear()
        self.cut()


def _ready(loss: Any) -> torch.cuda.Event | None:
    """When a value on a device is there: whoever reads it elsewhere is on another stream, and has to wait for that."""
    if not isinstance(loss, torch.Tensor) or loss.device.type != "cuda":
        return None
    event = torch.cuda.Event(blocking=True)  # type: ignore[no-untyped-call]
    event.record(torch.cuda.current_stream(loss.device))
    return event


def _kept(what: str, value: torch.Tensor | float) -> torch.Tensor | float:
    """Its value, or on a device a copy: a captured graph writes to the same tensor again."""
    if not isinstance(value, torch.Tensor):
        return float(value)
    if value.numel() != 1:
        raise ConfigError(f"the {what} is recorded as one number, and this one has the shape {list(value.shape)}")
    found = value if type(value) is torch.Tensor else whole_tensor(value)
    if found is None:
        raise ConfigError(
            f"the {what} is spread over the ranks, and to read it is a collective: give what its full_tensor() gives"
        )
    if found.is_cpu:
        return found.item()  # a fifth of what a copy costs, and nobody waits
    return found.detach().clone()


def _ids(samples: Any) -> Any:
    """A copy of a batch's ids, which the caller may change."""
    if isinstance(samples, torch.Tensor):
        return samples.detach().clone()
    return np.array(samples)


# -------------------------------------------------------------------- in the background


def told(rows: Iterable[Recorded]) -> list[TraceRow]:
    """The rows of a manifest. A device value may be waited for here."""
    return [_told(*row) for row in rows]


def _told(step: int, loss: Any, seconds: float | None, grad_norm: Any, kept: dict[str, Any] | None) -> TraceRow:
    facts: dict[str, Any] = {}
    number = _number(loss)
    if isinstance(number, str):
        facts["loss"], number = number, None
    facts["grad_norm"] = _number(grad_norm)
    for name, value in (kept or {}).items():
        facts[name] = _READ[name](value)
    if seconds is not None:
        facts["s"] = float(f"{seconds:.4g}")
    return TraceRow(step, number, {name: value for name, value in facts.items() if value is not None})


def _number(value: Any) -> float | str | None:
    """A number, or the word for one that JSON does not have, if it is one."""
    try:
        found = float(value)
    except (TypeError, ValueError, RuntimeError):
        return None  # a trace never costs a save
    return word(found) or found


def _batch(taken: tuple[ElasticLoader, int, int]) -> str | None:
    loader, start, stop = taken
    return mark(loader.indices(start, stop).astype("<i8").data) if 0 <= start < stop else None


def _own_batch(ids: Any) -> str | None:
    try:
        found = np.asarray(ids.cpu() if isinstance(ids, torch.Tensor) else ids)
        return mark(found.astype("<i8").tobytes()) if np.issubdtype(found.dtype, np.integer) else None
    except (TypeError, ValueError, RuntimeError):
        return None


def _same(value: Any) -> Any:
    return value


_READ = {"samples": _batch, "rank_samples": _own_batch, "lr": _number, "rng": _same, "rng_device": _same}
