"""What checkpoints need, and what of it is missing or damaged: a survey of a run's objects that writes nothing.

It knows records and bytes, never tensors, and it does not stop at the first thing that is wrong.
"""

from __future__ import annotations

import math
import threading
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import NamedTuple, TypeAlias, TypeVar

from gpumove.config import Config
from gpumove.errors import IntegrityError
from gpumove.fetch import Buffers, fetch, inline_data, read_span
from gpumove.format.boxes import Box
from gpumove.format.codec import decode, digest
from gpumove.format.dtypes import item_bytes
from gpumove.format.manifest import Checkpoint, Manifest, Pack, Part, PartRef, TensorEntry
from gpumove.format.pack import shape_bytes
from gpumove.format.stored import Placed, Shelf, Spot, Stored, closure
from gpumove.ranges import Span, Wanted
from gpumove.store.objects import Store
from gpumove.store.records import read_manifest, read_part

Progress = Callable[[int, int], None]
"""Told (bytes done, bytes in all), from any thread, one call at a time."""

T = TypeVar("T")
U = TypeVar("U")


@dataclass
class Finding:
    """Something wrong with one object: which log entries cannot be read because of it, and which tensors it affects."""

    problem: str
    code: str
    entries: set[int] = field(default_factory=set)
    tensors: set[str] = field(default_factory=set)


class _Users(NamedTuple):
    """Whom a chunk belongs to."""

    entries: set[int]
    tensors: set[str]


_Uses: TypeAlias = dict[Spot, tuple[Stored, _Users]]
"""The chunks in one pack that somebody needs."""


class _Facts(NamedTuple):
    """What is kept of a part: the rest of it is large. ``have`` and ``need`` count elements of global tensors."""

    packs: tuple[Pack, ...]
    have: Counter[str]
    need: dict[str, int]
    problems: list[str]


