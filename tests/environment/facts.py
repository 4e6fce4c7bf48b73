"""Fingerprints to compare: of a job on eight H100, of one on a processor, and as version 0.1 wrote them."""

from __future__ import annotations

import copy
from typing import Any

GIB = 1 << 30

H100 = {
    "model": "NVIDIA H100 80GB HBM3", "memory_bytes": 79 * GIB, "capability": "9.0", "multiprocessors": 132, "count": 8,
}  # fmt: skip
A100 = {
    "model": "NVIDIA A100-SXM4-40GB", "memory_bytes": 39 * GIB, "capability": "8.0", "multiprocessors": 108, "count": 8,
}  # fmt: skip
HOST: dict[str, Any] = {
    "gpumove": "0.1.0", "python": "3.11.7", "machine": "x86_64", "kernel": "6.8.0", "libc": "glibc 2.36",
    "processor": {"model": "Intel Xeon", "capability": "AVX512", "cores": 64, "memory_bytes": 512 * GIB},
    "packages": {"torch": "2.13.0+cu128", "numpy": "2.4.6", "s3fs": "2026.9.0", "transformers": "5.1.0"},
    "variables": {}, "driver": "570.124.06", "cuda": "12.8", "hip": None, "cudnn": "9.10.2", "nccl": "2.27.3",
    "devices": [H100], "architectures": ["sm_80", "sm_90", "sm_120", "compute_120"],
}  # fmt: skip
JOB: dict[str, Any] = {
    **HOST, "threads": 8, "interop_threads": 32, "world_size": 8, "ranks_here": 8, "state_bytes": 100 * GIB,
    "torch": {
        "matmul_precision": "highest", "matmul_tf32": False, "matmul_fp32": "none", "cudnn_tf32": True,
        "conv_fp32": "tf32", "onednn_fp32": "none", "bf16_reduction": "True", "fp16_reduction": "True",
        "fp16_accumulation": "False", "deterministic": False, "cudnn": True, "cudnn_benchmark": False,
        "cudnn_deterministic": False, "onednn": True, "attention": "flash efficient math cudnn",
        "default_dtype": "float32", "compiled": False,
    },
    "script": {"name": "train.py", "digest": "00112233445566aa", "commit": "a" * 40},
    "peak": {"device_bytes": 60 * GIB, "reserved_bytes": 70 * GIB, "host_bytes": 20 * GIB},
}  # fmt: skip
CPU_ONLY: dict[str, Any] = {
    **JOB, "devices": [], "driver": None, "cuda": None, "cudnn": None, "nccl": None, "peak": {"host_bytes": GIB},
}  # fmt: skip
OLD: dict[str, Any] = {
    "gpumove": "0.1.0", "python": "3.11.7", "machine": "x86_64", "kernel": "6.8.0", "threads": 8, "cuda": "12.8",
    "packages": {"torch": "2.13.0+cu128", "numpy": "2.4.6", "s3fs": "2026.9.0"},
    "devices": ["NVIDIA H100 80GB HBM3"] * 8, "world_size": 8, "state_bytes": 100 * GIB,
}  # fmt: skip


def but(facts: dict[str, Any], changes: dict[str, Any]) -> dict[str, Any]:
    """A copy with other facts, by their paths; ``...`` takes one away."""
    made = copy.deepcopy(facts)
    for path, value in changes.items():
        *way, last = path.split(".")
        at = made
        for name in way:
            at = at[name]
        if value is ...:
            at.pop(last, None)
        else:
            at[last] = value
    return made
