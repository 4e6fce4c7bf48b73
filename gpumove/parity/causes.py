"""What a difference most likely comes from: the table of docs/parity.md, as words. Pure."""

from __future__ import annotations

SAMPLES, RNG, SCHEDULER, MODEL = "samples", "rng", "scheduler", "model"
BACKWARD, OPTIMIZER, NUMERICS, WORLD_SIZE = "backward", "optimizer", "numerics", "world_size"

NAMES = {
    "loss": "the loss",
    "grad_norm": "the gradient norm",
    "samples": "the samples",
    "rank_samples": "this rank's samples",
    "rng": "the random generators",
    "rng_device": "the device's random generator",
    "lr": "the learning rate",
}
"""What the facts of a trace are called."""

BY_FACT = {"samples": SAMPLES, "rank_samples": SAMPLES, "rng": RNG, "rng_device": RNG, "lr": SCHEDULER}

WORDS = {
    SAMPLES: "the data position, the order's seed, or the size of the global batch is another one",
    RNG: "the random generators are not where they were: they were not restored, or something drew from them",
    SCHEDULER: "the learning rate scheduler, or what sets the rate, is not where it was",
    MODEL: "parameters or buffers are not those of the checkpoint, or the model computes something else",
    BACKWARD: "its loss is equal, so it is what backward makes of it: kernels, the scale of the loss, or gradients "
    "that were not zero",
    OPTIMIZER: "up to there the numbers agree, so it is what an optimizer step adds: its moments, its step counters, "
    "its settings, or the scale of the loss",
    NUMERICS: "sums are rounded otherwise: devices, threads, flags or kernels that are not deterministic",
    WORLD_SIZE: "the number of ranks is another one: random draws differ, and so does a loss that is not reduced over "
    "all ranks",
}
"""What each cause means."""
BLIND = " (or the data is: the samples were not recorded)"


def of_fact(fact: str, step: int) -> str:
    """A sentence on a fact that is another one from a step on."""
    verb = "differ" if fact in ("samples", "rank_samples", "rng") else "differs"
    return f"{NAMES[fact]} {verb} from step {step} on: {WORDS[BY_FACT[fact]]}"


def of_numbers(*, earlier: int, fact: str, same_world: bool, jumped: bool) -> str:
    """The cause of a number that is too far off, while samples, generators and learning rate are as they were.

    Args:
        earlier: how many steps before it told numbers.
        fact: ``loss`` or ``grad_norm``.
        same_world: whether there are as many ranks.
        jumped: whether the step before was much nearer; rounding grows, and does not jump.
    """
    if earlier:
        return OPTIMIZER if jumped else NUMERICS
    if not same_world:
        return WORLD_SIZE
    return MODEL if fact == "loss" else BACKWARD
