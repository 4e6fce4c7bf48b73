"""Coding one unit: which of its chunks are unchanged, what the others are coded against, and the coding itself."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from gpumove.errors import IntegrityError
from gpumove.format.codec import Buffer, digest
from gpumove.format.coding import Coded, Coder
from gpumove.format.rules import Field, Hyper, Rule
from gpumove.format.stored import Stored
from gpumove.save.assemble import Outcome
from gpumove.save.chain import Chain
from gpumove.save.chunks import Bytes, Cut, data_of
from gpumove.save.pace import Pace
from gpumove.save.predecessor import OnDisk, Predecessor
from gpumove.state.families import Kin
from gpumove.state.plan import Item
from gpumove.tracing import Trace

_SMALL_BYTES = 1 << 20
"""Looking at a unit costs as much as coding a megabyte or so."""


class Answer(NamedTuple):
    """What became of a chunk, and its stored bytes; None if the predecessor's serve."""

    outcome: Outcome
    data: Buffer | None


@dataclass(frozen=True)
class Material:
    """What the units of one save are coded from: what is to be written, and what was written last."""

    items: Sequence[Item]
    pieces: Cut
    snapshot: Bytes
    before: Predecessor
    rules: Mapping[str, Mapping[str, float]]
    disk: OnDisk | None
    trace: Trace


class UnitCoder:
    """Codes the units of one save, from several threads."""

    def __init__(self, material: Material, chain: Chain, pace: Pace) -> None:
        self._chain, self._pace, self._trace = chain, pace, material.trace
        self._items, self._pieces, self._snapshot = material.items, material.pieces, material.snapshot
        self._before, self._disk = material.before, material.disk
        self._coder = Coder()
        self._rules = {name: _rule(material.before.rules.get(name), now) for name, now in material.rules.items()}

    def code(self, unit: list[int]) -> list[Answer]:
        """Code one unit."""
        tasks = [self._pieces.tasks[i] for i in unit]
        data = [data_of(task, self._snapshot) for task in tasks]
        for task, view in zip(tasks, data):
            if len(view) != task.nbytes:
                raise IntegrityError(f"the copy of {task.key.fqn} has {len(view)} bytes, its box {task.nbytes}")
        with self._trace.span("digest"):
            digests = [digest(view) for view in data]
        if self._disk is not None:
            for task, view in zip(tasks, data):
                self._disk.put(task.key, view)
        before = [self._before.table.get(task.key) for task in tasks]
        clean = [b is not None and b.digest == d for b, d in zip(before, digests)]
        if all(clean):
            return [Answer(Outcome(d, stored=b), None) for d, b in zip(digests, before)]
        if not self._pace.worth():
            coded: list[Coded | None] = [None if c else Coded("raw/1", v, ()) for c, v in zip(clean, data)]
        else:
            coded = self._coded(unit, data, before, clean)
        return [
            Answer(Outcome(d, stored=b), None)
            if c is None
            else Answer(Outcome(d, c.codec, _resolved(c, unit, before)), c.stored)
            for c, d, b in zip(coded, digests, before)
        ]

    def _coded(
        self, unit: list[int], data: list[memoryview], before: list[Stored | None], clean: list[bool]
    ) -> list[Coded | None]:
        began = time.perf_counter()
        items = [self._items[self._pieces.tasks[i].item] for i in unit]
        kin = items[0].kin
        rule = kin.rule if kin is not None else ""
        bases = self._bases(unit, data, before, clean, rule)
        fields = [
            Field(i.kin.role if i.kin is not None else "", i.dtype, view, base, same)
            for i, view, base, same in zip(items, data, bases, clean)
        ]
        key = None if kin is None else _choice_key(kin, fields)
        coded = self._coder.encode(fields, self._rules.get(rule), key=key)
        raw = sum(len(v) for v, same in zip(data, clean) if not same)
        stored = sum(len(c.stored) for c in coded if c is not None)
        ended = time.perf_counter()
        self._trace.add("code", began, ended, nbytes=raw, stored=stored)
        self._pace.coded(raw, stored, ended - began)
        if any(b is not None for b in bases):
            self._chain.came_out(rule, raw, stored)
        return coded

    def _bases(
        self, unit: list[int], data: list[memoryview], before: list[Stored | None], clean: list[bool], rule: str
    ) -> list[memoryview | None]:
        """The predecessor's bytes that may be used, each compared with what was recorded of it."""
        held = self._before.held
        known = [b for b in before if b is not None]
        if held is None or not known or not self._chain.goes_on(known, rule):
            return [None] * len(unit)
        found: list[memoryview | None] = []
        for index, view, node, same in zip(unit, data, before, clean):
            base = None if node is None else view if same else held.get(self._pieces.tasks[index].key)
            # Memory may have gone bad, or the caller's tensors were changed between a restore and the first save.
            sound = node is not None and base is not None and (same or digest(base) == node.digest)
            found.append(base if sound else None)
        return found


def _resolved(coded: Coded, unit: list[int], before: list[Stored | None]) -> tuple[Stored | int, ...]:
    found: list[Stored | int] = []
    for source in coded.bases:
        old = before[source.field]
        if not source.old:
            found.append(unit[source.field])
        elif old is not None:
            found.append(old)
        else:
            raise IntegrityError("a chunk was coded against one that the last save does not have")
    return tuple(found)


def _choice_key(kin: Kin, fields: Sequence[Field]) -> tuple[object, ...]:
    """Which units are coded alike once one was looked at: those of one tensor, and small ones of one rule."""
    small = sum(len(f.new) for f in fields) < _SMALL_BYTES
    return (kin.rule if small else kin.family, *((f.role, f.dtype, f.base is None) for f in fields))


def _rule(before: Mapping[str, float] | None, now: Mapping[str, float]) -> Rule | None:
    """The step or steps between two saves. A scheduler has stepped since, so the rates of before are likelier."""
    if before is None:
        return None
    steps = round(now.get("step", 0) - before.get("step", 0))
    tries = tuple(dict.fromkeys((_hyper(before, now), _hyper(now, now))))
    return Rule("adam" if "beta1" in now else "momentum", max(0, steps), tries)


def _hyper(rates: Mapping[str, float], now: Mapping[str, float]) -> Hyper:
    """Hyper-parameters as they were, at the step that was reached since."""
    values = {**now, **rates, "step": now.get("step", 0)}
    kinds = {"step": int, "decoupled": bool, "maximize": bool, "nesterov": bool}
    return Hyper(**{n: kinds.get(n, float)(values[n]) for n in Hyper._fields if n in values})
