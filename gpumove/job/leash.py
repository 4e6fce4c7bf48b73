"""What torchrun's process does before it becomes torchrun: bind itself to the parent, and get deaf to two signals.

Run as a program of its own, because ``preexec_fn`` may deadlock in a parent that has threads.
"""

from __future__ import annotations

import os
import signal
import sys

from gpumove.prctl import end_with_parent


def main(arguments: list[str]) -> None:
    """``PARENT COMMAND...``: become the command, which gets a SIGTERM when the parent dies."""
    parent, command = int(arguments[0]), arguments[1:]
    end_with_parent(signal.SIGTERM)
    if os.getppid() != parent:
        raise SystemExit("gpumove run has died")
    # Schedulers that signal whole groups: these two kill a torchrun that has not heard of them, and orphan its workers.
    for number in (signal.SIGUSR1, signal.SIGUSR2):
        signal.signal(number, signal.SIG_IGN)
    os.execv(command[0], command)


if __name__ == "__main__":
    main(sys.argv[1:])
