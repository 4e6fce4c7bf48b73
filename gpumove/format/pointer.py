"""Pointers: numbered, create-only records that give a checkpoint a name that others follow; docs/format.md."""

from __future__ import annotations

import re
from typing import Any

from msgspec import Struct, field

from gpumove.errors import ConfigError
from gpumove.format.manifest import Record, readable

ROOM = "pointers/"
ACTIONS = ("publish", "promote", "demote", "retire")
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")
_KEY = re.compile(rf"{ROOM}({_NAME.pattern})/(\d{{20}})\.json")


class ExportedFile(Struct, frozen=True):
    """One file of an export."""

    nbytes: int
    digest: str


class Exported(Struct, frozen=True):
    """An export of the checkpoint, as its receipt describes it."""

    url: str
    """Where it lies, without secrets."""
    files: dict[str, ExportedFile]


class Pointer(Record, frozen=True, kw_only=True, omit_defaults=True):
    """What a name stands for, from this number on."""

    run: str
    name: str
    number: int
    action: str
    """One of ``ACTIONS``."""
    time: float
    by: str
    """Who, for people."""
    writer: str
    """Random, unique per process: no two writers write the same bytes."""
    step: int | None = None
    """None: nothing, from here on."""
    attempt: str = ""
    manifest: str = ""
    """The digest of its manifest."""
    previous: int | None = None
    """The number that ``demote`` goes back to."""
    source: str = ""
    """Of a promote: the name that it was taken from."""
    export: Exported | None = None
    gate: dict[str, Any] = field(default_factory=dict)
    """What the output probe said; empty if it was not asked."""
    text: str = ""

    @property
    def key(self) -> str:
        """Where it lies, relative to the run."""
        return pointer_key(self.name, self.number)

    @property
    def mark(self) -> str:
        """The pointer in one word, as the log has it."""
        return f"{self.name}/{self.number}"


readable(Pointer)


def check_name(name: str) -> str:
    """Raise ConfigError if a name is none."""
    if not _NAME.fullmatch(name):
        raise ConfigError(f"{name!r} is no name for a pointer: up to 64 letters, digits, dots, dashes and underscores")
    return name


def pointer_key(name: str, number: int) -> str:
    """The key of a pointer."""
    return f"{ROOM}{name}/{number:020d}.json"


def read_pointer_key(key: str) -> tuple[str, int] | None:
    """Name and number of a pointer's key; None if it is none."""
    match = _KEY.fullmatch(key)
    return (match[1], int(match[2])) if match else None


def read_mark(mark: str) -> tuple[str, int]:
    """Name and number of a mark; a number that cannot be read is one that nothing is beyond."""
    name, _, number = mark.rpartition("/")
    return name, int(number) if number.isdecimal() else 1 << 62
