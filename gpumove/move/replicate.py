"""``gpumove.replicate``: a run, or any other prefix, copied to another store. Opens both ends, says what was done."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from gpumove.config import Config
from gpumove.errors import ConfigError, IntegrityError
from gpumove.format.manifest import Checkpoint
from gpumove.inspection.run import pick
from gpumove.move.copier import Copier, Progress, Sent
from gpumove.move.plain import Plain, holds_run
from gpumove.move.regions import check_region
from gpumove.move.replica import Replica
from gpumove.move.rounds import Forecast, Round, Rounds
from gpumove.move.two_ends import two_ends
from gpumove.store.gc import Retention
from gpumove.store.log import Log

Told = Callable[[Round, Forecast], None]


@dataclass(frozen=True)
class Replication:
    """What :func:`replicate` has done."""

    source: str
    target: str
    run: str
    """The run's id; "" for a prefix that holds none."""
    steps: tuple[int, ...]
    """Checkpoints that were brought, in this order."""
    newest: int | None
    """The step that a restore from the target would take."""
    objects: int
    nbytes: int
    """Sent, in objects and bytes; what was there already does not count."""
    seconds: float
    rate_bytes_s: float | None
    """While bytes were under way."""
    problems: tuple[str, ...]
    """What could not be copied, and why: the rest was."""
    forecast: Forecast | None


def replicate(
    src: str,
    dst: str,
    *,
    step: int | str | None = None,
    follow: bool = False,
    limit: float | None = None,
    in_flight: int = 16,
    deep: bool = False,
    keep_last: int | str | None = None,
    keep_every: int | None = None,
    from_options: Mapping[str, Any] | None = None,
    to_options: Mapping[str, Any] | None = None,
    to_region: str | None = None,
    config: Config | None = None,
    progress: Progress | None = None,
    each: Told | None = None,
    stop: threading.Event | None = None,
) -> Replication:
    """Copy to ``dst`` what it lacks of ``src``: a run's checkpoints, or any other prefix's objects.

    Args:
        src: where the run, or the data, lies; only read.
        dst: another place: empty, a replica of the same run, or a prefix that was copied to before.
        step: of a run: ``"latest"`` (the default), ``"all"``, or the step of one checkpoint.
        follow: go on: bring the newest checkpoint whenever the run has committed one.
        limit: bytes per second.
        in_flight: objects under way at once, within ``config.budget_bytes``.
        deep: read what lies at ``dst`` already too, and send it again where it is damaged.
        keep_last: how many of the newest checkpoints stay at ``dst``, or ``"all"``; by default all, and with ``follow``
            those that ``src`` has.
        keep_every: those whose step is a multiple of this stay too.
        from_options: of ``src``, for fsspec.
        to_options: of ``dst``.
        to_region: where ``dst`` lies, for a store that does not tell, and ``config.allowed_regions`` to be met.
        config: bounds; by default from the environment.
        progress: told (bytes sent, bytes to send).
        each: told every checkpoint that was brought, and the forecast of a blackout.
        stop: set it to end ``follow``.

    Raises:
        ConfigError: there is nothing at ``src``, or ``dst`` is not to be written to: another run, an owner's, or in a
            region that is not allowed.
        FencedError: another replicator, or a job, has ``dst`` now.
        IntegrityError: nothing could be brought because it is damaged at ``src``.
        StoreError: one of the stores failed.
    """
    _check(step, limit)
    keep = _retention(keep_last, keep_every)
    both = two_ends(src, dst, in_flight=in_flight, config=config, from_options=from_options, to_options=to_options)
    with both as (source, target, config):
        check_region(target, config.allowed_regions, to_region)
        copier = Copier(source, target, in_flight=in_flight, budget_bytes=config.budget_bytes, limit_bytes_s=limit)
        if not holds_run(source):
            if follow or step is not None or keep is not None:
                raise ConfigError(f"there is no gpumove run at {source.url}: check the URL", code="config.no_run")
            return _plain(copier, deep=deep, progress=progress)
        log = Log(source)
        log.open(create=False)
        log.read()
        if isinstance(step, int):
            pick(log.view, step, url=source.url)  # before anything is made at the target
        replica, as_source = Replica(log, Log(target), copier, deep=deep, region=to_region), follow and keep is None
        rounds = Rounds(replica, keep, as_source=as_source, stop=stop or threading.Event())
        return _run(rounds, step, follow=follow, each=each or (lambda found, forecast: None), progress=progress)