class Survey:
    """Goes through checkpoints and gathers what they need and what is wrong with it."""

    def __init__(self, store: Store, config: Config) -> None:
        self.store, self.config = store, config
        self.needed: dict[str, int] = {}
        """Every object that the checkpoints need, with its size."""
        self.findings: dict[str, Finding] = {}
        """By object."""
        self.read_bytes = 0
        self._users: dict[str, set[int]] = {}
        self._readable: list[tuple[int, PartRef]] = []
        self._lock = threading.Lock()

    def _found(self, key: str, problem: str, code: str, entries: Iterable[int]) -> Finding:
        with self._lock:
            finding = self.findings.setdefault(key, Finding(problem, code))
            finding.entries.update(entries)
            return finding

    def _need(self, key: str, nbytes: int, entry: int) -> None:
        self.needed[key] = nbytes
        self._users.setdefault(key, set()).add(entry)

    def _each(self, work: Callable[[T], U], items: Sequence[T], threads: int) -> list[U]:
        with ThreadPoolExecutor(max(1, min(threads, len(items))), thread_name_prefix="gpumove-verify") as pool:
            return list(pool.map(work, items))

    # ---------------------------------------------------------------- records

    def check_records(self, checkpoint: Checkpoint) -> None:
        """The manifest and all parts: digests, ranks, and whether the chunks make up the tensors."""
        number, key = checkpoint.number, checkpoint.manifest_key
        self._need(key, checkpoint.manifest_bytes, number)
        try:
            manifest = read_manifest(self.store, checkpoint)
        except IntegrityError as error:
            self._found(key, str(error), error.code, [number])
            return
        if problem := _misfit(manifest, checkpoint):
            self._found(key, problem, "integrity.manifest", [number])
        have: Counter[str] = Counter()
        need: dict[str, int] = {}
        facts = self._each(self._facts, manifest.parts, self.config.concurrency)
        for ref, found in zip(manifest.parts, facts):
            self._take(number, ref, found)
            if isinstance(found, _Facts):
                have.update(found.have)
                need.update(found.need)
        whole = all(isinstance(found, _Facts) for found in facts)
        if whole and (short := {fqn for fqn, size in need.items() if have[fqn] != size}):
            text = "the chunks that its parts list do not make up the tensors"
            self._found(key, text, "integrity.cover", [number]).tensors.update(short)

    def _facts(self, ref: PartRef) -> _Facts | IntegrityError:
        try:
            return _facts_of(read_part(self.store, ref))
        except IntegrityError as error:
            return error

    def _take(self, number: int, ref: PartRef, found: _Facts | IntegrityError) -> None:
        self._need(ref.key, ref.nbytes, number)
        if isinstance(found, IntegrityError):
            self._found(ref.key, str(found), found.code, [number])
            return
        self._readable.append((number, ref))
        for pack in found.packs:
            self._need(pack.key, pack.nbytes, number)
        if found.problems:
            self._found(ref.key, "; ".join(found.problems[:5]), "integrity.part", [number])

    def check_sizes(self) -> None:
        """Every object that is needed is there, with its size."""
        sizes = {o.key: o.nbytes for room in ("manifests/", "parts/", "packs/") for o in self.store.list(room)}
        for key, nbytes in self.needed.items():
            found = sizes.get(key)
            if found is None and (info := self.store.exists(key)) is not None:
                found = info.nbytes  # a listing is no snapshot
            if found == nbytes:
                continue
            self.findings.pop(key, None)  # this says more than that it could not be read
            if found is None:
                self._found(key, "it is missing", "integrity.missing", self._users[key])
            else:
                self._found(key, f"it has {found} bytes instead of {nbytes}", "integrity.size", self._users[key])

    # ---------------------------------------------------------------- packs

    def check_packs(self, progress: Progress) -> None:
        """Read every pack that is there, compare its digest, decode every chunk and compare that."""
        todo = {k: size for k, size in self.needed.items() if k.startswith("packs/") and k not in self.findings}
        uses = self._uses(todo)
        chunk = max((node.nbytes for table in uses.values() for node, _ in table.values()), default=0)
        # Every thread keeps a buffer for its largest pack and one for a chunk.
        threads = min(self.config.concurrency, self.config.budget_bytes // (max(todo.values(), default=0) + chunk + 1))
        total, buffers = sum(todo.values()), Buffers()

        def check(key: str) -> None:
            self._check_pack(key, todo[key], uses.get(key, {}), buffers)
            with self._lock:
                self.read_bytes += todo[key]
                progress(self.read_bytes, total)

        self._each(check, sorted(todo), threads)
        self._check_deltas(uses)

    def _check_deltas(self, uses: Mapping[str, _Uses]) -> None:
        """Decode what is decoded from other chunks, now that all packs were looked at."""
        found = [(node, users) for table in uses.values() for node, users in table.values() if node.bases]
        # Of a damaged pack all is known that can be said: whose tensors cannot be read because of it.
        sound = [(n, u) for n, u in found if not any(spot.key in self.findings for spot in closure([n]))]
        names = {str(number): (node, users) for number, (node, users) in enumerate(sound)}
        wanted = [
            Wanted(name, Placed(Box((), ()), node.nbytes, node), lambda data: None) for name, (node, _) in names.items()
        ]

        def failed(name: str, error: IntegrityError) -> None:
            node, users = names[name]
            self._found(node.spot.key, str(error), error.code, users.entries).tensors.update(users.tensors)

        fetch(self.store, wanted, config=self.config, failed=failed)

    def _check_pack(self, key: str, nbytes: int, uses: _Uses, buffers: Buffers) -> None:
        try:
            data = read_span(self.store, Span(key, 0, nbytes), buffers.take(nbytes))
        except IntegrityError as error:
            self._found(key, str(error), error.code, self._users[key])
            return
        bad = [users for node, users in uses.values() if not _is_sound(node, data, buffers)]
        if bad:
            text = f"{len(bad)} of its {len(uses)} chunks that checkpoints need do not hold what was recorded"
            finding = self._found(key, text, "integrity.chunk", set().union(*(users.entries for users in bad)))
            finding.tensors.update(*(users.tensors for users in bad))
        elif digest(data) != key.rpartition("/")[2].partition(".")[0]:
            # A chunk that is decoded from others cannot be judged here, so they count as unreadable.
            deltas = [users for node, users in uses.values() if node.bases]
            text = "its bytes do not hash to its name" + (
                "" if deltas else ", but every chunk that checkpoints need is sound"
            )
            finding = self._found(key, text, "integrity.pack", set().union(*(users.entries for users in deltas)))
            finding.tensors.update(*(users.tensors for users in deltas))
        buffers.give(data)

    def name_tensors(self) -> None:
        """Find the tensors that lie in packs which are not there whole."""
        bad = {k for k, f in self.findings.items() if k.startswith("packs/") and f.entries and not f.tensors}
        if bad:
            for key, table in self._uses(bad).items():
                self.findings[key].tensors.update(*(users.tensors for _, users in table.values()))

    def _uses(self, wanted: Iterable[str]) -> dict[str, _Uses]:
        """By pack, the chunks that readable parts refer to. Parts are read again: they are too many to be kept."""
        table: dict[str, _Uses] = {key: {} for key in wanted}
        for number, ref in self._readable:
            try:
                part = read_part(self.store, ref)
            except IntegrityError as error:  # it was sound a moment ago: retention took it, or it is going bad
                self._found(ref.key, str(error), error.code, [number])
                continue
            for entry, chunk in _stored_chunks(part):
                for spot, node in closure([chunk]).items():
                    if (uses := table.get(spot.key)) is not None:
                        _, users = uses.setdefault(spot, (node, _Users(set(), set())))
                        users.entries.add(number)
                        users.tensors.add(entry.fqn)
        return table


def _misfit(manifest: Manifest, checkpoint: Checkpoint) -> str | None:
    """What a manifest says that does not fit its log entry or itself."""
    if (manifest.step, manifest.attempt, manifest.world_size) != (
        checkpoint.step,
        checkpoint.attempt,
        checkpoint.world_size,
    ):
        return f"it is not the manifest that log entry {checkpoint.number} describes"
    if [ref.rank for ref in manifest.parts] != list(range(manifest.world_size)):
        return f"it lists the parts of ranks {[ref.rank for ref in manifest.parts]} for {manifest.world_size} ranks"
    return None


def _facts_of(part: Part) -> _Facts:
    have: Counter[str] = Counter()
    need: dict[str, int] = {}
    for entry in part.tensors:
        need[entry.fqn] = math.prod(entry.shape)
        have[entry.fqn] += _elements(entry)
    problems = [f"its chunks do not make up {e.fqn}" for e in part.local if _elements(e) != math.prod(e.shape)]
    try:
        for _ in _stored_chunks(part):
            pass
    except IntegrityError as error:
        problems.append(str(error))
    for entry in (*part.tensors, *part.local):
        for chunk in entry.chunks:
            try:
                if chunk.inline is not None:
                    inline_data(entry.fqn, chunk.inline, shape_bytes(chunk.shape, item_bytes(entry.dtype)))
            except IntegrityError as error:
                problems.append(str(error))
    return _Facts(part.packs, have, need, problems)


def _elements(entry: TensorEntry) -> int:
    return sum(math.prod(chunk.shape) for chunk in entry.chunks)


def _stored_chunks(part: Part) -> Iterator[tuple[TensorEntry, Stored]]:
    shelf = Shelf(part)
    for entry in (*part.tensors, *part.local):
        yield from ((entry, chunk.stored) for chunk in shelf.placed(entry) if chunk.stored is not None)


def _is_sound(node: Stored, data: memoryview, buffers: Buffers) -> bool:
    """Whether a chunk that needs no others decodes to what was recorded."""
    if node.bases:
        return True
    out = buffers.take(node.nbytes)
    try:
        decode(node.codec, data[node.at : node.at + node.length], out, expected=node.digest)
    except IntegrityError:
        return False
    finally:
        buffers.give(out)
    return True
