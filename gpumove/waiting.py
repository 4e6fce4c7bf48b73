"""Waiting for a run that is on its way here: all ranks look for it together, and keep what it will need warm.

Rank 0 alone reads the log. All ranks meet about twice a second for a few bytes: what they learn so is whether to go on
waiting, and that all of them are still there. Nothing is written here before all may begin, and into the log only what
taking it up takes: a move foretells its blackout from that.
"""

from __future__ import annotations

import logging
import math
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import suppress
from typing import TypeVar

import msgspec

from gpumove.config import Config
from gpumove.errors import FencedError, IntegrityError, StoreError, describe, rebuild
from gpumove.fetch import fetch
from gpumove.format.manifest import Checkpoint
from gpumove.meeting import Described, Told
from gpumove.restore import Contents, read_contents, wants
from gpumove.state.capture import Job, Targets
from gpumove.state.peers import Peers
from gpumove.store.log import Log
from gpumove.store.retry import unless
from gpumove.store.view import View
from gpumove.warm import Warm

T = TypeVar("T")
_log = logging.getLogger("gpumove")
_PAUSE_S, _SOON_S = 0.5, 0.1
"""Between two looks at the log; while something came lately, the handover may be next."""
_LATELY_S = 5.0
_PASSING = ("store.unavailable", "store.timeout", "store.throttled")
"""What may be over in an hour; a wait outlasts it."""


class Word(msgspec.Struct):
    """What a rank says at each meeting."""

    notice: Told | None = None
    error: Described | None = None


class Answer(msgspec.Struct):
    """What rank 0 makes of it."""

    go: bool = False
    soon: bool = False
    """The handover may come at any moment."""
    notice: Told | None = None
    newest: Checkpoint | None = None
    error: Described | None = None


