"""Which predictions an optimizer's rule offers for a chunk, and their numbers. Decides; predict.py computes.

A family is the same box of a parameter and of what its optimizer keeps for it. Its chunks are decoded in the order
exp_avg, exp_avg_sq, parameter, copy, so each may be predicted from the new ones before it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from gpumove.format import kernels, predict
from gpumove.format.dtypes import item_bytes
from gpumove.format.kernels import Words
from gpumove.format.predict import (
    BFLOAT16,
    BFLOAT16_GRADIENT,
    BUFFER,
    DECAY,
    DESCENT,
    DTYPES,
    EACH,
    FIT,
    FIT_BUFFER,
    FLOAT32,
    GRADIENT,
    MAX_REPEATS,
    NESTEROV,
    SQUARE,
    SQUARES,
    STEP,
    Step,
)


class Field(NamedTuple):
    """One chunk of a family. ``role``: "parameter", "master" (its float32 original, where the optimizer keeps one),
    "exp_avg", "exp_avg_sq", "momentum_buffer", "copy" (of the parameter, in another type), or "" for anything else.
    """

    role: str
    dtype: str
    new: memoryview
    base: memoryview | None
    """The same box at the predecessor; None: there is none, or it must not be used."""
    clean: bool = False
    """The same as the base: nothing to encode, but others may be predicted from it."""


class Hyper(NamedTuple):
    """What a step of Adam, AdamW or SGD depends on. ``step``: how many it had made when ``new`` was taken."""

    lr: float
    beta1: float = 0.9
    beta2: float = 0.999
    eps: float = 1e-8
    weight_decay: float = 0.0
    decoupled: bool = True
    """AdamW: the decay shrinks the parameter, instead of being part of the gradient."""
    step: int = 0
    maximize: bool = False
    """Makes no difference to a prediction: the moments have the sign already."""
    momentum: float = 0.0
    dampening: float = 0.0
    nesterov: bool = False


@dataclass(frozen=True)
class Rule:
    """How a family went from base to new."""

    kind: str
    """"adam" or "momentum"."""
    steps: int
    """Optimizer steps between the two; 0: unknown."""
    tries: tuple[Hyper, ...]
    """Candidates: a scheduler has stepped already, so for one step the predecessor's lr is normally the right one."""


class Source(NamedTuple):
    """A field of the family; ``old``: the predecessor's bytes, else this checkpoint's."""

    field: int
    old: bool


class Recipe(NamedTuple):
    """A prediction without its numbers, which differ from one save to the next."""

    formula: int
    attempt: int = 0
    flags: int = 0
    repeated: bool = False
    """Decay step by step: exact where there was no gradient, at the cost of as many passes."""
    free: bool = False
    """SQUARES with factors of its own, found by least squares; FIT and FIT_BUFFER always have such."""


_MOST_STEPS = 1000
"""After so many the sum no longer changes."""
_WORDS = {"complex64": 4, "complex128": 8}


def word_bytes(dtype: str) -> int:
    """Complex numbers are pairs of words."""
    return _WORDS.get(dtype) or item_bytes(dtype)


class Family:
    """The fields as words, and by role."""

    def __init__(self, fields: Sequence[Field]) -> None:
        self.fields = fields
        self._role = {field.role: n for n, field in reversed(list(enumerate(fields)))}
        self._held: dict[Source, Words] = {}

    def role(self, name: str) -> int | None:
        """The first field with that role."""
        return self._role.get(name)

    @cached_property
    def stepped(self) -> int | None:
        """The field that the optimizer itself steps: the float32 original where there is one."""
        master = self.role("master")
        return self.role("parameter") if master is None else master

    def words(self, source: Source) -> Words:
        """A field's bytes as words."""
        if source not in self._held:
            field = self.fields[source.field]
            data = field.base if source.old else field.new
            self._held[source] = kernels.words(data, word_bytes(field.dtype))
        return self._held[source]

    def has(self, source: Source) -> bool:
        """Whether it is there, in a type that predictions are made in."""
        field = self.fields[source.field]
        return field.dtype in DTYPES and (field.base is not None or not source.old)

    def bases_of(self, formula: int) -> tuple[Source, ...] | None:
        """A formula's bases in their order; None: they are not all there."""
        parts = [(self.stepped if role == "stepped" else self.role(role), old) for role, old in _BASES[formula]]
        found = tuple(Source(n, old) for n, old in parts if n is not None)
        return found if len(found) == len(parts) and all(map(self.has, found)) else None


