"""Replica: a log that is kept a copy of another one, checkpoint by checkpoint, in the order that the format asks for.

It decides what is lacking and what must be refused; the Copier moves the bytes. Design: docs/design/0007-moving.md.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import msgspec

from gpumove.errors import ConfigError, IntegrityError, ObjectNotFoundError, StoreError
from gpumove.format.manifest import Checkpoint, LogEntry, Manifest, Part, decode
from gpumove.move.admission import check_target
from gpumove.move.copier import Copier, Object, Progress, Sent
from gpumove.move.regions import check_region
from gpumove.store.gc import Plan, Retention, collect
from gpumove.store.log import Log
from gpumove.store.records import reachable, read_verified
from gpumove.store.view import View

_log = logging.getLogger("gpumove")
_ROOMS = ("packs/", "parts/", "manifests/")
"""In the order of writing."""


@dataclass(frozen=True)
class AsSource(Retention):
    """Keep what the source has, and what every retention keeps."""

    attempts: frozenset[str] = frozenset()

    def kept(self, view: View) -> tuple[Checkpoint, ...]:
        """The checkpoints that stay, oldest first."""
        newest = {c.number for c in (*view.checkpoints[-1:], *view.candidates()[:1])}
        return tuple(
            c
            for c in view.checkpoints
            if c.attempt in self.attempts or c.number in newest or c.pinned or c.number == view.resumed
        )


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
        self._records: dict[str, bytes] = {}
        """Parts and manifests of the checkpoint that was looked at last."""
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

    @property
    def record_bytes(self) -> int:
        """Bytes of the parts and the manifest of the checkpoint that was looked at last."""
        return sum(map(len, self._records.values()))

    # ---------------------------------------------------------------- bringing one

    def missing(self, checkpoint: Checkpoint) -> list[Object]:
        """What a checkpoint needs and the target lacks, in the order of writing: packs, parts, manifest.

        Raises:
            IntegrityError: its records at the source are missing or damaged.
        """
        needed = self._needs(checkpoint)
        if self._have is None:
            self._have = self._listing()
        have = self._have
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
        return sent

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
        epoch = max(self.source.view.epoch, int(checkpoint.attempt[:8]))
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
            sent += self.copier.copy(packs, progress=progress, done=lambda o, _: self._has(o))
            for room in _ROOMS[1:]:
                records = [o for o in lacking if o.key.startswith(room)]
                sent += self.copier.put({o.key: self._records[o.key] for o in records})
                for item in records:
                    self._has(item)
            if not self._unsure:
                break
            # An older replicator may have been in the middle of deleting what the listing showed.
            self._have, self._unsure = None, False
        return sent

    def _has(self, item: Object) -> None:
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

    def _needs(self, checkpoint: Checkpoint) -> list[Object]:
        """Everything that a checkpoint needs, as the source's records say; they are kept until the next one."""
        store, before = self.source.store, self._records

        def read(key: str, name: str) -> bytes:
            return before[key] if key in before else read_verified(store, key, name)

        data = read(checkpoint.manifest_key, checkpoint.manifest)
        manifest = decode(Manifest, data, key=checkpoint.manifest_key)
        with ThreadPoolExecutor(16, thread_name_prefix="gpumove-parts") as pool:
            parts = list(pool.map(lambda ref: read(ref.key, ref.digest), manifest.parts))
        packs: dict[str, Object] = {}
        for ref, text in zip(manifest.parts, parts):
            for pack in decode(Part, text, key=ref.key).packs:
                packs[pack.key] = Object(pack.key, pack.nbytes, pack.digest)
        self._records = dict(zip((ref.key for ref in manifest.parts), parts)) | {checkpoint.manifest_key: data}
        needed = [
            *sorted(packs.values()),
            *(Object(ref.key, ref.nbytes, ref.digest) for ref in manifest.parts),
            Object(checkpoint.manifest_key, checkpoint.manifest_bytes, checkpoint.manifest),
        ]
        self._reach[checkpoint.attempt] = frozenset(o.key for o in needed)
        return needed

    def _listing(self) -> dict[str, int]:
        return {o.key: o.nbytes for room in _ROOMS for o in self.target.store.list(room)}

    # ---------------------------------------------------------------- what it keeps

    def as_source(self) -> Retention:
        """The retention that keeps what the source has now."""
        return AsSource(attempts=frozenset(c.attempt for c in self.source.view.checkpoints))

    def retain(self, retention: Retention) -> Plan | None:
        """Drop from the target what is not kept.

        Returns:
            What was done; None if there was nothing to drop, or too little yet.
        """
        surplus = len(self.target.view.checkpoints) - len(retention.kept(self.target.view))
        if self.target.epoch is None or surplus <= (retention.keep_last or 0) // 4:
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
