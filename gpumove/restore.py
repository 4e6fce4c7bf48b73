"""One rank's restore: parts -> which stored boxes are needed -> ranges -> verify -> decode -> fill.

It works for any world size: chunks carry their box in the whole tensor, so a reader takes whatever intersects its own
shards, without talking to anybody. Every chunk is verified before it is copied into a live tensor.
"""

from __future__ import annotations

import base64
import threading
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch

from gpumove.config import Config
from gpumove.errors import ConfigError, IntegrityError, ObjectNotFoundError
from gpumove.format.codec import check_digest, decode
from gpumove.format.manifest import Checkpoint, Manifest, Part, TensorEntry
from gpumove.save import ChunkKey
from gpumove.state.capture import Saved, Targets
from gpumove.state.members import Meta, RngMember
from gpumove.state.plan import Box, intersect, local_box, local_tensor
from gpumove.store.objects import Store
from gpumove.store.records import Ref, read_manifest, read_parts

_GAP = 256 << 10
"""Ranges closer than this are fetched as one: a request costs more than the bytes between."""
_RANGE = 16 << 20


class _Need(NamedTuple):
    """A chunk that is needed, and the live tensors that take parts of it."""

    fqn: str
    ref: Ref
    dtype: torch.dtype
    uses: list[tuple[torch.Tensor, Box, Box]]
    """(local tensor, its box in the whole, the part to copy)."""


class _Range(NamedTuple):
    key: str
    start: int
    stop: int
    needs: list[_Need]


@dataclass
class Contents:
    """A checkpoint as read from its manifest and parts, for one rank."""

    manifest: Manifest
    saved: Saved
    tensors: dict[str, list[Ref]]
    local: dict[str, list[Ref]]

    def predecessor(self) -> dict[ChunkKey, Ref]:
        """What the first save after a restore compares with, so that it sends only what changed."""
        table = {}
        for refs, metas, is_local in (
            (self.tensors, self.saved.tensors, False),
            (self.local, self.saved.local, True),
        ):
            for fqn, chunks in refs.items():
                dtype, shape = metas[fqn]
                for ref in chunks:
                    if ref.chunk.inline is None:
                        box = Box(ref.chunk.offset, ref.chunk.shape)
                        table[ChunkKey(fqn, dtype, shape, box, is_local)] = ref
        return table


def read_contents(
    store: Store, checkpoint: Checkpoint, *, rank: int, config: Config, stream: int | None = None
) -> Contents:
    """Read and verify the manifest and parts of a checkpoint.

    Args:
        store: the run.
        checkpoint: its log entry.
        rank: whose values and local tensors to take: this rank's if the checkpoint has it, else rank 0's.
        config: bounds.
        stream: which random stream this rank goes on with; by default the one that its part has.

    Raises:
        IntegrityError: a record is missing or damaged.
    """
    manifest = read_manifest(store, checkpoint)
    parts = read_parts(store, manifest.parts, concurrency=config.concurrency)
    by_rank = {part.rank: part for part in parts}
    if sorted(by_rank) != list(range(manifest.world_size)):
        raise IntegrityError(f"{store.url}/{checkpoint.manifest_key} lists the parts of ranks {sorted(by_rank)}")
    mine = by_rank.get(rank, by_rank[0])
    local = {e.fqn: (e, part) for part in (by_rank[0], mine) for e in part.local}
    values = {**by_rank[0].values, **mine.values}
    rng = RngMember.name
    if stream is not None and rng in values:
        twin = _twin(stream, [mine, *parts], by_rank[0])
        values[rng] = twin.values[rng]
        local |= {e.fqn: (e, twin) for e in twin.local if e.fqn.startswith(f"{rng}.")}
    tensors: dict[str, list[Ref]] = defaultdict(list)
    metas: dict[str, Meta] = {}
    for part in parts:
        for entry in part.tensors:
            metas[entry.fqn] = Meta(entry.dtype, entry.shape)
            tensors[entry.fqn] += _refs(entry, part)
    saved = Saved(
        tensors=metas,
        local={fqn: Meta(entry.dtype, entry.shape) for fqn, (entry, _) in local.items()},
        values=values,
        world_size=manifest.world_size,
    )
    return Contents(manifest, saved, tensors, {fqn: _refs(e, p) for fqn, (e, p) in local.items()})