_OLD, _NEW = True, False
_BASES: dict[int, tuple[tuple[str, bool], ...]] = {
    DECAY: (("exp_avg", _OLD),),
    GRADIENT: (("exp_avg", _OLD),),
    SQUARE: (("exp_avg_sq", _OLD), ("exp_avg", _OLD), ("exp_avg", _NEW)),
    SQUARES: (("exp_avg_sq", _OLD), ("exp_avg", _OLD), ("exp_avg", _NEW)),
    STEP: (("stepped", _OLD), ("exp_avg", _NEW), ("exp_avg_sq", _NEW)),
    FIT: (
        ("stepped", _OLD),
        ("exp_avg", _NEW),
        ("exp_avg_sq", _NEW),
        ("exp_avg", _OLD),
        ("exp_avg_sq", _OLD),
    ),
    BUFFER: (("momentum_buffer", _OLD),),
    DESCENT: (("stepped", _OLD), ("momentum_buffer", _NEW)),
    NESTEROV: (("stepped", _OLD), ("momentum_buffer", _NEW), ("momentum_buffer", _OLD)),
    FIT_BUFFER: (("stepped", _OLD), ("momentum_buffer", _NEW), ("momentum_buffer", _OLD)),
}


def _adam_formulas(role: str, steps: int) -> list[int]:
    if role == "exp_avg":
        return [DECAY, GRADIENT] if steps == 1 else [DECAY] if steps else []
    if role == "exp_avg_sq":
        return [SQUARE] if steps == 1 else [SQUARES] if steps else []
    return [STEP, FIT] if steps == 1 else [FIT]


def _momentum_formulas(role: str, steps: int, hyper: Hyper) -> list[int]:
    if role == "momentum_buffer":
        return [BUFFER] if steps else []
    return [NESTEROV if hyper.nesterov else DESCENT, FIT_BUFFER] if steps == 1 else [FIT_BUFFER]


def recipes(family: Family, index: int, rule: Rule) -> Iterator[Recipe]:
    """What may be tried for a field; those whose numbers come out the same only once."""
    role = "stepped" if index == family.stepped else family.fields[index].role
    roles = {"adam": ("exp_avg", "exp_avg_sq", "stepped"), "momentum": ("momentum_buffer", "stepped")}
    if role not in roles.get(rule.kind, ()):
        return
    seen: set[tuple[Step, bool]] = set()
    for attempt, hyper in enumerate(rule.tries):
        adam = rule.kind == "adam"
        for formula in _adam_formulas(role, rule.steps) if adam else _momentum_formulas(role, rule.steps, hyper):
            if family.bases_of(formula) is None or not _possible(formula, hyper):
                continue
            for recipe in _variants(Recipe(formula, attempt), family.fields[index].dtype, rule.steps):
                step = step_of(recipe, family, rule)
                if (step, recipe.free) not in seen:
                    seen.add((step, recipe.free))
                    yield recipe


def _possible(formula: int, hyper: Hyper) -> bool:
    if formula in (STEP, FIT, GRADIENT, SQUARE, SQUARES, DECAY):
        return 0 <= hyper.beta1 < 1 and 0 < hyper.beta2 < 1 and (formula != STEP or hyper.step > 0)
    return hyper.dampening != 1


def _variants(plain: Recipe, dtype: str, steps: int) -> list[Recipe]:
    if plain.formula == GRADIENT:
        return [plain] if dtype == "float32" else []
    found = [plain]
    if plain.formula == SQUARE:
        found.append(plain._replace(flags=BFLOAT16_GRADIENT))
    if plain.formula in (DECAY, SQUARES) and 1 <= steps <= MAX_REPEATS:
        # Rows without a gradient (embeddings, idle experts) are then exact.
        found.append(plain._replace(repeated=True))
    if plain.formula == SQUARES:
        found.append(plain._replace(free=True))
    if dtype != "float32" and plain.formula not in (FIT, FIT_BUFFER):
        found += [recipe._replace(flags=recipe.flags | EACH) for recipe in found]
    return found


