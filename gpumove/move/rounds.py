"""Rounds of pre-copy: what the newest checkpoint needs is copied, again and again, and from what that took it is
foretold how long a blackout would be. The forecast is arithmetic; the rounds decide only when to look."""

from __future__ import annotations

import logging
import statistics
import threading
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from itertools import pairwise

from gpumove.errors import IntegrityError
from gpumove.format.manifest import Checkpoint
from gpumove.move.copier import Progress
from gpumove.move.pointers import Courier
from gpumove.move.replica import Replica
from gpumove.store.gc import Retention
from gpumove.store.log import Log
from gpumove.store.view import View

_log = logging.getLogger("gpumove")
_RECENT = 5
_CROWDED = 0.5
"""Share of the time that a link may be busy with commits."""


@dataclass(frozen=True)
class Round:
    """One checkpoint that was brought: what was sent, and what it took."""

    step: int
    nbytes: int
    objects: int
    seconds: float
    """In all: reading records, copying, committing."""
    copy_s: float
    """Of that, while bytes were under way."""
    waiting: int = 0
    """Checkpoints that the source committed meanwhile."""

    @property
    def rest_s(self) -> float:
        """What does not depend on the bytes."""
        return max(0.0, self.seconds - self.copy_s)


@dataclass(frozen=True)
class Measured:
    """What a forecast is made of. None is unknown."""

    rate_bytes_s: float | None
    """Of the link, as the last rounds had it."""
    delta_bytes: float | None
    """What a commit brings."""
    every_s: float | None
    """Seconds between two commits."""
    rest_s: float = 0.0
    """What a round takes besides its bytes."""


def crowded_below(delta_bytes: float, every_s: float) -> float:
    """The rate of a link, in bytes per second, below which commits had better wait until the cutover: they take so much
    of it that to catch up with each takes long, and a difference over more steps is hardly larger."""
    return delta_bytes / (_CROWDED * every_s)


@dataclass(frozen=True)
class Forecast:
    """How long nobody would train if the job was stopped now."""

    blackout_s: float | None
    """The sum of ``parts``; None as long as nothing was measured."""
    parts: dict[str, float]
    """Seconds by what they go to. What nobody has measured is not among them."""
    converges: bool
    """Whether another round would leave less to do than there is now."""
    why: str
    """That, in words and numbers."""


def forecast(found: Measured, **parts: float) -> Forecast:
    """From what was measured to a blackout.

    Args:
        found: of the link and of the commits.
        **parts: what else it takes, in seconds: leaving, the handover, the restore.
    """
    rate, delta, every_s = found.rate_bytes_s, found.delta_bytes, found.every_s
    if delta is None or (delta > 0 and not rate):
        unknown = "the source has not committed yet" if delta is None else "nothing was sent that tells the link's rate"
        return Forecast(None, dict(parts), False, f"nothing can be foretold: {unknown}")
    last_s = (delta / rate if rate else 0.0) + found.rest_s
    parts = {"last_delta": last_s, **parts}
    blackout_s = sum(parts.values())
    if every_s is None:
        return Forecast(blackout_s, parts, False, "the source has committed too little to tell how often it does")
    speed = f" at {rate / 1e6:.1f} MB/s" if rate else ""
    facts = f"a commit brings {delta / 1e6:.1f} MB every {every_s:.1f} s, and takes {last_s:.1f} s to send{speed}"
    if last_s <= every_s:
        return Forecast(blackout_s, parts, True, f"the copy keeps up: {facts}")
    return Forecast(blackout_s, parts, False, f"another round would not help: {facts}")


def measure(
    rounds: Sequence[Round], commits: Sequence[Checkpoint], *, record_bytes: int, rate_bytes_s: float | None
) -> Measured:
    """The last few rounds and commits in numbers.

    Args:
        rounds: all so far.
        commits: of the source's own line.
        record_bytes: of a checkpoint's parts and manifest, which every commit brings besides its packs.
        rate_bytes_s: of the copier, for when no round has sent enough to tell.
    """
    recent = commits[-_RECENT - 1 :]
    gaps = [after.time - before.time for before, after in pairwise(recent) if after.time > before.time]
    # The oldest of those may have been the first of all, which is no delta.
    sizes = [c.new_bytes + record_bytes for c in (recent[1:] or recent)]
    delta = statistics.median(sizes) if sizes else None
    sent = [r for r in rounds[-_RECENT:] if r.nbytes and r.copy_s > 0]
    # A small delta does not fill a long link as a whole state does: what was about as large tells more.
    alike = [r for r in sent if delta and delta / 4 <= r.nbytes <= 4 * delta] or sent
    if alike:
        rate_bytes_s = sum(r.nbytes for r in alike) / sum(r.copy_s for r in alike)
    return Measured(
        rate_bytes_s=rate_bytes_s,
        delta_bytes=delta,
        every_s=statistics.median(gaps) if gaps else None,
        rest_s=statistics.median(r.rest_s for r in alike) if alike else 0.0,
    )


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
            if c.attempt in self.attempts or c.number in newest or c.pinned or c.pointers or c.number == view.resumed
        )


