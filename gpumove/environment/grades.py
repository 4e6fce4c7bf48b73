"""What a difference between two machines may do to a job: the table, row by row. docs/environment.md has the sources.

Pure data: it knows no fingerprints, only the names of their facts.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Grade = Literal["fatal", "numerics", "unknown", "speed", "exact"]
WORST_FIRST: tuple[Grade, ...] = ("fatal", "numerics", "unknown", "speed", "exact")
_TOLERANCE = "continue, and compare within the tolerance instead of bit for bit"


@dataclass(frozen=True)
class Row:
    """One fact. ``of``: it counts only where a GPU is used (``gpu``), where several ranks train (``ranks``), or both;
    elsewhere it changes nothing. ``job``: the script or its launcher sets it: a machine by itself does not have it.
    ``unless``: a fact that says the same, if both sides have it."""

    key: str
    name: str
    grade: Grade
    why: str
    what_to_do: str = _TOLERANCE
    of: tuple[Literal["gpu", "ranks"], ...] = ()
    job: bool = False
    unless: str = ""


def _flag(key: str, name: str, why: str, call: str, *, gpu: bool = True, unless: str = "") -> Row:
    of: tuple[Literal["gpu"], ...] = ("gpu",) if gpu else ()
    return Row(f"torch.{key}", name, "numerics", why, f"set it alike: {call}", of, job=True, unless=unless)


_TF32 = "TF32 keeps 10 bits of a factor's mantissa instead of 23"
_NARROW = "sums of products in low precision are rounded in between, or are not"

ROWS = (
    Row("world_size", "ranks", "numerics", "the batch is divided among other ranks, and gradients are added in another "
        "order", "as many ranks continue bit for bit; other numbers within the tolerance", job=True),
    Row("ranks_here", "ranks per machine", "numerics", "NCCL chooses its trees and rings by who shares a machine, and "
        "with them the order of additions", of=("gpu", "ranks"), job=True),
    Row("machine", "architecture of the processor", "numerics", "other instructions, and other kernels made of them"),
    Row("processor.model", "processor", "numerics", "MKL and oneDNN choose code by the processor and the sizes of its "
        "caches; where the model is on GPUs, this concerns only what the host computes"),
    Row("processor.capability", "vector instructions", "numerics", "torch, MKL and oneDNN add in vectors of this width",
        "the narrower one on both: ATEN_CPU_CAPABILITY=avx2, MKL_ENABLE_INSTRUCTIONS=AVX2, ONEDNN_MAX_CPU_ISA=AVX2"),
    Row("processor.cores", "cores", "speed", "the host's work takes longer or shorter; the number of threads is a fact "
        "of its own", "look at the step time"),
    Row("threads", "threads of an operation", "numerics", "a sum on the processor is cut into as many parts as there "
        "are threads", "set OMP_NUM_THREADS or torch.set_num_threads() alike", job=True),
    Row("interop_threads", "threads between operations", "speed", "independent operations run beside each other; none "
        "is computed otherwise", "", job=True),
    Row("driver", "driver", "numerics", "it compiles what comes as PTX, and drives additions in the switch (NVLS); "
        "kernels that torch brings along stay the same", of=("gpu",)),
    Row("cuda", "CUDA", "numerics", "cuBLAS promises equal bits within one toolkit version only",
        "the same build of torch, or the tolerance", of=("gpu",)),
    Row("hip", "ROCm", "numerics", "other versions of the libraries have other kernels",
        "the same build of torch, or the tolerance", of=("gpu",)),
    Row("cudnn", "cuDNN", "numerics", "cuDNN promises equal bits within one version only",
        "the same build of torch, or the tolerance", of=("gpu",)),
    Row("nccl", "NCCL", "numerics", "another version may choose other algorithms, which add in another order",
        "the same build of torch, or pin NCCL_ALGO and NCCL_PROTO on both", of=("gpu", "ranks")),
    Row("libc", "C library", "numerics", "its exp, log and sin are not correctly rounded, and change with versions; "
        "most of torch brings its own", "the same image, or the tolerance"),
    Row("kernel", "kernel", "speed", "it computes nothing of the job", ""),
    Row("gpumove", "gpumove", "exact", "what it carries is compared by digests", ""),
    _flag("matmul_precision", "matmul precision", "float32 products may be computed in TF32 or bfloat16",
          "torch.set_float32_matmul_precision()", gpu=False),
    _flag("matmul_tf32", "TF32 in products", _TF32, "torch.backends.cuda.matmul.allow_tf32",
          unless="torch.matmul_precision"),
    _flag("matmul_fp32", "precision of float32 products", _TF32, "torch.backends.cuda.matmul.fp32_precision",
          unless="torch.matmul_precision"),
    _flag("cudnn_tf32", "TF32 in convolutions", _TF32, "torch.backends.cudnn.allow_tf32"),
    _flag("conv_fp32", "precision of float32 convolutions", _TF32, "torch.backends.cudnn.conv.fp32_precision",
          unless="torch.cudnn_tf32"),
    _flag("onednn_fp32", "precision of float32 products on the processor", "they may be computed in bfloat16 or TF32",
          "torch.backends.mkldnn.matmul.fp32_precision", gpu=False, unless="torch.matmul_precision"),
    _flag("bf16_reduction", "bfloat16 reductions", _NARROW,
          "torch.backends.cuda.matmul.allow_bf16_reduced_precision_reduction"),
    _flag("fp16_reduction", "float16 reductions", _NARROW,
          "torch.backends.cuda.matmul.allow_fp16_reduced_precision_reduction"),
    _flag("fp16_accumulation", "float16 accumulation", _NARROW, "torch.backends.cuda.matmul.allow_fp16_accumulation"),
    _flag("deterministic", "deterministic algorithms", "other kernels are chosen, and without it some give other bits "
          "each time", "torch.use_deterministic_algorithms()", gpu=False),
    _flag("cudnn", "cuDNN in use", "other kernels are chosen", "torch.backends.cudnn.enabled"),
    _flag("cudnn_benchmark", "cuDNN benchmark", "the fastest algorithm of the moment is taken, which differs from "
          "start to start", "torch.backends.cudnn.benchmark = False"),
    _flag("cudnn_deterministic", "deterministic cuDNN", "other algorithms are allowed",
          "torch.backends.cudnn.deterministic"),
    _flag("onednn", "oneDNN in use", "other kernels are chosen", "torch.backends.mkldnn.enabled", gpu=False),
    _flag("attention", "kernels of attention", "each adds in an order of its own", "torch.backends.cuda.enable_*_sdp()",
          gpu=False),
    _flag("default_dtype", "default dtype", "new tensors have another precision", "torch.set_default_dtype()",
          gpu=False),
    _flag("compiled", "torch.compile", "fused kernels keep intermediate values in higher precision, and tile sums "
          "otherwise", "compile on both or on neither; TORCHINDUCTOR_EMULATE_PRECISION_CASTS=1 comes closer",
          gpu=False),
)  # fmt: skip

# -------------------------------------------------------------------- environment variables

_KERNELS = "it chooses the kernels, and with them the order of additions"
_NCCL = "NCCL's algorithm, and with it the order of additions, depends on it"


def _variables(names: str, grade: Grade, why: str, *of: Literal["gpu", "ranks"]) -> list[Row]:
    return [Row(f"variables.{n}", n, grade, why, f"set {n} alike", of) for n in names.split()]


VARIABLES = (
    *_variables("MKL_CBWR MKL_ENABLE_INSTRUCTIONS MKL_DYNAMIC OMP_DYNAMIC ONEDNN_MAX_CPU_ISA DNNL_MAX_CPU_ISA "
                "ATEN_CPU_CAPABILITY ONEDNN_DEFAULT_FPMATH_MODE OPENBLAS_CORETYPE OPENBLAS_NUM_THREADS "
                "TORCHINDUCTOR_EMULATE_PRECISION_CASTS TORCHINDUCTOR_MAX_AUTOTUNE TORCHDYNAMO_DISABLE "
                "TORCH_COMPILE_DISABLE", "numerics", _KERNELS),
    *_variables("CUBLAS_WORKSPACE_CONFIG CUBLASLT_WORKSPACE_SIZE NVIDIA_TF32_OVERRIDE "
                "TORCH_ALLOW_TF32_CUBLAS_OVERRIDE TORCH_BLAS_PREFER_CUBLASLT PYTORCH_NVFUSER_DISABLE "
                "NVTE_ALLOW_NONDETERMINISTIC_ALGO NVTE_FLASH_ATTN NVTE_FUSED_ATTN FLASH_ATTENTION_DETERMINISTIC",
                "numerics", _KERNELS, "gpu"),
    *_variables("NCCL_ALGO NCCL_PROTO NCCL_NVLS_ENABLE NCCL_COLLNET_ENABLE NCCL_MIN_NCHANNELS NCCL_MAX_NCHANNELS "
                "NCCL_MIN_CTAS NCCL_MAX_CTAS NCCL_NTHREADS NCCL_BUFFSIZE NCCL_P2P_DISABLE NCCL_P2P_LEVEL "
                "NCCL_SHM_DISABLE NCCL_CROSS_NIC", "numerics", _NCCL, "gpu", "ranks"),
    *_variables("PYTHONHASHSEED", "numerics", "the order of sets of strings follows from it"),
    *_variables("NCCL_IB_DISABLE NCCL_NET_GDR_LEVEL CUDA_DEVICE_MAX_CONNECTIONS CUDA_LAUNCH_BLOCKING",
                "speed", "it changes how bytes get there, or when work begins", "gpu"),
    *_variables("PYTORCH_ALLOC_CONF PYTORCH_CUDA_ALLOC_CONF", "speed", "the allocator may need more or less memory "
                "than its tensors do", "gpu"),
    *_variables("OMP_PROC_BIND OMP_PLACES KMP_AFFINITY KMP_BLOCKTIME", "speed", "threads run on other cores"),
)  # fmt: skip
"""Those of :data:`variables.ALLOWED` that are compared. Numbers of threads are not: ``threads`` is their effect."""
