"""Looking at a run without owning it and without torch: its checkpoints, and whether every byte of them is there.

Nothing here writes. Deciding what would be resumed is :mod:`gpumove.summary`'s; this room says what is sound.
"""

from __future__ import annotations

import math
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from gpumove.budget import ByteBudget
from gpumove.config import Config
from gpumove.errors import ConfigError, GpumoveError, IntegrityError, ObjectNotFoundError
from gpumove.fetch import Buffers, chunk_bytes, decoded, inline_data, read_span
from gpumove.format import keys
from gpumove.format.codec import digest
from gpumove.format.manifest import (
    Checkpoint,
    Chunk,
    Collect,
    LogEntry,
    Manifest,
    Pack,
    Part,
    PartRef,
    TensorEntry,
    decode_checked,
)
from gpumove.store.log import Log, View
from gpumove.store.objects import Store
from gpumove.store.records import read_manifest, read_part

Progress = Callable[[int, int], None]
"""Told (bytes done, bytes in all), from any thread, one call at a time."""


@contextmanager
def open_run(
    url: str, *, config: Config | None = None, storage_options: Mapping[str, Any] | None = None
) -> Iterator[Log]:
    """A run's log, for reading. Its entries are not read yet.

    Raises:
        ConfigError: there is no run at the URL (code ``config.no_run``), or it has a newer format.
    """
    store = Store.open(url, Config.from_env() if config is None else config, options=storage_options)
    try:
        log = Log(store)
        if not log.open(create=False):
            raise ConfigError(f"there is no gpumove run at {store.url}: check the URL", code="config.no_run")
        yield log
    finally:
        store.close()


def pick(view: View, step: int | None, *, url: str) -> Checkpoint:
    """The checkpoint of a step, or the newest.

    Raises:
        ConfigError: there is none (code ``config.no_checkpoint``).
    """
    if (found := view.find(step)) is not None:
        return found
    have = ", ".join(str(c.step) for c in view.checkpoints[-10:])
    what = "no checkpoint yet" if not have else f"no checkpoint of step {step}; the newest are of steps {have}"
    raise ConfigError(f"the run at {url} has {what}", code="config.no_checkpoint")


def checkpoints(url: str, *, storage_options: Mapping[str, Any] | None = None) -> list[Checkpoint]:
    """The checkpoints of a run, oldest first, as its log has them. Reads only the log and claims nothing.

    Args:
        url: the run.
        storage_options: for fsspec.

    Raises:
        ConfigError: there is no run at the URL.
        IntegrityError: the log is damaged.
        StoreError: the store failed.
    """
    with open_run(url, storage_options=storage_options) as log:
        return list(log.read().checkpoints)


@dataclass(frozen=True)
class Damage:
    """One thing that is wrong.

    ``steps`` are the checkpoints that cannot be read because of it; none if nothing that they need is touched.
    ``tensors`` are those that it affects; none named means all that the object describes.
    """

    object: str
    problem: str
    code: str
    steps: tuple[int, ...] = ()
    tensors: tuple[str, ...] = ()


@dataclass(frozen=True)
class Checked:
    """One checkpoint and whether it can be read."""

    entry: int
    step: int
    sound: bool


@dataclass(frozen=True)
class VerifyReport:
    """What :func:`verify` found. Sizes in bytes; ``newest_sound`` is a step, or None if there is no sound checkpoint."""

    url: str
    deep: bool
    sound: bool
    newest_sound: int | None
    checkpoints: tuple[Checked, ...]
    damage: tuple[Damage, ...]
    objects: int
    object_bytes: int
    read_bytes: int
    seconds: float


def verify(
    url: str,
    *,
    step: int | None = None,
    deep: bool = False,
    storage_options: Mapping[str, Any] | None = None,
    config: Config | None = None,
    progress: Progress | None = None,
) -> VerifyReport:
    """Check a run's checkpoints. All damage is listed, none is raised.

    The plain check reads the log, manifests and parts, compares their digests, checks that the chunks of every tensor
    make up its size, and that every object is there with its size. The deep one also reads every pack, compares its
    digest, and decodes every chunk and compares that.

    Args:
        url: the run.
        step: check this step's checkpoint only.
        deep: read the packs too, in parallel, holding at most ``Config.budget_bytes``.
        storage_options: for fsspec.
        config: bounds; by default from the environment.
        progress: told (bytes read, bytes to read) of packs.

    Raises:
        ConfigError: there is no run or no such checkpoint, or it needs a newer gpumove.
        StoreError: the store failed.
    """
    began, config = time.perf_counter(), Config.from_env() if config is None else config
    with open_run(url, config=config, storage_options=storage_options) as log:
        view, damage = _read_log(log)
        chosen = view.checkpoints if step is None else (pick(view, step, url=log.store.url),)
        survey = _Survey(log.store, config)
        for checkpoint in chosen:
            survey.check_records(checkpoint)
        survey.check_sizes()
        if deep:
            survey.check_packs(progress or (lambda done, total: None))
        survey.name_tensors()
        if survey.findings and not damage:
            # Retention may have run meanwhile: what it dropped is gone, not damaged.
            chosen = [c for c in chosen if c in log.read().checkpoints]
        damage += survey.damage(chosen)
        bad = survey.broken()
        checked = tuple(Checked(c.number, c.step, c.number not in bad) for c in chosen)
        return VerifyReport(
            url=log.store.url, deep=deep, sound=not damage,
            newest_sound=next((c.step for c in reversed(checked) if c.sound), None),
            checkpoints=checked, damage=tuple(damage),
            objects=len(survey.needed), object_bytes=sum(survey.needed.values()), read_bytes=survey.read_bytes,
            seconds=time.perf_counter() - began,
        )  # fmt: skip


