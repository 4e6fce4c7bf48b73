"""gpumove beside its peers: what a save costs a running training, and how long a restore takes.

`python -m benchmarks.save_restore` runs every peer in processes of its own, interleaved over several rounds.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console

from benchmarks import report
from benchmarks.figures import Table, verdicts
from benchmarks.machine import facts
from benchmarks.peers.contract import NAMES
from benchmarks.places import Place

ROOT = Path(__file__).resolve().parents[1]
_TRIAL_S = 1800.0


@dataclass(frozen=True)
class Trial:
    """One peer on one store in one round."""

    round: int
    store: str
    peer: str


def parse(arguments: list[str]) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.save_restore", description=__doc__)
    parser.add_argument("--size-mb", type=float, default=1500, help="parameters and AdamW state (1500: GPT-2 small)")
    parser.add_argument("--s3-size-mb", type=float, help="the same on S3; by default at most 500: the server is local")
    parser.add_argument("--rounds", type=int, default=4)
    parser.add_argument("--saves", type=int, default=4, help="per process; the first is reported by itself")
    parser.add_argument("--stores", default="file,s3", help="of file, s3")
    parser.add_argument("--peers", default=",".join(NAMES))
    parser.add_argument("--out", type=Path, default=Path("out/benchmarks"))
    parser.add_argument("--strict", action="store_true", help="exit with 1 also if a target of speed is missed")
    found = parser.parse_args(arguments)
    found.stores, found.peers = found.stores.split(","), found.peers.split(",")
    for name, known in (("stores", ("file", "s3")), ("peers", NAMES)):
        if unknown := set(getattr(found, name)) - set(known):
            parser.error(f"--{name}: {', '.join(sorted(unknown))} is none of {', '.join(known)}")
    if found.saves < 2:
        parser.error("--saves must be at least 2: the first save is told apart from the others")
    return found


def trials(rounds: int, stores: list[str], peers: list[str]) -> Iterator[Trial]:
    """Interleaved, and in every round in another order, so that no peer always comes first."""
    for number in range(rounds):
        for store in stores:
            shift = number % len(peers)
            for peer in peers[shift:] + peers[:shift]:
                yield Trial(number, store, peer)


@contextlib.contextmanager
def fresh_place(store: str, scratch: Path) -> Iterator[Place]:
    """An empty place, gone afterwards. The S3 server keeps objects in memory, so each trial gets a new one."""
    if store == "file":
        place = Place((scratch / "run").resolve().as_uri())
        try:
            yield place
        finally:
            place.remove()
        return
    from tests.servers import ministack

    server = Path(tempfile.mkdtemp(dir=scratch))
    with ministack(server) as bucket:
        yield Place(f"{bucket.url}/run", bucket.options)
    shutil.rmtree(server, ignore_errors=True)


def run_child(spec: dict[str, Any], scratch: Path) -> dict[str, Any]:
    """One process of benchmarks.trial.

    Raises:
        RuntimeError: it failed; the message ends with its last words.
    """
    question, answer = scratch / "spec.json", scratch / "result.json"
    question.write_text(json.dumps(spec))
    answer.unlink(missing_ok=True)
    quiet = {
        "NO_PROXY": "127.0.0.1,localhost",
        "no_proxy": "127.0.0.1,localhost",
        "AWS_EC2_METADATA_DISABLED": "true",
        "AWS_CONFIG_FILE": os.devnull,
        "AWS_SHARED_CREDENTIALS_FILE": os.devnull,
        "AWS_DEFAULT_REGION": "us-east-1",
    }
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-m", "benchmarks.trial", str(question), str(answer)],
        cwd=ROOT,
        env={**os.environ, **quiet},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        timeout=_TRIAL_S,
        check=False,
    )
    if done.returncode or not answer.exists():
        words = done.stderr.decode(errors="replace").strip().splitlines() or ["no words"]
        raise RuntimeError(f"exit status {done.returncode}: {words[-1][-300:]}")
    result: dict[str, Any] = json.loads(answer.read_text())
    return result


def run_trial(trial: Trial, size_mb: float, saves: int, scratch: Path) -> dict[str, Any]:
    """Save in one process, restore in another; a failure is part of the result."""
    sample: dict[str, Any] = {"round": trial.round, "store": trial.store, "peer": trial.peer}
    with fresh_place(trial.store, scratch) as place:
        spec = {"peer": trial.peer, "size_mb": size_mb, "url": place.url, "options": dict(place.options)}
        try:
            sample["save"] = run_child({**spec, "kind": "save", "saves": saves}, scratch)
            digest = sample["save"]["saves"][-1]["digest"]
            sample["restore"] = run_child({**spec, "kind": "restore", "digest": digest}, scratch)
        except (RuntimeError, subprocess.TimeoutExpired) as error:
            sample["error"] = str(error).replace(str(scratch), "").replace(str(ROOT), "")
    return sample


def _sizes(options: argparse.Namespace) -> dict[str, float]:
    s3 = min(500.0, options.size_mb) if options.s3_size_mb is None else options.s3_size_mb
    return {"file": options.size_mb, "s3": s3}


def main(arguments: list[str] | None = None) -> int:
    """Run, report; 0 if every restore was bit for bit."""
    options = parse(sys.argv[1:] if arguments is None else arguments)
    console, sizes, machine = Console(), _sizes(options), facts()
    options.out.mkdir(parents=True, exist_ok=True)
    scratch = Path(tempfile.mkdtemp(dir=options.out, prefix="scratch-"))
    plan = list(trials(options.rounds, options.stores, options.peers))
    samples = []
    try:
        for n, trial in enumerate(plan, 1):
            console.print(f"{n}/{len(plan)} round {trial.round + 1} {trial.store} {trial.peer}", highlight=False)
            samples.append(run_trial(trial, sizes[trial.store], options.saves, scratch))
            if error := samples[-1].get("error"):
                console.print(f"  [red]failed[/] {error}", highlight=False)
    except KeyboardInterrupt:
        console.print("interrupted: what follows is of the trials that were complete")
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    table = Table(samples)
    found = verdicts(table)
    report.show(console, table, found)
    settings = {"rounds": options.rounds, "saves": options.saves, "size_mb": sizes, "peers": options.peers}
    content = {
        "machine": machine,
        "settings": settings,
        "figures": table.summary(),
        "verdicts": [vars(v) for v in found],
        "samples": samples,
    }
    report.write_json(options.out / "save_restore.json", content)
    (options.out / "save_restore.md").write_text(report.markdown(table, machine, settings))
    report.picture(table, options.out / "save_restore.png")
    console.print(f"written to {options.out}: save_restore.json, .md, .png", highlight=False)
    sound = all(v.met for v in found if options.strict or "restores" in v.what or "failed" in v.what)
    return 0 if sound else 1


if __name__ == "__main__":
    sys.exit(main())
