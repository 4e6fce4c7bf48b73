"""Train in one cloud, move to another one during training, and show that the losses are those of a run that stayed.

    python -m examples.move_between_clouds [--quick] [--target-ranks 1|2|4] [--out DIR]

Two object stores of different protocols, S3 and GCS, each behind a link of its own. Two ranks train a GPT beside the
first; a second job waits beside the other one. `gpumove move` copies beside the training, stops it after one step, and
hands over; the waiting job trains to the end. All losses are compared with those of a run that nobody moved: bit by bit
with the same number of ranks, to 0.1 % with another one (the same samples in every step).
"""

from __future__ import annotations

import argparse
import os
import shutil
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.markup import escape
from rich.progress import Progress
from rich.table import Table

import gpumove
from examples.demo import Life, differences, digest
from examples.looks import bars, console, leave, say
from examples.move_between_clouds.clouds import Cloud, environment, two_clouds
from examples.move_between_clouds.picture import draw
from examples.move_between_clouds.processes import Running, Stage
from examples.sizes import parse_sizes, parser_of

RANKS = 2
NEVER = 10**9
MOVED = 77
"""What `gpumove run` ends with where the run was moved away."""
TOLERANCE = 1e-3


@dataclass(frozen=True)
class Trip:
    """The lives of the two runs, and what the mover says."""

    whole: Life
    before: Life
    after: Life
    report: dict[str, Any]
    out_bytes: int
    """What has left the first cloud, as its link counted it."""

    @property
    def step(self) -> int:
        """The last one in the first cloud."""
        return self.before.last

    @property
    def stopped_at(self) -> float:
        return self.before.at[self.before.last]

    @property
    def resumed_at(self) -> float:
        """When training was again where it had stopped."""
        return self.after.at[max(self.after.resumed, self.step)]

    @property
    def blackout_s(self) -> float:
        """From the end of the last step in one cloud until the next could begin in the other."""
        return self.resumed_at - self.stopped_at


