"""Moving a run: opens both ends, finds out what is under way between them, and goes on from there.

Also what is done where one end cannot be reached: only on ``force``, since the other end's log alone cannot rule out
that two jobs train; it is written down, and said.
"""

from __future__ import annotations

import uuid
from collections.abc import Callable, Mapping
from contextlib import closing
from typing import Any

from gpumove.config import Config
from gpumove.errors import ConfigError, StoreError
from gpumove.format import keys
from gpumove.move.baggage import read_baseline
from gpumove.move.copier import Copier, Progress
from gpumove.move.entries import Entries
from gpumove.move.machine import Mover
from gpumove.move.phase import UNDER_WAY, Ends, Phase, goes_back
from gpumove.move.regions import check_region
from gpumove.move.replica import Replica
from gpumove.move.report import Event, Report, Wishes
from gpumove.move.rounds import Rounds
from gpumove.move.two_ends import two_ends
from gpumove.store.log import Log
from gpumove.store.objects import Store

_PATIENCE_S = 30.0
"""How long an end that may be lost is asked for, where the user has said so."""


def move(
    src: str,
    dst: str,
    wishes: Wishes = Wishes(),  # noqa: B008 - frozen
    *,
    resume: bool = False,
    rollback: bool = False,
    limit: float | None = None,
    in_flight: int = 16,
    from_options: Mapping[str, Any] | None = None,
    to_options: Mapping[str, Any] | None = None,
    config: Config | None = None,
    to_region: str | None = None,
    tell: Callable[[Event], None] = lambda event: None,
    progress: Progress | None = None,
) -> Report:
    """Move the run at ``src`` to ``dst`` while its job trains, or go on with a move, or take the run back.

    Args:
        src: where the run lies, or lay before the move that is resumed or taken back.
        dst: where it is to lie.
        wishes: of the user.
        resume: go on with what is under way between the two, in whatever direction.
        rollback: let the job at ``src`` have the run again, with all that was trained at ``dst`` since.
        limit: bytes per second.
        in_flight: objects under way at once.
        from_options: of ``src``, for fsspec.
        to_options: of ``dst``.
        config: bounds; by default from the environment.
        to_region: where the store lies that is copied to, if it does not tell.
        tell: told what happens.
        progress: told (bytes sent, bytes to send) of a round.

    Raises:
        ConfigError: this cannot be moved, or not so; nothing has changed.
        StoreError: a store failed, or a job does not answer. ``resume`` goes on, ``rollback`` takes back.
        FencedError: somebody else has carried the move on.
    """
    if wishes.discard and not rollback:
        raise ConfigError("to discard what was trained since is for a way back: --rollback")
    if wishes.watch and rollback:
        raise ConfigError("a way back is not watched: leave out --watch, or --rollback")
    both = two_ends(src, dst, in_flight=in_flight, config=config, from_options=from_options, to_options=to_options)
    with both as (source, target, config):
        if wishes.force and not rollback and not _answers(src, config, from_options):
            return _without_source(source, target, tell)
        if wishes.force and rollback and not _answers(dst, config, to_options):
            return _without_target(source, target, tell)

        def mover(here: Store, there: Store, allowed: Callable[[], object], wishes: Wishes = wishes) -> Mover:
            copier = Copier(here, there, in_flight=in_flight, budget_bytes=config.budget_bytes, limit_bytes_s=limit)
            replica, ends = Replica(Log(here), Log(there), copier, region=to_region), Ends(here.url, there.url)
            rounds = Rounds(replica, spares=True)
            return Mover(ends, rounds, wishes, allowed=allowed, tell=tell, progress=progress)

        def take_back(wishes: Wishes) -> Report:
            again = mover(target, source, lambda: None, wishes)
            _open(again.source)
            return again.run()

        forth = mover(source, target, lambda: check_region(target, config.allowed_regions, to_region))
        back = mover(target, source, lambda: None)  # it was there before
        _open(forth.source)
        if forth.target.open(create=False):
            forth.target.read()
        returns = goes_back(forth.source.view, forth.target.view, forth.ends)
        if rollback:
            return _roll_back(forth, back, returns=returns)
        if returns:
            begun = _check_back(forth, back, resume=resume)
            return back.run() if begun else forth.watch(forth.report(Phase.DONE, "the run has moved"), take_back)
        if resume and forth.look() is Phase.FRESH and forth.target.view.sealed == source.url:
            _open(back.source)  # all is done but the last word
            return back.run()
        _check_forth(forth, resume=resume)
        return forth.watch(forth.run(), take_back)


def _check_forth(forth: Mover, *, resume: bool) -> None:
    now, (source, target) = forth.look(), forth.ends
    if now is Phase.DONE and not resume:
        raise ConfigError(f"the run has moved from {source} to {target} already", code="config.moved")
    if now is not Phase.FRESH:
        _check_resumed(resume, f"a move from {source} to {target} is under way ({now.value})")
    elif resume:
        raise ConfigError(f"no move between {source} and {target} is under way: leave out --resume to begin one")


