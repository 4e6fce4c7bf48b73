"""Named pointers in a store: which there are, the newest of a name, and which checkpoints retention keeps for them.

A pointer is made in two steps: a mark in the log (a ``pin`` entry), then the pointer itself. Whoever collects reads
the log first and the pointers afterwards. So it sees either the mark, and keeps what it is for until the pointer says
otherwise; or it has dropped the checkpoint in the log before the mark could be made, and the pointer is not.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping
from dataclasses import replace

import msgspec

from gpumove.errors import IntegrityError, ObjectNotFoundError
from gpumove.format.manifest import Checkpoint, decode_checked
from gpumove.format.pointer import ROOM, Pointer, pointer_key, read_mark, read_pointer_key
from gpumove.store.objects import Store
from gpumove.store.view import View

_log = logging.getLogger("gpumove")


def numbers(store: Store, name: str | None = None) -> dict[str, list[int]]:
    """The numbers of all pointers, or of those of one name, in order. One listing."""
    found: dict[str, list[int]] = {}
    for info in store.list(ROOM if name is None else f"{ROOM}{name}/"):
        known = read_pointer_key(info.key)
        if known is not None:
            found.setdefault(known[0], []).append(known[1])
    return {word: sorted(found[word]) for word in sorted(found)}


def read_pointer(store: Store, name: str, number: int) -> Pointer:
    """One pointer.

    Raises:
        IntegrityError: it is missing or damaged.
    """
    key = pointer_key(name, number)
    try:
        found = decode_checked(Pointer, store.get(key), key=f"{store.url}/{key}")
    except ObjectNotFoundError as error:
        raise IntegrityError(f"{store.url}/{key} is missing", code="integrity.missing") from error
    if found.key != key:
        raise IntegrityError(f"{store.url}/{key} says that it is {found.mark}: it was copied or renamed")
    return found


def needed(store: Store, found: Mapping[str, list[int]]) -> dict[str, set[str]]:
    """Attempt -> the marks of the pointers that need it: the newest of each name, and the one that it goes back to.

    A name that was retired needs nothing.
    """
    attempts: dict[str, set[str]] = {}
    for name, known in found.items():
        newest = read_pointer(store, name, known[-1])
        back = None if newest.action == "retire" else newest.previous
        # A replica lacks those whose checkpoints it never had.
        several = [newest, read_pointer(store, name, back)] if back is not None and back in known else [newest]
        for pointer in several:
            attempts.setdefault(pointer.attempt, set()).add(newest.mark)
    return attempts


def settled(store: Store, view: View) -> View:
    """The view, with the marks of each checkpoint as they are now: those that pointers need, and those on their way.

    Which checkpoints a pointer needs that cannot be read is not known: so all are marked.
    """
    found = numbers(store)
    wanted: dict[str, set[str]] = {}
    unread: set[str] = set()
    for name, known in found.items():
        try:
            for attempt, needing in needed(store, {name: known}).items():
                wanted.setdefault(attempt, set()).update(needing)
        except IntegrityError as error:
            unread.add(f"{name}/{known[-1]}")
            _log.warning("retention keeps everything until something is published as %s again: %s", name, error)

    def marks(checkpoint: Checkpoint) -> Iterable[str]:
        known = unread | wanted.get(checkpoint.attempt, set())
        names = {read_mark(mark)[0] for mark in known}
        yield from known
        for mark in checkpoint.pointers:
            name, number = read_mark(mark)
            if name not in names and number > max(found.get(name, ()), default=0):
                yield mark

    return replace(
        view,
        checkpoints=tuple(msgspec.structs.replace(c, pointers=tuple(sorted(marks(c)))) for c in view.checkpoints),
    )


def likely(view: View) -> View:
    """The view with the marks that are likely still needed, by the log alone: the two newest of each name.

    A log keeps every mark until it is collected. To tell whether a collection is worth it, those of all the checkpoints
    that a name has ever stood for must not count: a name that stands for each new one would keep them all.
    """
    known: dict[str, set[int]] = {}
    for name, number in (read_mark(mark) for c in view.checkpoints for mark in c.pointers):
        known.setdefault(name, set()).add(number)
    least = {name: min(sorted(found)[-2:]) for name, found in known.items()}

    def marks(checkpoint: Checkpoint) -> Iterable[str]:
        return (m for m in checkpoint.pointers for name, number in [read_mark(m)] if number >= least[name])

    return replace(
        view, checkpoints=tuple(msgspec.structs.replace(c, pointers=tuple(marks(c))) for c in view.checkpoints)
    )