def _twin(stream: int, parts: Sequence[Part], otherwise: Part) -> Part:
    """The first part whose rank drew from this random stream."""
    return next((p for p in parts if p.values[RngMember.name]["stream"] == stream), otherwise)


def _refs(entry: TensorEntry, part: Part) -> list[Ref]:
    return [Ref(chunk, part.packs) for chunk in entry.chunks]


def fill(store: Store, contents: Contents, targets: Targets, *, config: Config) -> int:
    """Read every target's bytes, verify them, and copy them into place.

    Returns:
        Bytes fetched.

    Raises:
        IntegrityError: an object is damaged, truncated or missing; the message names it. Targets may be part filled.
    """
    needs = _needs(targets.tensors, contents.tensors) + _needs(targets.local, contents.local)
    stored = [need for need in needs if need.ref.chunk.inline is None]
    with torch.no_grad():
        for need in needs:
            if need.ref.chunk.inline is not None:
                _place(need, _inline(need))
        return _fetch(store, _ranges(stored), config)


def _needs(targets: Mapping[str, torch.Tensor], stored: Mapping[str, list[Ref]]) -> list[_Need]:
    """Which chunks intersect which targets; all elements of every target must be there."""
    needs = []
    for fqn, tensor in targets.items():
        box, local = local_box(fqn, tensor), local_tensor(tensor.detach())
        found = 0
        for ref in stored.get(fqn, ()):
            common = intersect(box, Box(ref.chunk.offset, ref.chunk.shape))
            if common is not None:
                found += common.volume()
                needs.append(_Need(fqn, ref, local.dtype, [(local, box, common)]))
        if found != box.volume():
            raise IntegrityError(
                f"the checkpoint has {found} of the {box.volume()} elements of {fqn} that this rank needs",
                code="integrity.cover",
            )
    return needs


def _ranges(needs: Iterable[_Need]) -> list[_Range]:
    """Needs grouped by pack, neighbours joined; chunks that two tensors need (tied weights) are fetched once."""
    by_pack: dict[str, dict[tuple[int, int], list[_Need]]] = defaultdict(lambda: defaultdict(list))
    for need in needs:
        by_pack[need.ref.pack.key][need.ref.chunk.at, need.ref.chunk.length].append(need)
    ranges: list[_Range] = []
    for key, spots in by_pack.items():
        open_range: _Range | None = None
        for at, length in sorted(spots):
            if open_range and at <= open_range.stop + _GAP and at + length - open_range.start <= _RANGE:
                stop = max(open_range.stop, at + length)
                open_range = _Range(key, open_range.start, stop, open_range.needs + spots[at, length])
                ranges[-1] = open_range
            else:
                # Rounded down, so that chunks keep in the buffer the alignment that they have in the object.
                open_range = _Range(key, at & ~63, at + length, list(spots[at, length]))
                ranges.append(open_range)
    return sorted(ranges, key=lambda r: r.start - r.stop)


class _Buffers(threading.local):
    """One reused buffer per thread: fresh memory costs more to touch than to fill."""

    def __init__(self) -> None:
        self.fetched = bytearray()
        self.decoded = bytearray()

    def take(self, name: str, nbytes: int) -> memoryview:
        if len(getattr(self, name)) < nbytes:
            setattr(self, name, bytearray(nbytes))
        return memoryview(getattr(self, name))[:nbytes]