def _check(step: int | str | None, limit: float | None) -> None:
    if not (step in (None, "latest", "all") or type(step) is int):
        raise ConfigError(f"step is a number, 'latest' or 'all', not {step!r}")
    if limit is not None and not 0 < limit < float("inf"):
        raise ConfigError(f"limit is a number of bytes per second above 0, not {limit!r}")


def _retention(keep_last: int | str | None, keep_every: int | None) -> Retention | None:
    if keep_last is None and keep_every is None:
        return None
    newest = None if keep_last == "all" else Config.keep_last if keep_last is None else keep_last
    checked = Config(keep_last=newest, keep_every=keep_every)  # type: ignore[arg-type]
    return Retention(checked.keep_last, checked.keep_every)


def _plain(copier: Copier, *, deep: bool, progress: Progress | None) -> Replication:
    began = time.monotonic()
    done = Plain(copier, deep=deep).copy(progress=progress)
    return Replication(
        source=copier.source.url, target=copier.target.url, run="", steps=(), newest=None, objects=done.sent.objects,
        nbytes=done.sent.nbytes, seconds=time.monotonic() - began, rate_bytes_s=copier.rate.bytes_s,
        problems=done.problems, forecast=None,
    )  # fmt: skip


def _run(rounds: Rounds, step: int | str | None, *, follow: bool, each: Told, progress: Progress | None) -> Replication:
    began, replica, failure = time.monotonic(), rounds.replica, None
    replica.look()
    sent, problems = _mend(replica, progress) if replica.deep else (Sent(), [])
    for checkpoint in _wanted(rounds, step):
        try:
            found = rounds.once(checkpoint, progress=progress)
        except IntegrityError as error:
            failure = error
            continue
        if found is not None:
            each(found, rounds.forecast())
    if follow:
        rounds.follow(each, progress=progress)
    elif failure is not None and not rounds.done and not replica.target.view.checkpoints:
        raise failure
    rounds.courier.bring()
    sent = sum((Sent(r.nbytes, r.seconds, r.objects) for r in rounds.done), sent)
    newest = replica.target.view.find()
    return Replication(
        source=replica.source.store.url, target=replica.target.store.url, run=replica.source.run,
        steps=tuple(r.step for r in rounds.done), newest=newest.step if newest else None, objects=sent.objects,
        nbytes=sent.nbytes, seconds=time.monotonic() - began, rate_bytes_s=replica.copier.rate.bytes_s,
        problems=(*problems, *rounds.damaged.values()), forecast=rounds.forecast() if rounds.done else None,
    )  # fmt: skip


def _mend(replica: Replica, progress: Progress | None) -> tuple[Sent, list[str]]:
    """Look through what is there already; what was sent, and what could not be mended."""
    sent, problems = Sent(), []
    there = {c.attempt for c in replica.target.view.checkpoints}
    for checkpoint in replica.source.view.checkpoints:
        if checkpoint.attempt in there:
            try:
                sent += replica.mend(checkpoint, progress=progress)
            except IntegrityError as error:
                problems.append(str(error))
    return sent, problems


def _wanted(rounds: Rounds, step: int | str | None) -> Iterator[Checkpoint]:
    """What to bring, one after the other, as long as that is wanted after the one before was brought, or was not."""
    replica = rounds.replica
    if isinstance(step, int):
        chosen = pick(replica.source.view, step, url=replica.source.store.url)
        if replica.at_target(chosen) is None:
            if any(c.attempt > chosen.attempt for c in replica.target.view.checkpoints):
                raise ConfigError(
                    f"{replica.target.store.url} has newer checkpoints than step {step}, which would pass for the "
                    "newest there: use another URL",
                    code="config.older",
                )
            yield chosen
        return
    last = max((c.attempt for c in replica.source.view.checkpoints), default="")
    had = len(rounds.done)
    while step == "all" or len(rounds.done) == had:
        newest, behind = replica.look(), replica.behind()
        order = [*behind, newest] if step == "all" else [newest, *reversed(behind)]
        # What came since this began is for the next time, or a run that commits all the time would never be done.
        wanted = (c for c in order if c and c.attempt not in rounds.damaged and (c.attempt <= last or step != "all"))
        if (found := next(wanted, None)) is None:
            return
        yield found
