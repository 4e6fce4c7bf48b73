"""gpumove's codecs beside zstd and ZipNN, on the states of real trainings that it makes itself: how small, how fast.

`python -m benchmarks.codecs` trains for some minutes the first time and keeps the states; later it only measures.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

from rich.console import Console

from benchmarks.codec import peers, ratios, speed, tables
from benchmarks.codec.ratios import Total
from benchmarks.codec.regimes import BY_NAME, FULL, QUICK, REGIMES
from benchmarks.codec.speed import Pace, Task
from benchmarks.codec.states import Family, States
from benchmarks.codec.targets import (
    BASE,
    CHOOSING,
    FP32,
    NARROW,
    ONE,
    SUB,
    TEN,
    WEIGHTS,
    exact_verdicts,
    size_verdicts,
    speed_verdicts,
    thread_verdicts,
)
from benchmarks.machine import facts
from benchmarks.report import Verdict, write_json
from gpumove.format import native

_DISTANCES = (1, 2, 5, 10)
_TIMED = "mixed"


def parse(arguments: Sequence[str]) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.codecs", description=__doc__)
    parser.add_argument("--regimes", default=",".join(BY_NAME), help="of " + ", ".join(BY_NAME))
    parser.add_argument("--quick", action="store_true", help="a tiny model and few steps: shows that all of it works")
    parser.add_argument("--long", action="store_true", help="also 100 steps after the anchor")
    parser.add_argument("--rounds", type=int, default=5, help="of each timing; 0 measures sizes only")
    parser.add_argument("--numpy", action="store_true", help="gpumove without its native core")
    parser.add_argument("--out", type=Path, default=Path("out/benchmarks"))
    parser.add_argument("--strict", action="store_true", help="exit with 1 also if a target is missed")
    found = parser.parse_args(arguments)
    found.regimes = found.regimes.split(",")
    if unknown := set(found.regimes) - set(BY_NAME):
        parser.error(f"--regimes: {', '.join(sorted(unknown))} is none of {', '.join(BY_NAME)}")
    return found


def _codecs(names: Sequence[str]) -> list[peers.Codec]:
    return [peers.make(name) for name in names if name != "zipnn" or peers.present()]


def sizes_of(name: str, distance: int, families: Sequence[Family]) -> Iterator[Total]:
    """All codecs on one state; at distance 0 those that know no predecessor."""
    for codec in _codecs(peers.DELTAS if distance else peers.BASES):
        yield ratios.measure(name, distance, codec, families)


def measure_sizes(states: States, regimes: Sequence[str], distances: Sequence[int], console: Console) -> list[Total]:
    """Every regime at every distance, one after the other: a state is large."""
    found: list[Total] = []
    for regime in (r for r in REGIMES if r.name in regimes):
        views: dict[str, list[Total]] = {regime.name: []}
        for distance in (0, *distances):
            families = states.families(regime, distance)
            views[regime.name] += sizes_of(regime.name, distance, families)
            if regime.name == _TIMED:
                views.setdefault(WEIGHTS, []).extend(sizes_of(WEIGHTS, distance, list(ratios.only(families, "copy"))))
        for name, totals in views.items():
            title = f"{name} ({regime.title})" if name == regime.name else f"{name} of {regime.name}, alone"
            tables.sizes(console, title, totals, whole=regime.adapters)
            found += totals
    return found


def _matrices(states: States, regime: str, distance: int) -> Family:
    """All weight matrices of one optimizer group as one large family."""
    families = states.families(BY_NAME[regime], distance)
    return speed.joined([f for f in families if f.dense and f.before.get("weight_decay")])


def timed_tasks(states: States) -> tuple[list[Task], list[Task]]:
    """What is timed: each codec on each kind of buffer, and whole families for the threads."""
    ten, one, narrow = (_matrices(states, *of) for of in ((_TIMED, 10), (_TIMED, 1), ("mixed-bf16", 1)))
    roles = [m.role for m in ten.members]
    alone = next(iter(ratios.only([ten], "copy")))
    plain = (*peers.BASES, SUB, "xor + zstd 3")
    tasks = [Task(WEIGHTS, codec, speed.cut(alone, (0,), 10)) for codec in _codecs(plain)]
    for role in FP32:
        n = roles.index(role)
        tasks += [Task(role, codec, speed.cut(ten, (n,), 10)) for codec in _codecs(plain)]
    # "copy" comes last: gpumove derives it from the parameter, where the codecs above have the bf16 weights alone.
    for label, family, steps in ((ONE, one, 1), (CHOOSING, one, 1), (TEN, ten, 10), (NARROW, narrow, 1)):
        codec = peers.Ours(label, "best", forgets=label == CHOOSING)
        tasks += [Task(role, codec, speed.cut(family, (roles.index(role),), steps)) for role in (*FP32, "copy")]
    fp32 = tuple(roles.index(role) for role in FP32)
    threaded = [
        Task("fp32 state", peers.Ours(label, kind), speed.cut(family, fp32, steps))
        for label, kind, family, steps in ((BASE, "base", ten, 10), (SUB, "sub", ten, 10), (ONE, "best", one, 1))
    ]
    return tasks, threaded


def measure_speed(states: States, rounds: int, console: Console) -> tuple[list[Pace], list[Pace]]:
    """One thread, then two against one."""
    tasks, threaded = timed_tasks(states)
    paces = speed.measure(tasks, rounds=rounds)
    tables.speeds(console, paces)
    pairs = [Pace(task.buffer, task.codec.name, task.raw_bytes()) for task in threaded]
    speed.measure_pairs(threaded, pairs, rounds=3 * rounds)  # two idle cores at once are rare
    return paces, pairs


def _content(totals: Sequence[Total], paces: Sequence[Pace], verdicts: Sequence[Verdict]) -> dict[str, Any]:
    return {
        "sizes": [
            {
                "regime": t.regime,
                "distance": t.distance,
                "codec": t.codec,
                "dense": t.fraction(),
                "whole": t.fraction(dense=False),
                "raw_bytes": {f"{role}{'' if dense else ', input'}": n for (role, dense), n in t.raw.items()},
                "stored_bytes": {f"{role}{'' if dense else ', input'}": n for (role, dense), n in t.stored.items()},
                "raw_bytes_by_way": t.ways,
            }
            for t in totals
        ],
        "speeds": [vars(p) for p in paces],
        "verdicts": [vars(v) for v in verdicts],
    }


def main(arguments: Sequence[str] | None = None) -> int:
    """Run and report; 1 if a decode gave other bytes."""
    options = parse(sys.argv[1:] if arguments is None else arguments)
    console, machine = Console(), facts()
    if options.numpy:
        native.core = None
    options.out.mkdir(parents=True, exist_ok=True)
    distances = (*_DISTANCES, 100) if options.long else _DISTANCES
    states = States(options.out / "states", QUICK if options.quick else FULL, distances=distances, say=console.print)
    totals = measure_sizes(states, options.regimes, distances, console)
    paces, pairs = measure_speed(states, options.rounds, console) if options.rounds else ([], [])
    exact = list(exact_verdicts(totals, paces))
    found = [*exact, *size_verdicts(totals)]
    if options.rounds:
        found += [*speed_verdicts(paces), *thread_verdicts(pairs)]
    tables.outcome(console, found)
    settings = {k: v for k, v in vars(options).items() if k != "out"}
    settings["core"] = "numpy" if native.core is None else "native"
    settings["zipnn"] = version("zipnn") if peers.present() else None
    content = _content(totals, [*paces, *pairs], found)
    name = f"codecs{'_quick' * options.quick}{'_numpy' * options.numpy}.json"
    write_json(options.out / name, {"machine": machine, "settings": settings, **content})
    console.print(f"written to {options.out}: {name} ({settings['core']} core)", highlight=False)
    return 0 if all(v.met for v in (found if options.strict else exact)) else 1


if __name__ == "__main__":
    sys.exit(main())
