"""examples.train_gpt with a rest after every step, so that a move that starts late on a busy machine still meets it;
with something in it that is broken, where ``BROKEN`` says so; and with an output probe, where ``PROBED`` does."""

from __future__ import annotations

import logging
import os
import runpy
import time
from typing import Any

import torch

import gpumove

logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
genuine = gpumove.Checkpointer.step
broken, steps = os.environ.get("BROKEN", ""), 0


def step(self: gpumove.Checkpointer, *args: Any, **more: Any) -> bool:
    global steps
    steps += 1
    time.sleep(float(os.environ["PACE_S"]))
    if broken == "lr":
        for group in self._job.optimizers()[0].param_groups:
            group["lr"] *= 50
    elif broken == "slow" and steps > 5:
        time.sleep(0.3)
    elif steps == 12 and broken == "nan":
        with torch.no_grad():
            self._job.optimizers()[0].param_groups[0]["params"][0].fill_(float("nan"))
    elif steps == 30 and broken == "raise":
        raise ValueError("broken on purpose")
    return genuine(self, *args, **more)


def restore(self: gpumove.Checkpointer, *args: Any, **more: Any) -> int:
    model = self._job.members[0].module  # type: ignore[attr-defined]
    self.probe(lambda: model(torch.arange(2 * 65).view(2, 65)))
    found = plain_restore(self, *args, **more)
    logging.info("probes: %s", {name: result.verdict for name, result in self.probes.items()})
    return found


plain_restore = gpumove.Checkpointer.restore
if os.environ.get("PROBED"):
    gpumove.Checkpointer.restore = restore  # type: ignore[method-assign]
gpumove.Checkpointer.step = step  # type: ignore[method-assign]
runpy.run_module("examples.train_gpt", run_name="__main__")
