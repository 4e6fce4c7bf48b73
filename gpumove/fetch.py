"""Stored chunks without torch: reading many of them in ranges, verified, decoded, in bounded memory.

It knows records and a Store, never what the bytes become: each chunk is handed to a function of the caller's. Chunks
that others are decoded from are read with them, once, and verified before anything is decoded from them.
"""

from __future__ import annotations

import base64
import binascii
import threading
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from contextvars import copy_context
from typing import TypeVar

import numpy as np

from gpumove.config import Config
from gpumove.errors import GpumoveError, IntegrityError, ObjectNotFoundError
from gpumove.format.codec import check_digest, decode, digest
from gpumove.format.stored import Spot, Stored, closure
from gpumove.ranges import Group, Span, Wanted, batches, groups, spans
from gpumove.store.objects import Store

T = TypeVar("T")
R = TypeVar("R")

Held = Callable[[Stored], memoryview | None]
"""A chunk's decoded bytes, if they are here already; nobody changes them until the fetch is over."""


def inline_data(name: str, text: str, nbytes: int) -> memoryview:
    """The bytes of a chunk that travels inside its part.

    Raises:
        IntegrityError: they are not ``nbytes`` many.
    """
    try:
        data = base64.b64decode(text, validate=True)
    except binascii.Error:
        data = b""
    if len(data) != nbytes:
        raise IntegrityError(f"{name} travels inline with {len(data)} bytes instead of {nbytes}")
    return memoryview(data)


class Buffers(threading.local):
    """Reused memory of each thread: fresh memory costs more to touch than to fill."""

    def __init__(self) -> None:
        self._free: list[bytearray] = []

    def take(self, nbytes: int) -> memoryview:
        """A buffer of this size: the smallest that is free and large enough, else a new one."""
        fits = [n for n, b in enumerate(self._free) if len(b) >= nbytes]
        if fits:
            return memoryview(self._free.pop(min(fits, key=lambda n: len(self._free[n]))))[:nbytes]
        if self._free:
            self._free.pop()  # too small: memory stays bounded by what was in use at once
        return memoryview(bytearray(nbytes))

    def give(self, view: memoryview) -> None:
        """Nobody uses it any more. One that a hung call may still write into is never given back."""
        if isinstance(view.obj, bytearray):
            self._free.append(view.obj)


