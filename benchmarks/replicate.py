"""A run copied from one store to another: `gpumove replicate` beside `rclone copy`, on the same servers.

`python -m benchmarks.replicate` exits with 1 if a byte at the target is wrong, and with `--strict` also if gpumove is
slower than 0.9 of rclone.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import re
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table

from benchmarks.machine import facts
from benchmarks.report import write_json
from gpumove import verify
from gpumove.config import Config
from gpumove.format import keys
from gpumove.format.codec import digest
from gpumove.format.manifest import FORMAT, Checkpoint, Manifest, Pack, Part, encode
from gpumove.store.log import Log
from gpumove.store.objects import Store
from tests.servers import Bucket, azurite, gcs, ministack
from tests.servers.process import tool

WANTED = 0.9
TARGETS = {"s3": ministack, "azure": azurite, "gcs": gcs}
ATTEMPT = keys.attempt_name(1, 1)


@dataclass(frozen=True)
class Sample:
    """One copy by one program, in a process of its own."""

    peer: str
    target: str
    nbytes: int
    seconds: float
    cpu_s: float
    """Of the program alone; the servers take theirs from the same cores."""
    peak_bytes: int

    @property
    def mb_s(self) -> float:
        return self.nbytes / self.seconds / 1e6


# -------------------------------------------------------------------- what is copied


def make_run(bucket: Bucket, objects: int, object_bytes: int) -> tuple[str, int]:
    """A run of one checkpoint, whose packs are random bytes; its URL and its size."""
    url = f"{bucket.url}/run"
    rng, total = np.random.default_rng(0), 0
    with contextlib.closing(Store.open(url, Config(), options=bucket.options)) as store:
        log = Log(store)
        log.open(create=True)
        log.read()
        log.claim()
        packs = []
        for _ in range(objects):
            data = rng.bytes(object_bytes)
            packs.append(Pack(attempt=ATTEMPT, digest=digest(data), nbytes=len(data)))
            store.put(packs[-1].key, data)
            total += len(data)
        part = encode(
            Part(format=FORMAT, run=log.run, attempt=ATTEMPT, rank=0, world_size=1, step=1, packs=tuple(packs))
        )
        key = keys.part_key(ATTEMPT, rank=0, digest=digest(part), plan="0" * 16, new_bytes=total)
        receipt = keys.read_receipt(key)
        assert receipt is not None
        store.put(key, part)
        manifest = encode(
            Manifest(
                format=FORMAT, run=log.run, step=1, epoch=1, attempt=ATTEMPT, world_size=1, time=time.time(),
                state_bytes=total, new_bytes=total, plan=digest(b""), parts=(receipt.ref(len(part)),),
            )
        )  # fmt: skip
        store.put(keys.manifest_key(ATTEMPT, digest(manifest)), manifest)
        log.append(
            lambda view, number: Checkpoint(
                format=FORMAT, number=number, epoch=1, writer=log.writer, time=time.time(), step=1, attempt=ATTEMPT,
                manifest=digest(manifest), manifest_bytes=len(manifest), world_size=1, state_bytes=total,
                new_bytes=total,
            )
        )  # fmt: skip
    return url, total


# -------------------------------------------------------------------- the programs


def gpumove_command(source: tuple[str, Bucket], target: tuple[str, Bucket], in_flight: int) -> list[str]:
    options = []
    for option, (_, bucket) in (("--from-option", source), ("--to-option", target)):
        options += [word for name, value in bucket.options.items() for word in (option, f"{name}={value}")]
    return [sys.executable, "-m", "gpumove", "replicate", source[0], target[0], "--in-flight", str(in_flight), *options]


def rclone_command(source: tuple[str, Bucket], target: tuple[str, Bucket], in_flight: int) -> list[str]:
    flags = ["--config", os.devnull, "--transfers", str(in_flight), "--checkers", "8", "--quiet"]
    places = [f"{name}:{url.partition('://')[2]}" for name, (url, _) in (("SRC", source), ("DST", target))]
    return [str(tool("rclone/bin/rclone")), "copy", *places, *flags]


def rclone_remote(name: str, bucket: Bucket) -> dict[str, str]:
    """A remote of rclone in variables."""
    settings: Mapping[str, Any]
    if bucket.url.startswith("s3://"):
        settings = {
            "type": "s3", "provider": "Other", "endpoint": bucket.endpoint, "force_path_style": "true",
            "access_key_id": bucket.options["key"], "secret_access_key": bucket.options["secret"],
            "region": "us-east-1", "no_check_bucket": "true",
        }  # fmt: skip
    elif bucket.url.startswith("abfs://"):
        parts = dict(word.split("=", 1) for word in bucket.options["connection_string"].split(";"))
        settings = {
            "type": "azureblob", "account": parts["AccountName"], "key": parts["AccountKey"],
            "endpoint": parts["BlobEndpoint"],
        }  # fmt: skip
    else:
        settings = {
            "type": "google cloud storage", "endpoint": f"{bucket.endpoint}/storage/v1/", "anonymous": "true",
            "bucket_policy_only": "true",
        }  # fmt: skip
    return {f"RCLONE_CONFIG_{name}_{key.upper()}": value for key, value in settings.items()}


def timed(command: Sequence[str], env: Mapping[str, str]) -> tuple[float, float, int]:
    """Wall seconds, processor seconds and peak memory of a child."""
    began = time.perf_counter()
    child = subprocess.Popen(command, env={**os.environ, **env}, stdout=subprocess.DEVNULL)
    peaks: list[int] = []
    watcher = threading.Thread(target=_watch, args=(child.pid, peaks))
    watcher.start()
    _, status, usage = os.wait4(child.pid, 0)
    seconds = time.perf_counter() - began
    watcher.join()
    child.returncode = os.waitstatus_to_exitcode(status)
    if child.returncode:
        raise SystemExit(f"{command[0]} ended with {child.returncode}")
    return seconds, usage.ru_utime + usage.ru_stime, max(peaks, default=0)


def _watch(pid: int, peaks: list[int]) -> None:
    """The kernel's highest mark of the program: what wait4 tells begins with the memory of the process that forked."""
    with contextlib.suppress(OSError, TypeError):
        while True:
            text = Path(f"/proc/{pid}/status").read_text()
            peaks.append(int(re.search(r"^VmHWM:\s+(\d+) kB$", text, re.MULTILINE)[1]) * 1024)  # type: ignore[index]
            time.sleep(0.02)


