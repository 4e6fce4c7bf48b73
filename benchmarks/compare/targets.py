"""What gpumove has to reach beside its peers, and whether it did. Pure functions of the table."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from statistics import median

from benchmarks.compare.figures import Table
from benchmarks.compare.peers import PEERS
from benchmarks.compare.plan import DISK, Section
from benchmarks.report import Verdict

OURS, RAW = "gpumove", "gpumove-raw"
BOTH = (OURS, RAW)
_LOAD = "dcp.load"
ASYNC = ("dcp.async_save",)
BEST_ASYNC = tuple(name for name in PEERS if name.startswith("dcp.async_save"))
_BUDGET_GB = 256 * (1 << 20) / 1e9
_SLACK_GB = {"file": 0.048, "s3": 0.068}
"""Threads' heaps; on S3 the client's session."""


@dataclass(frozen=True)
class Target:
    """One figure of ours, at most: so many times the best of the others, or so much if there are none."""

    workload: str
    store: str
    figure: str
    at_most: float
    words: str
    ours: Sequence[str] = BOTH
    others: Sequence[str] = ()


TARGETS = (
    Target("W1", "file", "stall_s", 0.05, "stall, of dcp.async_save as it comes", others=ASYNC),
    Target("W1", "file", "stall_s", 0.5, "stall, of dcp.async_save's best variant", others=BEST_ASYNC),
    Target("W3", "file", "stall_s", 0.020, "stall, seconds"),
    Target("W1", "file", "lost_s", 0.35, "training lost, of dcp.async_save as it comes", (RAW,), ASYNC),
    Target("W1", "file", "lost_s", 0.6, "training lost, of dcp.async_save's best variant", (RAW,), BEST_ASYNC),
    Target("W1", "file", "durable_s", 0.75, "durable, of dcp.save with 2 threads", (RAW,), ("dcp.save+2threads",)),
    Target("W1", "s3", "durable_s", 0.5, "durable, of dcp.save with its fsspec writer", (RAW,), ("dcp.save",)),
    Target("W1", "file", "restore_again_s", 0.5, f"restore, warm, of {_LOAD}", others=("dcp.save",)),
    Target("W1", "s3", "restore_again_s", 0.4, f"restore, of {_LOAD}", others=("dcp.save",)),
    Target("W2", "file", "later_stored", 0.12, "second save's bytes, of the first's"),
    Target("W2", "file", "later_durable", 0.25, "second save durable, of the first's time"),
)
_PLANNING_S = 0.005


def needed(section: Section) -> set[str]:
    """The peers that targets of a section refer to."""
    if section.ranks:
        return {*BOTH, DISK}
    found = {
        peer
        for target in TARGETS
        if (target.workload, target.store) == (section.workload, section.store)
        for peer in (*target.ours, *target.others)
    }
    return found | {DISK} if found else found


def verdicts(table: Table) -> list[Verdict]:
    """Of what was measured; what was not is left out."""
    found = [verdict for target in TARGETS for verdict in _of_target(table, target)]
    for section in table.sections:
        found += _of_memory(table, section)
        found += _of_planning(table, section)
    return found + list(_of_ranks(table))


def _of_target(table: Table, target: Target) -> Iterator[Verdict]:
    section = Section(target.workload, target.store)
    for peer in target.ours:
        if target.others:
            ratios = table.ratios(section, peer, target.figure, target.others)
        else:
            ratios = list(table.values(section, peer, target.figure).values())
        if ratios:
            value = median(ratios)
            what = f"{target.words}: {value:.3f}, at most {target.at_most:g}"
            yield Verdict(str(section), peer, what, value <= target.at_most)


def _of_memory(table: Table, section: Section) -> Iterator[Verdict]:
    """The staged copy, its predecessor where differences are made, and the budget."""
    for peer in BOTH:
        peak, state = (table.median(section, peer, name) for name in ("peak_gb", "state_gb"))
        if peak is None or state is None:
            continue
        copies = 2 if peer == OURS else 1
        most = copies * state + _BUDGET_GB + _SLACK_GB[section.store]
        copy = "copy" if copies == 1 else "copies"
        what = f"peak memory {peak:.2f} GB, at most {most:.2f} ({copies} staged {copy}, the budget, threads' heaps)"
        yield Verdict(str(section), peer, what, peak <= most)


def _of_planning(table: Table, section: Section) -> Iterator[Verdict]:
    for peer in BOTH:
        if section.ranks and (seconds := table.median(section, peer, "plan_s")) is not None:
            what = f"planning of an unchanged layout {1e3 * seconds:.1f} ms, at most {1e3 * _PLANNING_S:.0f}"
            yield Verdict(str(section), peer, what, seconds <= _PLANNING_S)


def _of_ranks(table: Table) -> Iterator[Verdict]:
    """Bytes per second to durable: many ranks together are not slower than one, unless the disk is."""
    sharded = sorted((s for s in table.sections if s.ranks), key=lambda s: s.ranks)
    for many in sharded[1:]:
        one = sharded[0]
        for peer in BOTH:
            shares = _shares(table, one, many, peer)
            if one.ranks == 1 and shares:
                rate, disk = (median(column) for column in zip(*shares))
                what = f"bytes per second while training waits, of one rank's: {rate:.2f} (the disk: {disk:.2f})"
                met = median(rate / min(1.0, disk) for rate, disk in shares) >= 1.0
                yield Verdict(str(many), peer, what, met)


def _shares(table: Table, one: Section, many: Section, peer: str) -> list[tuple[float, float]]:
    """Per round: our rate with many ranks over that with one, and the same of the disk."""
    rates = [table.values(section, who, "idle_bytes_per_s") for who in (peer, DISK) for section in (many, one)]
    rounds = sorted(set.intersection(*(set(r) for r in rates)))
    return [(rates[0][n] / rates[1][n], rates[2][n] / rates[3][n]) for n in rounds]


def checks(table: Table) -> list[Verdict]:
    """What must be so of gpumove whatever the machine: restores bit for bit, no failure, and an honest stall."""
    found = []
    for section in table.sections:
        for peer in table.peers(section):
            if peer == DISK:
                continue
            samples = table.of(section, peer)
            rows = [row for s in samples for row in (s.get("restore") or {}).values()]
            exact = sum(not row["unequal"] for row in rows)
            failed = [s["error"] for s in samples if s.get("error")]
            if rows:
                words = f"{exact} of {len(rows)} restores bit for bit"
                found.append(Verdict(str(section), peer, words, exact == len(rows)))
            if failed:
                words = f"{len(failed)} of {len(samples)} trials failed: {failed[0]}"
                found.append(Verdict(str(section), peer, words, met=False))
            if peer in BOTH:
                found += _own_stall(table, section, peer)
    return found


def _own_stall(table: Table, section: Section, peer: str) -> list[Verdict]:
    saves = [save for sample in table.of(section, peer) if sample.get("save") for save in sample["save"]["saves"]]
    if not saves:
        return []
    off = [abs(save["own"]["stall_s"] - save["stall_s"]) for save in saves]
    within = all(o <= max(0.005, 0.1 * save["stall_s"]) for o, save in zip(off, saves))
    words = f"stats.stall_s is within {max(off) * 1e3:.1f} ms of the harness's own clock"
    return [Verdict(str(section), peer, words, within)]
