"""From raw samples to figures: medians, ratios within a round, and whether the targets are met. Pure functions."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import median
from typing import Any

Sample = Mapping[str, Any]
"""One peer on one store in one round: what benchmarks.trial measured."""


@dataclass(frozen=True)
class Figure:
    """One column: how it is called, and which peer it is compared with."""

    name: str
    label: str
    unit: str
    base: str | None = None


FIGURES = (
    Figure("stall_s", "stall", "s", "dcp.async_save"),
    Figure("first_stall_s", "stall, first save", "s", "dcp.async_save"),
    Figure("lost_s", "training lost in all", "s", "dcp.async_save"),
    Figure("durable_s", "durable", "s", "dcp.save"),
    Figure("stored", "stored / state", "x"),
    Figure("first_peak_gb", "peak memory, first save", "GB"),
    Figure("peak_gb", "peak memory, later", "GB"),
    Figure("kept_gb", "memory kept", "GB"),
    Figure("restore_first_s", "restore, first", "s", "dcp.save"),
    Figure("restore_again_s", "restore, again", "s", "dcp.save"),
    Figure("restore_cold_s", "restore, cold", "s", "dcp.save"),
    Figure("restore_peak_gb", "peak memory of restore", "GB"),
)


@dataclass(frozen=True)
class Target:
    """What gpumove promises of one figure, as a multiple of the peer that it is compared with."""

    figure: str
    at_most: float


TARGETS = (
    Target("stall_s", 0.2),
    Target("durable_s", 1.0),
    Target("restore_first_s", 1.0),
    Target("restore_again_s", 1.0),
    Target("restore_cold_s", 1.0),
)


@dataclass(frozen=True)
class Verdict:
    """Whether something that can be met was met."""

    store: str
    peer: str
    what: str
    met: bool


def values_of(sample: Sample) -> dict[str, float]:
    """All figures of one sample; the later saves' by their median."""
    found: dict[str, float] = {}
    if save := sample.get("save"):
        first, *later = save["saves"]
        later = later or [first]
        found = {
            "first_stall_s": first["stall_s"],
            "first_peak_gb": first["peak_over_training_bytes"] / 1e9,
            "stall_s": median(r["stall_s"] for r in later),
            "lost_s": median(r["lost_s"] for r in later),
            "durable_s": median(r["durable_s"] for r in later),
            "stored": median(r["stored_bytes"] for r in later) / save["state_bytes"],
            "peak_gb": max(r["peak_over_training_bytes"] for r in later) / 1e9,
            "kept_gb": median(r["kept_bytes"] for r in later) / 1e9,
        }
    for kind, row in (sample.get("restore") or {}).items():
        # Into new objects, everything counts that a resume has to do; after that only the call that loads.
        parts = {} if kind == "first" else row["parts"]
        found[f"restore_{kind}_s"] = parts.get("load_call_s", row["restore_s"])
        if kind == "again":
            found["restore_peak_gb"] = row["peak_over_before_bytes"] / 1e9
    return found


class Table:
    """Figures by (store, peer, figure), one value per round."""

    def __init__(self, samples: Sequence[Sample]) -> None:
        self.samples = samples
        self._values: dict[tuple[str, str, str], dict[int, float]] = defaultdict(dict)
        for sample in samples:
            for name, value in values_of(sample).items():
                self._values[sample["store"], sample["peer"], name][sample["round"]] = value

    @property
    def stores(self) -> list[str]:
        return list(dict.fromkeys(s["store"] for s in self.samples))

    @property
    def peers(self) -> list[str]:
        return list(dict.fromkeys(s["peer"] for s in self.samples))

    def median(self, store: str, peer: str, figure: str) -> float | None:
        """Over the rounds."""
        found = self._values.get((store, peer, figure))
        return median(found.values()) if found else None

    def ratios(self, store: str, peer: str, figure: Figure) -> list[float]:
        """To the figure's base, round by round: what a round's other load did to one, it did to the other."""
        if figure.base is None:
            return []
        mine = self._values.get((store, peer, figure.name), {})
        base = self._values.get((store, figure.base, figure.name), {})
        return [mine[r] / base[r] for r in sorted(mine.keys() & base.keys()) if base[r] > 0]

    def summary(self) -> dict[str, Any]:
        """Everything as plain values, for the JSON."""
        found: dict[str, Any] = {}
        for store in self.stores:
            for peer in self.peers:
                row = found.setdefault(store, {}).setdefault(peer, {})
                for figure in FIGURES:
                    if (value := self.median(store, peer, figure.name)) is not None:
                        ratios = self.ratios(store, peer, figure)
                        row[figure.name] = {"median": value, "ratios": ratios, "base": figure.base}
        return found


def verdicts(table: Table) -> list[Verdict]:
    """Targets, equality of what was restored, and agreement of gpumove's own stall with the clock of the harness."""
    by_name = {figure.name: figure for figure in FIGURES}
    found = []
    for store in table.stores:
        for peer in (p for p in table.peers if p.startswith("gpumove")):
            for target in TARGETS:
                figure = by_name[target.figure]
                if ratios := table.ratios(store, peer, figure):
                    ratio = median(ratios)
                    base = "dcp.load" if target.figure.startswith("restore") else figure.base
                    what = f"{figure.label}: {ratio:.2f} of {base}, at most {target.at_most:g}"
                    found.append(Verdict(store, peer, what, ratio <= target.at_most))
            found += _own_stall(table, store, peer)
    return found + _restored(table)


def _own_stall(table: Table, store: str, peer: str) -> list[Verdict]:
    saves = [
        save
        for sample in table.samples
        if (sample["store"], sample["peer"]) == (store, peer) and sample.get("save")
        for save in sample["save"]["saves"]
    ]
    if not saves:
        return []
    off = max(abs(save["own"]["stall_s"] - save["stall_s"]) for save in saves)
    within = all(abs(s["own"]["stall_s"] - s["stall_s"]) <= max(0.005, 0.1 * s["stall_s"]) for s in saves)
    words = f"stats.stall_s is within {off * 1e3:.1f} ms of the harness's own clock"
    return [Verdict(store, peer, words, within)]


def _restored(table: Table) -> list[Verdict]:
    found = []
    for store in table.stores:
        for peer in table.peers:
            mine = [s for s in table.samples if (s["store"], s["peer"]) == (store, peer)]
            equal = [row["equal"] for s in mine for row in (s.get("restore") or {}).values()]
            failed = [s["error"] for s in mine if s.get("error")]
            found.append(Verdict(store, peer, f"{sum(equal)} of {len(equal)} restores bit for bit", all(equal)))
            if failed:
                found.append(Verdict(store, peer, f"{len(failed)} of {len(mine)} trials failed: {failed[0]}", False))
    return found
