"""The real planner, commit and log at the size of a large job, with ranks that are only described."""

from __future__ import annotations

import itertools
import math
import threading
import time
import uuid
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import msgspec
import pytest

from gpumove.commit import Order, commit, wait_for_parts
from gpumove.config import Config
from gpumove.format import keys
from gpumove.format.boxes import Box, cover_problem
from gpumove.format.codec import digest
from gpumove.format.manifest import FORMAT, Checkpoint, encode_checked
from gpumove.state.layout import _Roll, _roll, _Said
from gpumove.state.peers import Peers
from gpumove.state.plan import Gathered, Kind, Piece, Table, check, plan_digest, share
from gpumove.store.gc import Retention, collect
from gpumove.store.log import Log
from gpumove.store.objects import Store
from gpumove.store.records import read_manifest
from tests.dist.harness import run
from tests.servers.process import Bucket
from tests.servers.proxy import Proxy

SHAPES = [(4096, 4096), (1024, 4096), (14336, 4096), (4096, 14336), (4096,), (128, 512), (1000, 40), (3, 64)]
SPLIT = 4 << 20


def table(parameters: int) -> Table:
    """Parameters of eight shapes in bf16, two moments each in fp32, and a step counter: four tensors each."""
    kinds = (
        [Kind("bfloat16", s, 2) for s in SHAPES] + [Kind("float32", s, 4) for s in SHAPES] + [Kind("float32", (), 4)]
    )
    n = len(SHAPES)
    rows = [
        (f"{prefix}layers.{p // n}.block.{p % n}.weight{suffix}", kind, family)
        for p in range(parameters)
        for family in [f"model.layers.{p // n}.block.{p % n}.weight"]
        for prefix, suffix, kind, family in [
            ("model.", "", p % n, family),
            ("optimizer.", ".exp_avg", n + p % n, family),
            ("optimizer.", ".exp_avg_sq", n + p % n, family),
            ("optimizer.", ".step", 2 * n, ""),
        ]
    ]
    names, of, families = ([*column] for column in zip(*rows))
    return Table(names, of, kinds, families, [""] * len(rows))


