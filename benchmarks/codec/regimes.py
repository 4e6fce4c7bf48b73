"""The ways to train whose states are measured, and how large. Frozen data; knows no tensor."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any


@dataclass(frozen=True)
class Scale:
    """A model, its batches and its text. ``shorter`` divides the steps before an anchor."""

    name: str
    width: int
    layers: int
    vocabulary: int
    context: int
    batch: int
    text_bytes: int
    shorter: int = 1


FULL = Scale("full", width=320, layers=6, vocabulary=8192, context=256, batch=4, text_bytes=8 << 20)
QUICK = Scale("quick", 64, 1, vocabulary=1024, context=32, batch=2, text_bytes=1 << 17, shorter=30)


@dataclass(frozen=True)
class Regime:
    """One way to train.

    ``steps`` are its own before the anchor, the state that deltas go out from. ``start`` names the regime whose
    anchor's weights it begins with; moments begin at zero. ``wide``: the optimizer sees gradients with all bits of fp32
    (mixed: summed over two micro-batches and clipped in fp32), else those of bfloat16 as backward left them.
    """

    name: str
    title: str
    steps: int
    start: str | None = None
    precision: str = "fp32"
    optimizer: str = "adamw"
    lr: float = 6e-4
    warm: int = 15
    total: int = 400
    """Where the schedule ends: far from the anchor, or the rate would vanish within the distances measured."""
    betas: tuple[float, float] = (0.9, 0.95)
    weight_decay: float = 0.1
    text: str = "python"
    wide: bool = True
    adapters: bool = False

    def recipe(self, scale: Scale) -> dict[str, Any]:
        """Everything that decides what comes out, to be compared with what a stored state was made by."""
        start = BY_NAME[self.start].recipe(scale) if self.start else None
        return {**asdict(self), "betas": list(self.betas), "start": start, "scale": asdict(scale)}


REGIMES = (
    Regime("fp32", "fp32, AdamW", 300, warm=50),
    Regime("mixed", "bf16 with fp32 master, AdamW, fp32 gradients", 300, precision="mixed", warm=50),
    Regime("mixed-bf16", "the same, bf16-valued gradients", 60, "mixed", precision="mixed", lr=1.2e-4, wide=False),
    Regime("autocast", "bf16 autocast, fp32 weights", 60, "fp32", precision="autocast", lr=1.2e-4, betas=(0.9, 0.999)),
    Regime("lora", "LoRA, rank 8, frozen fp32 base", 40, "fp32", adapters=True, lr=2e-4, weight_decay=0.0),
    Regime(
        "finetune", "fine-tuning at 1e-5, fp32", 60, "fp32", lr=1e-5, total=1000, betas=(0.9, 0.999), text="headers"
    ),
    Regime(
        "finetune-mixed",
        "fine-tuning at 1e-5, mixed, fp32 gradients",
        60,
        "mixed",
        precision="mixed",
        lr=1e-5,
        total=1000,
        betas=(0.9, 0.999),
        text="headers",
    ),
    Regime("sgd", "fp32, SGD with momentum", 60, "fp32", optimizer="sgd", lr=0.06, weight_decay=0.0),
)
BY_NAME = {regime.name: regime for regime in REGIMES}
