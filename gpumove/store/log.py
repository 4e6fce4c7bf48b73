"""The commit log: claim, checkpoint, note, pin, gc. Fencing by epoch, and read-back of what was created.

The rules are in docs/format.md, sections 2 and 7. This room knows records and keys, never tensors.
"""

from __future__ import annotations

import socket
import time
import uuid
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any

from gpumove.errors import ConfigError, FencedError, IntegrityError, ObjectNotFoundError, StoreError
from gpumove.format import keys
from gpumove.format.manifest import (
    FORMAT,
    Checkpoint,
    Claim,
    Collect,
    LogEntry,
    Move,
    Note,
    Pin,
    Run,
    decode_checked,
    encode_checked,
)
from gpumove.store.beside import both
from gpumove.store.objects import Store
from gpumove.store.view import Broken, View, replay

_BATCH = 32
_MAX_CONFLICTS = 1000


class Log:
    """A run's log. ``view`` is what was read or written last; only an owner (after ``claim``) may commit."""

    def __init__(self, store: Store) -> None:
        self.store = store
        self.writer = uuid.uuid4().hex
        self.run = ""
        self.epoch: int | None = None
        self._claimed_at = 0
        self.view = View()

    def open(self, *, create: bool, run: str = "") -> str:
        """Read ``format.json``; make it if allowed and absent.

        Args:
            create: whether to make it.
            run: the id to give to a run that is made here, by default a new one.

        Returns:
            The run's id, or "" if there is no run and none was to be made.

        Raises:
            ConfigError: the run has a newer format.
            StoreError: the store cannot hold a log.
        """
        if create and self.store.exists(keys.FORMAT_KEY) is None:
            self.store.probe_create()
            fresh = Run(format=FORMAT, name="gpumove", run=run or uuid.uuid4().hex)
            self.store.create(keys.FORMAT_KEY, encode_checked(fresh))  # another's is as good: it is read back below
        try:
            found = decode_checked(Run, self.store.get(keys.FORMAT_KEY), key=keys.FORMAT_KEY)
        except ObjectNotFoundError:
            return ""
        except IntegrityError as error:
            raise IntegrityError(
                f"{self.store.url}/{error}. No checkpoint depends on this object: delete it, and the next restore() "
                "writes it anew",
                code=error.code,
            ) from error
        if found.name != "gpumove":
            raise IntegrityError(f"{self.store.url}/{keys.FORMAT_KEY} is not a gpumove run: use another URL")
        self.run = found.run
        return found.run

    def read(self) -> View:
        """Read the live entries afresh.

        Raises:
            IntegrityError: an entry is missing or damaged.
        """
        for last in (False, False, True):
            try:
                self.view = self._read_once()
                return self.view
            except (ObjectNotFoundError, IntegrityError) as error:
                # A gc that ran between the listing and the reading looks like a hole: look again before crying wolf.
                if last or getattr(error, "code", "") not in ("store.not_found", "integrity.log_hole"):
                    raise
        raise AssertionError("unreachable")

    def _read_once(self) -> View:
        numbers = sorted(n for o in self.store.list("log/") if (n := keys.entry_number(o.key)) is not None)
        if not numbers:
            return View()
        entries: list[LogEntry | Broken] = []
        head, present = numbers[-1], set(numbers)
        top = head
        with ThreadPoolExecutor(min(_BATCH, head), thread_name_prefix="gpumove-log") as pool:
            while top > 0 and not any(isinstance(e, Collect) for e in entries):
                batch = range(max(1, top - _BATCH + 1), top + 1)
                entries[:0] = [e for e in pool.map(lambda n: self._entry(n, present), batch) if e is not None]
                top = batch[0] - 1
        return replay(entries, head)

    def _entry(self, number: int, present: set[int]) -> LogEntry | Broken | None:
        """One entry; None if it is not there, asked for by its key since a listing is no snapshot."""
        try:
            return self._decoded(keys.entry_key(number))
        except ObjectNotFoundError:
            if number in present and number == max(present):
                raise
            return None
        except IntegrityError as error:
            return Broken(number, str(error))

    def _decoded(self, key: str) -> LogEntry:
        entry: LogEntry = decode_checked(LogEntry, self.store.get(key), key=f"{self.store.url}/{key}")  # type: ignore[arg-type]
        if keys.entry_key(entry.number) != key:
            raise IntegrityError(
                f"{self.store.url}/{key} says that it is number {entry.number}: it was copied or renamed"
            )
        return entry

    def append(self, make: Callable[[View, int], LogEntry]) -> LogEntry:
        """Create the next entry.

        Args:
            make: builds it from the view that it follows and its number; called again if the number was taken.

        Raises:
            FencedError: another writer has claimed the run.
        """
        self.check_owner()
        for _ in range(_MAX_CONFLICTS):
            number = self.view.head + 1
            entry = make(self.view, number)
            if entry.number != number:
                raise ConfigError(f"an entry for number {number} was built with number {entry.number}")
            if not self.store.create(keys.entry_key(number), encode_checked(entry)):
                self._follow(number)
            elif self._is_live(number):
                self.view = self.view.extended(entry)
                return entry
            else:
                self.read()
                self.check_owner()
        raise StoreError(f"{self.store.url}: {_MAX_CONFLICTS} log numbers in a row were taken by other writers")

    def _is_live(self, number: int) -> bool:
        """Whether an entry that was just created counts.

        A writer that slept while others wrote, and gc removed what they wrote, finds its next number free although it
        is long gone, or a kept checkpoint's. But then the gc entry, whose number is higher, exists: one listing tells.
        """
        head = max((keys.entry_number(o.key) or 0 for o in self.store.list("log/")), default=number)
        if head == number:
            return True
        view = self._read_once()
        return view.first <= number or any((c.number, c.writer) == (number, self.writer) for c in view.checkpoints)

    def _follow(self, number: int) -> bool:
        """Take in an entry of somebody else's; whether it is there."""
        if (found := self._entry(number, set())) is None:
            return False
        self.view = self.view.extended(found)
        self.check_owner()
        return True

    def follow(self) -> None:
        """Take in the entries that came since."""
        if not (head := self.view.head):
            self.read()
            return
        last = partial(self.store.exists, keys.entry_key(head))
        there, more = both(last, lambda: self._follow(head + 1), at_once=self.store.parallel)
        if there is None:
            self.read()  # a gc passed by, and perhaps what lay between is gone with it
            self.check_owner()
        while (more or there is None) and self._follow(self.view.head + 1):
            more = True

    def check_owner(self) -> None:
        """Raise FencedError if this writer has claimed an epoch and a newer one is known, or may have been claimed."""
        lost = [b for b in self.view.broken if b.number > self._claimed_at]
        if self.epoch is not None and lost:
            raise FencedError(
                f"{lost[0].error}. It was written by somebody else and may have been a claim: stop this process; a new "
                "start with restore() claims the run and goes on",
                code="fenced.unknown",
            )
        if self.epoch is not None and self.view.epoch > self.epoch:
            what, code = f"{self.view.host or 'another writer'} has claimed epoch {self.view.epoch} since", None
            if self.view.sealed:
                what, code = f"the run was moved to {self.view.sealed} since", "fenced.moved"
            raise FencedError(
                f"{self.store.url}: this process owned epoch {self.epoch}, and {what}: stop this process; the newest "
                f"committed checkpoint is {_say(self.view.find())}",
                code=code,
            )

    def claim(
        self,
        *,
        resumed: int | None = None,
        follows: str = "",
        regions: str = "",
        epoch: int = 0,
        check: Callable[[View], None] = lambda view: None,
    ) -> Claim:
        """Open a new epoch, fencing every older owner.

        Args:
            resumed: which entry the run goes on from.
            follows: for a replicator: the URL of the log that this one is kept a copy of.
            regions: where the run may lie; empty to leave it as it is, ``*`` for everywhere.
            epoch: this at least: attempts of the other log's epoch will lie here.
            check: for a replicator: raises if the log, as it is just before the claim, is not to be followed into.

        Raises:
            FencedError: the run was moved away, or was not handed over yet (code ``fenced.moved``).
        """
        self.epoch = None
        host = socket.gethostname()

        def make(view: View, number: int) -> Claim:
            check(view)
            if not follows and (why := view.refusal()):
                raise FencedError(f"{self.store.url} cannot be claimed: {why}", code="fenced.moved")
            return Claim(
                format=FORMAT, number=number, epoch=max(epoch, view.epoch + 1 + len(view.broken)), writer=self.writer,
                time=time.time(), host=host, resumed=resumed, follows=follows, regions=regions,
            )  # fmt: skip

        entry = self.append(make)
        self.epoch, self._claimed_at = entry.epoch, entry.number
        return entry  # type: ignore[return-value]

    def move(
        self,
        state: str,
        *,
        move: str,
        other: str,
        save: bool = True,
        facts: Mapping[str, Any] | None = None,
        text: str = "",
        check: Callable[[View], None] = lambda view: None,
    ) -> Move:
        """Say how far a move has come; ``sealed`` and ``handover`` open an epoch, which fences the owner.

        Args:
            state: one of ``MOVE_STATES``.
            move: its id.
            other: the URL of the other end, as its store gives it.
            save: of a request: whether the job saves before it leaves.
            facts: what was measured.
            text: the same for people.
            check: raises if the log, as it is just before this entry, is not as it has to be.
        """
        opens = state in ("sealed", "handover")

        def make(view: View, number: int) -> Move:
            check(view)
            return Move(
                format=FORMAT, number=number, epoch=view.epoch + (1 + len(view.broken) if opens else 0),
                writer=self.writer, time=time.time(), move=move, state=state, other=other, save=save,
                facts=dict(facts or {}), text=text,
            )  # fmt: skip

        if opens:
            self.epoch = None
        return self.append(make)  # type: ignore[return-value]

    def adopt(self, run: str, epoch: int) -> None:
        """Take over what this job's rank 0 has claimed."""
        self.run, self.epoch = run, epoch

    def note(self, text: str, *, resumed: int | None = None, damaged: Sequence[int] = ()) -> LogEntry:
        """Say something that readers of the log should know."""
        return self.append(
            lambda view, number: Note(
                format=FORMAT, number=number, epoch=view.epoch, writer=self.writer, time=time.time(),
                text=text, resumed=resumed, damaged=tuple(damaged),
            )
        )  # fmt: skip

    def pin(self, checkpoint: Checkpoint, *, pinned: bool) -> LogEntry:
        """Keep a checkpoint from retention, or no longer."""
        return self.append(
            lambda view, number: Pin(
                format=FORMAT, number=number, epoch=view.epoch, writer=self.writer, time=time.time(),
                checkpoint=checkpoint.number, pinned=pinned,
            )
        )  # fmt: skip


def _say(checkpoint: Checkpoint | None) -> str:
    return "none" if checkpoint is None else f"step {checkpoint.step} (entry {checkpoint.number})"
