"""Fingerprints of real processes: what differs on purpose is seen, and nothing else. Commits of real repositories."""

from __future__ import annotations

import json
import logging
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

import gpumove
from gpumove.environment import fingerprint as fingerprints
from gpumove.environment import torch_facts
from gpumove.environment.compare import compare, same_devices
from gpumove.environment.fingerprint import Environment, fingerprint, machine
from gpumove.environment.git import commit_of
from gpumove.environment.variables import shown
from gpumove.format.codec import digest
from tests.jobs import new_job
from tests.runs import train

LOOK = """
import json, os, sys, torch
{setup}
from gpumove.environment.fingerprint import fingerprint
print(json.dumps(fingerprint(world_size=int(os.environ.get("WORLD_SIZE", "1")))))
"""


def look(folder: Path, setup: str = "", **variables: str) -> dict[str, Any]:
    """The fingerprint of a process of its own."""
    script = folder / "look.py"
    script.write_text(LOOK.format(setup=setup))
    plain = {name: value for name, value in os.environ.items() if not name.startswith(("OMP_", "MKL_", "NCCL_"))}
    done = subprocess.run(
        [sys.executable, str(script)], env={**plain, **variables}, capture_output=True, text=True, timeout=120,
        check=True,
    )  # fmt: skip
    found: dict[str, Any] = json.loads(done.stdout)
    return found


def test_processes_that_differ_on_purpose(tmp_path: Path) -> None:
    plain, again = look(tmp_path), look(tmp_path)
    assert compare(plain, again) == []
    assert same_devices(plain, again) is True
    setup = (
        "import numpy; torch.set_num_threads(3); torch.set_float32_matmul_precision('medium')\n"
        "torch.use_deterministic_algorithms(True); torch.set_default_dtype(torch.float64)\n"
        "torch.compile(torch.nn.Linear(2, 2), backend='eager')(torch.ones(1, 2))"
    )
    other = look(tmp_path, setup, WORLD_SIZE="4", LOCAL_WORLD_SIZE="2", MKL_CBWR="AVX2", HF_TOKEN="planted")
    found = {d.field: (d.before, d.after) for d in compare(plain, other) if d.grade == "numerics"}
    threads = plain["threads"]
    assert found.pop("script")[0].startswith("look.py (")
    assert found == {
        "ranks": ("1", "4"), "threads of an operation": (str(threads), "3"), "matmul precision": ("highest", "medium"),
        "deterministic algorithms": ("off", "on"), "default dtype": ("float32", "float64"),
        "MKL_CBWR": ("not set", "AVX2"), "torch.compile": ("off", "on"),
    }  # fmt: skip
    assert other["ranks_here"] == 2
    assert "planted" not in json.dumps(other)


@pytest.fixture
def as_before() -> Iterator[None]:
    threads, precision = torch.get_num_threads(), torch.get_float32_matmul_precision()
    yield
    torch.set_num_threads(threads)
    torch.set_float32_matmul_precision(precision)


def test_flags_are_read_anew_and_threads_are_those_of_the_training(as_before: None) -> None:
    """OpenMP's number of threads belongs to a thread; the one that looks is not the one that trains."""
    environment = Environment()
    seen: list[dict[str, Any]] = []

    def look_at_it() -> None:
        for _ in range(2):
            torch.get_num_threads()  # this thread has its own number from here on
            seen.append(environment.now())
            ready.set()
            go.wait(30)

    ready, go = threading.Event(), threading.Event()
    background = threading.Thread(target=look_at_it)
    background.start()
    assert ready.wait(30)
    other = torch.get_num_threads() + 1
    torch.set_num_threads(other)
    torch.set_float32_matmul_precision("high")
    go.set()
    background.join(30)
    assert [s["torch"]["matmul_precision"] for s in seen] == ["highest", "high"]
    assert [s["threads"] for s in seen] == [other - 1, other]


def test_flags_that_raise_are_not_known(as_before: None) -> None:
    """Torch refuses to tell where its older and its newer names were mixed."""
    matmul = torch.backends.cuda.matmul
    if not hasattr(matmul, "fp32_precision"):
        pytest.fail("this torch has no fp32_precision: take another flag for this test")
    before = matmul.fp32_precision
    matmul.fp32_precision = "tf32"
    try:
        flags = torch_facts.flags(torch)
    finally:
        matmul.fp32_precision = before
    assert flags["matmul_fp32"] == "tf32"
    assert "matmul_precision" not in flags
    assert flags["default_dtype"] == "float32"


def test_without_torch_there_is_no_flag_and_no_import(tmp_path: Path) -> None:
    code = (
        "import sys, json; from gpumove.environment.fingerprint import fingerprint, machine; "
        "print(json.dumps([fingerprint(world_size=1), machine()])); assert 'torch' not in sys.modules"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True)
    for found in json.loads(done.stdout):
        assert not {"torch", "devices", "threads", "cuda", "script"} & set(found)
        assert found["processor"]["memory_bytes"] > 0


