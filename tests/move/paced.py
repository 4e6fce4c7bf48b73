"""examples.train_gpt with a rest after every step, so that a move that starts late on a busy machine still meets it."""

from __future__ import annotations

import logging
import os
import runpy
import time
from typing import Any

import gpumove

logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
genuine = gpumove.Checkpointer.step


def step(self: gpumove.Checkpointer, *args: Any, **more: Any) -> bool:
    time.sleep(float(os.environ["PACE_S"]))
    return genuine(self, *args, **more)


gpumove.Checkpointer.step = step  # type: ignore[method-assign]
runpy.run_module("examples.train_gpt", run_name="__main__")
