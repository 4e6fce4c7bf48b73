"""The records of the format as frozen structs, to and from JSON; docs/format.md is the law. Knows no I/O.

``encode(record)`` gives the bytes that are stored; ``decode(kind, data, key=...)`` checks and rebuilds them. A record
that cannot be read is an IntegrityError that names the object; one of a newer format is a ConfigError.
"""

from __future__ import annotations

import re
from typing import Any, TypeVar, cast

import msgspec
from msgspec import Struct

from gpumove.errors import ConfigError, IntegrityError
from gpumove.format.codec import digest
from gpumove.format.probes import Probe

FORMAT = 1
INLINE_BYTES = 64
"""Boxes of at most this many bytes travel inside the part: a pack slot would cost more than they weigh."""


class Record(Struct, frozen=True, kw_only=True, omit_defaults=True):
    """What every stored object starts with."""

    format: int


class Run(Record, frozen=True, kw_only=True, omit_defaults=True):
    """``format.json``: which run lies under this prefix."""

    name: str
    run: str


class Chunk(Struct, frozen=True, omit_defaults=True):
    """A box of one tensor and where its bytes lie (format.md, section 4). ``bases`` are numbers into ``Part.bases``."""

    offset: tuple[int, ...] = ()
    shape: tuple[int, ...] = ()
    pack: int = -1
    at: int = 0
    length: int = 0
    codec: str = "raw/1"
    digest: str = ""
    bases: tuple[int, ...] = ()
    inline: str | None = None


class Base(Struct, frozen=True, omit_defaults=True):
    """A stored chunk that others are decoded from; ``nbytes`` decoded. ``bases`` are smaller numbers than its own."""

    pack: int
    at: int
    length: int
    digest: str
    nbytes: int
    codec: str = "raw/1"
    bases: tuple[int, ...] = ()


class TensorEntry(Struct, frozen=True):
    """One tensor, or this rank's boxes of it. ``shape`` is that of the whole tensor."""

    fqn: str
    dtype: str
    shape: tuple[int, ...]
    chunks: tuple[Chunk, ...]


class Pack(Struct, frozen=True):
    """A pack that a part refers to."""

    attempt: str
    digest: str
    nbytes: int

    @property
    def key(self) -> str:
        """Where the pack lies, relative to the run."""
        return f"packs/{self.attempt}/{self.digest}.safetensors"


class Part(Record, frozen=True, kw_only=True, omit_defaults=True):
    """What one rank wrote in one attempt."""

    run: str
    attempt: str
    rank: int
    world_size: int
    step: int
    packs: tuple[Pack, ...] = ()
    tensors: tuple[TensorEntry, ...] = ()
    local: tuple[TensorEntry, ...] = ()
    bases: tuple[Base, ...] = ()
    values: dict[str, Any] = {}


class PartRef(Struct, frozen=True):
    """A part as a manifest lists it."""

    key: str
    rank: int
    digest: str
    nbytes: int
    new_bytes: int


class Took(Struct, frozen=True, omit_defaults=True):
    """What gpumove cost rank 0, in seconds, as far as it knew when the manifest was written: format.md, section 6."""

    stall_s: float | None = None
    staged_s: float | None = None
    uploaded_s: float | None = None
    ready_s: float | None = None
    sight_s: float | None = None
    restore_s: float | None = None


class TraceRow(Struct, frozen=True, array_like=True):
    """What was recorded of one step. ``facts`` are those of format.md, section 6; what is not there is not known."""

    step: int
    loss: float | None = None
    facts: dict[str, Any] = {}


class Manifest(Record, frozen=True, kw_only=True, omit_defaults=True):
    """One checkpoint, whole."""

    run: str
    step: int
    epoch: int
    attempt: str
    world_size: int
    time: float
    state_bytes: int
    new_bytes: int
    plan: str
    parts: tuple[PartRef, ...]
    fingerprint: dict[str, Any] = {}
    trace: tuple[TraceRow, ...] = ()
    trace_after: str = ""
    """The attempt of the checkpoint that ``trace`` begins after; "" if there is none, or nobody knows."""
    health: tuple[dict[str, Any], ...] = ()
    took: Took | None = None
    probes: tuple[Probe, ...] = ()


class Entry(Record, frozen=True, kw_only=True, omit_defaults=True, tag_field="kind", tag="entry"):
    """What every log entry has."""

    number: int
    epoch: int
    writer: str
    time: float


class Claim(Entry, frozen=True, kw_only=True, omit_defaults=True, tag="claim"):
    """Opens an epoch; fences every older one."""

    host: str = ""
    resumed: int | None = None
    follows: str = ""
    """By a replicator: the log that this one is a copy of. No job may claim it until it is handed over."""
    regions: str = ""
    """Where the run may lie, as its owner says: patterns with commas; ``*`` for everywhere."""


