"""The GPT's training with a resume that somebody got wrong: one thing is not as it was when the checkpoint was made.

python -m examples.parity.broken --fault rng --url runs/gpt ...         (the rest as for examples.train_gpt)
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import Any

import torch

import gpumove
from examples import train_gpt


def move_data(job: dict[str, Any]) -> None:
    """The data position is one batch further on."""
    loader = job["loader"]
    state = loader.state_dict()
    at = state["position"] + loader.batch_size
    loader.load_state_dict({**state, "position": at, "next": loader.indices(at, at + len(state["next"])).tolist()})


def forget_generators(job: dict[str, Any]) -> None:
    """The random generators are where the script's own seed has put them."""
    torch.set_rng_state(job["generator"])


def zero_a_moment(job: dict[str, Any]) -> None:
    """One tensor of one of AdamW's moments is zero."""
    optimizer = job["optimizer"]
    largest = max(optimizer.state.values(), key=lambda state: state["exp_avg"].numel())
    largest["exp_avg"].zero_()


def shift_schedule(job: dict[str, Any]) -> None:
    """The learning rate is that of the next step."""
    job["scheduler"].step()


FAULTS: dict[str, Callable[[dict[str, Any]], None]] = {
    "data": move_data, "rng": forget_generators, "moment": zero_a_moment, "schedule": shift_schedule,
}  # fmt: skip


def breaking(fault: Callable[[dict[str, Any]], None]) -> type[gpumove.Checkpointer]:
    """A Checkpointer whose restore has this fault."""

    class Broken(gpumove.Checkpointer):
        def __init__(self, url: str, **job: Any) -> None:
            super().__init__(url, **job)
            self._parts = job

        def restore(self, *args: Any, **options: Any) -> int:
            """As it should be, and then the fault."""
            before = torch.get_rng_state()
            step = super().restore(*args, **options)
            fault({**self._parts, "generator": before})
            return step

    return Broken


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--fault", choices=FAULTS, required=True, help="what is wrong")
    given, rest = parser.parse_known_args()
    gpumove.Checkpointer = breaking(FAULTS[given.fault])
    train_gpt.train(train_gpt.parse(rest))