class Director:
    """Lets the runs happen."""

    def __init__(self, args: argparse.Namespace, out: Path, bars: Progress) -> None:
        self._args, self._out, self._bars = args, out, bars

    def whole(self) -> Life:
        """The run that nobody moves, saved at its end only."""
        with Stage(self._out, self._bars, self._args.most_s) as stage:
            url = (self._out / "uninterrupted").as_uri()
            job = stage.train("uninterrupted", url, ranks=RANKS, options=self._script(RANKS, NEVER), env=environment())
            stage.until(lambda: job.ended)
        return _life(job)

    def trip(self, source: Cloud, target: Cloud, whole: Life) -> Trip:
        """The run that is moved."""
        ranks, args = self._args.target_ranks, self._args
        with Stage(self._out, self._bars, args.most_s) as stage:
            before = stage.train(
                source.name, source.url, ranks=RANKS, options=self._script(RANKS, args.every_steps),
                env=environment(source.inside), good=(MOVED,),
            )  # fmt: skip
            after = stage.train(
                target.name, target.url, ranks=ranks, options=self._script(ranks, args.every_steps),
                env=environment(target.inside), wait=True,
            )  # fmt: skip
            # The mover is in neither cloud: it sees both through their links.
            stage.until(lambda: _life(before).last >= args.move_at and _life(before).saves)
            words = ["move", source.url, "--to", target.url, "--json"]
            mover = stage.start("move", words, environment(source.outside, target.outside))
            stage.until(lambda: mover.ended)
            out_bytes = source.out_bytes
            stage.until(lambda: before.ended and after.ended)
        return Trip(whole, _life(before), _life(after), mover.answer, out_bytes)

    def _script(self, ranks: int, every_steps: int) -> dict[str, object]:
        """The script's options. So many ranks, or fewer with more micro-batches, have the same samples in a step."""
        args = self._args
        batch, parts = min(args.batch, args.batch * RANKS // ranks), max(1, RANKS // ranks)
        # With other ranks other dropout masks are drawn, and losses differ for that alone.
        dropout = 0.1 if args.target_ranks == RANKS else 0.0
        return {
            "steps": args.steps, "every-steps": every_steps, "context": args.context, "layers": args.layers,
            "width": args.width, "batch": batch, "accumulate": parts, "dropout": dropout,
        }  # fmt: skip


def _life(job: Running) -> Life:
    assert job.life is not None
    return job.life


def compare(trip: Trip, *, exact: bool, digests: Sequence[str]) -> tuple[list[str], float]:
    """In what the moved run is not the other one, and the largest relative difference of a loss."""
    lives, truth = (trip.before, trip.after), trip.whole.losses
    pairs = [
        (step, float.fromhex(loss), float.fromhex(truth[step])) for one in lives for step, loss in one.losses.items()
    ]
    worst = max((abs(here - there) / abs(there) for _, here, there in pairs), default=0.0)
    if exact:
        return differences(trip.whole, lives, digests), worst
    wrong = [
        f"step {step}: the loss is {here!r}, and {there!r} in {trip.whole.name}"
        for step, here, there in pairs
        if not abs(here - there) <= TOLERANCE * abs(there)
    ]
    wrong += [
        f"step {step}: other samples in {one.name} than in {trip.whole.name}"
        for one in lives
        for step, samples in one.samples.items()
        if samples != trip.whole.samples[step]
    ]
    if missing := set(truth) - {step for one in lives for step in one.losses}:
        wrong.append(f"the moved run lacks the steps {sorted(missing)[:10]}")
    return wrong, worst


def show(trip: Trip) -> None:
    """The timeline, and the move in numbers."""
    began = min(trip.before.at.values())
    happened = [(event["at"], f"{event['state']}: {event['text']}") for event in trip.report["events"]]
    happened += [
        (trip.before.at[trip.before.resumed], f"the first job begins in {trip.before.name}"),
        (trip.stopped_at, f"[bold]step {trip.step}, the last one in {trip.before.name}[/]"),
        (trip.after.at[trip.after.resumed], f"[bold]restored in {trip.after.name} from step {trip.after.resumed}[/]"),
    ]
    if trip.after.resumed < trip.step:
        happened.append(
            (trip.resumed_at, f"[bold]step {trip.step} once more: to train it again was faster than to send it[/]")
        )
    table = Table(title="The timeline", title_justify="left", title_style="bold", show_header=False)
    for at, words in sorted(happened):
        plain = words if words.startswith("[bold]") else escape(words)
        table.add_row(f"{at - began:.1f} s", plain)
    console.print(table)
    table = Table(title="The move", title_justify="left", title_style="bold", show_header=False)
    for round_ in trip.report["rounds"]:
        table.add_row(f"round, step {round_['step']}", f"{round_['nbytes'] / 1e6:.2f} MB in {round_['seconds']:.1f} s")
    table.add_row(
        "sent in all", f"{trip.report['sent_bytes'] / 1e6:.2f} MB, {trip.out_bytes / 1e6:.2f} MB by the link's count"
    )
    expected = trip.report["forecast_s"]
    foretold = "" if expected is None else f"; {expected:.1f} s and the restore had been foretold"
    table.add_row("blackout", f"[bold]{trip.blackout_s:.1f} s[/] between two steps{foretold}")
    console.print(table)


def prove(trip: Trip, out: Path, target: Cloud, args: argparse.Namespace) -> tuple[list[str], dict[str, Any]]:
    """Read back what both runs have left, and compare."""
    exact, options = args.target_ranks == RANKS, vars(args)
    checked = gpumove.verify(target.url, deep=True, storage_options=target.inside.options)
    digests = [digest((out / "uninterrupted").as_uri(), options), digest(target.url, options, target.inside.options)]
    wrong, worst = compare(trip, exact=exact, digests=digests if exact else [])
    wrong += [f"{d.object}: {d.problem}" for d in checked.damage]
    wrong += [] if trip.report["phase"] == "done" else [f"the move has not ended: {trip.report['text']}"]
    compared = len(trip.before.losses) + len(trip.after.losses)
    words = "to the last bit" if worst == 0 else f"to {100 * worst:.1g} %"
    good = [
        f"{len(checked.checkpoints)} checkpoints read back in {target.name}, every byte verified",
        "every step was computed from the same samples",
        f"{compared} losses, of {trip.whole.last} steps, are equal {words}, {args.target_ranks} ranks after {RANKS}",
    ]
    good += [f"the final parameters and optimizer states are equal: {digests[0]}"] if exact else []
    say(wrong, [] if wrong else good)
    return wrong, {"compared_losses": compared, "worst_difference": worst, "digests": digests, "differences": wrong}


def parse() -> argparse.Namespace:
    parser = parser_of(__doc__, "out/move", "fewer steps of a smaller model")
    parser.add_argument("--target-ranks", type=int, choices=(1, 2, 4), default=2, help="ranks in the second cloud (2)")
    parser.add_argument("--mbit-s", type=float, default=100, help="rate of each cloud's link (100)")
    parser.add_argument("--delay-s", type=float, default=0.025, help="its delay one way (0.025)")
    parser.add_argument("--most-s", type=float, default=900, help=argparse.SUPPRESS)
    sizes = {"steps": 600, "move-at": 100, "every-steps": 20, "batch": 4, "context": 128, "layers": 4, "width": 128}
    quick = {"steps": 700, "move-at": 50, "every-steps": 40, "batch": 4, "context": 64, "layers": 3, "width": 96}
    return parse_sizes(parser, sizes, quick)


def main() -> int:
    args = parse()
    os.environ.update(environment())
    out = args.out.resolve()
    shutil.rmtree(out / "uninterrupted", ignore_errors=True)
    out.mkdir(parents=True, exist_ok=True)
    with two_clouds(out, mbit_s=args.mbit_s, delay_s=args.delay_s) as (source, target):
        with bars() as shown:
            director = Director(args, out, shown)
            trip = director.trip(source, target, director.whole())
        show(trip)
        wrong, proof = prove(trip, out, target, args)
    draw(out / "loss.png", trip)
    facts = {
        "step": trip.step,
        "resumed": trip.after.resumed,
        "blackout_s": trip.blackout_s,
        "out_bytes": trip.out_bytes,
    }
    sizes = {name: value for name, value in vars(args).items() if name != "out"}
    return leave(args.out, "loss.png", {**sizes, **facts, **proof, "move": trip.report, "passed": not wrong})


if __name__ == "__main__":
    sys.exit(main())
