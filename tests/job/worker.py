"""A worker without torch, for `gpumove run`: it trains nothing, but says and does what a worker may.

worker.py FOLDER WAY [ARGUMENT]
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

from gpumove.errors import FencedError
from gpumove.from_env import RunFolder, Worker
from gpumove.notices.notice import Outcome

FOLDER, WAY, ARGUMENT = Path(sys.argv[1]), sys.argv[2], (sys.argv[3:] or ["0"])[0]
RANK, GENERATION = int(os.environ["RANK"]), len(list(Path(sys.argv[1]).glob(f"started-{os.environ['RANK']}-*")))
RUN = RunFolder(os.environ["GPUMOVE_RUN_DIR"])


def note(name: str, text: str = "") -> None:
    """Put down a fact for the test, whole or not at all."""
    draft = FOLDER / f".{name}-{RANK}"
    draft.write_text(text)
    draft.rename(FOLDER / f"{name}-{RANK}-{GENERATION}")


def until_asked() -> None:
    while not RUN.request_file.exists():
        time.sleep(0.02)
    note("asked", RUN.request_file.read_text())


def until_all_started() -> None:
    while not all((FOLDER / f"started-{rank}-{GENERATION}").exists() for rank in range(int(os.environ["WORLD_SIZE"]))):
        time.sleep(0.02)


def main() -> None:
    if WAY == "import-error":
        import gpumove.nonsense  # noqa: F401
    worker = Worker(str(RUN.path), RANK)
    signal.signal(signal.SIGTERM, lambda *_: note("sigterm"))  # only seen, as by a notice source
    if WAY == "ignores":
        # What a worker does that hangs in C, with a helper process that has a session of its own.
        helper = subprocess.Popen(
            [sys.executable, "-c", "import signal, time; signal.signal(15, signal.SIG_IGN); time.sleep(600)"],
            start_new_session=True,
        )
        note("helper", str(helper.pid))
    worker.training(7)
    note("started", str(os.getpid()))
    match WAY:
        case "finishes":
            worker.finished(9)
        case "leaves":
            until_asked()
            time.sleep(float(ARGUMENT))
            worker.left(8, Outcome(durable=True, step=8, lost_steps=0), "file")
        case "loses":
            until_asked()
            worker.left(8, Outcome(durable=False, step=5, lost_steps=3, reason="the store did not answer"), "file")
        case "finishes-when-asked":
            until_asked()
            worker.finished(9)
        case "ignores":
            while True:
                time.sleep(1)
        case "fails":
            if str(RANK) == ARGUMENT:
                until_all_started()
                raise ValueError("the loss went up")
            signal.signal(signal.SIGTERM, signal.SIG_DFL)
            while True:
                time.sleep(1)
        case "fenced":
            raise FencedError("somebody else has the run")
        case "fails-once":
            if GENERATION == 0:
                until_all_started()
                raise ValueError("the first time")
            worker.finished(9)
        case "leaves-badly":  # durable, and then torchrun gets no good status
            until_asked()
            worker.left(8, Outcome(durable=True, step=8, lost_steps=0), "file")
            raise ValueError("in the last line")


main()
