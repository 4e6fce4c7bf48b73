"""On a CUDA device: the fingerprint names it, measures what the job takes of it, and wakes no device of its own."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest
import torch

from gpumove.environment.compare import compare
from gpumove.environment.fingerprint import Environment, machine

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


def test_a_process_that_uses_no_device_is_left_so() -> None:
    code = (
        "import json, torch; from gpumove.environment.fingerprint import fingerprint; "
        "print(json.dumps(fingerprint())); assert not torch.cuda.is_initialized()"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=True)
    found = json.loads(done.stdout)
    assert found["devices"] == []
    assert found["cuda"] == torch.version.cuda
    assert found["driver"]


def test_the_devices_libraries_and_peaks_of_a_job() -> None:
    environment = Environment()
    tensor = torch.ones(64 << 20, dtype=torch.uint8, device="cuda")
    found = environment.now(world_size=1)
    (kind,) = found["devices"]
    assert kind["model"] == torch.cuda.get_device_name()
    assert kind["memory_bytes"] > tensor.nbytes
    assert kind["count"] == torch.cuda.device_count()
    assert found["architectures"] == torch.cuda.get_arch_list()
    assert found["peak"]["device_bytes"] >= tensor.nbytes
    assert found["peak"]["reserved_bytes"] >= found["peak"]["device_bytes"]
    assert all(part.isdigit() for name in ("cudnn", "nccl") for part in found[name].split("."))
    assert found["driver"].split(".")[0].isdigit()
    assert compare({**found, "world_size": 1}, environment.now(world_size=1)) == []


def test_this_machine_runs_what_it_has_run() -> None:
    torch.ones(1, device="cuda")
    assert [d for d in compare(Environment().now(world_size=1), machine()) if d.grade in ("fatal", "unknown")] == []
