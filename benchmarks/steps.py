"""A save at every step: how many bytes, how much slower the training, and whether any step comes back bit for bit.

`python -m benchmarks.steps` trains one small GPT per setting, in turns of some steps, each with a run of its own.
"""

from __future__ import annotations

import argparse
import random
import shutil
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import mean, median
from time import perf_counter
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.table import Table

from benchmarks.codec.regimes import Regime, Scale
from benchmarks.codec.tables import outcome
from benchmarks.codec.text import corpora
from benchmarks.codec.training import Training
from benchmarks.machine import facts
from benchmarks.places import Place, fresh_place
from benchmarks.report import Verdict, write_json
from benchmarks.workload import digest_of
from gpumove import Checkpointer

SETTINGS: Mapping[str, Mapping[str, Any] | None] = {
    "no checkpointer": None,
    "auto": {},
    "small": {"codec": "small"},
    "small, no delta": {"codec": "small", "delta": False},
    "raw": {"codec": "raw"},
}
_ALONE = "no checkpointer"
_NOT_SLOWER = 1.1
_ON_S3 = ("no checkpointer", "auto", "raw")
"""The S3 server keeps its objects in memory, so it gets fewer."""
_SCALE = Scale("steps", width=192, layers=2, vocabulary=1024, context=128, batch=16, text_bytes=2 << 20)
_TINY = Scale("tiny", width=64, layers=1, vocabulary=512, context=16, batch=2, text_bytes=1 << 17)


@dataclass
class Run:
    """One training with one setting."""

    setting: str
    training: Training
    place: Place
    checkpointer: Checkpointer | None = None
    turns_s: list[float] = field(default_factory=list)
    new_bytes: list[int] = field(default_factory=list)
    digests: dict[int, str] = field(default_factory=dict)
    restored: dict[int, bool] = field(default_factory=dict)
    restores_s: list[float] = field(default_factory=list)
    stored_bytes: int = 0
    skipped: int = 0

    @property
    def state_bytes(self) -> int:
        """Of parameters and moments."""
        return sum(t.nbytes for _, _, t in self.training.tensors())

    def turn(self, steps: int) -> None:
        """Some steps, each saved beside the one that follows; at the end the last save is waited for."""
        began = perf_counter()
        for _ in range(steps):
            self.training.step()
            self._settle()
            self.digests[self.training.steps] = digest(self.training)
            if self.checkpointer is not None:
                self.checkpointer.step(self.training.steps)
        self._settle()
        self.turns_s.append(perf_counter() - began)

    def _settle(self) -> None:
        """Wait for the save that is under way: a save that is still running would make the next one be skipped."""
        if self.checkpointer is None or (last := self.checkpointer.last) is None:
            return
        last.wait()
        if len(self.new_bytes) < len(self.digests):
            self.new_bytes.append(last.stats.new_bytes)

    def close(self) -> None:
        """The training is over."""
        if self.checkpointer is not None:
            self.skipped = self.checkpointer.skipped
            self.checkpointer.close()
            self.stored_bytes = self.place.nbytes()

    def restore(self, step: int, fresh: Training) -> None:
        """One step's checkpoint into objects that never had it."""
        with opened(fresh, self.place, {}) as checkpointer:
            began = perf_counter()
            found = checkpointer.restore(step=step)
            self.restores_s.append(perf_counter() - began)
        self.restored[step] = found == step and digest(fresh) == self.digests[step]


def digest(training: Training) -> str:
    """Of every parameter and moment, names included."""
    return digest_of(lambda: ((f"{name}.{role}", tensor) for name, role, tensor in training.tensors()))


def opened(training: Training, place: Place, settings: Mapping[str, Any]) -> Checkpointer:
    """A Checkpointer of one training, which saves at every step and keeps them all."""
    return Checkpointer(
        place.url,
        model=training.model,
        optimizer=training.optimizer,
        scheduler=training.schedule,
        storage_options=place.options,
        every_s=None,
        every_steps=1,
        keep_last=None,
        **settings,
    )


def train(
    place: Place, *, scale: Scale, tokens: np.ndarray, steps: int, turn: int, settings: Sequence[str]
) -> list[Run]:
    """All settings in turns, so that each sees the same neighbours on the machine."""
    regime = Regime("steps", "fp32, AdamW", steps, warm=20, total=2 * steps)
    runs = []
    for name in settings:
        below = place.child("".join(c if c.isalnum() else "-" for c in name))
        run = Run(name, Training(regime, scale, tokens, None), Place(below, place.options))
        run.training.step()  # an optimizer has no state before its first step
        if (chosen := SETTINGS[name]) is not None:
            run.checkpointer = opened(run.training, run.place, chosen)
            run.checkpointer.restore()
        runs.append(run)
    for first in range(0, steps, turn):
        for run in runs:
            run.turn(min(turn, steps - first))
    for run in runs:
        run.close()
    return runs


def restore_some(runs: Sequence[Run], *, scale: Scale, tokens: np.ndarray, restores: int) -> None:
    """Random steps, the first and the last, of every setting."""
    chooser = random.Random(3)
    for run in (r for r in runs if r.checkpointer is not None):
        known = sorted(run.digests)
        for step in {known[0], known[-1], *chooser.sample(known, min(restores, len(known)))}:
            fresh = Training(run.training.regime, scale, tokens, None)
            with torch.no_grad():
                for _, _, tensor in fresh.tensors():
                    tensor.fill_(-1.0)
            run.restore(step, fresh)


def _named(runs: Sequence[Run], setting: str) -> Run | None:
    return next((run for run in runs if run.setting == setting), None)


def slowdown(run: Run | None, other: Run | None) -> float | None:
    """Times as long as with the other setting: the median of the turns, each against the one beside it."""
    if run is None or other is None:
        return None
    return median(a / b for a, b in zip(run.turns_s, other.turns_s))