def as_source(source: Log, also: Iterable[str] = ()) -> Retention:
    """The retention that keeps what the source has now, and these attempts."""
    return AsSource(attempts=frozenset((*(c.attempt for c in source.view.checkpoints), *also)))


@dataclass
class Rounds:
    """Follows a source: whenever it has committed, the newest checkpoint is brought.

    Args:
        replica: what is kept current.
        keep: retention at the target; by default nothing is dropped.
        as_source: what the source drops is dropped at the target.
        spares: but only what was brought by these rounds.
        poll_s: between two looks at the source's log.
        stop: set it to end ``follow``; what is under way is then finished, unless the copier is cancelled too.
    """

    replica: Replica
    keep: Retention | None = None
    as_source: bool = False
    spares: bool = False
    poll_s: float = 1.0
    stop: threading.Event = field(default_factory=threading.Event)
    done: list[Round] = field(default_factory=list)
    damaged: dict[str, str] = field(default_factory=dict)
    """Attempts that could not be brought because they are damaged at the source, and how."""
    _brought: set[str] = field(default_factory=set)
    courier: Courier = field(init=False)
    """Brings pointers along."""

    def __post_init__(self) -> None:
        self.courier = Courier(self.replica.source, self.replica.target)

    @property
    def sent_bytes(self) -> int:
        """By all of them."""
        return sum(done.nbytes for done in self.done)

    def once(self, checkpoint: Checkpoint | None = None, *, progress: Progress | None = None) -> Round | None:
        """Bring one checkpoint: this one, or the newest that the target should resume from and lacks.

        Returns:
            None if there was nothing to bring, or the source's retention took it away meanwhile.

        Raises:
            IntegrityError: it is damaged at the source.
        """
        began = time.monotonic()
        checkpoint = checkpoint or self.replica.look()
        self.courier.look()
        if checkpoint is None or checkpoint.attempt in self.damaged:
            return None
        try:
            sent = self.replica.bring(checkpoint, progress=progress)
        except IntegrityError as error:
            if error.code != "integrity.transfer":
                self.damaged[checkpoint.attempt] = str(error)
            raise
        if sent is None:
            _log.info("step %d is gone at the source: going on with what is there", checkpoint.step)
            return None
        seconds = time.monotonic() - began
        self.replica.source.follow()
        newer = sum(c.attempt > checkpoint.attempt for c in self.replica.source.view.checkpoints)
        self.done.append(Round(checkpoint.step, sent.nbytes, sent.objects, seconds, sent.seconds, newer))
        self._brought.add(checkpoint.attempt)
        if (keep := self._keep()) is not None:
            self.replica.retain(keep)
        return self.done[-1]

    def check_sound(self, checkpoint: Checkpoint | None) -> None:
        """Raise IntegrityError for one that was found to be damaged: to look again does not help."""
        if checkpoint is not None and (why := self.damaged.get(checkpoint.attempt)) is not None:
            raise IntegrityError(why)

    def _keep(self) -> Retention | None:
        if not self.as_source:
            return self.keep
        there = {c.attempt for c in self.replica.target.view.checkpoints} if self.spares else set()
        return as_source(self.replica.source, there - self._brought)

    def follow(self, each: Callable[[Round, Forecast], None], *, progress: Progress | None = None) -> None:
        """Go on until ``stop`` is set or the source's run has moved away.

        Args:
            each: told every round and what it leads to expect.
            progress: told how far a round is.

        Raises:
            FencedError: another replicator, or a job, has the target now.
        """
        while not self.stop.is_set():
            try:
                found = self.once(progress=progress)
            except IntegrityError as error:
                if error.code == "integrity.transfer":
                    raise
                _log.error("a checkpoint is passed over: %s", error)
                continue
            if found is not None:
                each(found, self.forecast())
            elif self.replica.source.view.sealed and self._is_current():
                return
            else:
                self.stop.wait(self.poll_s)

    def _is_current(self) -> bool:
        newest = self.replica.look()
        return newest is None or newest.attempt in self.damaged

    def commits(self) -> list[Checkpoint]:
        """Of the source's own line, oldest first."""
        view = self.replica.source.view
        return [c for c in view.checkpoints if c.number not in view.abandoned]

    def measured(self) -> Measured:
        """The last of them, and of the rounds, in numbers."""
        record_bytes, rate_bytes_s = self.replica.needs.nbytes, self.replica.copier.rate.bytes_s
        return measure(self.done, self.commits(), record_bytes=record_bytes, rate_bytes_s=rate_bytes_s)

    def left_bytes(self, newest: Checkpoint | None) -> int:
        """What the checkpoint that was found to be lacking needs, and the target does not have."""
        return 0 if newest is None else sum(o.nbytes for o in self.replica.missing(newest))

    def forecast(self, **parts: float) -> Forecast:
        """What a stop of the job would cost now; ``parts`` are seconds for what is not this room's to know."""
        return forecast(self.measured(), **parts)
