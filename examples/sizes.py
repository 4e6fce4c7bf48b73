"""What every demonstration takes from its command line: a folder, and numbers, or whether it is to be quick."""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from pathlib import Path


def parser_of(words: str | None, out: str, quick: str) -> argparse.ArgumentParser:
    """A parser that knows ``--out`` and ``--quick``.

    Args:
        words: on the whole demonstration.
        out: the folder, unless another one is named.
        quick: what is less then.
    """
    parser = argparse.ArgumentParser(description=words, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path(out), help=f"folder for everything (default {out})")
    parser.add_argument("--quick", action="store_true", help=quick)
    return parser


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
