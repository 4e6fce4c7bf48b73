"""How the chunks of a family are stored: the smallest of what a sample shows. Decides and encodes; codec.py decodes.

The choice is made on a sample of one chunk, and serves the others of the same tensors and distance.
"""

from __future__ import annotations

import threading
from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from gpumove.format import predict
from gpumove.format.arithmetic import ieee
from gpumove.format.codec import PLANES, RAW, ROUND, SUB, Buffer
from gpumove.format.differences import (
    SAMPLE,
    codec_of,
    encode_round,
    encode_step,
    encode_sub,
    gradient_of,
    residual_of,
)
from gpumove.format.kernels import CENTRED, FLOATS, PLAIN, Words
from gpumove.format.lanes import MisfitError
from gpumove.format.layouts import (
    constant_layout,
    estimate_bits,
    layout_for,
    plain_layout,
    repetitive_layout,
    sample,
    without_seven,
)
from gpumove.format.planes import encode_planes
from gpumove.format.predict import GRADIENT
from gpumove.format.rules import Family, Field, Hyper, Recipe, Rule, Source, fitted, recipes, step_of

__all__ = ["Coded", "Coder", "Field", "Hyper", "Rule", "Source"]

_RAW_BELOW, _PLAIN_BELOW = 256, 4096
_CHOICE_SAMPLE = (32, 1024)
_CHUNKS_PER_CHOICE = 64
_MAX_CHOICES = 1 << 16
_GAIN = 1 / 256
"""Of the raw size, what a slower way has to save beyond a faster one: once for sub, twice for a prediction, and once
more for each time that it goes over the state again."""
_FLOATS = frozenset({"float32", "bfloat16", "complex64"})


class Coded(NamedTuple):
    """A stored chunk. ``bases``: what its decoder needs, in that order."""

    codec: str
    stored: Buffer
    bases: tuple[Source, ...]


class _Way(NamedTuple):
    """How to store one field. ``codec`` is planes or sub; with a recipe, a prediction."""

    codec: str
    recipe: Recipe | None = None


@dataclass
class _Choice:
    ways: dict[int, _Way]
    left: int = _CHUNKS_PER_CHOICE


class Coder:
    """Encodes families and remembers what paid. One per rank; safe to use from many threads."""

    def __init__(self) -> None:
        self._choices: dict[Hashable, _Choice] = {}
        self._lock = threading.Lock()

    def encode(self, fields: Sequence[Field], rule: Rule | None, *, key: Hashable = None) -> list[Coded | None]:
        """Store the chunks of one family, none larger than it is.

        Args:
            fields: the same box of tensors that belong together, with the same number of elements each.
            rule: how base became new; None: no optimizer's rule is known.
            key: names the tensors and the distance; what was chosen for one chunk is used for others of the same key.

        Returns:
            One result per field; None for clean ones. A result may be the field's own buffer.
        """
        with ieee() as sound:
            family = Family(fields)
            if not sound:
                rule = None
            ways = self._ways(family, rule, None if key is None else (key, rule and (rule.kind, rule.steps)))
            return [
                None if field.clean else self._encode(family, n, rule, ways.get(n, _Way(PLANES)), sound=sound)
                for n, field in enumerate(fields)
            ]

    def _ways(self, family: Family, rule: Rule | None, key: Hashable) -> dict[int, _Way]:
        dirty = [
            n for n, f in enumerate(family.fields) if not f.clean and len(f.new) >= _PLAIN_BELOW and f.base is not None
        ]
        if not dirty:
            return {}
        with self._lock:
            choice = self._choices.get(key) if key is not None else None
            if choice is not None and choice.left and choice.ways.keys() >= set(dirty):
                choice.left -= 1
                return {n: choice.ways[n] for n in dirty}
        ways = {n: _choose(family, n, rule) for n in dirty}
        if key is not None:
            with self._lock:
                if len(self._choices) >= _MAX_CHOICES:
                    self._choices.clear()
                self._choices[key] = _Choice(ways)
        return ways

    def _encode(self, family: Family, n: int, rule: Rule | None, way: _Way, *, sound: bool) -> Coded:
        field = family.fields[n]
        best: Coded | None = None
        if len(field.new) >= _RAW_BELOW or field.role == "copy":
            best = _constant(family, n) or _rounded(family, n, sound=sound)
        if best is None and way.recipe is not None and rule is not None:
            best = _predicted(family, n, rule, way.recipe)
        elif best is None and way.codec == SUB:
            new, old = Source(n, old=False), Source(n, old=True)
            best = Coded(SUB, encode_sub(family.words(new), family.words(old)), (old,))
        if best is None or len(best.stored) >= len(field.new):
            best = _planes(family, n) if len(field.new) >= _RAW_BELOW else None
        return best if best is not None and len(best.stored) < len(field.new) else Coded(RAW, field.new, ())


