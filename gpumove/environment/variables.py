"""Which environment variables a fingerprint may show: an allow-list of those that change sums, speed or memory.

Nothing else of the environment is ever written down. What is shown is short and of few characters.
"""

from __future__ import annotations

import re
from collections.abc import Mapping

ALLOWED = (
    "OMP_NUM_THREADS", "OMP_DYNAMIC", "OMP_PROC_BIND", "OMP_PLACES", "KMP_AFFINITY", "KMP_BLOCKTIME",
    "MKL_NUM_THREADS", "MKL_DYNAMIC", "MKL_CBWR", "MKL_ENABLE_INSTRUCTIONS", "OPENBLAS_NUM_THREADS",
    "OPENBLAS_CORETYPE", "ONEDNN_MAX_CPU_ISA", "DNNL_MAX_CPU_ISA", "ONEDNN_DEFAULT_FPMATH_MODE",
    "ATEN_CPU_CAPABILITY",
    "CUBLAS_WORKSPACE_CONFIG", "CUBLASLT_WORKSPACE_SIZE", "NVIDIA_TF32_OVERRIDE", "TORCH_ALLOW_TF32_CUBLAS_OVERRIDE",
    "TORCH_BLAS_PREFER_CUBLASLT", "CUDA_DEVICE_MAX_CONNECTIONS", "CUDA_LAUNCH_BLOCKING",
    "NCCL_ALGO", "NCCL_PROTO", "NCCL_NVLS_ENABLE", "NCCL_COLLNET_ENABLE", "NCCL_MIN_NCHANNELS", "NCCL_MAX_NCHANNELS",
    "NCCL_MIN_CTAS", "NCCL_MAX_CTAS", "NCCL_NTHREADS", "NCCL_BUFFSIZE", "NCCL_P2P_DISABLE", "NCCL_P2P_LEVEL",
    "NCCL_SHM_DISABLE", "NCCL_IB_DISABLE", "NCCL_NET_GDR_LEVEL", "NCCL_CROSS_NIC",
    "PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF", "PYTORCH_NVFUSER_DISABLE", "PYTHONHASHSEED",
    "TORCHINDUCTOR_EMULATE_PRECISION_CASTS", "TORCHINDUCTOR_MAX_AUTOTUNE", "TORCHDYNAMO_DISABLE",
    "TORCH_COMPILE_DISABLE",
    "NVTE_ALLOW_NONDETERMINISTIC_ALGO", "NVTE_FLASH_ATTN", "NVTE_FUSED_ATTN", "FLASH_ATTENTION_DETERMINISTIC",
)  # fmt: skip
COUNTED = "CUDA_VISIBLE_DEVICES"
"""Only how many there are: which ones says nothing to another machine."""
_PLAIN = re.compile(r"[\w.,:;=+^%() \[\]-]{0,100}", re.ASCII)


def shown(found: Mapping[str, str]) -> dict[str, str]:
    """Those that are allowed and set, as they may be written down."""
    told = {}
    for name in (*ALLOWED, COUNTED):
        if (value := found.get(name)) is None:
            continue
        if name == COUNTED:
            told[name] = f"{len([part for part in value.split(',') if part.strip()])} named"
        else:
            told[name] = value if _PLAIN.fullmatch(value) else "set, to what is not shown"
    return told
