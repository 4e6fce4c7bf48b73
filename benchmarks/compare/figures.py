"""From raw samples to figures: medians over the rounds, and ratios within a round. Pure functions."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import median
from typing import Any

from benchmarks.compare.plan import Section

Sample = Mapping[str, Any]
"""One peer in one section in one round: what benchmarks.compare.trial measured."""


@dataclass(frozen=True)
class Figure:
    """One column: how it is called, its unit, and which peer's it is shown as a multiple of."""

    name: str
    label: str
    unit: str
    base: str | None = None


FIGURES = (
    Figure("stall_s", "stall", "s", "dcp.async_save"),
    Figure("first_stall_s", "stall, first save", "s"),
    Figure("lost_s", "training lost in all", "s", "dcp.async_save"),
    Figure("durable_s", "durable", "s", "dcp.save"),
    Figure("first_durable_s", "durable, first save", "s"),
    Figure("idle_s", "durable, training waits", "s", "dcp.save"),
    Figure("stored", "stored / state", "x"),
    Figure("peak_gb", "peak memory", "GB"),
    Figure("restore_first_s", "restore, first", "s", "dcp.save"),
    Figure("restore_again_s", "restore, again", "s", "dcp.save"),
    Figure("restore_cold_s", "restore, cold", "s", "dcp.save"),
    Figure("restore_peak_gb", "peak memory of restore", "GB"),
    Figure("plan_s", "planning", "s"),
)


def values_of(sample: Sample) -> dict[str, float]:
    """All figures of one sample; the later saves' by their median."""
    found: dict[str, float] = {}
    if "disk_s" in sample:
        found = {"durable_s": sample["disk_s"], "idle_bytes_per_s": 1e6 * sample["size_mb"] / sample["disk_s"]}
    if save := sample.get("save"):
        found |= _of_saves(save)
    for kind, row in (sample.get("restore") or {}).items():
        # Into new objects, everything counts that a resume has to do; after that only the call that loads.
        parts = {} if kind == "first" else row["parts"]
        found[f"restore_{kind}_s"] = parts.get("load_call_s", row["restore_s"])
        if kind == "again":
            found["restore_peak_gb"] = row["peak_over_before_bytes"] / 1e9
    return found


def _of_saves(save: Mapping[str, Any]) -> dict[str, float]:
    first, *later = save["saves"]
    found = {name: median(row[name] for row in later) for name in ("stall_s", "lost_s", "durable_s")}
    plans = [row["own"]["plan_s"] for row in later if "plan_s" in row["own"]]
    if plans:
        found["plan_s"] = median(plans)
    if "idle_s" in save:
        found |= {"idle_s": save["idle_s"], "idle_bytes_per_s": save["state_bytes"] / save["idle_s"]}
    peak = max(row["peak_over_training_bytes"] for row in save["saves"])
    stored = median(row["stored_bytes"] for row in later)
    return found | {
        "first_stall_s": first["stall_s"],
        "first_durable_s": first["durable_s"],
        "later_durable": later[0]["durable_s"] / first["durable_s"],
        "later_stored": later[0]["stored_bytes"] / max(1, first["stored_bytes"]),
        "stored": stored / save["state_bytes"],
        "peak_gb": peak / 1e9,
        "first_peak_gb": first["peak_over_training_bytes"] / 1e9,
        "kept_gb": median(row["kept_bytes"] for row in later) / 1e9,
        "state_gb": save["largest_rank_bytes"] / 1e9,
    }


class Table:
    """Figures by (section, peer, figure), one value per round."""

    def __init__(self, samples: Sequence[Sample]) -> None:
        self.samples = samples
        self._values: dict[tuple[Section, str, str], dict[int, float]] = defaultdict(dict)
        for sample in samples:
            for name, value in values_of(sample).items():
                self._values[section_of(sample), sample["peer"], name][sample["round"]] = value

    @property
    def sections(self) -> list[Section]:
        return list(dict.fromkeys(section_of(s) for s in self.samples))

    def of(self, section: Section, peer: str | None = None) -> list[Sample]:
        """The samples of one section, and peer."""
        return [s for s in self.samples if section_of(s) == section and peer in (None, s["peer"])]

    def peers(self, section: Section) -> list[str]:
        """Those that took part, in the order of the first round."""
        return list(dict.fromkeys(s["peer"] for s in self.of(section)))

    def values(self, section: Section, peer: str, figure: str) -> Mapping[int, float]:
        """By round."""
        return self._values.get((section, peer, figure), {})

    def median(self, section: Section, peer: str, figure: str) -> float | None:
        """Over the rounds."""
        found = self.values(section, peer, figure)
        return median(found.values()) if found else None

    def ratios(self, section: Section, peer: str, figure: str, bases: Sequence[str]) -> list[float]:
        """To the best of some peers, round by round: what a round's other load did to one, it did to the other."""
        found = []
        for number, mine in sorted(self.values(section, peer, figure).items()):
            others = [self.values(section, base, figure).get(number) for base in bases]
            known = [other for other in others if other is not None]
            if known and min(known) > 0:
                found.append(mine / min(known))
        return found

    def summary(self) -> dict[str, Any]:
        """Everything as plain values, for the JSON."""
        found: dict[str, Any] = {}
        for (section, peer, name), by_round in self._values.items():
            row = found.setdefault(str(section), {}).setdefault(peer, {})
            row[name] = {"median": median(by_round.values()), "rounds": list(by_round.values())}
        return found


def section_of(sample: Sample) -> Section:
    """Where it belongs."""
    return Section(sample["workload"], sample["store"], sample["ranks"])