def part(kind: Kind, number: int, count: int) -> Box:
    """What FSDP2 gives to one of ``count``: rows as ``torch.chunk`` cuts them, perhaps none."""
    if not kind.shape:
        return Box((), ())
    height = -(-kind.shape[0] // count)
    start = min(kind.shape[0], number * height)
    rest = [0] * (len(kind.shape) - 1)
    return Box((start, *rest), (min(height, kind.shape[0] - start), *kind.shape[1:]))


def job(parameters: int, ranks: int, shards: int) -> tuple[Gathered, list[bytes], bytes]:
    """A job as its planners exchange it; what every rank sends, and what all of them get back."""
    mine = table(parameters)
    data = msgspec.msgpack.encode(mine)
    said = [
        msgspec.msgpack.encode(
            _Said(digest(data), len(data), [part(kind, rank % shards, shards) for kind in mine.kinds])
        )
        for rank in range(ranks)
    ]
    answer = _roll(said)
    roll = msgspec.msgpack.decode(answer, type=_Roll)
    assert roll.speakers == [0], "no table travels if all are alike"
    return Gathered([mine], roll.tables, [roll.boxes[n] for n in roll.cut]), said, answer


def boxes(gathered: Gathered, rank: int, pieces: list[Piece]) -> Iterator[tuple[str, Box]]:
    mine = gathered.tables[0]
    for tensor, start, stop in pieces:
        box = gathered.boxes[rank][mine.of[tensor]]
        if box.shape:
            box = Box((box.offset[0] + start, *box.offset[1:]), (stop - start, *box.shape[1:]))
        yield mine.names[tensor], box


def written_bytes(gathered: Gathered, rank: int, pieces: list[Piece]) -> int:
    mine = gathered.tables[0]
    return sum(
        (p.stop - p.start) * math.prod(gathered.boxes[rank][mine.of[p.tensor]].shape[1:])
        * mine.kinds[mine.of[p.tensor]].item_bytes
        for p in pieces
    )  # fmt: skip


@pytest.mark.parametrize(("ranks", "shards"), [(96, 96), (96, 12), (96, 1)], ids=["fsdp", "hsdp", "ddp"])
def test_all_ranks_together_write_everything_once_and_evenly(ranks: int, shards: int) -> None:
    gathered, _, _ = job(200, ranks, shards)
    check(gathered)
    found: dict[str, list[Box]] = {}
    loads = []
    for rank in range(ranks):
        pieces = share(gathered, rank, split_bytes=SPLIT)
        loads.append(written_bytes(gathered, rank, pieces))
        for name, box in boxes(gathered, rank, pieces):
            found.setdefault(name, []).append(box)
    mine = gathered.tables[0]
    assert found.keys() == set(mine.names)
    for name, kind in zip(mine.names, mine.of):
        assert cover_problem(mine.kinds[kind].shape, found[name]) is None, name
        assert mine.kinds[kind].shape or len(found[name]) == 1
    # An even share, but for what cannot be cut: one chunk's family where replicas share, rows where shards are given.
    spare = 5 * SPLIT if ranks != shards else sum(-(-math.prod(k.shape) // max(1, k.shape[0] if k.shape else 1)) * 4
                                                  for k in mine.kinds) * 25  # fmt: skip
    assert max(loads) <= sum(loads) / ranks + spare


@pytest.mark.parametrize("shards", [1000, 125], ids=["fsdp", "hsdp"])
def test_a_thousand_ranks_plan_a_hundred_thousand_tensors(shards: int, capsys: pytest.CaptureFixture[str]) -> None:
    began = time.process_time()
    gathered, said, answer = job(25_000, 1000, shards)
    made = time.process_time()
    check(gathered)
    checked = time.process_time()
    together = [rank for rank in range(1000) if rank % shards == 7]
    shares = {rank: share(gathered, rank, split_bytes=SPLIT) for rank in together}
    each = (time.process_time() - checked) / len(shares)
    rows = [(name, "", (), box) for name, box in boxes(gathered, together[0], shares[together[0]])]
    began_digest = time.process_time()
    assert plan_digest(rows)
    with capsys.disabled():
        print(
            f"\n{shards} shards x {1000 // shards}: rank 0 gathers {sum(map(len, said)) / 1e6:.1f} MB, every rank gets "
            f"{len(answer) / 1e6:.2f} MB; seconds: simulation and roll {made - began:.2f}, check {checked - made:.2f}, "
            f"share {each:.2f}, digest {time.process_time() - began_digest:.2f}"
        )
    assert sum(map(len, said)) < 4e6
    # Whoever holds the same rows shares them out: every row once.
    found: dict[str, list[Box]] = {}
    for rank, pieces in shares.items():
        for name, box in boxes(gathered, rank, pieces):
            found.setdefault(name, []).append(box)
    mine = gathered.tables[0]
    for name, kind in zip(mine.names, mine.of):
        held = gathered.boxes[together[0]][kind]
        if mine.kinds[kind].shape and held.volume():
            assert sum(box.volume() for box in found[name]) == held.volume()
    loads = [written_bytes(gathered, rank, pieces) for rank, pieces in shares.items()]
    assert max(loads) <= 1.01 * min(loads) + SPLIT
    assert checked - made < 5
    assert each < 5


def ask_all(rank: int) -> list[bool]:
    """Messages and answers around the size that fits into the first exchange."""
    peers = Peers(timeout_s=60)
    found = []
    for size, back in itertools.product((0, 1, 503, 504, 505, 5000), (0, 3, 504, 505, 9000)):
        message = bytes([rank]) * (size if rank else 3)
        expected = [bytes([r]) * (size if r else 3) for r in range(3)]
        answer = peers.ask(message, lambda told, want=expected, n=back: (b"y" if told == want else b"n") * n)
        found.append(answer == b"y" * back)
    peers.close()
    return found


def test_messages_of_any_length_reach_rank_0_and_its_answers_all_others() -> None:
    assert run(ask_all, 3) == [[True] * 30] * 3


def order(attempt: str, ranks: int) -> Order:
    return Order(attempt, 1, [digest(str(rank).encode()) for rank in range(ranks)], 1, {}, ())


def put_parts(store: Store, attempt: str, ranks: int, *, data: bytes = b"{}") -> None:
    """A part of every rank, as far as a commit looks at it: its name."""
    plans = order(attempt, ranks).plans

    def put(rank: int) -> None:
        store.put(keys.part_key(attempt, rank=rank, digest=digest(data), plan=plans[rank], new_bytes=1), data)

    with ThreadPoolExecutor(16) as pool:
        list(pool.map(put, range(ranks)))


def committed(store: Store, log: Log, ranks: int, serial: int = 1) -> tuple[float, float]:
    """Seconds until rank 0 has seen all parts, and until the checkpoint exists."""
    wanted = order(keys.attempt_name(log.epoch or 0, serial), ranks)
    began = time.perf_counter()
    parts = wait_for_parts(log, wanted, timeout_s=60, cancelled=threading.Event())
    seen = time.perf_counter()
    entry = commit(log, wanted, parts)
    done = time.perf_counter()
    assert len(read_manifest(store, entry).parts) == ranks
    return seen - began, done - seen


def claimed(store: Store) -> Log:
    log = Log(store)
    log.open(create=True)
    log.read()
    log.claim()
    return log


def test_a_commit_of_a_thousand_parts_in_a_folder(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    store = Store.open((tmp_path / "run").as_uri(), Config())
    log = claimed(store)
    put_parts(store, keys.attempt_name(log.epoch or 0, 1), 1000)
    seen, done = committed(store, log, 1000)
    (manifest,) = store.list("manifests/")
    with capsys.disabled():
        print(f"\nfile: parts seen {seen:.3f} s, commit {done:.3f} s, manifest {manifest.nbytes} bytes")
    assert manifest.nbytes < 400 * 1000
    assert seen + done < 10
    store.close()


def test_a_commit_of_a_thousand_parts_on_s3(s3_server: Bucket, capsys: pytest.CaptureFixture[str]) -> None:
    """More parts than a page of a listing has."""
    ranks = 1003
    with Proxy(s3_server.endpoint) as proxy:
        seen_by = s3_server.via(proxy.endpoint)
        url = f"{s3_server.url}/scale-{uuid.uuid4().hex[:8]}"
        direct = Store.open(url, Config(), options=s3_server.options)
        store = Store.open(url, Config(), options=seen_by.options)
        log = claimed(store)
        put_parts(direct, keys.attempt_name(log.epoch or 0, 1), ranks)
        proxy.clear()
        seen, done = committed(store, log, ranks)
        requests = [line.split()[0] + (" list" if "list-type" in line else "") for line in proxy.requests]
        store.close()
        direct.close()
    count = dict(sorted(Counter(requests).items()))
    with capsys.disabled():
        print(f"\nS3: parts seen {seen:.3f} s, commit {done:.3f} s, requests {count} (one GET is the test's)")
    assert len(requests) <= 10, requests


def entry_of(log: Log, number: int) -> Checkpoint:
    return Checkpoint(
        format=FORMAT, number=number, epoch=log.epoch or 0, writer=log.writer, time=0.0, step=number,
        attempt=keys.attempt_name(log.epoch or 0, number), manifest="0" * 32, manifest_bytes=1, world_size=1000,
        state_bytes=1, new_bytes=1,
    )  # fmt: skip


def test_with_retention_the_log_stays_as_short_as_what_is_kept(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The same after 400 commits as after 100, so after a year too."""
    store = Store.open((tmp_path / "run").as_uri(), Config())
    log = claimed(store)
    retention = Retention(keep_last=10)
    lengths = []
    began = time.perf_counter()
    for number in range(1, 401):
        log.append(lambda view, at: entry_of(log, at))
        if len(log.view.checkpoints) > 12:
            collect(log, retention, reach=lambda checkpoint: ())
        if number % 100 == 0:
            lengths.append(len(list(store.list("log/"))))
    each = (time.perf_counter() - began) / 400
    began = time.perf_counter()
    again = Log(store)
    again.open(create=False)
    view = again.read()
    with capsys.disabled():
        print(
            f"\nlog with retention: {lengths} objects, read in {time.perf_counter() - began:.3f} s, entry {each:.4f} s"
        )
    assert len(view.checkpoints) >= 10
    assert max(lengths) <= 12
    store.close()


@pytest.mark.parametrize("commits", [2_000, pytest.param(52_560, marks=pytest.mark.slow)])
def test_a_log_that_keeps_everything_is_read_whole(
    commits: int, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A year of commits every ten minutes, without retention."""
    store = Store.open((tmp_path / "run").as_uri(), Config())
    log = claimed(store)
    for number in range(2, commits + 2):  # as the log writes them, without waiting for the disk each time
        (tmp_path / "run" / keys.entry_key(number)).write_bytes(encode_checked(entry_of(log, number)))
    began = time.perf_counter()
    view = log.read()
    read = time.perf_counter()
    log.append(lambda view, at: entry_of(log, at))
    appended = time.perf_counter()
    with capsys.disabled():
        print(f"\nlog of {commits}: read in {read - began:.2f} s, one more entry in {appended - read:.3f} s")
    assert len(view.checkpoints) == commits
    store.close()
