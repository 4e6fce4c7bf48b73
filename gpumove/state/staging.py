"""Copies of live tensors in host memory, taken beside forward and backward.

Parameters and optimizer state change only inside ``optimizer.step``. So the copy runs while the next forward and
backward run, and a hook in front of every optimizer step waits for what is left of it. A tensor that something else may
change is copied before ``stage`` returns; one that was changed all the same is noticed, and the snapshot is refused.

The host memory is one arena, kept between saves: first touch costs thirty times a copy, and the caching host allocator
would round every tensor up to a power of two. Where the last snapshot is kept, to code the next one against, there are
two, used in turn.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch
from torch.optim.optimizer import register_optimizer_step_pre_hook

from gpumove.errors import ConfigError
from gpumove.state.arena import Side, staged_bytes
from gpumove.state.copies import Order, Work, is_small, pieces
from gpumove.state.snapshot import Snapshot
from gpumove.state.unchanged import Watch, device_fingerprint, fingerprint
from gpumove.tracing import Trace

_LOOKERS = 2
"""Threads that hash host memory: one alone does not use up the memory's bandwidth."""


class Stager:
    """Makes snapshots into kept arenas, one at a time: the next ``stage`` overwrites all but the one that is kept."""

    def __init__(self, *, overlap: bool, skip: str = "off") -> None:
        """Nothing is allocated yet.

        Args:
            overlap: copy beside the training; else ``stage`` returns when all is copied.
            skip: whose unchanged tensors are looked for instead of copied: ``host``, ``all`` or ``off``.
        """
        self._overlap, self._skip = overlap, skip
        self.awaited: Callable[[], None] = lambda: None
        """Waits for what has to be there before an optimizer, or a snapshot, uses it."""
        self._serial = 0
        self._given_up = threading.Event()
        self._sides = (Side(), Side())
        self._current: Snapshot | None = None
        self._kept: Snapshot | None = None
        self._streams: dict[torch.device, torch.cuda.Stream] = {}
        self._watch = Watch()
        self._order: Order | None = None
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="gpumove-stage")
        self._lookers = ThreadPoolExecutor(_LOOKERS, thread_name_prefix="gpumove-look")
        self._hook = register_optimizer_step_pre_hook(self._before_step)

    @property
    def nbytes(self) -> int:
        """Host memory held."""
        return sum(side.arena.nbytes for side in self._sides)

    def keep(self, snapshot: Snapshot | None) -> None:
        """From now on this snapshot is not overwritten, and the one that was kept before may be."""
        self._kept = snapshot

    def trim(self) -> None:
        """Give the second arena back, if nothing is kept in it; not while a copy runs."""
        if self._kept is None and self._current is not None:
            other = self._sides[1 - self._current.side]
            if other.arena.nbytes:
                other.release()
                self._watch.forget()  # the older copy of something may have been there

    def settle(self, clean: Iterable[int] | None) -> None:
        """A save ended: these sources did not change since the one before. None: it failed, so nothing is known."""
        if clean is None:
            self._watch.forget()
        else:
            self._watch.settle(clean)

    def give_up(self) -> None:
        """What is being prepared or copied now is not wanted: let it end early."""
        self._given_up.set()

    def go_on(self) -> None:
        """What begins from now on is wanted."""
        if self._given_up.is_set():
            if self._current is not None:
                self._current._done.wait()
            self._given_up.clear()

    def _before_step(self, *_: Any) -> None:
        self.awaited()
        if self._current is not None:
            self._current.fence()

    def prepare(self, sources: Sequence[torch.Tensor], extra_bytes: int = 1 << 20, *, both: bool = False) -> None:
        """Touch the memory that a snapshot of these sources needs, so that the first is as quick as the rest.

        Args:
            sources: what is going to be staged.
            extra_bytes: room for values that grow.
            both: there is going to be one to keep.
        """
        nbytes = staged_bytes(sources) + extra_bytes
        used = {snapshot.side for snapshot in (self._current, self._kept) if snapshot is not None}
        for number in {0, 1 if both else 0} - used:
            pin = any(t.is_cuda for t in sources)
            self._sides[number].prepare(sources, nbytes, pin=pin, wanted=lambda: not self._given_up.is_set())

    def stage(
        self,
        sources: Sequence[torch.Tensor],
        at_once: Sequence[bool],
        trace: Trace | None = None,
        *,
        steady: frozenset[int] = frozenset(),
    ) -> Snapshot:
        """Begin a snapshot and return; it completes in the background.

        Args:
            sources: local tensors on any device.
            at_once: per source, whether it may change before the next optimizer step. The same list object says that
                the sources are those of the last call, though they may have moved.
            trace: gets what the copy took.
            steady: sources worth a look for changes before any save has told which have none.
        """
        self.go_on()
        number = 0 if self._current is None else self._current.side
        if self._kept is not None:
            number = 1 - self._kept.side
        side = self._sides[number]
        order = self._order_of(sources, at_once, steady)
        side.lay_out(sources, order.specs)
        arena = side.arena.reserve(0, pin=False)
        self._serial += 1
        snapshot = Snapshot(
            side.slots, arena, number, trace or Trace(on=False), nbytes=side.nbytes, serial=self._serial
        )
        looked = [i for i in order.lookable if i in self._watch.candidates] if self._watch.candidates else []
        copied = sorted(set(order.later) - set(looked)) if looked else order.later
        work = Work(snapshot, self._current, side.copies, sources, at_once, copied, looked)
        self._copy([work.copies[i] for i in order.now], [sources[i] for i in order.now])
        snapshot._watch(order.watched, [sources[i] for i in order.watched])
        self._mark(work)  # before the copies: the sooner it is known what is left to copy
        self._enqueue(work, [i for i in work.copied if sources[i].is_cuda])
        if not order.later:
            snapshot._finish(None)
        else:
            # A new thread would run, and hold the GIL, before start() returns.
            self._thread.submit(self._complete, work)
            if not self._overlap:
                snapshot._done.wait()
        snapshot.sight()
        self._current = snapshot  # last: an optimizer must never wait for a copy that did not begin
        return snapshot

    def _order_of(self, sources: Sequence[torch.Tensor], at_once: Sequence[bool], steady: frozenset[int]) -> Order:
        """What is copied when; kept while the caller hands out the same list of what is to be copied at once."""
        if self._order is not None and self._order.at_once is at_once and len(self._order.specs) == len(sources):
            return self._order
        specs = [(t.dtype, t.shape) for t in sources]
        self._watch.forget(steady)  # number n may be another tensor now
        now = [i for i, t in enumerate(sources) if not t.is_cuda and (at_once[i] or not self._overlap or is_small(t))]
        later = sorted(set(range(len(sources))) - set(now))
        watched = [i for i in later if not at_once[i] and not sources[i].is_inference()]
        lookable = [i for i in watched if self._skip == "all" or (self._skip == "host" and not sources[i].is_cuda)]
        self._order = Order(at_once, specs, now, later, watched, lookable)
        return self._order

    def _copy(self, into: list[torch.Tensor], from_: list[torch.Tensor]) -> None:
        # _foreach_copy_ releases the GIL for the whole list; untyped_storage().copy_() would hold it.
        if into:
            torch._foreach_copy_(into, from_)

    def _stream(self, device: torch.device) -> torch.cuda.Stream:
        """The side stream of a device."""
        if device not in self._streams:
            self._streams[device] = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
        return self._streams[device]

    def _mark(self, work: Work) -> None:
        """Queue device tensors' fingerprints, and their way to the host, behind what the current stream has to do."""
        for device in {work.sources[i].device for i in work.looked if work.sources[i].is_cuda}:
            stream = self._stream(device)
            stream.wait_stream(torch.cuda.current_stream(device))
            with torch.cuda.stream(stream):
                mine = [i for i in work.looked if work.sources[i].device == device]
                there = torch.stack([device_fingerprint(work.sources[i]) for i in mine])
                here = torch.empty(there.shape, dtype=there.dtype, pin_memory=True).copy_(there, non_blocking=True)
                work.marks.update(zip(mine, here))
                event = torch.cuda.Event()  # type: ignore[no-untyped-call]
                event.record(stream)
            work.marked.append(event)

    def _enqueue(self, work: Work, which: Sequence[int]) -> None:
        """Queue device copies on a side stream that starts behind what the current stream has been given so far."""
        for device in {work.sources[i].device for i in which}:
            mine = [i for i in which if work.sources[i].device == device]
            # What forward may change is cloned on the device first, in the order of the training stream.
            taken = {i: work.sources[i].clone() if work.at_once[i] else work.sources[i] for i in mine}
            stream = self._stream(device)
            stream.wait_stream(torch.cuda.current_stream(device))
            with torch.cuda.stream(stream):
                sources_now = [taken[i].contiguous() for i in mine]
                torch._foreach_copy_([work.copies[i] for i in mine], sources_now, non_blocking=True)
                event = torch.cuda.Event()  # type: ignore[no-untyped-call]
                event.record(stream)
            work.snapshot._events.append((device, event))
            work.keep += sources_now + list(taken.values())  # registered memory is not tracked by the allocator

    def _complete(self, work: Work) -> None:
        snapshot, error = work.snapshot, None
        try:
            # Candidates first: until it is known which of them are copied, an optimizer has to wait on the host.
            with snapshot.trace.span("copy"):
                changed = self._look(work)
                self._enqueue(work, [i for i in changed if work.sources[i].is_cuda])
                for into, from_ in pieces(work, (*work.copied, *changed)):
                    if self._given_up.is_set():
                        raise ConfigError("the copy was given up", code="config.given_up")
                    self._copy(into, from_)
                snapshot._on_host.set()
                for _, event in snapshot._events:
                    event.synchronize()
        except BaseException as failure:  # noqa: BLE001 - handed to whoever waits
            error = failure
            self._watch.forget()  # some of what was looked at was to be copied, and is not
        work.keep.clear()
        snapshot._finish(error)

    def _look(self, work: Work) -> list[int]:
        """Which candidates have to be copied after all; of the others the older copy is used."""
        for event in work.marked:
            event.synchronize()
        found = self._lookers.map(lambda i: fingerprint(work.sources[i], work.marks.get(i)), work.looked)
        changed = self._watch.changed(dict(zip(work.looked, found)))
        if work.before is not None:
            work.snapshot._unchanged = {i: work.before.view(i) for i in set(work.looked) - set(changed)}
        return changed

    def close(self) -> None:
        """Wait for a running copy, unhook, give the memory back."""
        self._hook.remove()
        if self._current is not None:
            self._current._done.wait()
        self._thread.shutdown()
        self._lookers.shutdown()
        self._current = self._kept = None
        for side in self._sides:
            side.release()
