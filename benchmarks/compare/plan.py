"""What is run, and in which order: sections, peers, rounds. Pure functions of the options."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass

from benchmarks.compare.peers import PEERS
from benchmarks.compare.workloads import SIZES_MB

DISK = "disk"
"""A plain write and fsync of as many bytes: not a peer, but what a peer could reach."""
S3_MOST_MB = 500.0
"""The server shares the machine, and keeps its objects in memory."""
RANKS_MB = 400.0
"""What the ranks share: a step costs them a round of gloo over all of it."""


@dataclass(frozen=True)
class Section:
    """What one table is of: figures are compared within it. ``ranks`` is 0 for a training without process groups."""

    workload: str
    store: str
    ranks: int = 0

    def __str__(self) -> str:
        if not self.ranks:
            return f"{self.workload}, {self.store}"
        return f"{self.workload} over {self.ranks} rank{'s' * (self.ranks > 1)}, {self.store}"


@dataclass(frozen=True)
class Trial:
    """One peer in one section in one round."""

    round: int
    section: Section
    peer: str


def sections(workloads: Sequence[str], stores: Sequence[str], ranks: Sequence[int]) -> list[Section]:
    """All tables: every workload on every store, and W1 over so many ranks on local files."""
    found = [Section(workload, store) for store in stores for workload in workloads]
    if "W1" in workloads and "file" in stores:
        found += [Section("W1", "file", n) for n in ranks]
    return found


def size_mb(section: Section, full_mb: float) -> float:
    """The state of a section, if W1 has ``full_mb``."""
    full = RANKS_MB if section.ranks else SIZES_MB[section.workload]
    scaled = full * full_mb / SIZES_MB["W1"]
    return min(scaled, S3_MOST_MB) if section.store == "s3" else scaled


def takes_part(peer: str, section: Section) -> bool:
    """Whether it can, there."""
    if peer == DISK:
        return section.store == "file"
    entry = PEERS[peer]
    some = section.ranks or (section.store == "s3" and section.workload != "W1")
    return section.store in entry.stores and (entry.everywhere or not some)


def each_once(found: Sequence[Section], peers: Sequence[str]) -> Iterator[Trial]:
    """To see that all of it works: gpumove everywhere, its peers in the first place they can be, and over ranks."""
    seen = set()
    for section in found:
        for peer in (p for p in peers if takes_part(p, section)):
            kind = (peer, bool(section.ranks))
            if kind not in seen or peer.startswith("gpumove"):
                seen.add(kind)
                yield Trial(0, section, peer)


def trials(
    rounds: int, found: Sequence[Section], peers: Sequence[str], needed: Callable[[Section], Collection[str]]
) -> Iterator[Trial]:
    """Interleaved, and in every round in another order, so that no peer always comes first.

    All of them take part in the first round; in later ones those that are ``needed``, for which ratios are taken.
    """
    for number in range(rounds):
        for section in found:
            here = [peer for peer in [DISK, *peers] if takes_part(peer, section)]
            if number:
                wanted = needed(section)
                here = [peer for peer in here if peer in wanted]
            shift = number % len(here) if here else 0
            for peer in here[shift:] + here[:shift]:
                yield Trial(number, section, peer)