def _read_log(log: Log) -> tuple[View, list[Damage]]:
    """The log's view; if it is damaged, what its readable entries say, and every entry that is not."""
    try:
        return log.read(), []
    except IntegrityError as error:
        view, damage = _salvage(log.store)
        return view, damage or [Damage("log", str(error), error.code)]


def _salvage(store: Store) -> tuple[View, list[Damage]]:
    view, damage = View(), []
    present = {n for o in store.list("log/") if (n := keys.entry_number(o.key)) is not None}
    entries: list[LogEntry] = []
    for number in range(min(present, default=1), max(present, default=0) + 1):
        key = keys.entry_key(number)
        try:
            entries.append(decode_checked(LogEntry, store.get(key), key=key))  # type: ignore[arg-type]
        except ObjectNotFoundError:
            damage.append(Damage(key, "the log has a hole: this entry is missing", "integrity.log_hole"))
        except IntegrityError as error:
            damage.append(Damage(key, str(error), error.code))
    first = max((e.number for e in entries if isinstance(e, Collect)), default=1)
    for entry in entries:
        view = view.extended(entry)
    # What lies below the newest gc entry is dead weight, and may be missing.
    return view, [d for d in damage if (keys.entry_number(d.object) or 0) >= first]


class _Use(NamedTuple):
    """A chunk in a pack, as parts refer to it."""

    at: int
    length: int
    codec: str
    digest: str
    nbytes: int


class _Users(NamedTuple):
    """Whom a chunk belongs to."""

    entries: set[int]
    tensors: set[str]


class _Facts(NamedTuple):
    """What is kept of a part: the rest of it is large."""

    packs: tuple[Pack, ...]
    have: Counter[str]
    need: dict[str, int]
    problems: list[str]


@dataclass
class _Finding:
    problem: str
    code: str
    entries: set[int] = field(default_factory=set)
    tensors: set[str] = field(default_factory=set)


