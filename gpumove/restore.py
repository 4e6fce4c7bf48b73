"""One rank's restore: parts -> which stored boxes are needed -> ranges -> verify -> decode -> fill.

It works for any world size: chunks carry their box in the whole tensor, so a reader takes whatever intersects its own
shards, without talking to anybody. Every chunk is verified, before it is copied into a live tensor or, where it is
decoded right there, afterwards: a restore that fails leaves rubbish in its targets, one that returns never does.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Container, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch.autograd.graph import increment_version

from gpumove.config import Config
from gpumove.errors import ConfigError, IntegrityError
from gpumove.fetch import Held, fetch
from gpumove.format.boxes import Box, intersect
from gpumove.format.manifest import Checkpoint, Manifest, Part
from gpumove.format.stored import Placed, Shelf, Stored, closure
from gpumove.ranges import Wanted
from gpumove.save.chunks import ChunkKey
from gpumove.state.capture import Saved, Targets
from gpumove.state.locals import local_tensor
from gpumove.state.members import Meta, RngMember
from gpumove.state.plan import local_box
from gpumove.store.objects import Store
from gpumove.store.records import read_manifest, read_parts

_LEAST = 16 << 10
"""Elements of a chunk from which on it is worth to ask where it lies."""


@dataclass
class Contents:
    """A checkpoint as read from its manifest and parts, for one rank."""

    manifest: Manifest
    saved: Saved
    tensors: dict[str, list[Placed]]
    local: dict[str, list[Placed]]

    def predecessor(self) -> dict[ChunkKey, Stored]:
        """What the first save after a restore compares with, so that it sends only what changed."""
        return {
            ChunkKey(fqn, *metas[fqn], chunk.box, is_local): chunk.stored
            for found, metas, is_local in (
                (self.tensors, self.saved.tensors, False),
                (self.local, self.saved.local, True),
            )
            for fqn, chunks in found.items()
            for chunk in chunks
            if chunk.stored is not None
        }


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
    tensors: dict[str, list[Placed]] = defaultdict(list)
    metas: dict[str, Meta] = {}
    shelves = {part.rank: Shelf(part) for part in parts}
    for part in parts:
        for entry in part.tensors:
            metas[entry.fqn] = Meta(entry.dtype, entry.shape)
            tensors[entry.fqn] += shelves[part.rank].placed(entry)
    saved = Saved(
        tensors=metas,
        local={fqn: Meta(entry.dtype, entry.shape) for fqn, (entry, _) in local.items()},
        values=values,
        world_size=manifest.world_size,
    )
    return Contents(manifest, saved, tensors, {fqn: shelves[p.rank].placed(e) for fqn, (e, p) in local.items()})


def _twin(stream: int, parts: Sequence[Part], otherwise: Part) -> Part:
    """The first part whose rank drew from this random stream."""
    return next((p for p in parts if p.values[RngMember.name]["stream"] == stream), otherwise)


def fill(store: Store, contents: Contents, targets: Targets, *, config: Config, held: Held | None = None) -> int:
    """Read every target's bytes, verify them, and copy them into place.

    Returns:
        Bytes fetched.

    Raises:
        IntegrityError: an object is damaged, truncated or missing; the message names it. Targets may be part filled.
    """
    nbytes = fetch(store, wants(contents, targets), config=config, held=held)
    filled(targets)
    return nbytes


def wants(contents: Contents, targets: Targets) -> list[Wanted]:
    """The chunks that go into these targets.

    Raises:
        IntegrityError: they do not cover a target.
    """
    return _wanted(targets.tensors, contents.tensors) + _wanted(targets.local, contents.local)


def filled(targets: Targets) -> None:
    """Say so to torch: they may have been filled behind its back."""
    for tensor in (*targets.tensors.values(), *targets.local.values()):
        if tensor.numel() >= _LEAST and not tensor.is_inference():
            increment_version(local_tensor(tensor.detach()))


def parted(wanted: Sequence[Wanted], late: Container[str]) -> tuple[list[Wanted], list[Wanted]]:
    """What is to be there first, and what of the ``late`` tensors can come later.

    What the one is decoded from is read with it, so it is handed over then, whomever it belongs to.
    """
    first = [want for want in wanted if want.name not in late]
    needed = closure(want.placed.stored for want in first if want.placed.stored is not None)
    later: list[Wanted] = []
    for want in wanted:
        if want.name in late:
            along = want.placed.stored is None or want.placed.stored.spot in needed
            (first if along else later).append(want)
    return first, later


def _wanted(targets: Mapping[str, torch.Tensor], stored: Mapping[str, list[Placed]]) -> list[Wanted]:
    """Which chunks intersect which targets; all elements of every target must be there."""
    found = []
    for fqn, tensor in targets.items():
        box, local = local_box(fqn, tensor), local_tensor(tensor.detach())
        covered, size = 0, box.volume()
        for chunk in stored.get(fqn, ()):
            # Most tensors are one chunk, and are wanted whole.
            if (common := box if chunk.box == box and covered < size else intersect(box, chunk.box)) is not None:
                covered += common.volume()
                into = local if common == box else local[_within(common, box.offset)]
                use = partial(_place, into=into, chunk=chunk.box, part=common)
                found.append(Wanted(fqn, chunk, use, _home(into) if common == chunk.box else None))
        if covered != size:
            raise IntegrityError(
                f"the checkpoint has {covered} of the {size} elements of {fqn} that this rank needs",
                code="integrity.cover",
            )
    return found


def _home(into: torch.Tensor) -> memoryview | None:
    """The memory of a tensor, if a whole chunk can be left in it as it is."""
    if into.numel() < _LEAST or into.device.type != "cpu" or not into.is_contiguous():
        return None
    return memoryview(into.view(-1).view(torch.uint8).numpy())  # type: ignore[arg-type]


def _place(data: memoryview, *, into: torch.Tensor, chunk: Box, part: Box) -> None:
    """Copy the needed part of a decoded chunk to where it belongs."""
    if data.readonly:
        data = memoryview(bytearray(data))  # torch makes tensors of writable memory only
    flat = torch.frombuffer(data, dtype=torch.uint8)
    if flat.data_ptr() % into.dtype.itemsize:
        flat = flat.clone()  # vector instructions fault on what is not aligned
    with torch.no_grad():
        whole = flat.view(into.dtype).view(chunk.shape)
        into.copy_(whole if part == chunk else whole[_within(part, chunk.offset)])


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
