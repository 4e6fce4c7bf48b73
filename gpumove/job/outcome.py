"""What an attempt came to: torchrun's status and the ranks' words in, a verdict out. Pure.

torchrun's own status says little: workers that leave well after a signal make it 1, and so does every crash.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from gpumove.errors import ConfigError, FencedError, GpumoveError, IntegrityError, LayoutError, ParityError
from gpumove.from_env import Word
from gpumove.notices.notice import MOVE, Outcome

FINISHED, DURABLE, NOT_DURABLE, MOVED = 0, 75, 76, 77
_MOVED = "moved: do not start it again here"
_TORCHRUN_USAGE = 2
_LINES = 30
_AGENT = "failed (exitcode: "
"""From here on torchrun speaks, at length, and without having heard what the worker said."""
# Another attempt would meet the same: only these are worth one, besides all that is no error of gpumove's.
_FINAL = {error.exit_code for error in (ConfigError, IntegrityError, LayoutError, FencedError, ParityError)}


@dataclass(frozen=True)
class Verdict:
    """How an attempt ended. ``exit_code`` None: it crashed, and another attempt may help."""

    exit_code: int | None
    text: str
    outcome: Outcome | None = None


def judge(status: int, words: Sequence[Word], *, asked: bool) -> Verdict:
    """The verdict over one attempt.

    Args:
        status: torchrun's, negative for a signal.
        words: what the ranks of this machine said last.
        asked: whether they were asked to leave.
    """
    # torchrun sends SIGTERM to the ranks that a crash has left over. They may well save, but the job has crashed.
    crashed = status != 0 and not asked
    left = [
        w.outcome
        for w in words
        if w.state == "left" and w.outcome is not None and not (crashed and w.source == "sigterm")
    ]
    if left:
        # All ranks were told the same; should they differ, the worst is true.
        worst = min(left, key=lambda o: (o.finished or o.durable, o.step))
        if not worst.finished and any(w.state == "left" and w.source == MOVE for w in words):
            return Verdict(MOVED, f"{_MOVED} ({worst})", worst)
        return Verdict(_code(worst), str(worst), worst)
    if status == 0:
        return Verdict(FINISHED, "finished")
    first = first_to_fail(words)
    if first is not None and first.code == "fenced.moved":
        return Verdict(MOVED, f"{_MOVED} ({headline(first)})")
    if first is not None and first.exit_code in _FINAL:
        return Verdict(first.exit_code, headline(first))
    if not words and status == _TORCHRUN_USAGE:
        return Verdict(ConfigError.exit_code, "torchrun did not take its arguments")
    return Verdict(NOT_DURABLE if asked else None, say_status(status) if first is None else headline(first))


def stayed(outcome: Outcome) -> Verdict:
    """The verdict if the move that a job has left for was withdrawn."""
    return Verdict(_code(outcome), f"{outcome} (it left for a move, which was withdrawn)", outcome)


def _code(outcome: Outcome) -> int:
    if outcome.finished:
        return FINISHED
    return DURABLE if outcome.durable else NOT_DURABLE


def first_to_fail(words: Iterable[Word]) -> Word | None:
    """The rank that failed first; the others mostly fail because of it."""
    return min((w for w in words if w.state == "failed"), key=lambda w: w.time, default=None)


def crash_code(words: Iterable[Word]) -> int:
    """The exit code of a crash that is not tried again."""
    first = first_to_fail(words)
    return GpumoveError.exit_code if first is None or first.exit_code is None else first.exit_code


def headline(word: Word) -> str:
    """A rank's failure in one line: the last one of its traceback."""
    lines = (word.error or "").strip().splitlines()
    return f"rank {word.rank} failed first" + (f": {lines[-1].strip()}" if lines else "")


def quote(status: int, words: Iterable[Word], tail: str) -> str:
    """The first failing rank's whole traceback; without one, the end of standard error."""
    first = first_to_fail(words)
    if first is not None and first.error is not None:
        return f"rank {first.rank} (pid {first.pid}) failed first:\n{first.error.rstrip()}"
    lines = "\n".join(tail.partition(_AGENT)[0].rstrip().splitlines()[-_LINES:])
    return f"{say_status(status)} and no rank said why" + (f"; the end of standard error:\n{lines}" if lines else "")


def say_status(status: int) -> str:
    """Such as ``torchrun ended with status 1``."""
    return f"torchrun was killed by signal {-status}" if status < 0 else f"torchrun ended with status {status}"