def clear(bucket: Bucket, url: str) -> None:
    """The servers keep objects in memory."""
    with contextlib.closing(Store.open(url, Config(), options=bucket.options)) as store:
        store.delete([info.key for info in store.list("")])


def check(peer: str, bucket: Bucket, url: str, total: int) -> None:
    """What lies at the target is what was at the source: by digest for gpumove, by size for rclone."""
    if peer == "gpumove":
        found = verify(url, deep=True, storage_options=bucket.options)
        good = found.sound and found.newest_sound == 1
    else:
        with contextlib.closing(Store.open(url, Config(), options=bucket.options)) as store:
            good = sum(info.nbytes for info in store.list("packs/")) == total
    if not good:
        raise SystemExit(f"{peer} left something wrong at {url}")


# -------------------------------------------------------------------- the measurement


def measure(target: str, args: argparse.Namespace, scratch: Path, console: Console) -> Iterator[Sample]:
    with ministack(_folder(scratch, "from")) as source, TARGETS[target](_folder(scratch, target)) as bucket:
        url, total = make_run(source, args.objects, args.object_mb * 1_000_000)
        peers = [p for p in ("rclone", "gpumove") if p != "rclone" or target != "gcs"]
        env = rclone_remote("SRC", source) | rclone_remote("DST", bucket)
        for number in range(args.rounds):
            for peer in peers if number % 2 == 0 else peers[::-1]:
                place = f"{bucket.url}/{peer}-{number}"
                make = rclone_command if peer == "rclone" else gpumove_command
                seconds, cpu_s, peak = timed(make((url, source), (place, bucket), args.in_flight), env)
                check(peer, bucket, place, total)
                clear(bucket, place)
                yield (sample := Sample(peer, target, total, seconds, cpu_s, peak))
                console.print(f"{target} {peer}: {sample.mb_s:.0f} MB/s, {cpu_s:.1f} s of a core, {peak >> 20} MiB")


def _folder(scratch: Path, name: str) -> Path:
    path = scratch / name
    path.mkdir()
    return path


def show(samples: Sequence[Sample], console: Console) -> dict[str, float]:
    """The table; the ratio of gpumove to rclone by target."""
    table = Table(box=None)
    for head in ("target", "program", "MB/s", "range", "core seconds", "peak MiB", "of rclone"):
        table.add_column(head, justify="left" if head in ("target", "program") else "right")
    ratios = {}
    for target in dict.fromkeys(s.target for s in samples):
        of = {peer: [s for s in samples if (s.target, s.peer) == (target, peer)] for peer in ("rclone", "gpumove")}
        for peer, found in of.items():
            if not found:
                continue
            rates = sorted(s.mb_s for s in found)
            ratio = median(rates) / median(s.mb_s for s in of["rclone"]) if of["rclone"] else None
            if ratio and peer == "gpumove":
                ratios[target] = ratio
            table.add_row(
                target, peer, f"{median(rates):.0f}", f"{rates[0]:.0f} to {rates[-1]:.0f}",
                f"{median(s.cpu_s for s in found):.1f}", f"{max(s.peak_bytes for s in found) >> 20}",
                f"{ratio:.2f}" if ratio else "",
            )  # fmt: skip
    console.print(table)
    return ratios


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--targets", default="s3,azure", help="of s3, azure and gcs, where rclone takes no part")
    parser.add_argument("--objects", type=int, default=32)
    parser.add_argument("--object-mb", type=int, default=64)
    parser.add_argument("--in-flight", type=int, default=16)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--strict", action="store_true", help="fail where gpumove has less than 0.9 of rclone's rate")
    parser.add_argument("--out", type=Path, default=Path("out/benchmarks"))
    args = parser.parse_args(arguments)
    args.out.mkdir(parents=True, exist_ok=True)
    machine, console = facts(), Console()
    samples: list[Sample] = []
    for target in args.targets.split(","):
        with tempfile.TemporaryDirectory() as scratch:
            samples += measure(target, args, Path(scratch), console)
    ratios = show(samples, console)
    write_json(
        args.out / "replicate.json", {"machine": machine, "samples": [asdict(s) for s in samples], "ratios": ratios}
    )
    return 1 if args.strict and any(ratio < WANTED for ratio in ratios.values()) else 0


if __name__ == "__main__":
    sys.exit(main())