class Waiting:
    """One rank's wait. Collective, in the training thread, which touches live objects in no other way than to look."""

    def __init__(
        self, peers: Peers, job: Job, log: Log, config: Config, *, told: Callable[[], Told | None], strict: bool
    ) -> None:
        """Nothing is done yet.

        Args:
            peers: the other ranks.
            job: the live objects: what they take of a checkpoint is kept warm.
            log: of the run, which may not be there yet.
            config: bounds.
            told: the notice that this rank has, if it has one.
            strict: as for the restore that comes after.
        """
        self._peers, self._job, self._book, self._config = peers, job, log, config
        self._told, self._strict = told, strict
        self.warm = Warm(log.store, config)
        self._stop = threading.Event()
        self._look: Future[View | None] | None = None
        self._view: View | None = None
        self._news_at = -math.inf
        self._said = ""
        self._work: Future[Contents | None] | None = None
        self._tried, self._rehearsed = 0, False
        self._read_s = 0.0
        self._facts: dict[str, float] = {}
        self._told_facts: dict[str, float] | None = None

    def run(self) -> Told | None:
        """Wait until the run may be claimed. Again, if it could not be after all.

        Returns:
            The notice that the job has to leave on before it may, if there is one.

        Raises:
            LayoutError: what comes does not fit the live objects.
            GpumoveError: a rank is gone, or the store refuses to be read.
        """
        self._peers.meet("the wait for the run")
        self._stop.clear()
        self._view = self._look = self._work = None
        self._tried = 0
        self._threads = ThreadPoolExecutor(2, thread_name_prefix="gpumove-wait")
        newest: Checkpoint | None = None
        try:
            while True:
                message = msgspec.msgpack.encode(self._word(newest))
                found = msgspec.msgpack.decode(self._peers.ask(message, self._answer), type=Answer)
                if found.error is not None:
                    raise rebuild(found.error)
                if found.go or found.notice is not None:
                    return found.notice
                newest = found.newest
                time.sleep(_SOON_S if found.soon else _PAUSE_S)
        finally:
            self._stop.set()
            self._threads.shutdown(cancel_futures=True)

    def _start(self, work: Callable[[], T]) -> Future[T]:
        def wanted() -> T:
            with unless(self._stop.is_set):
                return work()

        return self._threads.submit(wanted)

    # ---------------------------------------------------------------- what a rank says, and what rank 0 answers

    def _word(self, newest: Checkpoint | None) -> Word:
        try:
            self._go_on(newest)
            return Word(self._told())
        except Exception as error:  # noqa: BLE001 - whatever it is, the other ranks must not wait for this one
            return Word(error=describe(error))

    def _answer(self, messages: list[bytes]) -> bytes:
        try:
            answer = self._decide([msgspec.msgpack.decode(message, type=Word) for message in messages])
        except Exception as error:  # noqa: BLE001 - told to all ranks
            answer = Answer(error=describe(error))
        return msgspec.msgpack.encode(answer)

    def _decide(self, words: list[Word]) -> Answer:
        for rank, word in enumerate(words):
            if word.error is not None:
                kind, code, text = word.error
                return Answer(error=(kind, code, f"rank {rank}: {text}"))
        if notices := [word.notice for word in words if word.notice is not None]:
            return Answer(notice=min(notices, key=lambda told: told.until))
        self._look_again()
        view = self._view
        why = "there is no run yet" if view is None or not view.head else view.refusal()
        if why != self._said:
            self._said = why
            _log.info("waiting for %s: %s", self._book.store.url, why or "it may be claimed now")
        if view is None or why:
            newest = next(iter(view.candidates()), None) if view is not None else None
            return Answer(newest=newest, soon=time.monotonic() - self._news_at < _LATELY_S)
        return Answer(go=True)

    # ---------------------------------------------------------------- rank 0: the log

    def _look_again(self) -> None:
        """Take in what the log says now, if the store tells in time; the other ranks wait here too."""
        self._look = self._look or self._start(self._read_log)
        wait([self._look], timeout=_PAUSE_S)
        if self._look.done():
            look, self._look = self._look, None
            try:
                self._view = look.result()
            except StoreError as error:
                if error.code not in _PASSING:
                    raise
                _log.warning("the wait goes on: %s", error)

    def _read_log(self) -> View | None:
        if not self._book.run and not self._book.open(create=False):
            return None
        before = self._book.view.head
        self._book.follow()
        if self._book.view.head > before > 0:
            self._news_at = time.monotonic()
        if self._told_facts != self._facts:
            self._say_waiting(self._book.view)
        return self._book.view

    def _say_waiting(self, view: View) -> None:
        """Tell a move that a job waits here, and later on how long it will take to go on after the handover."""
        begun, facts = view.move, dict(self._facts)
        if not view.follows or (begun is not None and begun.state == "cancelled"):
            return  # a withdrawal must stay the last word, or somebody might still hand over

        def check(now: View) -> None:
            if now.follows != view.follows or now.move != begun:
                raise FencedError(f"{self._book.store.url}: its move has gone on")

        with suppress(FencedError):
            name, told = "0" * 16 if begun is None else begun.move, {"job": facts}
            self._book.move("begin", move=name, other=view.follows, facts=told, text="a job waits here", check=check)
            self._told_facts = facts

    # ---------------------------------------------------------------- every rank: what the newest checkpoint needs

    def _go_on(self, newest: Checkpoint | None) -> None:
        """Bring up the newest checkpoint, one piece of work after the other; newer ones are not waited for."""
        if self._work is not None:
            if not self._work.done():
                return
            work, self._work = self._work, None
            try:
                contents = work.result()
            except IntegrityError as error:
                _log.warning("a checkpoint that is on its way here is not sound, and is not kept warm: %s", error)
                return
            except StoreError as error:
                if error.code not in _PASSING:
                    raise
                self._tried = 0
                _log.warning("the wait goes on: %s", error)
                return
            if contents is not None:
                targets = self._job.match(contents.saved, world_size=self._peers.world_size, strict=self._strict)
                self._work = self._start(lambda: self._bring_up(contents, targets))
                return
        if newest is not None and newest.number > self._tried:
            self._tried = newest.number
            self._work = self._start(lambda: self._read(newest))

    def _read(self, checkpoint: Checkpoint) -> Contents:
        rank, stream, began = self._peers.rank, self._job.stream(), time.perf_counter()
        contents = read_contents(self._book.store, checkpoint, rank=rank, config=self._config, stream=stream)
        self._read_s = time.perf_counter() - began
        return contents

    def _bring_up(self, contents: Contents, targets: Targets) -> None:
        wanted = wants(contents, targets)
        began = time.perf_counter()
        nbytes = self.warm.follow(wanted)
        took_s = time.perf_counter() - began
        _log.info("step %d is here: %.1f MB fetched in %.1f s", contents.manifest.step, nbytes / 1e6, took_s)
        whole = all(w.placed.stored is None or self.warm.get(w.placed.stored) is not None for w in wanted)
        if whole and not self._rehearsed:
            # Memory that was never touched, and everything else that is slow only once, is not left for the blackout.
            self._rehearsed = True
            began = time.perf_counter()
            fetch(self._book.store, wanted, config=self._config, held=self.warm.get)
            took_s = time.perf_counter() - began
            # Besides: the next look at the log, and the claim, which asks the store about as often as records do.
            self._facts = {"restore_s": round(took_s + _SOON_S + 2 * self._read_s, 3)}
            _log.info("taking it up takes %.2f s", took_s)
