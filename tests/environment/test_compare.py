"""Grades: every row of the table, what is not recorded, whether it fits, and that no manifest can break it."""

from __future__ import annotations

import copy
import random
import re
from pathlib import Path
from typing import Any

import pytest

from gpumove.environment.compare import Difference, compare, numeric, of, same_devices
from gpumove.environment.devices import kinds
from gpumove.environment.fingerprint import CARRIERS
from gpumove.environment.grades import ROWS, VARIABLES, WORST_FIRST
from gpumove.environment.said import lines, listed
from gpumove.environment.variables import ALLOWED
from gpumove.format.manifest import Manifest
from tests.environment.facts import A100, CPU_ONLY, GIB, H100, HOST, JOB, OLD, but

Changes = dict[str, Any]


def found(before: Changes, after: Changes) -> dict[str, Difference]:
    return {d.field: d for d in compare(before, after)}


@pytest.mark.parametrize("facts", [JOB, CPU_ONLY, HOST, OLD], ids=["job", "processor", "machine", "old"])
def test_alike_is_alike(facts: Changes) -> None:
    assert compare(facts, copy.deepcopy(facts)) == []
    assert same_devices(facts, facts) in (True, None)


CASES: list[tuple[str, Changes, str, str]] = [
    # the fact that changes, how it is called, its grade
    ("A100 for H100", {"devices": [{**A100, "memory_bytes": 79 * GIB}]}, "GPUs", "numerics"),
    ("other multiprocessors", {"devices": [{**H100, "multiprocessors": 114}]}, "GPUs", "numerics"),
    ("the same inside", {"devices": [{**H100, "model": "NVIDIA H100 NVL"}]}, "GPUs", "speed"),
    ("fewer in sight", {"devices": [{**H100, "count": 4}]}, "GPUs in sight", "exact"),
    ("no GPU where it trains", {"devices": []}, "GPUs", "numerics"),
    ("CUDA minor", {"cuda": "12.6"}, "CUDA", "numerics"),
    ("CUDA patch of cuDNN", {"cudnn": "9.10.1"}, "cuDNN", "numerics"),
    ("NCCL", {"nccl": "2.26.2"}, "NCCL", "numerics"),
    ("driver", {"driver": "580.65.06"}, "driver", "numerics"),
    ("world size", {"world_size": 16}, "ranks", "numerics"),
    ("ranks per machine", {"ranks_here": 4}, "ranks per machine", "numerics"),
    ("torch patch", {"packages.torch": "2.13.1+cu128"}, "torch", "numerics"),
    ("torch minor", {"packages.torch": "2.12.0+cu128"}, "torch", "numerics"),
    ("torch build", {"packages.torch": "2.13.0+cu126"}, "torch", "numerics"),
    ("numpy", {"packages.numpy": "2.5.0"}, "numpy", "numerics"),
    ("a library of models", {"packages.transformers": "5.2.0"}, "transformers", "numerics"),
    ("what carries bytes", {"packages.s3fs": "2026.10.0"}, "s3fs", "exact"),
    ("precision", {"torch.matmul_precision": "high"}, "matmul precision", "numerics"),
    ("TF32 in convolutions", {"torch.cudnn_tf32": False}, "TF32 in convolutions", "numerics"),
    ("determinism", {"torch.deterministic": True}, "deterministic algorithms", "numerics"),
    ("cuDNN benchmark", {"torch.cudnn_benchmark": True}, "cuDNN benchmark", "numerics"),
    ("compile", {"torch.compiled": True}, "torch.compile", "numerics"),
    ("threads", {"threads": 4}, "threads of an operation", "numerics"),
    ("interop threads", {"interop_threads": 4}, "threads between operations", "speed"),
    ("processor", {"processor.model": "AMD EPYC"}, "processor", "numerics"),
    ("vectors", {"processor.capability": "AVX2"}, "vector instructions", "numerics"),
    ("cores", {"processor.cores": 8}, "cores", "speed"),
    ("ARM", {"machine": "aarch64"}, "architecture of the processor", "numerics"),
    ("libc", {"libc": "glibc 2.39"}, "C library", "numerics"),
    ("kernel", {"kernel": "6.11"}, "kernel", "speed"),
    ("python patch", {"python": "3.11.9"}, "python", "exact"),
    ("python minor", {"python": "3.12.1"}, "python", "numerics"),
    ("gpumove", {"gpumove": "0.2.0"}, "gpumove", "exact"),
    ("MKL_CBWR", {"variables": {"MKL_CBWR": "AVX2"}}, "MKL_CBWR", "numerics"),
    ("NCCL_ALGO", {"variables": {"NCCL_ALGO": "Tree"}}, "NCCL_ALGO", "numerics"),
    ("the allocator", {"variables": {"PYTORCH_ALLOC_CONF": "expandable_segments:True"}}, "PYTORCH_ALLOC_CONF", "speed"),
    ("the script", {"script.digest": "ffff"}, "script", "numerics"),
    ("the commit", {"script.commit": "b" * 40}, "commit", "numerics"),
]


