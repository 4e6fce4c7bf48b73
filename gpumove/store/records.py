"""Manifests and parts, verified by the digest they are named with, and what is left of a log. Never tensors."""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial

from gpumove.errors import IntegrityError, ObjectNotFoundError
from gpumove.format import keys
from gpumove.format.codec import digest
from gpumove.format.manifest import Checkpoint, LogEntry, Manifest, Part, PartRef, decode, decode_checked
from gpumove.store.objects import Store
from gpumove.store.view import Broken

_READS, _READERS = 3, 16


def read_every_entry(store: Store, *, holes: bool) -> dict[int, LogEntry | Broken | None]:
    """All that is left of a log, by number, also what retention has left behind; None for what is missing.

    Args:
        store: the run.
        holes: ask for those too that a listing does not show: it is no snapshot.
    """

    numbers: Sequence[int] = [n for o in store.list("log/") if (n := keys.entry_number(o.key)) is not None]
    if holes and numbers:
        numbers = range(min(numbers), max(numbers) + 1)
    with ThreadPoolExecutor(_READERS) as pool:
        return dict(zip(numbers, pool.map(partial(read_entry, store), numbers)))


def read_entry(store: Store, number: int) -> LogEntry | Broken | None:
    """One entry of a log; None if it is missing."""
    key = keys.entry_key(number)
    try:
        return decode_checked(LogEntry, store.get(key), key=key)  # type: ignore[arg-type]
    except ObjectNotFoundError:
        return None
    except IntegrityError as error:
        return Broken(number, str(error))


def read_manifest(store: Store, checkpoint: Checkpoint) -> Manifest:
    """The manifest of a log entry.

    Raises:
        IntegrityError: it is missing or is not what the log entry names.
    """
    data = read_verified(store, checkpoint.manifest_key, checkpoint.manifest)
    return decode(Manifest, data, key=checkpoint.manifest_key)


def read_part(store: Store, ref: PartRef) -> Part:
    """A part as a manifest names it.

    Raises:
        IntegrityError: it is missing or is not what the manifest names.
    """
    return decode(Part, read_verified(store, ref.key, ref.digest), key=ref.key)


def read_parts(store: Store, refs: Sequence[PartRef], *, concurrency: int) -> list[Part]:
    """Several parts at once, in the order asked for."""
    with ThreadPoolExecutor(max(1, min(concurrency, len(refs)))) as pool:
        return list(pool.map(lambda ref: read_part(store, ref), refs))


def reachable(store: Store, checkpoint: Checkpoint, *, concurrency: int = 8) -> dict[str, int]:
    """Every object that a checkpoint needs, manifest, parts and packs, with its size in bytes."""
    manifest = read_manifest(store, checkpoint)
    needed = {checkpoint.manifest_key: checkpoint.manifest_bytes, **{ref.key: ref.nbytes for ref in manifest.parts}}
    for part in read_parts(store, manifest.parts, concurrency=concurrency):
        needed.update((pack.key, pack.nbytes) for pack in part.packs)
    return needed


def read_verified(store: Store, key: str, expected: str) -> bytes:
    """A small object as its digest names it. Not every store checks what it sends, so what differs is read again.

    Raises:
        IntegrityError: it is missing or damaged.
    """
    found = ""
    for _ in range(_READS):
        try:
            data = store.get(key)
        except ObjectNotFoundError as error:
            raise IntegrityError(f"{store.url}/{key} is missing, and a committed checkpoint needs it") from error
        if (found := digest(data)) == expected:
            return data
    raise IntegrityError(f"{store.url}/{key} is damaged: its bytes hash to {found}, and {expected} was recorded")
