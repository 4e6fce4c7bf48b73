"""Random number generators: python, numpy, torch CPU and every CUDA device, per rank; and what new ranks get."""

from __future__ import annotations

import random
from typing import Any

import numpy as np
import torch

from gpumove.format.codec import digest


def capture() -> dict[str, Any]:
    """The state of every global generator of this process."""
    state: dict[str, Any] = {
        "python": random.getstate(),
        "numpy": np.random.get_state(legacy=False),
        "torch": torch.get_rng_state(),
    }
    if torch.cuda.is_available() and torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
        state["cuda"] = [torch.cuda.get_rng_state(i) for i in range(torch.cuda.device_count())]
    return state


def restore(state: dict[str, Any]) -> None:
    """Put every global generator of this process back. CUDA devices beyond those saved keep their state."""
    random.setstate(state["python"])
    np.random.set_state(state["numpy"])
    torch.set_rng_state(state["torch"])
    if torch.cuda.is_available():
        for index, device_state in enumerate(state.get("cuda", ())[: torch.cuda.device_count()]):
            torch.cuda.set_rng_state(device_state, index)


def derive(state: dict[str, Any], stream: int) -> None:
    """Seed this process for a stream that the checkpoint does not have.

    The seed is a digest of rank 0's torch state and the stream's number: the same checkpoint always gives the same new
    streams, and no two of them are alike.
    """
    seed = int(digest(state["torch"].numpy().tobytes(), stream.to_bytes(8, "little"))[:16], 16)
    random.seed(seed)
    np.random.seed(seed % (1 << 32))
    torch.manual_seed(seed)  # seeds every CUDA device too
