"""Kill a training run twice, with SIGKILL, at random moments, and show that nothing of it was lost or changed.

    python -m examples.demo [--quick] [--out DIR]

Two runs of the same small GPT, every life of them a process of its own. The first is never interrupted, and saves
nothing before its end. The second saves as it goes, is killed and started again, twice. Then all losses of the second
are compared with those of the first, bit by bit, and so are the final parameters and optimizer states.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from hashlib import blake2b
from itertools import pairwise
from pathlib import Path
from statistics import median
from typing import Any

from rich.progress import Progress
from rich.table import Table

import gpumove
from examples.demo_picture import draw
from examples.looks import bars, console, leave, say
from examples.sizes import parse_sizes, parser_of
from examples.train_gpt import GPT, make_optimizer

KILLS = ((0.25, 0.45), (0.6, 0.8))
"""In which stretches of the run a process is killed."""
NEVER = 10**9


@dataclass
class Life:
    """One process from its start to its end, as its record tells it."""

    name: str
    record: Path
    resumed: int = 0
    losses: dict[int, str] = field(default_factory=dict)
    """By step, in hexadecimal: every bit of the number."""
    samples: dict[int, str] = field(default_factory=dict)
    """By step, a digest of which samples it was computed from."""
    at: dict[int, float] = field(default_factory=dict)
    """By step, when it was complete; at ``resumed``, when the first step could begin."""
    saves: list[dict[str, Any]] = field(default_factory=list)
    seconds: float = 0.0
    killed: bool = False
    in_save: bool = False
    """Whether the kill hit a save that was on its way."""
    _read: int = 0

    @property
    def last(self) -> int:
        """The newest step that was completed."""
        return max(self.losses, default=self.resumed)

    def follow(self) -> None:
        """Take in what was written since. A last line without an end was cut by the kill, or is being written."""
        with self.record.open("rb") as file:
            file.seek(self._read)
            for line in file:
                if line.endswith(b"\n"):
                    self._read += len(line)
                    self._take(json.loads(line))

    def _take(self, said: dict[str, Any]) -> None:
        if "step" in said:
            self.losses[said["step"]], self.samples[said["step"]] = said["loss"], said["samples"]
            self.at[said["step"]] = said["at"]
        elif "saved" in said:
            self.saves.append(said)
        else:
            self.resumed = said["resumed"]
            self.at[self.resumed] = said["at"]


@dataclass
class Trainer:
    """Starts processes, follows them, and kills some of them."""

    out: Path
    options: dict[str, int]
    dice: random.Random
    bars: Progress

    def live(self, name: str, *, run: str, every: int, kill: tuple[float, float] | None = None) -> Life:
        """One process of a run, to its end or until it is killed."""
        life = Life(name, self.out / f"{name}.jsonl")
        life.record.write_bytes(b"")
        options = {**self.options, "every-steps": every, "url": self.out / run, "out": life.record}
        command = [sys.executable, "-m", "examples.train_gpt", *(f"--{k}={v}" for k, v in options.items())]
        env = {**os.environ, "GPUMOVE_EVERY_S": "none"}  # saves by steps only, however slow this machine is
        bar = self.bars.add_task(name, total=self.options["steps"])
        log, began = self.out / f"{name}.log", time.monotonic()
        with log.open("wb") as file:
            root = Path(__file__).resolve().parent.parent
            process = subprocess.Popen(command, cwd=root, env=env, stdout=file, stderr=subprocess.STDOUT)
        doomed = self._doom(life, every, kill)
        try:
            while process.poll() is None and not life.killed:
                time.sleep(0.005)
                life.follow()
                self.bars.update(bar, completed=life.last)
                life.killed = next(doomed)
        finally:
            process.kill()  # SIGKILL: nothing is flushed, no handler runs, no save is brought to its end
            process.wait()
        life.follow()
        self.bars.update(bar, completed=life.last)
        self.bars.stop_task(bar)
        life.seconds = time.monotonic() - began
        life.in_save = life.killed and has_open_save(self.out / run)
        if not life.killed and (kill or process.returncode):
            told = log.read_text(errors="replace")[-3000:]
            sys.exit(f"{name} ended by itself, with {process.returncode}, after step {life.last}; its log:\n{told}")
        return life

    def _doom(self, life: Life, every: int, kill: tuple[float, float] | None) -> Iterator[bool]:
        """Whether to kill now: from a random step on, after two commits, at any moment of an interval between saves."""
        if kill is not None:
            first = self.dice.uniform(*kill) * self.options["steps"]
            began = time.monotonic()
            while life.last < first or sum(save["committed"] for save in life.saves) < 2:
                began = began if life.losses else time.monotonic()
                yield False
            step_s = (time.monotonic() - began) / len(life.losses)
            due = time.monotonic() + self.dice.uniform(0, every * step_s)
            while time.monotonic() < due:
                yield False
            yield True
        while True:
            yield False


def has_open_save(run: Path) -> bool:
    """Whether the newest attempt to save has left objects, but is not committed. The layout is docs/format.md's."""
    begun = {path.name for room in ("packs", "parts") for path in (run / room).glob("*")}
    begun |= {path.name[:17] for path in (run / "manifests").glob("*.json")}
    committed = max((checkpoint.attempt for checkpoint in gpumove.checkpoints(str(run))), default="")
    return max(begun, default="") > committed


