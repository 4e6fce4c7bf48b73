"""States of real trainings, made once and kept on disk: an anchor, and what it had become some steps later."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from benchmarks.codec.model import INPUT
from benchmarks.codec.regimes import BY_NAME, Regime, Scale
from benchmarks.codec.text import corpora
from benchmarks.codec.training import Training

ORDER = ("exp_avg", "exp_avg_sq", "momentum_buffer", "parameter", "copy")
Say = Callable[[str], None]


@dataclass(frozen=True)
class Member:
    """One tensor of a family, at the anchor and now, as flat bytes."""

    role: str
    dtype: str
    item_bytes: int
    old: memoryview
    new: memoryview


@dataclass(frozen=True)
class Family:
    """A parameter, its moments and its copy. ``before`` and ``now`` are the optimizer's numbers; empty if frozen."""

    name: str
    members: tuple[Member, ...]
    before: dict[str, float]
    now: dict[str, float]

    @property
    def dense(self) -> bool:
        """Whether every element gets a gradient at every step."""
        return self.name != INPUT

    def cut(self, elements: int) -> Iterator[Family]:
        """In boxes of so many elements, as a save cuts it."""
        count = len(self.members[0].new) // self.members[0].item_bytes
        for at in range(0, count, elements):
            parts = (
                Member(
                    m.role,
                    m.dtype,
                    m.item_bytes,
                    *(view[at * m.item_bytes :][: elements * m.item_bytes] for view in (m.old, m.new)),
                )
                for m in self.members
            )
            yield Family(self.name, tuple(parts), self.before, self.now)


class States:
    """The states of one scale below a directory. Nothing is made before it is asked for."""

    def __init__(self, top: Path, scale: Scale, *, distances: Sequence[int], say: Say) -> None:
        self._top, self._scale, self._say = top / scale.name, scale, say
        self._distances = sorted(distances)
        self._texts: dict[str, np.ndarray] = {}

    def families(self, regime: Regime, distance: int) -> list[Family]:
        """All tensors of a regime at its anchor (as ``old``) and so many steps later (as ``new``)."""
        self.make(regime)
        old, new = _read(self._path(regime, 0)), _read(self._path(regime, distance))
        found: dict[str, dict[str, Member]] = {}
        for key, before in old.tensors.items():
            name, role = key.rsplit(":", 1)
            now = new.tensors.get(key, before)
            found.setdefault(name, {})[role] = Member(
                role, str(now.dtype).removeprefix("torch."), now.element_size(), _bytes(before), _bytes(now)
            )
        return [
            Family(
                name,
                tuple(sorted(members.values(), key=lambda m: ORDER.index(m.role))),
                old.rates(name),
                new.rates(name),
            )
            for name, members in found.items()
        ]

    def make(self, regime: Regime) -> None:
        """Train, unless that has been done."""
        recipe = {**regime.recipe(self._scale), "torch": torch.__version__}
        note = self._top / regime.name / "recipe.json"
        if note.exists():
            found = json.loads(note.read_text())
            if set(self._distances) <= set(found.pop("distances")) and found == recipe:
                return
        weights = None
        if regime.start is not None:
            self.make(BY_NAME[regime.start])
            anchor = _read(self._path(BY_NAME[regime.start], 0)).tensors
            weights = {key.rsplit(":", 1)[0]: t for key, t in anchor.items() if key.endswith(":parameter")}
        note.parent.mkdir(parents=True, exist_ok=True)
        note.unlink(missing_ok=True)
        training = Training(regime, self._scale, self._text(regime.text), weights)
        self._train(training, regime)
        note.write_text(json.dumps({**recipe, "distances": self._distances}))

    def _train(self, training: Training, regime: Regime) -> None:
        steps = max(1, regime.steps // self._scale.shorter)
        self._say(f"training: {regime.title}, {steps} steps to the anchor")
        anchor: dict[str, torch.Tensor] = {}
        for done in range(1, steps + max(self._distances) + 1):
            training.step()
            if done - steps not in (0, *self._distances):
                continue
            tensors = {f"{name}:{role}": t for name, role, t in training.tensors()}
            if done == steps:
                self._say(f"  loss {training.loss:.2f}")
                anchor = {key: t.clone() for key, t in tensors.items()}
            else:
                # What has not changed is taken from the anchor: a frozen base is stored once.
                tensors = {key: t for key, t in tensors.items() if not torch.equal(t, anchor[key])}
            save_file(tensors, self._path(regime, done - steps), training.about())

    def _text(self, kind: str) -> np.ndarray:
        if not self._texts:
            self._texts = corpora(self._scale.text_bytes, size=self._scale.vocabulary)
        return self._texts[kind]

    def _path(self, regime: Regime, distance: int) -> Path:
        return self._top / regime.name / f"{distance}.safetensors"


@dataclass(frozen=True)
class _Stored:
    tensors: dict[str, torch.Tensor]
    about: dict[str, Any]

    def rates(self, name: str) -> dict[str, float]:
        group = json.loads(self.about["group_of"]).get(name)
        return {} if group is None else dict(json.loads(self.about["rates"])[group])


def _read(path: Path) -> _Stored:
    with safe_open(path, framework="pt") as file:
        return _Stored({key: file.get_tensor(key) for key in file.keys()}, file.metadata())  # noqa: SIM118


def _bytes(tensor: torch.Tensor) -> memoryview:
    return memoryview(tensor.contiguous().reshape(-1).view(torch.uint8).numpy()).toreadonly()
