"""How soon does a resumed job compute, if its optimizer's state may come later? Eager and lazy restores over one link.

`python -m benchmarks.lazy` exits with 1 if any of them does not bring back the very state that was saved.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch.optim.optimizer import register_optimizer_step_pre_hook

import gpumove
from benchmarks.machine import facts
from benchmarks.report import write_json
from benchmarks.workload import gpt
from tests.servers import ministack
from tests.servers.link import Link
from tests.servers.process import Bucket
from tests.servers.proxy import Proxy

KINDS = {"raw": (1, {"codec": "raw"}), "base": (1, {"codec": "small"}), "chain": (4, {"codec": "small"})}
"""What is restored: saves before it, the last one included, one step apart; and the settings of the job that saved."""


@dataclass(frozen=True)
class Trial:
    """One restore, in seconds from its call on."""

    kind: str
    lazy: bool
    returned_s: float
    forward_s: float
    step_s: float
    exact: bool


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.lazy", description=__doc__)
    parser.add_argument("--state-mb", type=float, default=100)
    parser.add_argument("--mbit", type=float, nargs="+", default=[200], help="rates of the link")
    parser.add_argument("--delay", type=float, default=0.02, help="seconds, one way")
    parser.add_argument("--tokens", type=int, default=128, help="of the first batch")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--out", type=Path, default=Path("out/benchmarks"))
    return parser.parse_args(arguments)


def save(bucket: Bucket, kind: str, options: argparse.Namespace) -> tuple[str, int]:
    """Make a run to restore; the digest of its state, and its bytes."""
    job = gpt(options.state_mb)
    saves, settings = KINDS[kind]
    place = {"storage_options": bucket.options, "every_s": None, **settings}
    with gpumove.Checkpointer(f"{bucket.url}/{kind}", model=job.model, optimizer=job.optimizer, **place) as ckpt:
        ckpt.restore()
        for _ in range(saves):
            job.train_step()
            ckpt.save(job.step).wait()
    return job.digest(), job.state_bytes


def restore(bucket: Bucket, kind: str, truth: str, *, lazy: bool, options: argparse.Namespace) -> Trial:
    """Resume as a new job does, and take the time."""
    job = gpt(options.state_mb, seed=7, tokens=options.tokens)
    settings: dict[str, Any] = {"storage_options": bucket.options, "every_s": None}
    seen: list[str] = []
    with gpumove.Checkpointer(f"{bucket.url}/{kind}", model=job.model, optimizer=job.optimizer, **settings) as ckpt:
        looking_s = 0.0

        def look(*_: object) -> None:
            nonlocal looking_s
            before = time.perf_counter()
            seen.append(job.digest())
            looking_s = time.perf_counter() - before

        hook = register_optimizer_step_pre_hook(look)  # behind gpumove's own: what its step would use
        began = time.perf_counter()
        ckpt.restore(lazy=lazy)
        returned_s = time.perf_counter() - began
        loss = job.loss()
        forward_s = time.perf_counter() - began
        loss.backward()
        job.optimizer.step()
        step_s = time.perf_counter() - began - looking_s
        hook.remove()
    return Trial(kind, lazy, returned_s, forward_s, step_s, seen == [truth])


def measure(options: argparse.Namespace) -> tuple[dict[str, list[Trial]], int]:
    """All trials by the rate of the link, eager and lazy ones in turns; and the bytes of the state."""
    found: dict[str, list[Trial]] = {}
    with tempfile.TemporaryDirectory() as folder, ministack(Path(folder)) as bucket:
        saved = {kind: save(bucket, kind, options) for kind in KINDS}
        for mbit in options.mbit:
            ways = {way: Link(mbit, delay_s=options.delay) for way in ("up", "down")}
            with Proxy(bucket.endpoint, **ways) as proxy:
                far = bucket.via(proxy.endpoint)
                found[f"{mbit:g}"] = [
                    restore(far, kind, saved[kind][0], lazy=lazy, options=options)
                    for _ in range(options.rounds)
                    for kind in KINDS
                    for lazy in (False, True)
                ]
    return found, max(nbytes for _, nbytes in saved.values())


def rows(found: dict[str, list[Trial]]) -> list[dict[str, Any]]:
    """Medians, and lazy as a share of eager."""
    made = []
    for mbit, trials in found.items():
        for kind in KINDS:
            row: dict[str, Any] = {"mbit_s": mbit, "kind": kind}
            for name in ("returned_s", "forward_s", "step_s"):
                eager, lazy = (
                    statistics.median(getattr(t, name) for t in trials if t.kind == kind and t.lazy == which)
                    for which in (False, True)
                )
                row[name] = {"eager": eager, "lazy": lazy, "ratio": lazy / eager}
            made.append(row)
    return made


def main(arguments: Sequence[str] | None = None) -> int:
    """Run and report; 1 if a state was not brought back exactly."""
    options = parse(arguments)
    machine = facts()
    torch.set_num_threads(1)  # the server and the link have the other core
    found, nbytes = measure(options)
    title = f"seconds from restore() on; {nbytes / 1e6:.0f} MB, {2e3 * options.delay:.0f} ms there and back"
    table = Table(
        "Mbit/s", "checkpoint", "forward, eager", "lazy", "ratio", "step, eager", "lazy", "ratio", title=title
    )
    medians = rows(found)
    for row in medians:
        times = [f"{row[name][key]:.2f}" for name in ("forward_s", "step_s") for key in ("eager", "lazy", "ratio")]
        table.add_row(row["mbit_s"], row["kind"], *times)
    Console().print(table)
    options.out.mkdir(parents=True, exist_ok=True)
    content = {
        "machine": machine, "state_bytes": nbytes, "delay_s": options.delay, "tokens": options.tokens,
        "medians": medians, "trials": {mbit: [asdict(t) for t in trials] for mbit, trials in found.items()},
    }  # fmt: skip
    write_json(options.out / "lazy.json", content)
    wrong = [t for trials in found.values() for t in trials if not t.exact]
    for trial in wrong:
        Console().print(f"not what was saved: {trial}")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