def digest(url: str, options: Mapping[str, int], storage_options: Mapping[str, Any] | None = None) -> str:
    """Digest of all parameters and optimizer state in the newest checkpoint of a run."""
    model = GPT(context=options["context"], layers=options["layers"], width=options["width"])
    optimizer, _ = make_optimizer(model, options["steps"])
    gpumove.load(url, model=model, optimizer=optimizer, storage_options=storage_options)
    found = blake2b(digest_size=16)
    for name, tensor in model.state_dict().items():
        found.update(name.encode() + tensor.numpy().tobytes())
    for index, state in optimizer.state_dict()["state"].items():
        for name, tensor in sorted(state.items()):
            found.update(f"{index}.{name}".encode() + tensor.numpy().tobytes())
    return found.hexdigest()


def differences(whole: Life, lives: Sequence[Life], digests: Sequence[str]) -> list[str]:
    """Everything in which the killed run is not the uninterrupted one; an empty list is the point of it all."""
    wrong = []
    for life in lives:
        for step, loss in life.losses.items():
            if loss != whole.losses[step]:
                there, here = float.fromhex(whole.losses[step]), float.fromhex(loss)
                wrong.append(f"step {step}: the loss is {here!r} in {life.name} and {there!r} in {whole.name}")
            if life.samples[step] != whole.samples[step]:
                wrong.append(f"step {step}: other samples in {life.name} than in {whole.name}")
    if missing := set(whole.losses) - {step for life in lives for step in life.losses}:
        wrong.append(f"the killed run lacks the steps {sorted(missing)[:10]}")
    if len(set(digests)) > 1:
        wrong.append(f"the final states differ: {', '.join(digests)}")
    return wrong


