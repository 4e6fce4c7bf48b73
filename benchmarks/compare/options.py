"""The command line of the comparison."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from fnmatch import fnmatchcase
from pathlib import Path

from benchmarks.compare.peers import PEERS
from benchmarks.compare.workloads import SIZES_MB

_QUICK_MB = 30.0


def parse(arguments: Sequence[str]) -> argparse.Namespace:
    """Checked and expanded: lists are lists, patterns are names."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.compare", description=__doc__)
    parser.add_argument("--workloads", default="W1,W2,W3", help="of W1, W2, W3")
    parser.add_argument("--stores", default="file,s3", help="of file, s3")
    parser.add_argument("--ranks", default="1,2,4", help="W1 sharded over so many processes; none: left out")
    parser.add_argument("--peers", help="names or patterns, such as dcp.*; asked for, they take part in every round")
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--minutes", type=float, default=30, help="no later round goes on after that")
    parser.add_argument("--saves", type=int, default=3, help="per process; the first is reported by itself")
    parser.add_argument("--size-mb", type=float, default=SIZES_MB["W1"], help="state of W1; the others shrink with it")
    parser.add_argument("--quick", action="store_true", help="tiny, one round: shows that all of it works")
    parser.add_argument("--out", type=Path, default=Path("out/benchmarks"))
    parser.add_argument("--strict", action="store_true", help="exit with 1 also if a target is missed")
    found = parser.parse_args(arguments)
    if found.quick:
        found.size_mb, found.rounds, found.saves = min(found.size_mb, _QUICK_MB), 1, 2
    found.workloads = _listed(parser, "workloads", found.workloads, tuple(SIZES_MB))
    found.stores = _listed(parser, "stores", found.stores, ("file", "s3"))
    ranks = "" if found.ranks == "none" else found.ranks
    found.ranks = [int(n) for n in ranks.split(",") if n.isdigit() and int(n) > 0]
    if ranks and len(found.ranks) != len(ranks.split(",")):
        parser.error(f"--ranks: {ranks} is no list of numbers above 0")
    if found.quick:
        found.ranks = found.ranks[:2]
    found.all_rounds = found.peers is not None
    found.peers = _matched(parser, found.peers or "*")
    if found.saves < 2:
        parser.error("--saves must be at least 2: the first save is told apart from the others")
    return found


def _listed(parser: argparse.ArgumentParser, name: str, text: str, known: Sequence[str]) -> list[str]:
    found = text.split(",")
    if unknown := set(found) - set(known):
        parser.error(f"--{name}: {', '.join(sorted(unknown))} is none of {', '.join(known)}")
    return found


def _matched(parser: argparse.ArgumentParser, text: str) -> list[str]:
    patterns = text.split(",")
    for pattern in patterns:
        if not any(fnmatchcase(name, pattern) for name in PEERS):
            parser.error(f"--peers: {pattern} is none of {', '.join(PEERS)}")
    return [name for name in PEERS if any(fnmatchcase(name, pattern) for pattern in patterns)]
