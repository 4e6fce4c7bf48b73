"""Replica: a log that is kept a copy of another one, checkpoint by checkpoint, in the order that the format asks for.

It decides what is lacking and what must be refused; the Copier moves the bytes. Design: docs/design/0007-moving.md.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable

import msgspec

from gpumove.errors import ConfigError, IntegrityError, ObjectNotFoundError, StoreError
from gpumove.format import keys
from gpumove.format.manifest import Checkpoint, LogEntry
from gpumove.move.admission import check_target
from gpumove.move.copier import Copier, Object, Progress, Sent
from gpumove.move.needs import Needs
from gpumove.move.regions import check_region
from gpumove.store.beside import both
from gpumove.store.gc import Plan, Retention, collect, surplus
from gpumove.store.log import Log
from gpumove.store.records import reachable
from gpumove.store.view import View

_log = logging.getLogger("gpumove")
_ROOMS = ("packs/", "parts/", "manifests/")
"""In the order of writing."""


class Replica:
    """Keeps ``target`` a copy of ``source``: both are logs that were opened, the target's perhaps in an empty store.

    The target is claimed when something is first written to it, and again when the source's epoch has grown.

    Args:
        source: only read.
        target: written to.
        copier: between their stores.
        deep: what lies at the target already is read and compared too, once, and sent again where it is damaged.
        region: where the target lies, as a person says, for a run that may not lie everywhere.
    """

    def __init__(
        self, source: Log, target: Log, copier: Copier, *, deep: bool = False, region: str | None = None
    ) -> None:
        self.source, self.target, self.copier = source, target, copier
        self.deep, self._region = deep, region
        self._sound: set[str] = set()
        """Keys at the target that were read and are what they should be."""
        self._have: dict[str, int] | None = None
        """What lies at the target, by key, with its size."""
        self._unsure = True
        """Whether some of that was only seen in a listing, and nothing was committed since."""
        self.needs = Needs(source.store)
        self._early = Sent()
        """What was sent of saves that were not committed yet."""
        self._reach: dict[str, frozenset[str]] = {}

    # ---------------------------------------------------------------- what is to be done

    def look(self) -> Checkpoint | None:
        """Take in what both logs say now; the checkpoint that the target should resume from and lacks, if there is one.

        Raises:
            ConfigError: the target is not to be written to: another run, an owner's, or one that went on by itself.
            FencedError: another replicator has taken over.
        """
        self.source.follow()
        self._open_target()
        self.check(self.target.view)
        newest = self.source.view.find()
        if newest is None or newest.number in self.source.view.damaged:
            return None
        return newest if self.at_target(newest) is None or self._is_ahead(newest) else None

    def behind(self) -> list[Checkpoint]:
        """The checkpoints of the source's own line, oldest first, that are newer than all that the target has."""
        view, last = self.source.view, max((c.attempt for c in self.target.view.checkpoints), default="")
        return [c for c in view.checkpoints if c.number not in view.abandoned | view.damaged and c.attempt > last]

    def at_target(self, checkpoint: Checkpoint) -> Checkpoint | None:
        """The same checkpoint as the target's log has it."""
        return next((c for c in self.target.view.checkpoints if c.attempt == checkpoint.attempt), None)

    def _is_ahead(self, newest: Checkpoint) -> bool:
        """Whether a restore from the target would take one that the source's run has gone back behind."""
        found = self.target.view.find()
        return found is not None and found.attempt != newest.attempt

    def _check_region(self) -> None:
        """The run's own policy: it goes wherever the run goes."""
        if not self.target.view.sealed:  # where the run has come from it may go back to
            check_region(self.target.store, self.source.view.regions, self._region)

    def _open_target(self) -> None:
        if not self.target.run:
            if not self.target.open(create=False):
                self._check_region()
            self.target.open(create=True, run=self.source.run)
            if self.target.run != self.source.run:
                raise ConfigError(
                    f"{self.target.store.url} holds another run than {self.source.store.url}: use another URL",
                    code="config.other_run",
                )
            self.target.read()
        else:
            self.target.follow()

    def check(self, view: View) -> None:
        """Raise ConfigError if the target's log, as it is now, must not be written to."""
        check_target(view, self.source.view, here=self.target.store.url, there=self.source.store.url)

    # ---------------------------------------------------------------- bringing one

    def missing(self, checkpoint: Checkpoint) -> list[Object]:
        """What a checkpoint needs and the target lacks, in the order of writing: packs, parts, manifest.

        Raises:
            IntegrityError: its records at the source are missing or damaged.
        """
        needed = self.needs.of(checkpoint)
        self._reach[checkpoint.attempt] = frozenset(o.key for o in needed)
        have = self._known()
        if self.deep:
            unread = [o for o in needed if have.get(o.key) == o.nbytes and o.key not in self._sound]
            for item in self.copier.damaged(unread):
                _log.warning("%s/%s is damaged and is sent again", self.target.store.url, item.key)
                del have[item.key]
            self._sound.update(o.key for o in unread)  # what is damaged is sent, and checked then
        return [o for o in needed if have.get(o.key) != o.nbytes]

    def bring(self, checkpoint: Checkpoint, *, progress: Progress | None = None) -> Sent | None:
        """Copy what a checkpoint needs and the target lacks, and commit it there.

        Returns:
            What was sent; None if the source's retention has dropped the checkpoint meanwhile.

        Raises:
            IntegrityError: it is damaged at the source.
            FencedError: another replicator, or a job, has the target now.
        """
        self._own(checkpoint)
        try:
            sent = self._send(checkpoint, progress)
        except (IntegrityError, ObjectNotFoundError):
            if not self._is_live(checkpoint):
                return None
            raise
        self._commit(checkpoint)
        self._unsure = False
        early, self._early = self._early, Sent()
        return early + sent

    def bring_early(self) -> bool:
        """Copy what saves have written that are not committed yet, since it is needed as soon as they are.

        Where they never are, it is garbage here as it is there. What fails here is left to :meth:`bring`.

        Returns:
            Whether there was anything.
        """
        epoch = self.source.view.epoch
        if self.target.epoch is None or self.target.epoch < epoch:
            return False
        have = self._known()
        store, (first, second) = self.source.store, self._running()
        found = both(
            lambda: store.list(f"packs/{first}"), lambda: store.list(f"packs/{second}"), at_once=store.parallel
        )
        packs = [
            Object(info.key, info.nbytes, name)
            for info in (*found[0], *found[1])
            if (name := keys.pack_digest(info.key)) is not None and have.get(info.key) != info.nbytes
        ]
        try:
            sent = self.copier.copy(packs, done=self._has)
        except (IntegrityError, ObjectNotFoundError) as error:
            _log.debug("what is not committed yet is not copied: %s", error)
            return False
        self._early += sent
        return bool(packs)

    def _running(self) -> tuple[str, str]:
        """The names of the attempts that may be running: the last save's, and that of the one before it."""
        view = self.source.view
        last = keys.last_serial(view.epoch, (c.attempt for c in view.checkpoints))
        return keys.attempt_name(view.epoch, last + 1), keys.attempt_name(view.epoch, last + 2)

    def mend(self, checkpoint: Checkpoint, *, progress: Progress | None = None) -> Sent:
        """Send again what is missing or, with ``deep``, damaged of a checkpoint that the target has already.

        Raises:
            IntegrityError: it is damaged at the source too.
        """
        try:
            if self.missing(checkpoint):
                self._own(checkpoint)
                return self._send(checkpoint, progress)
        except (IntegrityError, ObjectNotFoundError):
            if self._is_live(checkpoint):
                raise
        return Sent()

    def _is_live(self, checkpoint: Checkpoint) -> bool:
        """Whether the source has it still: retention may have passed by."""
        self.source.read()
        return any(c.attempt == checkpoint.attempt for c in self.source.view.checkpoints)

    def _own(self, checkpoint: Checkpoint) -> None:
        """Claim the target, unless that was done; its epoch must not be lower than any attempt that is brought."""
        epoch = max(self.source.view.epoch, keys.epoch_of(checkpoint.attempt))
        if self.target.epoch is None or self.target.epoch < epoch:
            self.target.follow()  # raises where another one has taken over
            self.claim(epoch)

    def claim(self, epoch: int) -> None:
        """Make the target's log a replica of the source's, in an epoch of at least this number.

        Raises ConfigError if the target is not to be written to, or the run may not lie there.
        """
        self._check_region()
        source = self.source
        self.target.claim(follows=source.store.url, regions=source.view.regions, epoch=epoch, check=self.check)
        self._unsure = True

    def _send(self, checkpoint: Checkpoint, progress: Progress | None) -> Sent:
        sent = Sent()
        while lacking := self.missing(checkpoint):
            packs = [o for o in lacking if o.key.startswith("packs/")]
            sent += self.copier.copy(packs, progress=progress, done=self._has)
            for room in _ROOMS[1:]:
                records = [o for o in lacking if o.key.startswith(room)]
                sent += self.copier.put({o.key: self.needs.records[o.key] for o in records})
                for item in records:
                    self._has(item)
            if not self._unsure:
                break
            # An older replicator may have been in the middle of deleting what the listing showed.
            self._have, self._unsure = None, False
        return sent

    def _has(self, item: Object, _digest: str = "") -> None:
        if self._have is not None:
            self._have[item.key] = item.nbytes

    def _commit(self, checkpoint: Checkpoint) -> None:
        found = self.at_target(checkpoint)
        if found is not None:
            self.target.note(f"the run at {self.source.store.url} went on from here", resumed=found.number)
            return

        def make(view: View, number: int) -> LogEntry:
            return msgspec.structs.replace(checkpoint, number=number, epoch=view.epoch, writer=self.target.writer)

        self.target.append(make)

    def _known(self) -> dict[str, int]:
        if self._have is None:
            self._have = {o.key: o.nbytes for room in _ROOMS for o in self.target.store.list(room)}
        return self._have

    # ---------------------------------------------------------------- what it keeps

    def retain(self, retention: Retention) -> Plan | None:
        """Drop from the target what is not kept.

        Returns:
            What was done; None if there was nothing to drop, or too little yet.
        """
        if self.target.epoch is None or surplus(self.target.view, retention) <= (retention.keep_last or 0) // 4:
            return None
        try:
            done = collect(self.target, retention, reach=self._reachable)
        except (StoreError, IntegrityError) as error:
            self._have = None
            _log.warning("retention at %s broke off and is completed later: %s", self.target.store.url, error)
            return None
        if self._have is not None:
            gone = set(done.doomed)
            self._have = {key: nbytes for key, nbytes in self._have.items() if key not in gone}
        live = {c.attempt for c in done.kept}
        self._reach = {attempt: found for attempt, found in self._reach.items() if attempt in live}
        return done

    def _reachable(self, checkpoint: Checkpoint) -> Iterable[str]:
        if checkpoint.attempt not in self._reach:
            self._reach[checkpoint.attempt] = frozenset(reachable(self.target.store, checkpoint))
        return self._reach[checkpoint.attempt]