def _fetch(store: Store, ranges: Sequence[_Range], config: Config) -> int:
    """Fetch, verify, decode and place, with one range in hand per thread."""
    buffers = _Buffers()
    widest = max((r.stop - r.start for r in ranges), default=1)
    threads = max(1, min(config.concurrency, config.budget_bytes // (2 * widest), len(ranges)))
    stop = threading.Event()

    def work(span: _Range) -> int:
        if stop.is_set():
            return 0
        try:
            _take(store, span, buffers)
        except BaseException:
            stop.set()
            raise
        return span.stop - span.start

    with ThreadPoolExecutor(threads, thread_name_prefix="gpumove-get") as pool:
        return sum(pool.map(work, ranges))


def _take(store: Store, span: _Range, buffers: _Buffers) -> None:
    where = f"{store.url}/{span.key}"
    try:
        out = buffers.take("fetched", span.stop - span.start)
        (got,) = store.get_ranges(span.key, [(span.start, span.stop)], [out])
    except ObjectNotFoundError as error:
        raise IntegrityError(f"{where} is missing, and a committed checkpoint needs it") from error
    got = memoryview(got)
    if got.readonly:  # torch makes tensors of writable memory only; the copy is quicker than the hash that follows
        np.copyto(np.frombuffer(out, np.uint8), np.frombuffer(got, np.uint8))
        got = out
    with torch.no_grad():
        for need in span.needs:
            chunk = need.ref.chunk
            stored = got[chunk.at - span.start : chunk.at - span.start + chunk.length]
            try:
                _place(need, _decoded(need, stored, buffers))
            except IntegrityError as error:
                raise IntegrityError(
                    f"{where} is damaged at bytes {chunk.at} to {chunk.at + chunk.length} ({need.fqn}): {error}",
                    code="integrity.chunk",
                ) from error


def _chunk_bytes(need: _Need) -> int:
    return Box(need.ref.chunk.offset, need.ref.chunk.shape).volume() * need.dtype.itemsize


def _decoded(need: _Need, stored: memoryview, buffers: _Buffers) -> memoryview:
    chunk, nbytes = need.ref.chunk, _chunk_bytes(need)
    if chunk.codec == "raw/1" and len(stored) == nbytes:
        check_digest(stored, chunk.digest)
        return stored
    out = buffers.take("decoded", nbytes)
    decode(chunk.codec, stored, out, expected=chunk.digest)
    return out


def _inline(need: _Need) -> memoryview:
    data = base64.b64decode(need.ref.chunk.inline or "")
    if len(data) != _chunk_bytes(need):
        raise IntegrityError(f"{need.fqn} travels inline with {len(data)} bytes instead of {_chunk_bytes(need)}")
    return memoryview(bytearray(data))


def _place(need: _Need, data: memoryview) -> None:
    """Copy the parts of a decoded chunk to where they belong."""
    chunk = need.ref.chunk
    if not len(data):
        return
    flat = torch.frombuffer(data, dtype=torch.uint8)
    if flat.data_ptr() % need.dtype.itemsize:
        flat = flat.clone()  # vector instructions fault on what is not aligned
    source = flat.view(need.dtype).view(chunk.shape)
    for local, box, part in need.uses:
        local[_within(part, box.offset)].copy_(source[_within(part, chunk.offset)])


def _within(part: Box, origin: Sequence[int]) -> tuple[slice, ...]:
    return tuple(slice(o - z, o - z + n) for o, z, n in zip(part.offset, origin, part.shape))


def try_newest(
    candidates: Sequence[Checkpoint],
    attempt: Callable[[Checkpoint], None],
    *,
    say: Callable[[Checkpoint, IntegrityError], None],
) -> Checkpoint:
    """Go through checkpoints, newest first, until one can be read whole.

    Raises:
        IntegrityError: none could; the message has the newest one's damage.
    """
    first: IntegrityError | None = None
    for checkpoint in candidates:
        try:
            attempt(checkpoint)
            return checkpoint
        except IntegrityError as error:
            say(checkpoint, error)
            first = first or error
    if first is None:
        raise ConfigError("there is no checkpoint to read")
    raise first
