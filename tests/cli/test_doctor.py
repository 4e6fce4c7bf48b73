"""doctor: sound machines and stores pass, and each thing that can be wrong gets its line and its exit code."""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from gpumove import cli, memory
from gpumove.config import Config
from gpumove.environment.fingerprint import Environment
from gpumove.estimates import probing
from gpumove.inspection import doctor, fitness
from gpumove.inspection.doctor import Check
from gpumove.store.backends import MemoryBackend, ObjectInfo
from gpumove.store.log import Log
from gpumove.store.objects import Store
from tests.runs import flip, objects, train

MACHINE = ["gpumove", "packages", "torch", "memory", "memlock", "machine", "disk", "settings"]
STORE = ["address", "reach", "run", "same job", "create-only", "write", "rate"]


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
    assert "1 checkpoint, the newest checkpoint is of step 1" in look(str(tmp_path / "run"))["run"].found
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
    assert look()["disk"].status == "ok", "the rest of the machine is looked at all the same"


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
    monkeypatch.setattr(fitness, "packages", lambda: {"numpy": "1"})
    check = look()["packages"]
    assert (check.status, check.exit_code) == ("fail", 2)
    assert "zstandard" in check.found


def test_little_memory_and_disk(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    class Usage:
        free = 10

    monkeypatch.setattr(fitness.shutil, "disk_usage", lambda _: Usage())
    account = [tmp_path / name for name in ("max", "current", "stat")]
    for file, text in zip(account, (f"{1 << 30}\n", f"{1 << 29}\n", "inactive_file 0\n")):
        file.write_text(text)
    monkeypatch.setattr(memory, "_CGROUPS", (tuple(str(file) for file in account),))
    checks = look()
    assert (checks["disk"].status, checks["memory"].status) == ("warn", "warn")
    assert checks["memory"].found.startswith("0.5 of "), "what the container has taken already is not there"
    assert checks["memory"].found.endswith(" GiB available, limited to 1.0 GiB in this container")


def test_memory_that_nothing_tells_of(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "_read", lambda path: None)
    assert "is not known" in look()["memory"].found


def test_the_folder_for_the_last_save(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("GPUMOVE_PREDECESSOR_DIR", str(tmp_path))
    assert f"free at {tmp_path}, takes" in look()["disk"].found
    assert list(tmp_path.iterdir()) == []
    monkeypatch.setattr(fitness, "_disk_rate", lambda _: 1e6)
    assert look()["disk"].status == "warn"
    monkeypatch.setenv("GPUMOVE_PREDECESSOR_DIR", str(tmp_path / "missing"))
    assert (look()["disk"].status, look()["disk"].exit_code) == ("fail", 2)


# -------------------------------------------------------------------- is it the same job?


def elsewhere(run: Path, step: int, changes: dict[str, Any]) -> None:
    """Train to this step as if on another machine; ``...`` is what its version does not record."""
    whole = Environment.now

    def now(self: Environment, **given: Any) -> dict[str, Any]:
        return {name: value for name, value in {**whole(self, **given), **changes}.items() if value is not ...}

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Environment, "now", now)
        train(str(run), [step])


def test_a_machine_like_that_of_the_run(tmp_path: Path) -> None:
    train(str(tmp_path / "run"), [1])
    check = look(str(tmp_path / "run"))["same job"]
    assert (check.status, check.details) == ("ok", ())
    assert check.found == "compared with where step 1 was saved: alike"


def test_a_machine_unlike_that_of_the_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = tmp_path / "run"
    elsewhere(run, 1, {"libc": "glibc 2.12"})
    check = look(str(run))["same job"]
    assert (check.status, check.exit_code) == ("warn", 0)
    assert check.details[0].startswith("numerics: C library: glibc 2.12 -> ")
    devices = [{"model": "X100", "count": 8, "memory_bytes": 1 << 36, "capability": "9.0", "multiprocessors": 132}]
    elsewhere(run, 2, {"devices": devices, "peak": {"device_bytes": 1 << 35}})
    assert cli.main(["doctor", str(run)]) == 2
    said = capsys.readouterr().out
    assert "FAIL same job    compared with where step 2 was saved: 1 difference by which it will not run" in said
    assert "fatal: GPUs: 8 x X100 (64.0 GiB) -> none: the job has trained on GPUs, and torch finds none here" in said
    assert "ok   rate" in said, "the store is looked at all the same"
    code, found = first_failure(str(run), capsys)
    assert (code, found["name"], found["facts"]["step"]) == (2, "same job", 2)
    assert {"field", "before", "after", "grade", "why", "what_to_do"} == set(found["facts"]["differences"][0])


def test_a_run_of_version_0_1(tmp_path: Path) -> None:
    new = ("libc", "processor", "driver", "cuda", "hip", "cudnn", "nccl", "devices", "torch", "script", "variables")
    more = ("peak", "world_size", "ranks_here", "interop_threads")
    elsewhere(tmp_path / "run", 1, dict.fromkeys((*new, *more), ...))
    check = look(str(tmp_path / "run"))["same job"]
    assert check.status == "warn"
    (told,) = check.details
    assert told.startswith("unknown: what cannot be compared")
    assert "processor, vector instructions, C library" in told


def test_the_fingerprint_for_programs_and_for_people(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["doctor", "--json"]) == 0
    checks = {c["name"]: c for c in json.loads(capsys.readouterr().out)["checks"]}
    assert checks["machine"]["facts"]["processor"]["cores"] >= 1
    assert "threads" not in checks["machine"]["facts"], "that is the job's to set"
    assert cli.main(["doctor"]) == 0
    assert re.search(r"ok   machine .*\n +python: 3.*\n +devices: ", capsys.readouterr().out)


def test_bandwidth(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(probing, "_OBJECT_BYTES", 100_000)
    assert cli.main(["doctor", str(tmp_path / "new"), "--probe"]) == 0
    assert "ok   bandwidth   64 MB go there at" in capsys.readouterr().out
    assert Store.open(str(tmp_path / "new"), Config()).list("") == []
    assert cli.main(["doctor", "--probe"]) == 0
    assert "bandwidth" not in capsys.readouterr().out, "there is no store to measure"


def test_a_store_that_cannot_be_reached_leaves_the_rest(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("GPUMOVE_RETRY_S", "0.2")
    monkeypatch.setenv("GPUMOVE_DEADLINE_S", "0.2")
    options = ["--option", "endpoint_url=http://127.0.0.1:1", "--option", "key=a", "--option", "secret=b"]
    assert cli.main(["doctor", "s3://nowhere/run", "--probe", *options]) == 10
    said = capsys.readouterr().out
    assert "ok   machine" in said
    assert "FAIL reach" in said
    assert "bandwidth" not in said, "it is not waited for a second time"


def test_a_store_that_does_not_list(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    harmed(monkeypatch, "page", lambda whole, self, *args: ([], None))
    code, found = first_failure("memory://doctor/unlisted", capsys)
    assert (code, found["name"]) == (10, "write")
    assert "is not listed" in found["found"]