@pytest.mark.parametrize(("changes", "field", "grade"), [c[1:] for c in CASES], ids=[c[0] for c in CASES])
def test_grades(changes: Changes, field: str, grade: str) -> None:
    there = but(JOB, changes)
    differences = compare(JOB, there)
    assert [(d.field, d.grade) for d in differences] == [(field, grade)]
    assert differences[0].why
    assert [(d.field, d.grade) for d in compare(there, JOB)] == [(field, grade)], "and the other way round"
    assert [d.field for d in numeric(JOB, there)] == ([field] if grade == "numerics" else [])


def test_what_counts_only_on_gpus_or_between_ranks_changes_nothing_elsewhere() -> None:
    changes = {"cuda": "12.6", "torch.cudnn_benchmark": True, "driver": "1.2"}
    assert {d.grade for d in compare(CPU_ONLY, but(CPU_ONLY, changes))} == {"exact"}
    alone = but(JOB, {"world_size": 1, "ranks_here": 1})
    nccl = found(alone, but(alone, {"nccl": "2.0.0", "variables": {"NCCL_ALGO": "Ring"}}))
    assert {name: d.grade for name, d in nccl.items()} == {"NCCL": "exact", "NCCL_ALGO": "exact"}


def test_the_worst_comes_first() -> None:
    there = but(HOST, {"devices": [A100], "kernel": "7.0", "python": "3.11.9", "libc": ...})
    grades = [d.grade for d in compare(JOB, there)]
    assert grades == sorted(grades, key=WORST_FIRST.index)
    assert grades[0] == "fatal"  # 60 GiB on 39
    assert {"numerics", "unknown", "speed", "exact"} < set(grades)


# -------------------------------------------------------------------- will it run?


def test_a_machine_without_gpus_for_a_job_that_has_used_them() -> None:
    bare = but(HOST, {"devices": [], "architectures": ...})
    for changes, advice in (
        ({"driver": None}, "use a machine that has one"),
        ({"cuda": None, "driver": None}, "install a build for CUDA"),
        ({"driver": "470.57.02"}, "CUDA 12.8 takes driver 525 or newer, 470.57.02 is here"),
        ({}, "see whether this process may use its devices"),
    ):
        lost = found(JOB, but(bare, changes))["GPUs"]
        assert (lost.grade, lost.after) == ("fatal", "none")
        assert advice in lost.what_to_do


@pytest.mark.parametrize(
    ("capability", "built", "runs"),
    [
        ("9.0", ["sm_80", "sm_90"], True), ("8.6", ["sm_80"], True), ("8.0", ["sm_86"], False),
        ("12.0", ["sm_80", "sm_90"], False), ("12.0", ["sm_90", "compute_90"], True), ("9.0", ["compute_100"], False),
        ("9.0", ["sm_90a"], True), ("10.3", ["sm_100a"], False), ("10.3", ["sm_100"], True), ("7.0", ["gfx90a"], True),
        ("7.0", [], True),
    ],
)  # fmt: skip
def test_whether_torch_has_kernels_for_the_device(capability: str, built: list[str], runs: bool) -> None:
    there = but(HOST, {"devices": [{**H100, "capability": capability}], "architectures": built})
    assert ("kernels" not in found(JOB, there)) == runs