class Checkpoint(Entry, frozen=True, kw_only=True, omit_defaults=True, tag="checkpoint"):
    """A commit: from here on this checkpoint exists."""

    step: int
    attempt: str
    manifest: str
    manifest_bytes: int
    world_size: int
    state_bytes: int
    new_bytes: int
    pinned: bool = False
    pointers: tuple[str, ...] = ()
    """Names that are, or are about to be, pointed at it: ``name/number``. Retention knows whether they still are."""

    @property
    def manifest_key(self) -> str:
        """Where the manifest lies, relative to the run."""
        return f"manifests/{self.attempt}-{self.manifest}.json"


class Note(Entry, frozen=True, kw_only=True, omit_defaults=True, tag="note"):
    """The owner says what it found and where it went on from."""

    text: str
    resumed: int | None = None
    damaged: tuple[int, ...] = ()


class Pin(Entry, frozen=True, kw_only=True, omit_defaults=True, tag="pin"):
    """Retention keeps, or no longer keeps, one checkpoint."""

    checkpoint: int
    pinned: bool
    pointer: str = ""
    """If given, this mark is all that the entry says: retention keeps the checkpoint while the pointer needs it."""


MOVE_STATES = ("begin", "request", "left", "sealed", "handover", "done", "watched", "cancelled")
"""In their order. ``sealed`` and ``handover`` open an epoch."""


class Move(Entry, frozen=True, kw_only=True, omit_defaults=True, tag="move"):
    """A move of the run to another store, or from there, has come this far."""

    move: str
    """Its id: 16 hex digits, the same in both logs."""
    state: str
    other: str
    """The URL of the other end, without secrets."""
    save: bool = True
    """Of a request: whether the job saves before it leaves."""
    facts: dict[str, Any] = {}
    text: str = ""

    @property
    def is_over(self) -> bool:
        """Whether a job has trained where the run was moved to."""
        return self.state in ("done", "watched")


class Collect(Entry, frozen=True, kw_only=True, omit_defaults=True, tag="gc"):
    """From here on, of all earlier checkpoints only ``kept`` exist."""

    kept: tuple[Checkpoint, ...]
    resumed: int | None = None
    abandoned: tuple[int, ...] = ()
    follows: str = ""
    sealed: str = ""
    regions: str = ""
    owner: str = ""
    host: str = ""
    move: Move | None = None
    """The newest one; this and the five before it would be lost with the entries that said so."""


LogEntry = Claim | Checkpoint | Note | Pin | Collect | Move

R = TypeVar("R")


_CHECK = re.compile(rb',"check":"([0-9a-f]{32})"}\Z')


def encode_checked(record: Record) -> bytes:
    """The stored bytes of a record that no digest names: its last field, ``check``, is the digest of what is before."""
    body = encode(record)[:-1]
    return body + b',"check":"' + digest(body).encode() + b'"}'


def decode_checked(kind: type[R], data: bytes, *, key: str) -> R:
    """Rebuild a record that carries its own ``check``.

    Raises:
        ConfigError: it was written by a newer format.
        IntegrityError: it is damaged.
    """
    found = _CHECK.search(data)
    if found is not None and digest(data[: found.start()]).encode() != found[1]:
        # First of all: a flipped bit in "format" must not pass for a newer version.
        raise IntegrityError(f"{key} is damaged: its check does not fit its bytes", code="integrity.record")
    record = decode(kind, data, key=key)
    if found is None:
        raise IntegrityError(f"{key} is damaged: it ends without a check", code="integrity.record")
    return record


class _Probe(Struct):
    format: int = 0


# Built here, not when first used: msgspec 0.22 resolves a class lazily, and two threads that do so at once crash the
# process. Ready decoders may be used by any number of threads.
_PROBE = msgspec.json.Decoder(_Probe)
_DECODERS: dict[Any, msgspec.json.Decoder[Any]] = {
    kind: msgspec.json.Decoder(kind) for kind in (Run, Part, Manifest, LogEntry)
}


def readable(kind: type[Record]) -> None:
    """Have ``decode`` know one more kind of record; called where the kind is defined."""
    _DECODERS[kind] = msgspec.json.Decoder(kind)


def encode(record: Record) -> bytes:
    """The stored bytes of a record: compact JSON, fields in a fixed order."""
    return msgspec.json.encode(record)


def decode(kind: type[R], data: bytes | memoryview, *, key: str) -> R:
    """Rebuild a record.

    Args:
        kind: the record's class, or ``LogEntry``.
        data: the stored bytes.
        key: the object's key, for messages.

    Raises:
        ConfigError: the record was written by a newer format.
        IntegrityError: the bytes are not such a record.
    """
    try:
        probe = _PROBE.decode(data)
        if probe.format > FORMAT:
            raise ConfigError(
                f"{key} is of format {probe.format}, and this gpumove reads up to {FORMAT}: upgrade gpumove",
                code="config.newer_format",
            )
        return cast(R, _DECODERS[kind].decode(data))
    except (msgspec.DecodeError, msgspec.ValidationError, RecursionError, UnicodeDecodeError) as error:
        raise IntegrityError(
            f"{key} is not a readable record ({error}): the object is damaged or was not written by gpumove",
            code="integrity.record",
        ) from error
