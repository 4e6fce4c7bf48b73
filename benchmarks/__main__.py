"""`python -m benchmarks`: all of them, one after the other, or one by name with its own options."""

from __future__ import annotations

import subprocess
import sys

NAMES = ("compare", "kill_loop", "soak", "codecs", "steps", "leaving", "lazy", "replicate", "move", "step_call")


def main(arguments: list[str]) -> int:
    """Run; the exit status is the worst one."""
    if arguments and arguments[0] in NAMES:
        return _run(*arguments)
    if arguments:
        print(f"usage: python -m benchmarks [{' | '.join(NAMES)}] [options of that one]")
        return 0 if arguments[0] in ("-h", "--help") else 2
    return max([_run(name) for name in NAMES])


def _run(name: str, *options: str) -> int:
    """In a process of its own: one looks at its memory, another forks."""
    return subprocess.call([sys.executable, "-m", f"benchmarks.{name}", *options])


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