def _transform(dtype: str) -> int:
    return FLOATS if dtype in _FLOATS else PLAIN


def _constant(family: Family, n: int) -> Coded | None:
    words = family.words(Source(n, old=False))
    if not words.size or words[0] != words[-1] or words[0] != words[words.size // 2] or (words != words[0]).any():
        return None
    return Coded(PLANES, encode_planes(words, constant_layout(words.itemsize)), ())


def _rounded(family: Family, n: int, *, sound: bool) -> Coded | None:
    field = family.fields[n]
    sources = {"copy": ("parameter", "master"), "parameter": ("master",)}.get(field.role, ())
    found = [family.role(role) for role in sources]
    wide = [m for m in found if m is not None and family.fields[m].dtype == "float32"]
    if not sound or not wide or field.dtype not in ("bfloat16", "float16"):
        return None
    source = Source(wide[0], old=False)
    stored = encode_round(family.words(Source(n, old=False)), field.dtype, family.words(source))
    return None if stored is None else Coded(ROUND, stored, (source,))


def _planes(family: Family, n: int) -> Coded:
    words, dtype = family.words(Source(n, old=False)), family.fields[n].dtype
    if words.nbytes < _PLAIN_BELOW:
        return Coded(PLANES, encode_planes(words, plain_layout(words.itemsize, _transform(dtype))), ())
    layout = None if "float" in dtype or "complex" in dtype else repetitive_layout(words)
    if layout is None:
        layout = layout_for(sample(words, *SAMPLE), _transform(dtype))
    try:
        return Coded(PLANES, encode_planes(words, layout), ())
    except MisfitError:
        return Coded(PLANES, encode_planes(words, without_seven(layout)), ())


def _predicted(family: Family, n: int, rule: Rule, recipe: Recipe) -> Coded | None:
    sources = family.bases_of(recipe.formula)
    if sources is None or recipe.attempt >= len(rule.tries):
        return None
    bases, new = [family.words(source) for source in sources], family.words(Source(n, old=False))
    step = step_of(recipe, family, rule)
    step = fitted(recipe, step, [sample(base, *SAMPLE) for base in bases], sample(new, *SAMPLE))
    return Coded(codec_of(step), encode_step(step, bases, new), sources)


def _choose(family: Family, n: int, rule: Rule | None) -> _Way:
    """The smallest on a sample."""
    field = family.fields[n]
    new, old = (sample(family.words(Source(n, old)), *_CHOICE_SAMPLE) for old in (False, True))
    transform, width = _transform(field.dtype), 8 * new.itemsize
    ways = [
        (estimate_bits(new, transform), _Way(PLANES)),
        (estimate_bits(new - old, CENTRED) + _GAIN * width, _Way(SUB)),
    ]
    if rule is not None:
        for recipe in recipes(family, n, rule):
            cost = (2 + (rule.steps if recipe.repeated else 0)) * _GAIN * width
            ways.append((_bits_of(family, new, rule, recipe) + cost, _Way("", recipe)))
    return min(ways, key=lambda way: way[0])[1]


def _bits_of(family: Family, new: Words, rule: Rule, recipe: Recipe) -> float:
    bases = [sample(family.words(source), *_CHOICE_SAMPLE) for source in family.bases_of(recipe.formula) or ()]
    step = fitted(recipe, step_of(recipe, family, rule), bases, new)
    bits = 0.0
    with predict.quiet():
        if recipe.formula == GRADIENT:
            gradients = np.empty(new.size, np.uint16)
            gradient_of(step, bases[0], new, gradients)
            bases.append(gradients)
            bits = estimate_bits(gradients, FLOATS)
        return bits + estimate_bits(residual_of(step, bases, new), CENTRED)