def show(console: Console, store: str, runs: Sequence[Run]) -> None:
    """One store: settings downwards."""
    state, steps = runs[0].state_bytes, len(runs[0].digests)
    shown = Table(title=f"{store}: {steps} saves of {state / 1e6:.1f} MB", title_justify="left")
    for name in ("setting", "sent, MB", "a save, %", "stored, MB", "training", "restore"):
        shown.add_column(name, justify="left" if name == "setting" else "right")
    for run in runs:
        ratio = slowdown(run, _named(runs, _ALONE))
        time = "-" if ratio is None else f"{ratio:.2f}x"
        if run.checkpointer is None:
            step_s = median(run.turns_s) / steps * len(run.turns_s)
            shown.add_row(run.setting, "", "", "", f"{1e3 * step_s:.0f} ms/step", "")
            continue
        later = mean(run.new_bytes[1:] or run.new_bytes)
        shown.add_row(
            run.setting,
            f"{sum(run.new_bytes) / 1e6:.0f}",
            f"{100 * later / state:.1f}",
            f"{run.stored_bytes / 1e6:.0f}",
            time,
            f"{median(run.restores_s):.2f} s" if run.restores_s else "-",
        )
    console.print(shown)


def verdicts(store: str, runs: Sequence[Run]) -> Iterator[Verdict]:
    """What must be so whatever the machine."""
    for run in (r for r in runs if r.checkpointer is not None):
        exact = sum(run.restored.values())
        what = f"{exact} of {len(run.restored)} steps restored bit for bit"
        yield Verdict(store, run.setting, what, exact == len(run.restored))
        saved = len(run.new_bytes)
        what = f"{saved} of {len(run.digests)} steps saved, {run.skipped} skipped"
        yield Verdict(store, run.setting, what, saved == len(run.digests) and not run.skipped)
        most = len(run.digests) * run.state_bytes
        what = f"sent {sum(run.new_bytes) / most:.3f} of the raw bytes"
        yield Verdict(store, run.setting, what, sum(run.new_bytes) <= most * (1.0 + 1e-2))


def targets(store: str, runs: Sequence[Run]) -> Iterator[Verdict]:
    """What a noisy machine can spoil: a save is not slower for being smaller."""
    ratio = slowdown(_named(runs, "auto"), _named(runs, "raw"))
    if ratio is not None:
        what = f"training takes {ratio:.2f}x of that with raw, target {_NOT_SLOWER}"
        yield Verdict(store, "auto", what, ratio <= _NOT_SLOWER)


def parse(arguments: Sequence[str]) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.steps", description=__doc__)
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--turn", type=int, default=10, help="steps in a row with one setting")
    parser.add_argument("--restores", type=int, default=5, help="random steps restored per setting")
    parser.add_argument("--stores", default="file,s3", help="of file, s3")
    parser.add_argument("--settings", help="of " + "; ".join(SETTINGS) + "; separated by semicolons")
    parser.add_argument("--tiny", action="store_true", help="a tiny model: shows that all of it works")
    parser.add_argument("--out", type=Path, default=Path("out/benchmarks"))
    parser.add_argument("--strict", action="store_true", help="exit with 1 also if a target of speed is missed")
    found = parser.parse_args(arguments)
    found.stores = found.stores.split(",")
    found.settings = [name.strip() for name in found.settings.split(";")] if found.settings else list(SETTINGS)
    for name, known in (("stores", ("file", "s3")), ("settings", SETTINGS)):
        if unknown := set(getattr(found, name)) - set(known):
            parser.error(f"--{name}: {', '.join(sorted(unknown))} is none of {', '.join(known)}")
    return found


def main(arguments: Sequence[str] | None = None) -> int:
    """Run and report; 1 if a restored state differs or a step was not saved."""
    options = parse(sys.argv[1:] if arguments is None else arguments)
    console, machine, scale = Console(), facts(), _TINY if options.tiny else _SCALE
    options.out.mkdir(parents=True, exist_ok=True)
    tokens = corpora(scale.text_bytes, size=scale.vocabulary)["python"]
    content: dict[str, Any] = {}
    exact: list[Verdict] = []
    hoped: list[Verdict] = []
    for store in options.stores:
        scratch = Path(tempfile.mkdtemp(dir=options.out, prefix="scratch-"))
        try:
            with fresh_place(store, scratch) as place:
                names = [n for n in options.settings if store == "file" or n in _ON_S3]
                runs = train(place, scale=scale, tokens=tokens, steps=options.steps, turn=options.turn, settings=names)
                restore_some(runs, scale=scale, tokens=tokens, restores=options.restores)
        finally:
            shutil.rmtree(scratch, ignore_errors=True)
        show(console, store, runs)
        exact += verdicts(store, runs)
        hoped += targets(store, runs)
        content[store] = [_plain(run, _named(runs, _ALONE)) for run in runs]
    found = exact + hoped
    outcome(console, found)
    settings = {k: v for k, v in vars(options).items() if k != "out"}
    rest = {"machine": machine, "settings": settings, "verdicts": [vars(v) for v in found]}
    name = "steps_tiny.json" if options.tiny else "steps.json"
    write_json(options.out / name, {"stores": content, **rest})
    console.print(f"written to {options.out}: {name}", highlight=False)
    return 0 if all(verdict.met for verdict in (found if options.strict else exact)) else 1


def _plain(run: Run, alone: Run | None) -> dict[str, Any]:
    keys = ("setting", "turns_s", "new_bytes", "restored", "restores_s", "stored_bytes", "state_bytes", "skipped")
    return {**{key: getattr(run, key) for key in keys}, "slowdown": slowdown(run, alone)}


if __name__ == "__main__":
    sys.exit(main())
