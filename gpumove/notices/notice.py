"""A notice, what became of it, and what a source of notices is. Knows nothing else."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Protocol, runtime_checkable

MOVE = "move"
"""The source of a notice that a move gave: the run goes on in another store, and nobody takes the machine."""


@dataclass(frozen=True)
class Outcome:
    """What became of the job's state when it left."""

    durable: bool
    """Whether the step that the job left after is in the run's log."""
    step: int
    """The step that a resume begins from; 0 with no checkpoint."""
    lost_steps: int
    """Steps that were trained and are lost."""
    reason: str = ""
    """Why it is not durable, in words."""
    finished: bool = False
    """The job came to its end before it had to leave."""

    def __str__(self) -> str:
        if self.finished:
            return "finished"
        if self.durable:
            return f"durable: step {self.step}"
        return f"not durable: resumes from step {self.step}, {self.lost_steps} steps lost"


@dataclass
class Notice:
    """Somebody said that the job has to leave."""

    source: str
    """``aws``, ``aws-rebalance``, ``gcp``, ``gcp-maintenance``, ``azure``, ``sigterm``, ``sigusr1``, ``sigusr2``,
    ``file``, ``url``, ``request``, ``health``, ``move``, or a word that a file or a URL gave."""
    deadline: float | None
    """When the machine goes, in seconds since the epoch (``time.time()``); None if nobody said."""
    detail: str = ""
    """What else was said, in one line."""
    outcome: Outcome | None = field(default=None, compare=False)
    """What became of it; None as long as that is not known."""


class Source(Protocol):
    """Where notices come from. Each is asked in a thread of its own, so that one that hangs delays nothing else."""

    @property
    def name(self) -> str:
        """What it is called in the log."""
        ...

    @property
    def pause_s(self) -> float:
        """Seconds between two polls."""
        ...

    def poll(self) -> Notice | None:
        """What is known now; the same notice again and again is one. Should return by itself; may raise anything."""
        ...


@runtime_checkable
class Opened(Protocol):
    """A source that has to be set up and taken down, in the thread that starts and closes the watcher."""

    def open(self) -> None:
        """Set up. What it raises means that the source is not watched."""
        ...

    def close(self) -> None:
        """Take down; a poll that is running returns."""
        ...


@runtime_checkable
class Acknowledged(Protocol):
    """A source that wants to know when the job has left."""

    def acknowledge(self) -> None:
        """Tell it. Bounded; may raise anything."""
        ...


def one_line(text: str, most: int = 200) -> str:
    """What a stranger wrote, fit for a line of the log."""
    line = " ".join("".join(c if c.isprintable() else " " for c in text[: 4 * most]).split())
    return line if len(line) <= most else line[: most - 3] + "..."
