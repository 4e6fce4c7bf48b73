"""doctor: sound machines and stores pass, and each thing that can be wrong gets its line and its exit code."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from gpumove import cli
from gpumove.config import Config
from gpumove.inspection import doctor
from gpumove.inspection.doctor import Check
from gpumove.store.backends import MemoryBackend, ObjectInfo
from gpumove.store.log import Log
from gpumove.store.objects import Store
from tests.runs import flip, objects, train

MACHINE = ["gpumove", "packages", "torch", "memory", "memlock", "disk", "settings"]
STORE = ["address", "reach", "run", "create-only", "write", "rate"]


def look(url: str | None = None) -> dict[str, Check]:
    return {check.name: check for check in doctor.doctor(url)}


def test_the_machine_alone() -> None:
    checks = look()
    assert list(checks) == MACHINE
    assert {c.status for c in checks.values()} <= {"ok", "warn"}


@pytest.mark.parametrize("scheme", ["file", "memory"])
def test_a_store_without_a_run(scheme: str, tmp_path: Path) -> None:
    url = str(tmp_path / "new") if scheme == "file" else "memory://doctor/new"
    checks = look(url)
    assert list(checks) == MACHINE + STORE
    assert {checks[name].status for name in STORE} == {"ok"}
    assert "none lies here" in checks["run"].found
    assert Store.open(url, Config()).list("") == []


def test_a_run_is_read_and_left_alone(tmp_path: Path) -> None:
    train(str(tmp_path / "run"), [1])
    before = objects(tmp_path / "run")
    assert "1 checkpoints, the newest checkpoint is of step 1" in look(str(tmp_path / "run"))["run"].found
    assert objects(tmp_path / "run") == before


def first_failure(url: str, capsys: pytest.CaptureFixture[str]) -> tuple[int, dict[str, Any]]:
    code = cli.main(["doctor", url, "--json"])
    return code, next(c for c in json.loads(capsys.readouterr().out)["checks"] if c["status"] == "fail")


def test_a_damaged_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    Log(Store.open(str(tmp_path), Config())).open(create=True)
    flip(tmp_path / "format.json", 20)
    code, found = first_failure(str(tmp_path), capsys)
    assert (code, found["name"]) == (20, "run")
    assert look(str(tmp_path))["rate"].status == "ok", "the store itself is sound"


def test_addresses_that_cannot_be(capsys: pytest.CaptureFixture[str]) -> None:
    code, found = first_failure("nonsense://somewhere", capsys)
    assert (code, found["name"]) == (2, "address")
    assert cli.main(["doctor", "nonsense://somewhere"]) == 2
    assert "FAIL address" in capsys.readouterr().out


def test_settings_that_cannot_be(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv("GPUMOVE_WORKERS", "many")
    code, found = first_failure("memory://doctor/x", capsys)
    assert (code, found["name"]) == (2, "settings")


def test_a_place_that_cannot_be_written(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "file").write_text("")
    code, found = first_failure(str(tmp_path / "file" / "below"), capsys)
    assert (code, found["name"]) == (10, "run")


def harmed(monkeypatch: pytest.MonkeyPatch, name: str, change: Callable[..., Any]) -> None:
    """Change one call of the memory store."""
    whole = getattr(MemoryBackend, name)
    monkeypatch.setattr(MemoryBackend, name, lambda self, *args: change(whole, self, *args))


def test_a_store_that_creates_twice(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    harmed(monkeypatch, "create", lambda _, self, key, data, s: self.put(key, [memoryview(data)], s))
    code, found = first_failure("memory://doctor/twice", capsys)
    assert (code, found["name"]) == (10, "create-only")


def test_a_store_that_changes_what_it_holds(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    harmed(monkeypatch, "put", lambda whole, self, key, data, s: whole(self, key, [b"x", *data[1:]], s))
    code, found = first_failure("memory://doctor/changed", capsys)
    assert (code, found["name"]) == (20, "write")


def test_a_store_that_does_not_delete(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    harmed(monkeypatch, "delete", lambda whole, self, keys, s: None)
    code, found = first_failure("memory://doctor/kept", capsys)
    assert (code, found["name"]) == (10, "write")


def test_a_clock_that_is_off(monkeypatch: pytest.MonkeyPatch) -> None:
    def later(whole: Any, self: MemoryBackend, key: str, s: float) -> ObjectInfo | None:
        info = whole(self, key, s)
        return info and info._replace(mtime=info.mtime + 90)

    harmed(monkeypatch, "info", later)
    check = look("memory://doctor/clock")["write"]
    assert check.status == "warn"
    assert "the store's clock is +90.0 s" in check.found
    assert cli.main(["doctor", "memory://doctor/clock"]) == 0


def test_a_machine_without_torch(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setitem(sys.modules, "torch", None)
    assert look()["torch"].status == "warn"
    assert cli.main(["doctor"]) == 0
    assert "install torch to save and restore" in capsys.readouterr().out


def test_a_package_that_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "packages", lambda: {"numpy": "1"})
    check = look()["packages"]
    assert (check.status, check.exit_code) == ("fail", 2)
    assert "zstandard" in check.found


def test_little_memory_and_disk(monkeypatch: pytest.MonkeyPatch) -> None:
    class Usage:
        free = 10

    monkeypatch.setattr(doctor.shutil, "disk_usage", lambda _: Usage())
    monkeypatch.setattr(doctor, "_container_limit", lambda: 1 << 30)
    checks = look()
    assert (checks["disk"].status, checks["memory"].status) == ("warn", "warn")
    assert "limited to 1.0 GiB" in checks["memory"].found