def tell(whole: Life, lives: Sequence[Life], every: int) -> dict[str, Any]:
    """Print what happened, and return it in numbers."""
    table = Table(title="The processes", title_justify="left", title_style="bold")
    for heading in ("process", "from", "to", "ended by", "done again", "saves", "time"):
        table.add_column(heading, justify="left" if heading in ("process", "ended by") else "right", no_wrap=True)
    again = [before.last - after.resumed for before, after in pairwise(lives)]
    for life, lost in zip([whole, *lives], [0, 0, *again]):
        end = "itself" if not life.killed else "[red]SIGKILL[/]" + (" in a save" if life.in_save else "")
        numbers = (str(lost), str(len(life.saves)), f"{life.seconds:.1f} s")
        table.add_row(life.name, str(life.resumed), str(life.last), end, *numbers)
    console.print(table)

    saves = [save for life in lives for save in life.saves if save["committed"]]
    stall_s, sent = sorted(save["stall_s"] for save in saves), sum(save["new_bytes"] for save in saves)
    facts = {
        "steps": whole.last,
        "every_steps": every,
        "resumed": [life.resumed for life in lives[1:]],
        "killed_at": [life.last for life in lives if life.killed],
        "killed_in_save": [life.in_save for life in lives if life.killed],
        "recomputed_steps": sum(again),
        "saves": len(saves),
        "stall_s": {"median": median(stall_s), "max": stall_s[-1]},
        "committed_s": median(save["committed_s"] for save in saves),
        "state_bytes": saves[-1]["state_bytes"],
        "sent_bytes": sent,
    }
    table = Table(title="The saves", title_justify="left", title_style="bold", show_header=False)
    table.add_row("saves that were reported", f"{len(saves)}; one is due every {every} steps, and one at the end")
    table.add_row(
        "stall of the training", f"{1e3 * median(stall_s):.1f} ms per save (median), {1e3 * stall_s[-1]:.1f} ms at most"
    )
    table.add_row("from call to commit", f"{1e3 * facts['committed_s']:.0f} ms (median), beside the training")
    table.add_row("bytes sent", f"{sent / len(saves) / 1e6:.1f} MB per save, {sent / 1e6:.0f} MB in all")
    console.print(table)
    return facts


def prove(out: Path, options: dict[str, int], whole: Life, lives: Sequence[Life]) -> tuple[list[str], dict[str, Any]]:
    """Read back what both runs have left, and compare."""
    checked = gpumove.verify(str(out / "killed"), deep=True)
    digests = [digest(str(out / run), options) for run in ("uninterrupted", "killed")]
    steps = [checkpoint.step for checkpoint in checked.checkpoints]
    wrong = differences(whole, lives, digests) + [f"{d.object}: {d.problem}" for d in checked.damage]
    compared = sum(len(life.losses) for life in lives)
    good = [
        f"{compared} losses, of {whole.last} steps, are equal to the last bit",
        "every step was computed from the same samples",
        f"the final parameters and optimizer states are equal: {digests[0]}",
    ]
    read = [f"{len(steps)} checkpoints read back, every byte verified"] if checked.sound else []
    say(wrong, read + ([] if wrong else good))
    return wrong, {"compared_losses": compared, "verified_steps": steps, "digests": digests, "differences": wrong}


def parse() -> argparse.Namespace:
    parser = parser_of(__doc__, "out/demo", "fewer steps of a smaller model")
    parser.add_argument("--dice", type=int, help="seed of the moments of the kills; a new one each time by default")
    sizes = {"steps": 405, "every-steps": 10, "batch": 8, "context": 128, "layers": 4, "width": 128}
    quick = {"steps": 203, "every-steps": 5, "batch": 4, "context": 64, "layers": 3, "width": 96}
    return parse_sizes(parser, sizes, quick)


def main() -> int:
    args = parse()
    options = {name: getattr(args, name) for name in ("steps", "batch", "context", "layers", "width")}
    every, seed = args.every_steps, random.SystemRandom().randrange(10**6) if args.dice is None else args.dice
    out = args.out.resolve()
    out.mkdir(parents=True, exist_ok=True)
    for run in ("uninterrupted", "killed"):  # what an earlier demonstration has left, and nothing else
        shutil.rmtree(out / run, ignore_errors=True)

    with bars() as shown:
        trainer = Trainer(out, options, random.Random(seed), shown)
        whole = trainer.live("uninterrupted", run="uninterrupted", every=NEVER)
        lives = [
            trainer.live(f"life-{number}", run="killed", every=every, kill=kill)
            for number, kill in enumerate([*KILLS, None], start=1)
        ]
    facts = tell(whole, lives, every)
    wrong, proof = prove(out, options, whole, lives)
    draw(out / "loss.png", whole, lives, every=every)
    return leave(args.out, "loss.png", {**options, **facts, **proof, "dice": seed, "passed": not wrong})


if __name__ == "__main__":
    sys.exit(main())