@pytest.mark.parametrize(
    ("changes", "there", "grade", "why"),
    [
        ({}, {"devices": [A100]}, "fatal", "the tensors of a rank took up to 60.0 GiB"),
        ({"peak.device_bytes": 35 * GIB}, {"devices": [A100]}, "unknown", "70.0 GiB was held"),
        ({"peak.device_bytes": 20 * GIB, "peak.reserved_bytes": 25 * GIB}, {"devices": [A100]}, None, ""),
        ({"peak": {}}, {"devices": [A100]}, "unknown", "was not measured"),
        ({"peak": {}, "state_bytes": 800 * GIB}, {"devices": [A100]}, "fatal", "share of the state alone takes 100.0"),
        ({}, {"world_size": 4}, None, ""),  # 60 + 12.5 of 79 GiB
        ({"peak.device_bytes": 74 * GIB}, {"world_size": 4}, "unknown", "sharded each holds 12.5 GiB more"),
        ({}, {"devices": [{**H100, "memory_bytes": 140 * GIB}]}, None, ""),
    ],
)  # fmt: skip
def test_whether_it_fits(changes: Changes, there: Changes, grade: str | None, why: str) -> None:
    told = found(but(JOB, changes), but(JOB, there)).get("memory of a GPU")
    assert (told.grade if told else None) == grade
    assert why in (told.why if told else "")


def test_whether_the_host_holds_it() -> None:
    small = found(JOB, but(HOST, {"processor.memory_bytes": 100 * GIB}))["memory of the host"]
    assert (small.grade, small.before, small.after) == ("unknown", "512.0 GiB", "100.0 GiB")
    assert "a rank took up to 20.0 GiB" in small.why


def test_a_package_that_the_job_has_used_must_be_there() -> None:
    bare = but(HOST, {"packages.torch": ..., "packages.transformers": ..., "packages.s3fs": ...})
    told = found(JOB, bare)
    assert (told["torch"].grade, told["torch"].what_to_do) == ("fatal", "install torch==2.13.0")
    assert told["transformers"].grade == "unknown", "it may have been loaded only because it was there"
    assert told["s3fs"].grade == "exact"
    assert compare(JOB, but(JOB, {"packages.transformers": ...})) == [], "a running job may load it later"
    assert compare(JOB, but(HOST, {"packages.jax": "1.0"})) == [], "what is there besides does no harm"


# -------------------------------------------------------------------- what is not known


def test_fingerprints_of_older_versions() -> None:
    for here in (JOB, HOST):
        (told,) = compare(OLD, here)
        assert (told.grade, told.before) == ("unknown", "not recorded")
        assert "processor, vector instructions, driver, cuDNN, NCCL, C library" in told.why.replace(
            "ranks per machine, ", ""
        )
        assert ("flags of torch" in told.why) == (here is JOB)
    assert found(OLD, but(JOB, {"devices": [A100]}))["GPUs"].grade == "numerics"
    assert found(OLD, but(HOST, {"devices": []}))["GPUs"].grade == "fatal"
    assert same_devices(OLD, JOB) is True
    assert same_devices(OLD, but(JOB, {"devices": [A100]})) is False
    cpu = but(OLD, {"devices": ..., "cuda": ...})
    assert kinds(cpu) == []
    assert same_devices(cpu, CPU_ONLY) is None, "version 0.1 did not record the processor"


def test_an_empty_fingerprint_is_unknown_and_not_alike() -> None:
    told = compare({}, JOB)
    assert {d.grade for d in told} == {"unknown"}
    assert {d.field for d in told} == {"GPUs", "what cannot be compared"}
    assert same_devices({}, JOB) is None
    assert {d.grade for d in compare(JOB, {})} == {"unknown"}


