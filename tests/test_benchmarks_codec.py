"""The codec benchmark in its tiny form: states are made, coded by everybody, and come back bit for bit."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from benchmarks import codecs, steps
from benchmarks.codec import peers, ratios
from benchmarks.codec.regimes import BY_NAME, QUICK
from benchmarks.codec.states import Family, Member, States


def test_the_tiny_form_measures_sizes_and_speeds(tmp_path: Path) -> None:
    assert codecs.main(["--quick", "--rounds", "1", "--regimes", "mixed,lora", "--out", str(tmp_path)]) == 0
    found = json.loads((tmp_path / "codecs_quick.json").read_text())
    dense = {(row["regime"], row["distance"], row["codec"]): row["dense"] for row in found["sizes"]}
    one = dense["mixed", 1, "gpumove"]
    assert one < 0.3 < dense["mixed", 1, "gpumove sub"] < dense["mixed", 1, "xor + zstd 3"]
    assert dense["mixed", 0, "gpumove base"] < dense["mixed", 0, "zstd 3"]
    assert dense["lora", 10, "gpumove"] < 0.5 * dense["mixed", 10, "gpumove"]
    assert {row["codec"] for row in found["speeds"]} >= {"gpumove base", "gpumove, 1 step", "zstd 1"}
    assert any("WRONG" not in v["what"] and "bit for bit" in v["what"] for v in found["verdicts"])


def test_states_are_made_once_and_the_same_each_time(tmp_path: Path) -> None:
    said: list[str] = []
    states = [States(tmp_path / name, QUICK, distances=(1, 2), say=said.append) for name in ("a", "a", "b")]
    found = [s.families(BY_NAME["sgd"], 2) for s in states]
    assert sum("SGD" in words for words in said) == 2
    for family, *others in zip(*found):
        assert all([m.new for m in o.members] == [m.new for m in family.members] for o in others)
    assert any(m.new != m.old for family in found[0] for m in family.members)
    assert found[0][0].now["step"] - found[0][0].before["step"] == 2


class _Damaging(peers.Zstd):
    def encode(self, ready: list[tuple[memoryview, memoryview]]) -> list[bytes]:
        changed = [(old, memoryview(bytes(len(new)))) for old, new in ready]
        return super().encode(changed)


def test_other_bytes_are_noticed() -> None:
    data = memoryview(np.arange(100, dtype=np.float32)).cast("B")
    family = Family("weight", (Member("parameter", "float32", 4, data, data),), {}, {})
    assert ratios.measure("none", 1, peers.make("zstd 1"), [family]).wrong == []
    total = ratios.measure("none", 1, _Damaging("zstd 1", 1), [family])
    assert total.wrong == ["weight parameter"]
    assert next(codecs.exact_verdicts([total], [])).met is False


@pytest.mark.parametrize("settings", ["auto", "small; small, no delta; raw"])
def test_a_save_at_every_step_comes_back(tmp_path: Path, settings: str) -> None:
    options = ["--tiny", "--steps", "4", "--turn", "2", "--stores", "file", "--restores", "1"]
    assert steps.main([*options, "--settings", settings, "--out", str(tmp_path)]) == 0
    (runs,) = json.loads((tmp_path / "steps_tiny.json").read_text())["stores"].values()
    assert all(len(run["new_bytes"]) == 4 and all(run["restored"].values()) for run in runs)
    assert not list(tmp_path.glob("scratch-*"))
