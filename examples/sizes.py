"""Numbers that a demonstration takes from its command line, or from whether it is to be quick."""

from __future__ import annotations

import argparse
from collections.abc import Mapping


def parse_sizes(
    parser: argparse.ArgumentParser, sizes: Mapping[str, int], quick: Mapping[str, int]
) -> argparse.Namespace:
    """What the parser, which knows ``--quick``, finds; with a hidden option for each size."""
    for name in sizes:
        parser.add_argument(f"--{name}", type=int, metavar="N", help=argparse.SUPPRESS)
    args = parser.parse_args()
    for name, value in (quick if args.quick else sizes).items():
        key = name.replace("-", "_")
        setattr(args, key, value if getattr(args, key) is None else getattr(args, key))
    return args