def fetch(
    store: Store,
    wanted: Sequence[Wanted],
    *,
    config: Config,
    failed: Callable[[str, IntegrityError], None] | None = None,
    held: Held | None = None,
) -> int:
    """Read, verify and hand over chunks, from several threads at once.

    Args:
        store: the run.
        wanted: what to read; inline chunks are fine.
        config: how many calls and bytes may be in flight.
        failed: told the name of every chunk that cannot be had, and why; without it the first such error is raised.
        held: asked for every chunk before it is read: what is here is not, nor what it is decoded from.

    Returns:
        Bytes read from the store.

    Raises:
        IntegrityError: an object is missing, truncated or damaged; the message names it and the tensor.
    """
    for want in wanted:
        if want.placed.inline is not None:
            _deliver(want, inline_data(want.name, want.placed.inline, want.placed.nbytes))
    here = at_hand(wanted, held, workers=config.workers) if held is not None else {}
    todo = groups(wanted, here=here)
    ready = list(batches([want for want in wanted if want.placed.stored and want.placed.stored.spot in here]))
    buffers = Buffers()
    widest = max((group.held_bytes for group in todo), default=1)
    # A local file is read by the processor that decodes it: more threads than that only wait for each other.
    most = config.concurrency if store.parallel else config.workers
    threads = max(1, min(most, config.budget_bytes // widest, len(todo) + len(ready)))

    # Two pools: a group's ranges are read side by side, or a chain would pay the store's latency for each of its links.
    with (
        ThreadPoolExecutor(config.concurrency, thread_name_prefix="gpumove-get") as reads,
        ThreadPoolExecutor(threads, thread_name_prefix="gpumove-decode") as pool,
    ):

        def work(group: Group) -> int:
            return _Reader(store, group, buffers, reads, failed, here).run()

        def hand_over(batch: Sequence[Wanted]) -> None:
            for want in batch:
                if want.placed.stored is not None:
                    _deliver(want, here[want.placed.stored.spot])

        delivered = _each(pool, hand_over, ready)  # takes back what is still queued if one fails
        nbytes = sum(_each(pool, work, todo))
        for _ in delivered:
            pass
        return nbytes


def _each(pool: ThreadPoolExecutor, work: Callable[[T], R], items: Sequence[T]) -> Iterator[R]:
    """``pool.map``, with what the caller has said of whom the work is still wanted by (``store.retry.unless``)."""
    return pool.map(lambda job: job[0].run(work, job[1]), [(copy_context(), item) for item in items])


def at_hand(wanted: Sequence[Wanted], held: Held, *, workers: int) -> dict[Spot, memoryview]:
    """What of these, and of what they are decoded from, is here, as far down as it has to be known.

    Each is hashed, although it was right when it was put in: that takes a fraction of the copy into place, and memory
    or a disk may have gone bad in the hours that a job waits. What is not right is not damage of the checkpoint: it is
    read as if it were not here.
    """
    found: dict[Spot, memoryview] = {}
    seen: set[Spot] = set()

    def look(want: Wanted) -> None:
        todo = [] if want.placed.stored is None else [want.placed.stored]
        while todo:
            node = todo.pop()
            if node.spot in seen:
                continue
            seen.add(node.spot)
            data = held(node)
            if data is not None and len(data) == node.nbytes and digest(data) == node.digest:
                found[node.spot] = data
            else:
                todo += node.bases

    with ThreadPoolExecutor(workers, thread_name_prefix="gpumove-look") as pool:
        for _ in pool.map(look, wanted):
            pass
    return found


def read_span(store: Store, span: Span, out: memoryview) -> memoryview:
    """Bytes of an object, in ``out`` or, if a call hung that may still write there, elsewhere.

    Raises:
        IntegrityError: it is missing or too short.
    """
    try:
        (got,) = store.get_ranges(span.key, [(span.start, span.stop)], [out])
    except ObjectNotFoundError as error:
        raise IntegrityError(f"{store.url}/{span.key} is missing, and a committed checkpoint needs it") from error
    return memoryview(got)


def _deliver(want: Wanted, data: memoryview) -> None:
    if want.into is None:
        want.use(data)
    elif want.into is not data:
        # Not torch's copy: its threads wait for each other, which on busy cores takes far longer than the copy.
        np.copyto(np.frombuffer(want.into, dtype=np.uint8), np.frombuffer(data, dtype=np.uint8))


class _Reader:
    """Reads and decodes one group in one thread."""

    def __init__(
        self,
        store: Store,
        group: Group,
        buffers: Buffers,
        reads: ThreadPoolExecutor,
        failed: Callable[[str, IntegrityError], None] | None,
        here: Mapping[Spot, memoryview],
    ) -> None:
        self._store, self._group, self._buffers, self._reads, self._failed = store, group, buffers, reads, failed
        self._here = here
        self._spans: dict[str, list[tuple[Span, memoryview]]] = defaultdict(list)
        self._errors: dict[str, IntegrityError] = {}
        """By pack: why it could not be read."""
        self._data: dict[Spot, memoryview] = {}
        self._broken: dict[Spot, IntegrityError] = {}

    def run(self) -> int:
        """Read all, decode in order, hand over. Bytes read."""
        nodes = self._group.nodes
        self._read(spans(nodes.values()))
        waiting = Counter(base.spot for node in nodes.values() for base in node.bases)
        for spot, node in nodes.items():
            self._decode(spot, node)
            if spot in self._group.wanted:
                self._hand_over(spot)
            waiting.subtract(base.spot for base in node.bases)
            for done in {spot, *(base.spot for base in node.bases)}:
                if not waiting[done] and done in self._data:
                    self._release(done)
        read = [(span, data) for found in self._spans.values() for span, data in found]
        for _, data in read:
            self._buffers.give(data)
        return sum(span.stop - span.start for span, _ in read)

    def _read(self, wanted: list[Span]) -> None:
        """All ranges at once; none is left under way, whatever fails."""
        outs = [self._buffers.take(span.stop - span.start) for span in wanted]
        under_way = [
            self._reads.submit(copy_context().run, read_span, self._store, span, out) for span, out in zip(wanted, outs)
        ]
        wait(under_way)
        for span, future in zip(wanted, under_way):
            try:
                self._spans[span.key].append((span, future.result()))
            except IntegrityError as error:
                if self._failed is None:
                    raise
                self._errors[span.key] = error

    def _decode(self, spot: Spot, node: Stored) -> None:
        try:
            self._data[spot] = self._decoded(node)
        except IntegrityError as error:
            self._broken[spot] = error
            if self._failed is None:
                raise self._located(spot, self._what(spot), error) from error

    def _what(self, spot: Spot) -> str:
        """A chunk in words: its tensor, or those of the wanted chunks that are decoded from it."""
        if spot in self._group.wanted:
            return self._group.wanted[spot][0].name
        needing = [s for s in self._group.wanted if spot in closure([self._group.nodes[s]])]
        return "a base of " + ", ".join(sorted({w.name for s in needing for w in self._group.wanted[s]})[:3])

    def _located(self, spot: Spot, what: str, error: IntegrityError) -> IntegrityError:
        where = f"{self._store.url}/{spot.key} is damaged at bytes {spot.at} to {spot.at + spot.length} ({what})"
        return IntegrityError(f"{where}: {error}", code="integrity.chunk")

    def _decoded(self, node: Stored) -> memoryview:
        if (error := self._errors.get(node.spot.key)) is not None:
            raise error
        for base in node.bases:
            if (error := self._broken.get(base.spot)) is not None:
                raise error
        stored = next(
            data[node.at - span.start : node.at - span.start + node.length]
            for span, data in self._spans[node.spot.key]
            if span.start <= node.at and node.at + node.length <= span.stop
        )
        if node.codec == "raw/1" and len(stored) == node.nbytes:
            check_digest(stored, node.digest)
            return stored
        out = self._home(node) or self._buffers.take(node.nbytes)
        bases = [self._here[b.spot] if b.spot in self._here else self._data[b.spot] for b in node.bases]
        try:
            decode(node.codec, stored, out, bases=bases, expected=node.digest)
        except GpumoveError:
            self._buffers.give(out)
            raise
        return out

    def _home(self, node: Stored) -> memoryview | None:
        """Where its bytes are to be left, if somebody wants them in one piece."""
        return next((w.into for w in self._group.wanted.get(node.spot, ()) if w.into is not None), None)

    def _hand_over(self, spot: Spot) -> None:
        for want in self._group.wanted[spot]:
            if (error := self._broken.get(spot)) is None:
                _deliver(want, self._data[spot])
            elif self._failed is not None:
                self._failed(want.name, self._located(spot, want.name, error))

    def _release(self, spot: Spot) -> None:
        data = self._data.pop(spot)
        if not any(data.obj is whole.obj for found in self._spans.values() for _, whole in found):
            self._buffers.give(data)