def test_whether_devices_are_alike() -> None:
    assert same_devices(JOB, but(JOB, {"devices": [{**H100, "model": "NVIDIA H100 NVL"}]})) is True
    assert same_devices(JOB, but(JOB, {"devices": [A100]})) is False
    assert same_devices(JOB, CPU_ONLY) is False
    assert same_devices(CPU_ONLY, but(CPU_ONLY, {"processor.capability": "AVX2"})) is False
    assert same_devices(CPU_ONLY, but(CPU_ONLY, {"processor": ...})) is None


def test_no_manifest_can_break_it() -> None:
    """Whatever JSON somebody has put there."""
    chance = random.Random(4)
    junk = [None, 0, -1, 1.5, True, "", "x" * 500, [], {}, [None], {"a": 1}, [[1]], {"model": None}, "9.x", 10**30]

    def spoil(value: Any) -> Any:
        if chance.random() < 0.25:
            return chance.choice(junk)
        if isinstance(value, dict):
            return {name: spoil(v) for name, v in value.items() if chance.random() > 0.1}
        return [spoil(v) for v in value] if isinstance(value, list) else value

    for _ in range(2000):
        one, other = (spoil(chance.choice((JOB, CPU_ONLY, OLD, HOST))) for _ in range(2))
        one, other = (x if isinstance(x, dict) else {} for x in (one, other))
        for d in compare(one, other):
            assert d.grade in WORST_FIRST
            assert all(
                isinstance(text, str) and len(text) < 2000 for text in (d.field, d.before, d.after, d.why, d.text)
            )
        same_devices(one, other)
        lines(one)


# -------------------------------------------------------------------- words


def test_the_table_is_complete() -> None:
    assert len({row.key for row in (*ROWS, *VARIABLES)}) == len(ROWS) + len(VARIABLES)
    threads = {"OMP_NUM_THREADS", "MKL_NUM_THREADS"}  # their effect is a fact of its own
    assert {row.name for row in VARIABLES} == set(ALLOWED) - threads
    flags = {row.key.removeprefix("torch.") for row in ROWS if row.key.startswith("torch.")}
    assert flags == set(JOB["torch"])
    assert not set(CARRIERS) & {"torch", "numpy"}


def test_the_page_has_every_row_with_its_grade() -> None:
    page = (Path(__file__).resolve().parents[2] / "docs" / "environment.md").read_text()
    cells = [[cell.strip() for cell in line.strip("|").split(" | ")] for line in page.splitlines() if line[:1] == "|"]
    told = {cell[0].strip(): cell[1].strip("`") for cell in cells if len(cell) == 4}
    assert {row.name: row.grade for row in ROWS}.items() <= told.items()
    recorded = {name for cell in cells if len(cell) == 3 for name in re.findall(r"`(\w+)`", cell[0])}
    assert set(JOB) - {"state_bytes"} == recorded


def test_many_differences_are_one_message() -> None:
    flags = dict.fromkeys(JOB["torch"], "other")
    there = but(JOB, {"torch": flags, "kernel": "7", "libc": "x", "python": "3.12.0", "gpumove": "9"})
    told = compare(JOB, there)
    text = listed(told)
    assert len(text.splitlines()) == 13
    assert text.endswith("more differences")
    assert "gpumove" not in text, "what changes nothing is not said"
    assert listed([]) == ""


def test_a_fingerprint_in_words() -> None:
    told = dict(lines(JOB))
    assert told["devices"] == "8 x NVIDIA H100 80GB HBM3 (79.0 GiB)"
    assert told["CUDA"] == "12.8, driver 570.124.06, cudnn 9.10.2, nccl 2.27.3"
    assert told["peak"] == "device 60.0 GiB, reserved 70.0 GiB, host 20.0 GiB"
    assert dict(lines(OLD))["devices"] == "8 x NVIDIA H100 80GB HBM3"
    assert lines({}) == []


def test_the_facts_of_a_manifest() -> None:
    manifest = Manifest(
        format=1, run="r", step=1, epoch=1, attempt="a", world_size=4, time=0.0, state_bytes=7, new_bytes=0, plan="p",
        parts=(), fingerprint={"python": "3.11.7"},
    )  # fmt: skip
    assert of(manifest) == {"python": "3.11.7", "world_size": 4, "state_bytes": 7}
