"""How the training itself is doing: slower than it was, a rank that lags, a loss that is no number.

The training thread only notes times, below a microsecond per step; the watchdog's thread judges them. What is found is
said once per episode. Knows neither threads nor a store, and never waits for a device.
"""

from __future__ import annotations

import logging
import math
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from statistics import median
from typing import Any

import msgspec
import torch

from gpumove.steptimes import BLOCK_S, BLOCK_STEPS, ROW, SLOWER, Pace, in_words

_log = logging.getLogger("gpumove")

_LOOK_S = 1.0
"""How often a loss is looked at."""
_MOST_NOTES = 100
_NEVER = (-1, 0.0)


class Finding(msgspec.Struct, frozen=True):
    """Something that is wrong, told once: ``slow``, ``straggler``, ``nan`` or ``hang``."""

    kind: str
    step: int
    text: str
    rank: int = 0


class Lap(msgspec.Struct, frozen=True, array_like=True):
    """What one rank did between two meetings: a few numbers, sent with the report that it makes anyway."""

    steps: int = 0
    own_s: float = 0.0
    """From the end of the last meeting until it came to this one, waiting for nobody there."""
    cpu_s: float = 0.0
    """Of these, how long its training thread computed. Waiting inside a collective does not count."""


class Vitals(msgspec.Struct, frozen=True, array_like=True):
    """What a rank tells at a meeting."""

    lap: Lap = Lap()
    findings: tuple[Finding, ...] = ()


def find_straggler(laps: Sequence[Lap]) -> tuple[int, str] | None:
    """The rank that the others wait for, and why it is thought to be that one; None if they are alike.

    Ranks that meet in collectives all the time take equally long, whoever is slow. What tells them apart is when they
    come to a meeting, and how much of the time they computed rather than waited.
    """
    own, cpu = [lap.own_s for lap in laps], [lap.cpu_s for lap in laps]
    for times, what in ((own, "comes late to every meeting: {} per step, the others {}"),
                        (cpu, "computes longer than the others, who wait: {} per step, they {}")):  # fmt: skip
        worst = max(range(len(times)), key=times.__getitem__)
        usual = median(times[:worst] + times[worst + 1 :])
        if times[worst] - usual > SLOWER * median(own):
            steps = laps[worst].steps
            return worst, f"rank {worst} " + what.format(in_words(times[worst] / steps), in_words(usual / steps))
    return None


class Stragglers:
    """Laps of all ranks, put together until they say something; on rank 0."""

    def __init__(self) -> None:
        self._sums: list[Lap] = []
        self._row: list[int | None] = []
        self._told: int | None = None

    def add(self, laps: Sequence[Lap]) -> tuple[int, str] | None:
        """What the ranks told at a meeting; a rank and words if from here on one of them lags."""
        if len(laps) < 2 or not all(lap.steps for lap in laps):
            return None
        before = self._sums or [Lap()] * len(laps)
        self._sums = [Lap(a.steps + b.steps, a.own_s + b.own_s, a.cpu_s + b.cpu_s) for a, b in zip(before, laps)]
        if self._sums[0].steps < BLOCK_STEPS or min(lap.own_s for lap in self._sums) < BLOCK_S:
            return None
        found, self._sums = find_straggler(self._sums), []
        rank = found[0] if found else None
        self._row = [*self._row[1 - ROW :], rank]
        if len(self._row) < ROW or set(self._row) != {rank} or rank == self._told:
            return None
        self._told = rank
        return found


class _Newest:
    """The newest loss that is known here; one on a device is fetched beside the training, and nobody waits for it."""

    def __init__(self) -> None:
        self.seen: tuple[int, float] | None = None
        self._step = 0
        self._host: torch.Tensor | None = None
        self._arrived: torch.cuda.Event | None = None

    def look(self, step: int, loss: torch.Tensor | float) -> None:
        """In the training thread: take what has arrived, and ask for the next."""
        if self._arrived is not None and self._host is not None:
            if not self._arrived.query():  # type: ignore[no-untyped-call]
                return
            self.seen, self._arrived = (self._step, float(self._host)), None
        if not isinstance(loss, torch.Tensor):
            self.seen = step, float(loss)
        elif type(loss) is torch.Tensor and loss.numel() == 1:  # of a subclass, reading may be a collective
            self._fetch(step, loss.detach())

    def _fetch(self, step: int, loss: torch.Tensor) -> None:
        if loss.device.type == "cpu":
            self.seen = step, float(loss)
        elif loss.device.type == "cuda":
            if self._host is None or self._host.dtype != loss.dtype:
                self._host = torch.empty((), dtype=loss.dtype, device="cpu", pin_memory=True)
            self._host.copy_(loss.reshape(()), non_blocking=True)
            self._step = step
            self._arrived = torch.cuda.Event()  # type: ignore[no-untyped-call]
            self._arrived.record(torch.cuda.current_stream(loss.device))