def _check_back(forth: Mover, back: Mover, *, resume: bool) -> bool:
    """Whether the way back has begun; if not, a watch has decided on it. A replica by itself is neither."""
    (source, target), told = forth.ends, forth.source.view.move
    _open(back.source)
    begun = back.look() is not Phase.FRESH
    if not begun and not (told is not None and told.state == "watched" and told.facts.get("back")):
        raise ConfigError(
            f"{source} is a replica of {target}, where the run lies, and no move between the two is under way: "
            f"`gpumove move {target} --to {source}` begins one",
            code="config.replica",
        )
    _check_resumed(resume, f"the run is on its way from {target} back to {source}")
    return begun


def _check_resumed(resume: bool, what: str) -> None:
    if not resume:
        raise ConfigError(
            f"{what}: go on with it by --resume (end whoever is at it first), or take the run back with --rollback",
            code="config.moving",
        )


def _open(log: Log) -> None:
    if not log.open(create=False):
        raise ConfigError(f"there is no gpumove run at {log.store.url}: check the URL", code="config.no_run")
    log.read()


def _roll_back(forth: Mover, back: Mover, *, returns: bool) -> Report:
    if not returns:
        now = forth.withdraw()
        if now is Phase.FRESH:
            return forth.report(now, _withdrawn(forth.ends))
        if now is Phase.FORCED:
            raise ConfigError(f"{forth.ends.source} is not sealed yet: seal it with --resume", code="config.moving")
    _open(back.source)
    told = forth.source.view.move
    if returns and back.look() is Phase.FRESH and (told is None or told.other != back.ends.source):
        raise ConfigError(f"no move from {forth.ends.source} is under way: there is nothing to take back")
    return back.run()


def _withdrawn(ends: Ends) -> str:
    return f"withdrawn: the run is at {ends.source}; start the job there if it has left"


# -------------------------------------------------------------------- an end that cannot be reached


def _answers(url: str, config: Config, options: Mapping[str, Any] | None) -> bool:
    quick = config.replace(deadline_s=min(config.deadline_s, _PATIENCE_S), retry_s=min(config.retry_s, _PATIENCE_S))
    with closing(Store.open(url, quick, options=options)) as store:
        try:
            store.exists(keys.FORMAT_KEY)
        except StoreError:
            return False
        return True


def _without_source(source: Store, target: Store, tell: Callable[[Event], None]) -> Report:
    """The target gets the run although nobody can tell what the source's job does."""
    log, ends = Log(target), Ends(source.url, target.url)
    _open(log)
    newest = log.view.find()
    if log.view.follows != source.url or newest is None:
        raise StoreError(
            f"{source.url} cannot be reached, and {target.url} is no replica of it that could be handed the run: "
            f"{log.view.refusal() or 'a job may own it already'}",
            code="store.unreachable",
        )
    risk = (
        f"{source.url} could not be reached and is NOT sealed: a job that still runs there goes on training and writes "
        "there. It cannot touch this store, but the run then has two histories, of which only this one counts. End "
        "that job, and as soon as the source answers, seal it with --resume"
    )
    entries = Entries(ends, Log(source), log, tell)
    entries.id = log.view.move.move if log.view.move is not None else uuid.uuid4().hex[:16]
    facts = {"step": newest.step, "forced": True, "moved": True, "baseline": read_baseline(log) or None}
    entries.enter("handover", at=log, facts=facts, text=risk)
    return _told(entries, newest.step, f"handed over without a seal, from step {newest.step}: {risk}")


def _without_target(source: Store, target: Store, tell: Callable[[Event], None]) -> Report:
    """The source gets the run back although nobody can tell whether a job trains at the target."""
    log, ends = Log(source), Ends(source.url, target.url)
    _open(log)
    view = log.view
    entries = Entries(ends, log, Log(target), tell)
    newest = view.find()
    step = None if newest is None else newest.step
    if view.sealed == target.url and view.move is not None:
        entries.id = view.move.move
        risk = (
            f"{target.url} could not be reached: if a job trains there, the run has two histories from now on, and "
            "what was trained there is not taken back. End that job"
        )
        entries.enter("handover", facts={"step": step, "forced": True}, text=risk)
        return _told(entries, step, f"taken back without the target's consent: {risk}")
    if view.move is not None and view.move.state in UNDER_WAY and view.move.other == target.url:
        entries.id = view.move.move
        entries.enter("cancelled", text="withdrawn")
        return _told(entries, step, _withdrawn(ends))
    raise ConfigError(f"no move from {source.url} to {target.url} is under way: there is nothing to take back")


def _told(entries: Entries, step: int | None, text: str) -> Report:
    return Report(
        move=entries.id, source=entries.ends.source, target=entries.ends.target, phase="forced", text=text, step=step,
        rounds=(), sent_bytes=0, forecast_s=None, blackout_s=None, events=tuple(entries.told),
    )  # fmt: skip
