"""Plain: any prefix copied to another store, and a ledger there of what it holds, so that nothing is sent twice.

The ledger lies below ``.gpumove-ledger/`` in pages, each named by its own digest and never changed: for each object
its size and time at the source, and the digest of its bytes. It knows no runs, and refuses to copy one.
"""

from __future__ import annotations

import logging
import re
import time
from dataclasses import dataclass

import msgspec
from msgspec import Struct

from gpumove.errors import ConfigError, GpumoveError, IntegrityError, ObjectNotFoundError
from gpumove.format.codec import digest
from gpumove.move.copier import Copier, Object, Progress, Sent
from gpumove.store.log import Log
from gpumove.store.objects import ObjectInfo, Store

_log = logging.getLogger("gpumove")
_ROOM = ".gpumove-ledger/"
_PAGE = re.compile(r"\.gpumove-ledger/(\d{10})-([0-9a-f]{32})\.json")
_RUN = re.compile(r"((?:.*/)?)log/\d{20}\.json")
_PAGE_LINES, _PAGE_S = 10_000, 5.0
_MANY_PAGES = 8


class Line(Struct, frozen=True, array_like=True):
    """One object at the target: what it was at the source when it was copied, and what its bytes hash to."""

    key: str
    nbytes: int
    mtime: float | None
    digest: str


def holds_run(store: Store) -> bool:
    """Whether a run lies there, be it damaged. A ``format.json`` of somebody else's makes none."""
    try:
        return bool(Log(store).open(create=False))
    except IntegrityError:
        if any(_RUN.fullmatch(info.key) for info in store.list("log/")):
            raise
        return False


_PAGES = msgspec.json.Decoder(list[Line])


class Ledger:
    """What is known of the objects at the target. Written as it grows: a kill costs some seconds' work."""

    def __init__(self, store: Store) -> None:
        self._store = store
        self.lines: dict[str, Line] = {}
        self._pages: list[str] = []
        self._fresh: list[Line] = []
        self._flushed_at = time.monotonic()

    def read(self) -> None:
        """All pages, older ones first. One that is damaged is forgotten, and what it said is copied again."""
        for info in self._store.list(_ROOM):
            match = _PAGE.fullmatch(info.key)
            if match is None:
                continue
            self._pages.append(info.key)
            try:
                data = self._store.get(info.key)
                lines = _PAGES.decode(data) if digest(data) == match[2] else None
            except (ObjectNotFoundError, msgspec.DecodeError):
                lines = None
            if lines is None:
                _log.warning("%s/%s is damaged: what it lists is copied again", self._store.url, info.key)
            self.lines.update((line.key, line) for line in lines or ())

    def add(self, line: Line) -> None:
        """One more object, or another version of it."""
        self.lines[line.key] = line
        self._fresh.append(line)
        if len(self._fresh) >= _PAGE_LINES or time.monotonic() - self._flushed_at > _PAGE_S:
            self.flush()

    def flush(self) -> None:
        """What was not written yet."""
        if self._fresh:
            self._write(self._fresh)
        self._fresh, self._flushed_at = [], time.monotonic()

    def close(self) -> None:
        """The end of a copy: many small pages become few."""
        self.flush()
        old = list(self._pages)
        if len(old) <= max(_MANY_PAGES, 2 * len(self.lines) // _PAGE_LINES):
            return
        lines = list(self.lines.values())
        for start in range(0, len(lines), _PAGE_LINES):
            self._write(lines[start : start + _PAGE_LINES])
        self._store.delete(old)

    def _write(self, lines: list[Line]) -> None:
        data = msgspec.json.encode(lines)
        last = max((int(match[1]) for key in self._pages if (match := _PAGE.fullmatch(key))), default=0)
        key = f"{_ROOM}{last + 1:010d}-{digest(data)}.json"
        self._store.put(key, data)
        self._pages.append(key)


@dataclass(frozen=True)
class Copied:
    """What a copy of a prefix did."""

    sent: Sent
    problems: tuple[str, ...]
    """Objects that could not be copied, and why."""


class Plain:
    """Copies a prefix. Objects that the source has no more stay at the target.

    Args:
        copier: between the two stores.
        deep: what lies at the target is read too, and sent again where it is not what the ledger says.
    """

    def __init__(self, copier: Copier, *, deep: bool = False) -> None:
        self._copier, self._deep = copier, deep
        self._ledger = Ledger(copier.target)

    def copy(self, *, progress: Progress | None = None) -> Copied:
        """Copy what is new or has changed.

        Raises:
            ConfigError: there is nothing, or a run of gpumove, at the source or in the way at the target.
        """
        found = [info for info in self._copier.source.list("") if not info.key.startswith(_ROOM)]
        self._check(found)
        self._ledger.read()
        mtimes = {info.key: info.mtime for info in found}
        problems: list[str] = []

        def done(item: Object, name: str) -> None:
            self._ledger.add(Line(item.key, item.nbytes, mtimes[item.key], name))

        def lost(item: Object, error: GpumoveError) -> None:
            problems.append(str(error))

        try:
            sent = self._copier.copy(self._todo(found), progress=progress, done=done, lost=lost)
        finally:
            self._ledger.flush()
        self._ledger.close()
        return Copied(sent, tuple(problems))

    def _check(self, found: list[ObjectInfo]) -> None:
        source, target = self._copier.source, self._copier.target
        if not found:
            raise ConfigError(f"there is nothing at {source.url}: check the URL", code="config.nothing")
        inside = next((match[1] for info in found if (match := _RUN.fullmatch(info.key))), None)
        if inside is not None:
            raise ConfigError(
                f"{source.url}/{inside} is a run of gpumove, and a plain copy of it could be resumed beside it: "
                "replicate it by its own URL",
                code="config.run_inside",
            )
        if holds_run(target):
            raise ConfigError(f"{target.url} holds a run of gpumove: use another URL", code="config.owned")

    def _todo(self, found: list[ObjectInfo]) -> list[Object]:
        there = {info.key: info.nbytes for info in self._copier.target.list("")}
        todo, same = [], []
        for info in found:
            line = self._ledger.lines.get(info.key)
            held = line is not None and there.get(info.key) == line.nbytes
            if line and held and (line.nbytes, line.mtime) == (info.nbytes, info.mtime) and info.mtime is not None:
                same.append(Object(info.key, info.nbytes, line.digest, info.mtime))
            else:
                # Of another time, but perhaps the same: then it is read, and not sent.
                known = line.digest if line and held and not self._deep else None
                todo.append(Object(info.key, info.nbytes, None, info.mtime, known))
        if self._deep:
            rotten = self._copier.damaged(same)
            for item in rotten:
                _log.warning("%s/%s is damaged and is sent again", self._copier.target.url, item.key)
            todo += [item._replace(digest=None) for item in rotten]
        return todo
