"""Looking at a run without owning it and without torch: its checkpoints, and whether every byte of them is there.

Nothing here writes. What would be resumed is :mod:`gpumove.inspection.summary`'s to say; this room says what is sound.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass
from typing import Any

from gpumove.config import Config
from gpumove.errors import ConfigError, IntegrityError
from gpumove.format import keys
from gpumove.format.manifest import Checkpoint
from gpumove.format.pointer import Pointer, pointer_key
from gpumove.inspection.survey import Progress, Survey
from gpumove.store.log import Log
from gpumove.store.objects import Store
from gpumove.store.pointers import numbers, read_pointer
from gpumove.store.records import read_every_entry
from gpumove.store.view import View


@contextmanager
def open_run(
    url: str, *, config: Config | None = None, storage_options: Mapping[str, Any] | None = None
) -> Iterator[Log]:
    """A run's log, for reading. Its entries are not read yet.

    Raises:
        ConfigError: there is no run at the URL (code ``config.no_run``), or it has a newer format.
    """
    store = Store.open(url, Config.from_env() if config is None else config, options=storage_options)
    with closing(store):
        log = Log(store)
        if not log.open(create=False):
            raise _no_run(store)
        yield log


def _no_run(store: Store) -> ConfigError:
    return ConfigError(f"there is no gpumove run at {store.url}: check the URL", code="config.no_run")


def pick(view: View, step: int | Pointer | None, *, url: str) -> Checkpoint:
    """The checkpoint of a step, the one that a pointer names, or the newest.

    Raises:
        ConfigError: there is none (code ``config.no_checkpoint``).
    """
    if isinstance(step, Pointer):
        return _pointed(view, step, url=url)
    if (found := view.find(step)) is not None:
        return found
    have = ", ".join(str(c.step) for c in view.checkpoints[-10:])
    what = "no checkpoint yet" if not have else f"no checkpoint of step {step}; the newest are of steps {have}"
    raise ConfigError(f"the run at {url} has {what}", code="config.no_checkpoint")


def _pointed(view: View, pointer: Pointer, *, url: str) -> Checkpoint:
    """Several checkpoints may be of one step, of lines that were left; an attempt is one, here and in every replica."""
    named = (pointer.attempt, pointer.manifest)
    found = next((c for c in view.checkpoints if (c.attempt, c.manifest) == named), None)
    if found is None:
        what = f"step {pointer.step}, which {pointer.mark} names," if pointer.attempt else f"{pointer.mark}"
        raise ConfigError(f"{what} is not a checkpoint of the run at {url}", code="config.no_checkpoint")
    return found


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
    """What :func:`verify` found. ``newest_sound`` is a step, or None if there is no sound checkpoint."""

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
    with closing(Store.open(url, config, options=storage_options)) as store:
        log = Log(store)
        damage = _check_format(log)
        view, more = _read_log(log)
        damage += more
        chosen = view.checkpoints if step is None else (pick(view, step, url=store.url),)
        survey = Survey(store, config)
        for checkpoint in chosen:
            survey.check_records(checkpoint)
        survey.check_sizes()
        if deep:
            survey.check_packs(progress or (lambda done, total: None))
        survey.name_tensors()
        if survey.findings:
            # Retention may have run meanwhile: what it dropped is gone, not damaged.
            live = {c.number for c in _read_log(log)[0].checkpoints}
            chosen = tuple(c for c in chosen if c.number in live)
        damage += _damage(survey, chosen) + _pointers(log)
    broken = set[int]().union(*(finding.entries for finding in survey.findings.values()))
    checked = tuple(Checked(c.number, c.step, c.number not in broken) for c in chosen)
    return VerifyReport(
        url=store.url,
        deep=deep,
        sound=not damage,
        newest_sound=next((c.step for c in reversed(checked) if c.sound), None),
        checkpoints=checked,
        damage=tuple(damage),
        objects=len(survey.needed),
        object_bytes=sum(survey.needed.values()),
        read_bytes=survey.read_bytes,
        seconds=time.perf_counter() - began,
    )


def _damage(survey: Survey, chosen: Sequence[Checkpoint]) -> list[Damage]:
    """The findings that concern these checkpoints, or none in particular."""
    steps = {c.number: c.step for c in chosen}
    return [
        Damage(
            key, f.problem, f.code, tuple(sorted({steps[n] for n in f.entries if n in steps})), tuple(sorted(f.tensors))
        )
        for key, f in sorted(survey.findings.items())
        if not f.entries or f.entries & set(steps)
    ]


def _check_format(log: Log) -> list[Damage]:
    """What is wrong with ``format.json``; nothing can be resumed without it, but the rest can be looked at."""
    try:
        if log.open(create=False):
            return []
    except IntegrityError as error:
        return [Damage(keys.FORMAT_KEY, str(error), error.code)]
    if not log.store.list("log/"):
        raise _no_run(log.store)
    return [Damage(keys.FORMAT_KEY, "it is missing, while there is a log", "integrity.missing")]


def _read_log(log: Log) -> tuple[View, list[Damage]]:
    """The log's view and what is wrong with it; if it has holes, what its readable entries say."""
    try:
        view = log.read()
        return view, _broken(view)
    except IntegrityError as error:
        view, holes = _salvage(log.store)
        return view, [*_broken(view), *holes] or [Damage("log", str(error), error.code)]


def _pointers(log: Log) -> list[Damage]:
    """What is wrong with the names that others follow: a newest pointer that is damaged, or stands for what is gone."""
    newest: dict[str, Pointer] = {}
    found = []
    for name, known in numbers(log.store).items():
        try:
            newest[name] = read_pointer(log.store, name, known[-1])
        except IntegrityError as error:
            found.append(Damage(pointer_key(name, known[-1]), str(error), error.code))
    live = {c.attempt for c in _read_log(log)[0].checkpoints} if newest else set()  # as it is after they were read
    return found + [
        Damage(pointer.key, f"it stands for step {pointer.step}, which is not there", "integrity.missing")
        for pointer in newest.values()
        if pointer.step is not None and pointer.attempt not in live
    ]


def _broken(view: View) -> list[Damage]:
    return [Damage(keys.entry_key(b.number), b.error, "integrity.record") for b in view.broken]


def _salvage(store: Store) -> tuple[View, list[Damage]]:
    """What can be read of a log that as a whole cannot, and its holes."""
    entries = read_every_entry(store, holes=True)
    view = View()
    for entry in entries.values():
        view = view if entry is None else view.extended(entry)
    # What lies below the newest gc entry is dead weight, and may be missing; without one, number 1 is the first.
    holes = [1] if view.first == 1 < min(entries, default=1) else []
    holes += [n for n, entry in entries.items() if entry is None and n >= view.first]
    return view, [Damage(keys.entry_key(n), "it is missing: the log has a hole", "integrity.log_hole") for n in holes]
