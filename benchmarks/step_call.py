"""What does ``ckpt.step`` cost when nothing is due? Microseconds per call, with the agent and the sources running.

`python -m benchmarks.step_call` exits with 1 if a call takes more than 5 microseconds. The best of ten rounds is what
the call costs; the machine's other load is in the median.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table

import gpumove
from benchmarks.machine import facts
from benchmarks.report import write_json

_MOST_US = 5.0
_ROUNDS = 10


def micros(call: Callable[[int], object], calls: int, start: int) -> float:
    """Per call."""
    began = time.perf_counter()
    for step in range(start, start + calls):
        call(step)
    return (time.perf_counter() - began) / calls * 1e6


def measure(folder: str, calls: int) -> dict[str, list[float]]:
    """Every round of every kind of call, in a job that has saved once and has nothing due."""
    model = torch.nn.Linear(64, 64)
    optimizer = torch.optim.AdamW(model.parameters())
    loss, norm = torch.tensor(0.5), torch.tensor(2.5)
    with gpumove.Checkpointer(folder, model=model, optimizer=optimizer, every_s=None) as ckpt:
        step = ckpt.restore() + 1
        ckpt.step(step)  # the first meeting
        ckpt.save(step).wait()
        kinds: dict[str, Callable[[int], object]] = {
            "an empty call": lambda n: None,
            "ckpt.step(n)": ckpt.step,
            "ckpt.step(n, loss=float)": lambda n: ckpt.step(n, loss=0.5),
            "ckpt.step(n, loss=tensor)": lambda n: ckpt.step(n, loss=loss),
            "ckpt.step(n, loss=tensor, grad_norm=tensor)": lambda n: ckpt.step(n, loss=loss, grad_norm=norm),
        }
        found: dict[str, list[float]] = {name: [] for name in kinds}
        for _ in range(_ROUNDS):
            for name, call in kinds.items():
                found[name].append(micros(call, calls, step + 1))
                step += calls
        return found


def main(arguments: Sequence[str] | None = None) -> int:
    """Run and report; 1 if it is too slow."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.step_call", description=__doc__)
    parser.add_argument("--calls", type=int, default=20_000, help="per round and kind")
    parser.add_argument("--out", type=Path, default=Path("out/benchmarks"))
    options = parser.parse_args(arguments)
    machine = facts()
    with tempfile.TemporaryDirectory() as folder:
        found = measure(folder, options.calls)
    table = Table("", "best, us", "median, us")
    for name, rounds in found.items():
        table.add_row(name, f"{min(rounds):.2f}", f"{statistics.median(rounds):.2f}")
    Console().print(table)
    options.out.mkdir(parents=True, exist_ok=True)
    write_json(options.out / "step_call.json", {"machine": machine, "calls": options.calls, "micros": found})
    return 1 if max(min(rounds) for rounds in found.values()) > _MOST_US else 0


if __name__ == "__main__":
    sys.exit(main())
