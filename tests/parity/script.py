"""A training script for `gpumove certify`, well made or not: script.py WAY"""

from __future__ import annotations

import os
import sys
import time

import gpumove
from tests.jobs import new_job
from tests.parity.jobs import BROKEN, loop


def main(way: str) -> None:
    if way == "unrelated":
        return
    if way == "hangs":
        print("it hangs", file=sys.stderr, flush=True)
        time.sleep(600)
    if way == "crashes":
        raise ValueError("no data here")
    job = new_job()
    url = os.environ["GPUMOVE_URL"] + ("-other" if way == "elsewhere" else "")
    with gpumove.Checkpointer(url, **job.parts(), every_steps=1, every_s=None) as ckpt:
        step = ckpt.restore()
        BROKEN.get(way, lambda job: None)(job)
        step = loop(job, ckpt, step, step + 2 if way == "fails-early" else 100, heed=way != "ignores")
        if way == "fails-early":
            raise ValueError("no memory")
        ckpt.save(step, pinned=True).wait()
    if way == "fails-later":
        raise ValueError("no room for the result")


if __name__ == "__main__":
    main(sys.argv[1])