class _Survey:
    """Goes through checkpoints and gathers what they need and what is wrong with it."""

    def __init__(self, store: Store, config: Config) -> None:
        self.store, self.config = store, config
        self.needed: dict[str, int] = {}
        self.findings: dict[str, _Finding] = {}
        self.read_bytes = 0
        self._users: dict[str, set[int]] = {}
        self._readable: dict[int, list[PartRef]] = {}
        self._lock = threading.Lock()

    def broken(self) -> set[int]:
        """The entries that cannot be read."""
        return set().union(*(f.entries for f in self.findings.values()))

    def damage(self, chosen: Sequence[Checkpoint]) -> list[Damage]:
        """All findings that concern these checkpoints, or none in particular."""
        steps = {c.number: c.step for c in chosen}
        return [
            Damage(
                key, f.problem, f.code, tuple(sorted({steps[n] for n in f.entries if n in steps})), tuple(sorted(f.tensors))
            )
            for key, f in sorted(self.findings.items())
            if not f.entries or f.entries & set(steps)
        ]  # fmt: skip

    def _found(self, key: str, error: GpumoveError | str, code: str, entries: Iterable[int]) -> _Finding:
        with self._lock:
            finding = self.findings.setdefault(key, _Finding(str(error), code))
            finding.entries.update(entries)
            return finding

    def _need(self, key: str, nbytes: int, entry: int) -> None:
        self.needed[key] = nbytes
        self._users.setdefault(key, set()).add(entry)

    # ---------------------------------------------------------------- records

    def check_records(self, checkpoint: Checkpoint) -> None:
        """The manifest and all parts: digests, ranks, and whether the chunks make up the tensors."""
        number = checkpoint.number
        self._need(checkpoint.manifest_key, checkpoint.manifest_bytes, number)
        try:
            manifest = read_manifest(self.store, checkpoint)
        except IntegrityError as error:
            self._found(checkpoint.manifest_key, error, error.code, [number])
            return
        if problem := _misfit(manifest, checkpoint):
            self._found(checkpoint.manifest_key, problem, "integrity.manifest", [number])
        have: Counter[str] = Counter()
        need: dict[str, int] = {}
        whole = True
        for ref, facts in zip(manifest.parts, self._map(self._facts, manifest.parts)):
            self._need(ref.key, ref.nbytes, number)
            if isinstance(facts, GpumoveError):
                self._found(ref.key, facts, facts.code, [number])
                whole = False
                continue
            self._readable.setdefault(number, []).append(ref)
            have.update(facts.have)
            need.update(facts.need)
            for pack in facts.packs:
                self._need(pack.key, pack.nbytes, number)
            for problem in facts.problems:
                self._found(ref.key, problem, "integrity.cover", [number])
        if whole and (short := {n for n, size in need.items() if have[n] != size}):
            text = "the chunks that its parts list do not make up the tensors"
            self._found(checkpoint.manifest_key, text, "integrity.cover", [number]).tensors.update(short)

    def _map(self, work: Callable[[Any], Any], items: Sequence[Any]) -> list[Any]:
        with ThreadPoolExecutor(max(1, min(self.config.concurrency, len(items)))) as pool:
            return list(pool.map(work, items))

    def _facts(self, ref: PartRef) -> _Facts | IntegrityError:
        try:
            return _facts_of(read_part(self.store, ref))
        except IntegrityError as error:
            return error

    def check_sizes(self) -> None:
        """Every object that is needed is there, with its size."""
        sizes = {o.key: o.nbytes for room in ("manifests/", "parts/", "packs/") for o in self.store.list(room)}
        for key, nbytes in self.needed.items():
            found = sizes.get(key)
            if found is None and (info := self.store.exists(key)) is not None:
                found = info.nbytes  # a listing is no snapshot
            if found is None:
                self._found(key, "it is missing", "integrity.missing", self._users[key])
            elif found != nbytes:
                self._found(key, f"it has {found} bytes instead of {nbytes}", "integrity.size", self._users[key])

    # ---------------------------------------------------------------- packs

    def _uses(self, wanted: Callable[[str], bool]) -> dict[str, dict[_Use, _Users]]:
        """The chunks that parts refer to, by pack, for the packs that are asked for."""
        table: dict[str, dict[_Use, _Users]] = {}
        for number, refs in self._readable.items():
            for ref in refs:
                part = read_part(self.store, ref)
                numbers = {n: pack.key for n, pack in enumerate(part.packs) if wanted(pack.key)}
                for entry, chunk in _stored_chunks(part):
                    for link in _links(chunk):
                        if link.pack in numbers:
                            nbytes = chunk_bytes(entry.dtype, chunk)
                            use = _Use(link.at, link.length, link.codec, link.digest, nbytes)
                            users = table.setdefault(numbers[link.pack], {}).setdefault(use, _Users(set(), set()))
                            users.entries.add(number)
                            users.tensors.add(entry.fqn)
        return table

    def check_packs(self, progress: Progress) -> None:
        """Read every pack that is there, compare its digest, decode every chunk."""
        todo = {key: size for key, size in self.needed.items() if key.startswith("packs/") and key not in self.findings}
        uses = self._uses(todo.__contains__)
        total, budget, buffers, stop = sum(todo.values()), ByteBudget(self.config.budget_bytes), Buffers(), threading.Event()

        def check(key: str) -> None:
            if stop.is_set():
                return
            cost = todo[key] + max((u.nbytes for u in uses.get(key, ())), default=0)
            budget.acquire(cost)
            try:
                self._check_pack(key, todo[key], uses.get(key, {}), buffers)
            finally:
                budget.release(cost)
            with self._lock:
                self.read_bytes += todo[key]
                progress(self.read_bytes, total)

        try:
            self._map(check, sorted(todo))
        finally:
            stop.set()

    def _check_pack(self, key: str, nbytes: int, uses: Mapping[_Use, _Users], buffers: Buffers) -> None:
        try:
            data = read_span(self.store, key, 0, nbytes, buffers=buffers)
        except IntegrityError as error:
            self._found(key, error, error.code, self._users[key])
            return
        if digest(data) == key.rpartition("/")[2].partition(".")[0]:
            bad = []
        else:
            bad = [use for use in uses if not _is_sound(use, data, buffers)]
            text = (
                f"{len(bad)} of the {len(uses)} chunks that checkpoints need are damaged in it"
                if bad
                else "its bytes do not hash to its name, but every chunk that checkpoints need is sound"
            )
            self._found(key, text, "integrity.pack", ())
