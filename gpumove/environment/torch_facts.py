"""What torch tells of its devices, libraries and flags. Torch is handed in: nothing here imports it.

A fact that cannot be had is left out, which means that it is not known; None means that there is no such thing.
"""

from __future__ import annotations

import sys
import threading
from collections import Counter
from collections.abc import Callable, Mapping
from typing import Any

_MOST_TEXT = 100


def known(facts: Mapping[str, Callable[[], Any]]) -> dict[str, Any]:
    """What can be had of these. Whatever goes wrong while looking, nobody's checkpoint must suffer for it."""
    found = {}
    for name, look in facts.items():
        try:
            value = look()
        except Exception:  # noqa: BLE001 - drivers, files and half-set flags raise what they like
            continue
        found[name] = value[:_MOST_TEXT] if isinstance(value, str) else value
    return found


def libraries(torch: Any, *, look: bool) -> dict[str, Any]:
    """Versions that torch was built for and has loaded; they do not change while a process lives.

    Args:
        torch: the module.
        look: begin to use CUDA for this, if the process has not yet.
    """
    facts: dict[str, Callable[[], Any]] = {
        "cuda": lambda: torch.version.cuda,
        "hip": lambda: getattr(torch.version, "hip", None),
        "cudnn": lambda: _cudnn(torch.backends.cudnn.version()),
        "nccl": lambda: _nccl(torch) if torch.version.cuda else None,
        "devices": lambda: devices(torch, look=look),
    }
    if torch.cuda.is_initialized() or look:
        facts["architectures"] = lambda: list(torch.cuda.get_arch_list())
    return known(facts)


def _cudnn(number: int | None) -> str | None:
    if number is None:
        return None
    thousand = 10000 if number >= 90000 else 1000  # 90100 is 9.1.0, and 8902 was 8.9.2
    return f"{number // thousand}.{number % thousand // 100}.{number % 100}"


def _nccl(torch: Any) -> str:
    found = torch.cuda.nccl.version()
    return ".".join(map(str, found)) if isinstance(found, tuple) else str(found)


def devices(torch: Any, *, look: bool) -> list[dict[str, Any]]:
    """Kinds of devices that this process may use, each with how many there are. None for a process that uses no CUDA:
    to look at them would begin to, and take memory of the first one."""
    if not torch.cuda.is_initialized() and not (look and torch.cuda.is_available()):
        return []
    kinds: Counter[tuple[Any, ...]] = Counter()
    for index in range(torch.cuda.device_count()):
        p = torch.cuda.get_device_properties(index)
        kinds[p.name, p.total_memory, f"{p.major}.{p.minor}", p.multi_processor_count] += 1
    names = ("model", "memory_bytes", "capability", "multiprocessors")
    return [{**dict(zip(names, kind)), "count": count} for kind, count in kinds.items()]


def peaks(torch: Any, count: int) -> dict[str, int]:
    """The most memory that this process's tensors took on one of its devices, and that its allocator held. It asks the
    allocator's books, never the driver, which may be the very thing that hangs."""
    if not count or not torch.cuda.is_initialized():
        return {}
    found = [torch.cuda.memory_stats(i) for i in range(count)]
    names = {"device_bytes": "allocated_bytes.all.peak", "reserved_bytes": "reserved_bytes.all.peak"}
    return {name: max((int(stats.get(key, 0)) for stats in found), default=0) for name, key in names.items()}


def threads(torch: Any) -> int:
    """Threads of an operation, as they are set now. OpenMP's number belongs to each thread, and torch hands a thread
    what was set when it first asks: only a new one is sure to know it."""
    found: list[int] = []
    asking = threading.Thread(target=lambda: found.append(torch.get_num_threads()), daemon=True)
    asking.start()
    asking.join()
    return found[0]


def flags(torch: Any) -> dict[str, Any]:
    """What the script has set. Some raise where the older and the newer names of one setting were mixed."""
    b = torch.backends
    return known(
        {
            "matmul_precision": torch.get_float32_matmul_precision,
            "matmul_tf32": lambda: b.cuda.matmul.allow_tf32,
            "matmul_fp32": lambda: str(b.cuda.matmul.fp32_precision),
            "cudnn_tf32": lambda: b.cudnn.allow_tf32,
            "conv_fp32": lambda: str(b.cudnn.conv.fp32_precision),
            "onednn_fp32": lambda: str(b.mkldnn.matmul.fp32_precision),
            "bf16_reduction": lambda: str(b.cuda.matmul.allow_bf16_reduced_precision_reduction),
            "fp16_reduction": lambda: str(b.cuda.matmul.allow_fp16_reduced_precision_reduction),
            "fp16_accumulation": lambda: str(b.cuda.matmul.allow_fp16_accumulation),
            "deterministic": torch.are_deterministic_algorithms_enabled,
            "cudnn": lambda: bool(b.cudnn.enabled),
            "cudnn_benchmark": lambda: bool(b.cudnn.benchmark),
            "cudnn_deterministic": lambda: bool(b.cudnn.deterministic),
            "onednn": lambda: bool(b.mkldnn.enabled),
            "attention": lambda: _attention(b.cuda),
            "default_dtype": lambda: str(torch.get_default_dtype()).removeprefix("torch."),
        }
    )


def _attention(cuda: Any) -> str:
    kinds = {"flash": "flash", "mem_efficient": "efficient", "math": "math", "cudnn": "cudnn"}
    return " ".join(name for kind, name in kinds.items() if getattr(cuda, f"{kind}_sdp_enabled")())


def compiled() -> bool:
    """Whether torch.compile has made anything of what this process has run. The compiler is not imported."""
    dynamo = sys.modules.get("torch._dynamo.utils")
    return dynamo is not None and dynamo.counters.get("stats", {}).get("unique_graphs", 0) > 0