def test_what_cannot_be_looked_at_is_left_out(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def broken(*_: object) -> None:
        raise RuntimeError("the driver is upset")

    for name in ("get_float32_matmul_precision", "get_num_interop_threads"):
        monkeypatch.setattr(torch, name, broken)
    monkeypatch.setattr(torch.backends.cudnn, "version", broken)
    monkeypatch.setattr(fingerprints, "total_bytes", broken)
    found = fingerprint()
    assert "cudnn" not in found
    assert "interop_threads" not in found
    assert "matmul_precision" not in found["torch"]
    assert "memory_bytes" not in found["processor"]
    assert found["python"]


@pytest.mark.parametrize(
    ("text", "version"),
    [
        ("NVRM version: NVIDIA UNIX x86_64 Kernel Module  535.161.08  Sat Feb 17 22:55:48 UTC 2024", "535.161.08"),
        ("NVRM version: NVIDIA UNIX Open Kernel Module for x86_64  570.124.06  Release Build", "570.124.06"),
    ],
)
def test_the_driver(text: str, version: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "version").write_text(f"{text}\nGCC version: gcc version 12.3.0\n")
    monkeypatch.setattr(fingerprints, "_DRIVER", tmp_path / "version")
    assert machine()["driver"] == version
    (tmp_path / "version").write_text("something else\n")
    assert "driver" not in machine(), "not known is not none"
    monkeypatch.setattr(fingerprints, "_DRIVER", tmp_path / "missing")
    assert machine()["driver"] is None


def test_devices_are_told_by_kind_and_never_woken() -> None:
    """On a machine without any: what torch would say of eight, of two kinds."""
    eight = [
        SimpleNamespace(name="X", total_memory=i // 4, major=9, minor=0, multi_processor_count=132) for i in range(8)
    ]
    cuda = SimpleNamespace(
        is_initialized=lambda: True, is_available=lambda: True, device_count=lambda: 8,
        get_device_properties=eight.__getitem__,
        memory_stats=lambda i: {"allocated_bytes.all.peak": i, "reserved_bytes.all.peak": 10 * i},
    )  # fmt: skip
    stand_in = SimpleNamespace(cuda=cuda)
    kind = {"model": "X", "capability": "9.0", "multiprocessors": 132, "count": 4}
    assert torch_facts.devices(stand_in, look=False) == [{**kind, "memory_bytes": 0}, {**kind, "memory_bytes": 1}]
    assert torch_facts.peaks(stand_in, 8) == {"device_bytes": 7, "reserved_bytes": 70}
    cuda.is_initialized = lambda: False
    assert torch_facts.devices(stand_in, look=False) == []
    assert len(torch_facts.devices(stand_in, look=True)) == 2
    assert torch_facts.peaks(stand_in, 8) == {}


@pytest.mark.parametrize(("number", "version"), [(8902, "8.9.2"), (90100, "9.1.0"), (91002, "9.10.2"), (None, None)])
def test_versions_of_cudnn(number: int | None, version: str | None) -> None:
    assert torch_facts._cudnn(number) == version


def test_variables_that_are_shown() -> None:
    told = shown({
        "OMP_NUM_THREADS": "4", "NCCL_ALGO": "Ring,Tree", "AWS_SECRET_ACCESS_KEY": "planted", "HF_TOKEN": "planted",
        "MKL_CBWR": "s3://me:planted@host", "NCCL_PROTO": "x" * 200, "CUDA_VISIBLE_DEVICES": "GPU-1234,GPU-5678",
        "PYTORCH_ALLOC_CONF": "max_split_size_mb:512,garbage_collection_threshold:0.6",
    })  # fmt: skip
    assert told == {
        "OMP_NUM_THREADS": "4", "NCCL_ALGO": "Ring,Tree", "CUDA_VISIBLE_DEVICES": "2 named",
        "MKL_CBWR": "set, to what is not shown", "NCCL_PROTO": "set, to what is not shown",
        "PYTORCH_ALLOC_CONF": "max_split_size_mb:512,garbage_collection_threshold:0.6",
    }  # fmt: skip


# -------------------------------------------------------------------- the script's repository


def git(folder: Path, *words: str) -> str:
    who = ("-c", "user.name=a", "-c", "user.email=a@b", "-c", "commit.gpgsign=false")
    env = {k: v for k, v in os.environ.items() if not k.startswith("GIT_")} | {"GIT_CONFIG_GLOBAL": os.devnull}
    return subprocess.run(["git", *who, *words], cwd=folder, env=env, capture_output=True, text=True, check=True).stdout


def test_the_commit_is_what_git_says(tmp_path: Path) -> None:
    home = tmp_path / "repository"
    (home / "deep" / "er").mkdir(parents=True)
    git(home, "init", "-q", "-b", "main")
    with pytest.raises(ValueError, match="no refs/heads/main"):
        commit_of(home)
    git(home, "commit", "-q", "--allow-empty", "-m", "one")

    def check(folder: Path) -> None:
        assert commit_of(folder) == git(folder, "rev-parse", "HEAD").strip()

    check(home / "deep" / "er")
    git(home, "pack-refs", "--all")
    check(home)
    git(home, "commit", "-q", "--allow-empty", "-m", "two")  # now it is in both, and the loose one counts
    check(home)
    git(home, "worktree", "add", "-q", "-b", "a/branch", str(tmp_path / "tree"))
    git(tmp_path / "tree", "commit", "-q", "--allow-empty", "-m", "three")
    check(tmp_path / "tree")
    git(home, "pack-refs", "--all")
    check(tmp_path / "tree")
    assert commit_of(tmp_path / "tree") != commit_of(home)
    git(home, "checkout", "-q", "--detach", "HEAD")
    check(home)
    assert commit_of(tmp_path) is None


def test_repositories_that_are_none(tmp_path: Path) -> None:
    (tmp_path / ".git").write_text("gitdir: elsewhere\n")
    with pytest.raises((OSError, ValueError)):
        commit_of(tmp_path)
    (tmp_path / ".git").write_text("rubbish")
    with pytest.raises(ValueError, match="not a link"):
        commit_of(tmp_path)
    (tmp_path / ".git").unlink()
    (tmp_path / ".git").mkdir()
    for head in ("ref: refs/heads/../../../../etc/passwd", "ref: refs/heads/.invalid", "ref: HEAD", "", "not a commit"):
        (tmp_path / ".git" / "HEAD").write_text(head)
        with pytest.raises(ValueError, match="no"):
            commit_of(tmp_path)


# -------------------------------------------------------------------- in manifests, and at a restore


def test_every_manifest_has_one(tmp_path: Path) -> None:
    train(str(tmp_path / "run"), [1])
    (path,) = (tmp_path / "run" / "manifests").iterdir()
    found = json.loads(path.read_bytes())["fingerprint"]
    assert found["world_size"] == 1
    assert found["devices"] == [] if not torch.cuda.is_initialized() else found["devices"]
    assert found["torch"]["matmul_precision"] == torch.get_float32_matmul_precision()
    assert found["threads"] == torch.get_num_threads()
    assert found["peak"]["host_bytes"] > 50 << 20
    assert found["packages"]["torch"] == torch.__version__
    assert len(json.dumps(found)) < 4000


def resumed(url: str, caplog: pytest.LogCaptureFixture) -> list[tuple[int, str]]:
    caplog.clear()
    with caplog.at_level(logging.INFO, logger="gpumove"):
        job = new_job()
        with gpumove.Checkpointer(url, **job.parts(), every_s=None) as ckpt:
            assert ckpt.restore() == 2
    return [(r.levelno, r.getMessage()) for r in caplog.records if "not as it was" in r.getMessage()]


def test_a_restore_says_once_what_is_not_as_it_was(
    tmp_path: Path, as_before: None, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    url, job = str(tmp_path / "run"), new_job()
    with gpumove.Checkpointer(url, **job.parts(), every_s=None) as ckpt:
        job.train(ckpt.restore(), 2, ckpt)
        ckpt.save(2).wait(60)
    assert resumed(url, caplog) == [], "nothing has changed, so nothing is said"
    monkeypatch.setenv("OMP_PROC_BIND", "close")
    ((level, text),) = resumed(url, caplog)
    assert level == logging.INFO
    assert text.splitlines()[0] == "what is not as it was when step 2 was saved:"
    torch.set_num_threads(torch.get_num_threads() + 1)
    torch.set_float32_matmul_precision("high")
    ((level, text),) = resumed(url, caplog)
    assert level == logging.WARNING
    assert [line.split(":")[0].strip() for line in text.splitlines()[1:]] == ["numerics", "numerics", "speed"]
    assert "threads of an operation" in text
    assert "matmul precision: highest -> high" in text
    assert "[set it alike: torch.set_float32_matmul_precision()]" in text, "what to do about it is said, too"


def test_a_fingerprint_that_nobody_can_read_costs_no_restore(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    url, job = str(tmp_path / "run"), new_job()
    monkeypatch.setattr(Environment, "now", lambda self, **_: {"devices": 3, "torch": [], "packages": "none"})
    with gpumove.Checkpointer(url, **job.parts(), every_s=None) as ckpt:
        job.train(ckpt.restore(), 2, ckpt)
        ckpt.save(2).wait(60)
    monkeypatch.undo()
    with gpumove.Checkpointer(url, **new_job().parts(), every_s=None) as ckpt:
        assert ckpt.restore() == 2


def test_the_script_is_told_by_its_digest(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    script = tmp_path / "train.py"
    script.write_text("print('hello')")
    monkeypatch.setattr(sys.modules["__main__"], "__file__", str(script), raising=False)
    assert fingerprint()["script"] == {"name": "train.py", "digest": digest(b"print('hello')")[:16], "commit": None}
    monkeypatch.setattr(sys.modules["__main__"], "__file__", str(tmp_path / "gone.py"))
    assert "script" not in fingerprint()