class Health:
    """What one rank knows of how its training is doing, and whom it tells.

    ``step``, ``busy``, ``report``, ``met`` and ``hear`` are for the training thread; ``look`` is for the watchdog's.
    """

    def __init__(
        self,
        *,
        rank: int = 0,
        leave_on: str = "",
        leave: Callable[[Finding], None] = lambda finding: None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """Nothing is known yet.

        Args:
            rank: of this process.
            leave_on: kinds of findings that make the job leave, with commas.
            leave: called with such a finding, from either thread.
            clock: monotonic seconds.
        """
        self.rank, self._clock = rank, clock
        self._leave_on, self._leave = {word.strip() for word in leave_on.split(",")}, leave
        self._told: deque[tuple[int, float] | None] = deque(maxlen=1 << 16)  # None: time that is nobody's
        self._before: tuple[int, float] | None = None
        self._at = _NEVER  # the newest step, in the training thread
        self.last_step: int | None = None
        self._paces = {False: Pace(), True: Pace()}
        self._saving = False
        self._newest, self._look_at = _Newest(), 0.0
        self._infinite = False
        self._busy = 0
        self._lap: tuple[int, float, float] | None = None
        self._stragglers = Stragglers()
        self._lock = threading.Lock()
        self._fresh: list[Finding] = []
        self._notes: deque[Finding] = deque(maxlen=_MOST_NOTES)

    # ---------------------------------------------------------------- the training thread

    def step(self, step: int, loss: torch.Tensor | float | None = None) -> float | None:
        """A step is complete; the seconds that it took, if that is known and they were all its own."""
        now = self._clock()
        self._told.append((step, now))
        (since, began), self._at = self._at, (step, now)
        if loss is not None and now >= self._look_at:
            self._look_at = now + _LOOK_S
            with suppress(TypeError, ValueError, RuntimeError):  # a loss that cannot be read costs nobody a step
                self._newest.look(step, loss)
        return (now - began) / (step - since) if step > since >= 0 else None

    @contextmanager
    def busy(self) -> Iterator[None]:
        """No step comes meanwhile, and that is no hang; nor does the time count as a step's, or as this rank's own."""
        self._busy += 1
        try:
            yield
        finally:
            self._lap, self._at = None, _NEVER
            self._told.append(None)
            self._busy -= 1

    def report(self, step: int) -> Vitals:
        """This rank comes to a meeting: what it has to tell."""
        with self._lock:
            fresh, self._fresh = tuple(self._fresh), []
        if self._lap is None:
            return Vitals(findings=fresh)
        since, began, computed = self._lap
        return Vitals(Lap(step - since, self._clock() - began, time.thread_time() - computed), fresh)

    def met(self, step: int) -> None:
        """All ranks leave a meeting."""
        self._lap = step, self._clock(), time.thread_time()

    def hear(self, told: Sequence[Vitals], step: int) -> None:
        """On rank 0: what all ranks told at a meeting."""
        with self._lock:
            self._notes.extend(finding for vitals in told[1:] for finding in vitals.findings)
        found = self._stragglers.add([vitals.lap for vitals in told])
        if found is not None:
            self.tell(Finding("straggler", step, found[1], found[0]))

    # ---------------------------------------------------------------- any thread

    def tell(self, finding: Finding) -> None:
        """Something was found: into the log, for the next manifest, and where it was asked for, a reason to leave."""
        _log.warning("after step %d: %s", finding.step, finding.text)
        with self._lock:
            self._fresh.append(finding)
            self._notes.append(finding)
        if finding.kind in self._leave_on:
            self._leave(finding)

    def notes(self) -> list[dict[str, Any]]:
        """The newest findings of this job, for a manifest; rank 0 has those of all ranks that met since."""
        with self._lock:
            return [msgspec.to_builtins(finding) for finding in self._notes]

    # ---------------------------------------------------------------- the watchdog's thread

    def look(self, *, saving: bool) -> bool:
        """Judge what was told since the last look; whether there was a step, or none is due.

        Args:
            saving: a save runs beside the training. Such steps are compared with their like.
        """
        beside, self._saving = saving or self._saving, saving
        alive = self._busy > 0
        for told in _drained(self._told):
            alive = True
            if told is not None and self._before is not None and told[0] > self._before[0]:
                self._judge(told, self._before, beside)
            self._before = told
            self.last_step = told[0] if told is not None else self.last_step
        self._judge_loss()
        return alive

    def _judge(self, told: tuple[int, float], before: tuple[int, float], beside: bool) -> None:
        words = self._paces[beside].add((told[1] - before[1]) / (told[0] - before[0])) if self.rank == 0 else None
        if words is not None:
            self.tell(Finding("slow", told[0], words, self.rank))

    def _judge_loss(self) -> None:
        if self._newest.seen is None:
            return
        step, loss = self._newest.seen
        if not math.isfinite(loss) and not self._infinite:
            self.tell(Finding("nan", step, f"the loss of rank {self.rank} is {loss}", self.rank))
        self._infinite = not math.isfinite(loss)


def _drained(queue: deque[Any]) -> Iterable[Any]:
    """What is there, oldest first; the other end may be written to meanwhile."""
    while queue:
        yield queue.popleft()
