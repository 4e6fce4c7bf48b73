"""What ``ckpt.step`` costs when nothing is due: microseconds per call, with the agent thread and the sources running.

    python -m benchmarks.step_call [--calls 200000]

Printed is the best and the median of ten rounds, with and without a loss; the machine's other load is in the median.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable

import torch

import gpumove


def micros(call: Callable[[int], object], calls: int, start: int) -> float:
    began = time.perf_counter()
    for step in range(start, start + calls):
        call(step)
    return (time.perf_counter() - began) / calls * 1e6


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--calls", type=int, default=200_000)
    args = parser.parse_args()
    model = torch.nn.Linear(64, 64)
    optimizer = torch.optim.AdamW(model.parameters())
    with (
        tempfile.TemporaryDirectory() as folder,
        gpumove.Checkpointer(folder, model=model, optimizer=optimizer, every_s=None) as ckpt,
    ):
        step = ckpt.restore()
        ckpt.step(step + 1)  # the first meeting
        ckpt.save(step + 1).wait()
        step += 2
        calls: dict[str, Callable[[int], object]] = {
            "an empty call": lambda n: None,
            "ckpt.step(n)": ckpt.step,
            "ckpt.step(n, loss=float)": lambda n: ckpt.step(n, loss=0.5),
        }
        for name, call in calls.items():
            found = []
            for _ in range(10):
                found.append(micros(call, args.calls // 10, step))
                step += args.calls // 10
            print(f"{name:26} best {min(found):5.2f} us   median {statistics.median(found):5.2f} us")


if __name__ == "__main__":
    main()
