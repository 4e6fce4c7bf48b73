"""The contract of a peer."""

from __future__ import annotations

import abc
from collections.abc import Callable

from benchmarks.compare.world import World
from benchmarks.places import Place
from benchmarks.workload import Job

Wait = Callable[[], None]


class Peer(abc.ABC):
    """One way to save a job. Every method is called in the training thread; ``Wait`` functions in another."""

    def __init__(self, job: Job, place: Place, world: World) -> None:
        self.job, self.place, self.world = job, place, world
        self.saved: list[str] = []
        """Names of the saves that this peer's user has to delete; none where the peer has retention."""

    def open(self) -> None:  # noqa: B027 - most peers keep nothing open
        """Get ready, as a training script does before its loop."""

    def stepped(self) -> None:  # noqa: B027 - most peers need not be told
        """A training step is complete."""

    @abc.abstractmethod
    def save(self) -> Wait:
        """Begin a save, as quickly as this peer can.

        Returns:
            A function that returns when the save is complete and durable.
        """

    @abc.abstractmethod
    def restore(self) -> dict[str, float]:
        """Load the newest save into the live objects; seconds of parts of it, by name, if there is more to tell."""

    def own_figures(self) -> dict[str, float]:
        """What this peer itself says about its last save."""
        return {}

    def forget(self) -> None:
        """Delete all saves but the newest, where the peer leaves that to its user."""
        for name in self.saved[:-1]:
            self.place.remove(name)
        del self.saved[:-1]

    def close(self) -> None:  # noqa: B027 - most peers keep nothing open
        """Give everything back."""

    def next_name(self) -> str:
        """What a peer without retention calls the save that it begins now."""
        self.saved.append(f"step-{self.job.step}")
        return self.saved[-1]

    def sync(self, name: str) -> None:
        """Make durable what the peer left in the page cache; one rank does it for all."""
        if self.world.rank == 0:
            self.place.sync(name)