def _adam_scalars(formula: int, hyper: Hyper, steps: int) -> tuple[float, ...]:
    beta1, beta2 = hyper.beta1, hyper.beta2
    if formula == DECAY:
        return (1 - beta1, beta1**steps)
    if formula == GRADIENT:
        return (1 - beta1,)
    if formula == SQUARE:
        return (1 - beta1, beta2, 1 - beta2)
    if formula == SQUARES:
        ratio = min(beta1**2 / beta2, 1.0)
        share = (1 - beta2) / sum(ratio**n for n in range(min(steps, _MOST_STEPS)))
        return (beta1**steps, 1 - beta1, beta2, beta2**steps, share)
    if formula == FIT:
        return (0.0, 0.0, 0.0, hyper.eps)
    keep = 1 - hyper.lr * hyper.weight_decay if hyper.decoupled else 1.0
    return (keep, (1 - beta2**hyper.step) ** 0.5, hyper.eps, -(hyper.lr / (1 - beta1**hyper.step)))


def _momentum_scalars(formula: int, hyper: Hyper, steps: int) -> tuple[float, ...]:
    if formula == BUFFER:
        return (hyper.momentum**steps,)
    if formula == DESCENT:
        return (-hyper.lr,)
    return (-hyper.lr, hyper.momentum, 1 - hyper.dampening) if formula == NESTEROV else (0.0, 0.0, 0.0)


def step_of(recipe: Recipe, family: Family, rule: Rule) -> Step:
    """The numbers of this save. Those of FIT and FIT_BUFFER are still to be fitted."""
    hyper = rule.tries[recipe.attempt]
    scalars: Callable[[int, Hyper, int], tuple[float, ...]] = (
        _adam_scalars if rule.kind == "adam" else _momentum_scalars
    )
    dtypes = tuple(DTYPES[family.fields[s.field].dtype] for s in family.bases_of(recipe.formula) or ())
    if recipe.formula == GRADIENT:
        dtypes = (FLOAT32, BFLOAT16)
    rounded = tuple(float(np.float32(s)) for s in scalars(recipe.formula, hyper, rule.steps))
    return Step(recipe.formula, dtypes, rounded, recipe.flags, rule.steps if recipe.repeated else 0)


def fitted(recipe: Recipe, step: Step, bases: Sequence[Words], new: Words) -> Step:
    """The step with factors that leave the least squares on this sample, if its recipe leaves them free."""
    if recipe.formula in (FIT, FIT_BUFFER):
        with predict.quiet():
            terms = np.array(predict.terms_of(step, bases), np.float64)
            old = predict.load(bases[0], step.dtypes[0], "fit old").astype(np.float64)
            moved = predict.load(new, step.dtypes[0], "fit new") - old
            return step._replace(scalars=(*_least_squares(terms, moved), *step.scalars[3:]))
    if recipe.free:
        with predict.quiet():
            values = zip((*bases, new), (*step.dtypes, step.dtypes[0]), "abcd")
            old, before, after, target = (predict.load(*value).astype(np.float64) for value in values)
            power1, weight, beta, _, _ = step.scalars
            # By weight 1 / exp_avg_sq: what counts is the error in units of the last place.
            terms = np.array((np.ones(old.size), np.square((after - power1 * before) / weight) / old))
            return step._replace(scalars=(power1, weight, beta, *_least_squares(terms, target / old)))
    return step


def _least_squares(terms: NDArray[np.float64], values: NDArray[np.float64]) -> tuple[float, ...]:
    good = np.isfinite(terms).all(axis=0) & np.isfinite(values)
    if not good.any():
        return (0.0,) * len(terms)
    try:
        factors = np.linalg.lstsq(terms[:, good].T, values[good], rcond=None)[0]
    except np.linalg.LinAlgError:
        factors = np.zeros(len(terms))
    return tuple(float(np.float32(f)) for f in factors)
