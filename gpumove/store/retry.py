"""Retries: what a failure means, how long to wait, how many calls may be in flight. Knows no back end."""

from __future__ import annotations

import errno
import random
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Literal, NamedTuple, TypeVar

from gpumove.errors import GpumoveError, StoreError

T = TypeVar("T")
Kind = Literal["missing", "exists", "permanent", "space", "throttled", "transient", "corrupt"]


class Fault(NamedTuple):
    """One failure, judged: what to do about it, its stable code, and advice for the message."""

    kind: Kind
    code: str
    advice: str = ""


_unwanted: ContextVar[Callable[[], bool]] = ContextVar("gpumove_unwanted", default=lambda: False)
_LOOK_S = 0.25
"""Between two looks whether what is waited for is still wanted."""


@contextmanager
def unless(unwanted: Callable[[], bool]) -> Iterator[None]:
    """Store calls of this thread end soon, with ``store.abandoned``, once nobody wants what they do."""
    outer = _unwanted.get()
    token = _unwanted.set(lambda: outer() or unwanted())
    try:
        yield
    finally:
        _unwanted.reset(token)


def wait_for(done: threading.Event, seconds: float) -> bool:
    """Wait for an event, at most so long, and no longer than that is wanted."""
    until, unwanted = time.monotonic() + seconds, _unwanted.get()
    while not done.wait(max(0.0, min(_LOOK_S, until - time.monotonic()))):
        if time.monotonic() >= until or unwanted():
            return done.is_set()
    return True


def _sleep(seconds: float) -> None:
    wait_for(threading.Event(), seconds)


class Clock(NamedTuple):
    """Time and chance, so that tests can supply their own."""

    now: Callable[[], float] = time.monotonic
    sleep: Callable[[float], None] = _sleep
    # Not the global generator: that one belongs to the training job, and is in its checkpoints.
    chance: Callable[[], float] = random.SystemRandom().random


class _Rule(NamedTuple):
    first_s: float  # bound of the first wait; doubled each time
    floor: float  # share of the wait that is not left to chance
    tries: int  # calls, the first included


_CAP_S = 20.0
# A full disk or quota may be cleared by somebody, so it is given some 20 s to 40 s; bytes that are damaged four times
# in a row are damaged at rest, not on the way; a throttled store needs real pauses, so half of each is certain.
_RULES: dict[Kind, _Rule] = {
    "transient": _Rule(0.25, 0.0, 1_000_000),
    "throttled": _Rule(1.0, 0.5, 1_000_000),
    "space": _Rule(4.0, 0.5, 4),
    "corrupt": _Rule(0.25, 0.0, 4),
}

ABSENT = Fault("missing", "store.not_found")
TAKEN = Fault("exists", "store.exists")
STALLED = Fault(
    "transient", "store.timeout", "the store did not answer in time; check the network, or raise deadline_s"
)
FLAKY = Fault("transient", "store.unavailable", "check that the store is up and can be reached from this node")
DAMAGED = Fault("corrupt", "integrity.transfer", "bytes are damaged on the way to or from the store, or at rest there")
SLOW_DOWN = Fault("throttled", "store.throttled", "the store asks for fewer requests; lower concurrency or its load")
FULL = Fault("space", "store.no_space", "free space there, then start again; nothing that was committed is lost")
QUOTA = Fault("space", "store.quota", "raise the quota or delete old checkpoints; nothing that was committed is lost")
NO_BUCKET = Fault("permanent", "store.no_bucket", "create the bucket or container; gpumove never creates one")
NO_CREATE = Fault(
    "permanent", "store.no_create_only", "use a store that creates only if absent: S3, GCS, Azure or a local disk"
)

_ERRNO: dict[int, Fault] = {
    errno.ENOENT: ABSENT,
    errno.EEXIST: TAKEN,
    errno.EACCES: Fault("permanent", "store.denied"),
    errno.EPERM: Fault("permanent", "store.denied"),
    errno.EROFS: Fault("permanent", "store.read_only", "the file system is mounted read-only"),
    errno.ENOSPC: FULL,
    errno.EDQUOT: QUOTA,
    errno.EFBIG: QUOTA,
    errno.ETIMEDOUT: STALLED,
    errno.EINVAL: Fault("permanent", "store.refused", "the system refused the call as invalid"),
    errno.ENAMETOOLONG: Fault("permanent", "store.refused", "the path is too long"),
    errno.ENOTDIR: Fault("permanent", "store.refused", "a part of the path is a file"),
    errno.EISDIR: Fault("permanent", "store.refused", "the path is a directory"),
    errno.ELOOP: Fault("permanent", "store.refused", "the path has a loop of symbolic links"),
}


class MismatchError(Exception):
    """What the store holds, or sent, is not what was sent or asked for."""


def judge(error: BaseException) -> Fault:
    """What a failure means that says nothing of a cloud; cloud back ends ask their own rules first."""
    if isinstance(error, MismatchError):
        return DAMAGED
    if "CERTIFICATE_VERIFY_FAILED" in str(error):  # unlike other TLS errors, this one does not pass
        return Fault("permanent", "store.refused", "its TLS certificate is not trusted here; check the CA settings")
    if "Timeout" in type(error).__name__ and not isinstance(error, OSError):
        return STALLED
    if isinstance(error, OSError):
        for known, fault in ((FileNotFoundError, ABSENT), (FileExistsError, TAKEN), (TimeoutError, STALLED)):
            if isinstance(error, known):
                return fault
        number = errno.EACCES if isinstance(error, PermissionError) else error.errno
        return _ERRNO.get(number or 0, FLAKY)
    if isinstance(error, (NotImplementedError, TypeError, ValueError, AttributeError, LookupError, ImportError)):
        return Fault("permanent", "store.refused", "the call or the store's options are wrong, or it cannot do this")
    return FLAKY


