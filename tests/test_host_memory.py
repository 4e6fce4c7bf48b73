"""How much memory there is to take, by the machine's and the container's account."""

from __future__ import annotations

from pathlib import Path

import pytest

from gpumove import Config, memory
from gpumove.save.predecessor import keeps_in_memory


def test_the_machine_has_some() -> None:
    found = memory.available_bytes()
    assert found is not None
    assert 1 << 20 < found < 1 << 50


def test_the_container_s_limit_counts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    limit, used = tmp_path / "max", tmp_path / "current"
    stat, absent = tmp_path / "stat", str(tmp_path / "absent")
    monkeypatch.setattr(memory, "_CGROUPS", ((str(limit), str(used), str(stat)), (absent, absent, absent)))
    used.write_text("3000000\n")
    limit.write_text("max\n")
    assert (memory.available_bytes() or 0) > 1 << 20
    limit.write_text("5000000\n")
    assert memory.available_bytes() == 2_000_000
    stat.write_text("anon 1000000\ninactive_file 1500000\n")
    assert memory.available_bytes() == 3_500_000, "page cache is given back when it is needed"
    stat.unlink()
    limit.write_text("1000\n")
    assert memory.available_bytes() == 0


def test_a_second_copy_is_kept_where_it_fits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("gpumove.save.predecessor.available_bytes", lambda: 800)
    assert keeps_in_memory(Config(), 200)
    assert not keeps_in_memory(Config(), 201)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    assert not keeps_in_memory(Config(), 51)
    assert keeps_in_memory(Config(predecessor_bytes=1000), 1000)
    assert not keeps_in_memory(Config(predecessor_bytes=1000), 1001)
    assert not keeps_in_memory(Config(delta=False), 1)
    assert not keeps_in_memory(Config(codec="raw"), 1)
    monkeypatch.setattr("gpumove.save.predecessor.available_bytes", lambda: None)
    assert keeps_in_memory(Config(), 1 << 40)