class Limiter:
    """Bounds the calls in flight: halved when the store throttles, growing back slowly (AIMD)."""

    def __init__(self, most: int, clock: Clock) -> None:
        self._most = most
        self._clock = clock
        self._limit = float(most)
        self._busy = 0
        self._cut_at = -1e9
        self._changed = threading.Condition()

    @property
    def limit(self) -> int:
        """Calls that may be in flight now."""
        return max(1, int(self._limit))

    @contextmanager
    def slot(self, seconds: float) -> Iterator[None]:
        """Hold one of the places; TimeoutError if none is free in time."""
        with self._changed:
            if not self._changed.wait_for(lambda: self._busy < self.limit, timeout=max(0.0, seconds)):
                raise TimeoutError(f"waited {seconds:.0f} s for a free place among {self.limit} calls in flight")
            self._busy += 1
        try:
            yield
        finally:
            with self._changed:
                self._busy -= 1
                self._changed.notify_all()

    def throttled(self) -> None:
        """Halve; once per second, because calls in flight together are refused together."""
        with self._changed:
            if self._clock.now() - self._cut_at >= 1.0:
                self._cut_at = self._clock.now()
                self._limit = max(1.0, self._limit / 2)

    def answered(self) -> None:
        """A call was served: come back by a tenth of a call."""
        with self._changed:
            if self._limit < self._most:
                self._limit = min(float(self._most), self._limit + 0.1)
                self._changed.notify()


class GaveUpError(Exception):
    """The policy gave up: the last failure, judged, and how hard it was tried. Never leaves this room."""

    def __init__(self, fault: Fault, tries: int, seconds: float, error: Exception) -> None:
        super().__init__(fault.code)
        self.fault = fault
        self.tries = tries
        self.seconds = seconds
        self.error = error


def wait_s(fault: Fault, tries: int, chance: float) -> float:
    """Seconds to wait after the ``tries``-th failure: exponential and capped, the rest of it left to chance."""
    rule = _RULES[fault.kind]
    bound = min(_CAP_S, rule.first_s * 2.0 ** min(tries - 1, 30))
    return bound * (rule.floor + (1 - rule.floor) * chance)


def retrying(
    attempt: Callable[[float], T],
    *,
    judged: Callable[[Exception], Fault],
    deadline_s: float,
    budget_s: float,
    limiter: Limiter,
    clock: Clock,
) -> T:
    """Call ``attempt(seconds)`` until it answers, fails for good, or the budget is used up.

    Raises:
        GaveUpError: the one way out besides an answer; errors of our own tree pass as they are.
        StoreError: nobody wants the answer any more.
    """
    start, seen = clock.now(), Counter[str]()
    before: tuple[Fault, Exception] | None = None
    while True:
        _check_wanted()
        left_s = budget_s - (clock.now() - start)
        seconds = max(0.01, min(deadline_s, left_s))
        try:
            with limiter.slot(left_s):
                result = attempt(seconds)
            limiter.answered()
            return result
        except GpumoveError:
            raise
        except Exception as error:  # noqa: BLE001 - a back end may raise anything, and judged() has an answer for all
            _check_wanted()
            fault = judged(error)
            seen[fault.kind] += 1
            if fault.kind == "throttled":
                limiter.throttled()
            spent_s = clock.now() - start
            rule = _RULES.get(fault.kind)
            pause_s = wait_s(fault, seen[fault.kind], clock.chance()) if rule else 0.0
            if rule is None or seen[fault.kind] >= rule.tries or spent_s + pause_s >= budget_s:
                # A last call that the budget cut short says nothing: the failure before it says what is wrong.
                if before is not None and fault.code == STALLED.code and seconds < deadline_s:
                    fault, error = before
                raise GaveUpError(fault, seen.total(), spent_s, error) from None
            before = fault, error
        clock.sleep(pause_s)


def _check_wanted() -> None:
    if _unwanted.get()():
        raise StoreError("given up: nobody waits for it any more", code="store.abandoned") from None


class Ticket:
    """Settles whether a call that runs in a thread of its own may still take effect after its caller left."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._owner: Literal["", "work", "caller"] = ""

    def commit(self) -> None:
        """Asked by the work right before its effect; TimeoutError if the caller has left."""
        with self._lock:
            if self._owner == "caller":
                raise TimeoutError("the caller has left")
            self._owner = "work"

    def abandon(self) -> None:
        """Told by the caller when it leaves."""
        with self._lock:
            self._owner = self._owner or "caller"


def in_thread(work: Callable[[Ticket], T], seconds: float) -> T:
    """Run ``work`` in a daemon thread and leave it behind after ``seconds``, or when nobody wants it any more: a hung
    mount cannot be interrupted."""
    ticket, done = Ticket(), threading.Event()
    result: list[T] = []
    failure: list[BaseException] = []

    def body() -> None:
        try:
            result.append(work(ticket))
        except BaseException as error:  # noqa: BLE001 - handed to the caller, whatever it is
            failure.append(error)
        finally:
            done.set()

    threading.Thread(target=body, name="gpumove-store", daemon=True).start()
    try:
        in_time = wait_for(done, seconds)
    finally:
        # Buffers belong to the caller again once it leaves; bytes read from them later must not be published.
        if not done.is_set():
            ticket.abandon()
    if not in_time:
        raise TimeoutError(f"no answer within {seconds:.1f} s")
    if failure:
        raise failure[0]
    return result[0]
