"""Coding one unit: which of its chunks are unchanged, what the others are coded against, and the coding itself."""

from __future__ import annotations

import struct
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

_COUNTERS = {"float32": "<f", "float64": "<d", "int64": "<q", "int32": "<i"}
_MOST_STEPS = 1 << 40
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
    steps: Mapping[str, float]
    disk: OnDisk | None
    trace: Trace
    unchanged: frozenset[int] = frozenset()


class UnitCoder:
    """Codes the units of one save, from several threads."""

    def __init__(self, material: Material, coder: Coder, chain: Chain, pace: Pace) -> None:
        self._coder, self._chain, self._pace, self._trace = coder, chain, pace, material.trace
        self._items, self._pieces, self._snapshot = material.items, material.pieces, material.snapshot
        self._before, self._disk, self._unchanged = material.before, material.disk, material.unchanged
        self._now, self._steps = material.rules, material.steps
        self._rules: dict[tuple[str, float, float], Rule | None] = {}

    def code(self, unit: list[int]) -> list[Answer]:
        """Code one unit."""
        tasks = [self._pieces.tasks[i] for i in unit]
        data = [data_of(task, self._snapshot) for task in tasks]
        for task, view in zip(tasks, data):
            if len(view) != task.nbytes:
                raise IntegrityError(f"the copy of {task.key.fqn} has {len(view)} bytes, its box {task.nbytes}")
        if self._disk is not None:
            for task, view in zip(tasks, data):
                self._disk.put(task.key, view)
        before = [self._before.table.get(task.key) for task in tasks]
        if self._unchanged.issuperset(task.source for task in tasks) and None not in before:
            return [Answer(Outcome(b.digest, stored=b), None) for b in before if b is not None]
        with self._trace.span("digest"):
            digests = [digest(view) for view in data]
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
        bases = self._bases(unit, data, before, clean)
        coded = self._encoded(unit, data, bases, clean)
        stored = sum(len(c.stored) for c in coded if c is not None)
        raw = sum(len(v) for v, same in zip(data, clean) if not same)
        needed = [b for b, base in zip(before, bases) if b is not None and base is not None]
        if needed:
            self._chain.came_out(self._rule_name(unit), raw, stored)
            if not self._chain.holds(needed, stored):
                coded = self._encoded(unit, data, [None] * len(unit), clean)
                stored = sum(len(c.stored) for c in coded if c is not None)
        ended = time.perf_counter()
        self._trace.add("code", began, ended, nbytes=raw, stored=stored)
        self._pace.coded(raw, stored, ended - began)
        return coded

    def _encoded(
        self, unit: list[int], data: list[memoryview], bases: list[memoryview | None], clean: list[bool]
    ) -> list[Coded | None]:
        """Code those that changed; unchanged ones serve only if they may be a base."""
        chosen = [n for n, same in enumerate(clean) if not same or bases[n] is not None]
        items = [self._items[self._pieces.tasks[unit[n]].item] for n in chosen]
        fields = [
            Field(i.kin.role if i.kin is not None else "", i.dtype, data[n], bases[n], clean[n])
            for i, n in zip(items, chosen)
        ]
        kin = items[0].kin
        key = None if kin is None else _choice_key(kin, fields)
        found = self._coder.encode(fields, None if kin is None else self._rule(kin), key=key)
        coded: list[Coded | None] = [None] * len(unit)
        for n, one in zip(chosen, found):
            if one is not None:
                sources = tuple(source._replace(field=chosen[source.field]) for source in one.bases)
                coded[n] = one._replace(bases=sources)
        return coded

    def _rule_name(self, unit: list[int]) -> str:
        kin = self._items[self._pieces.tasks[unit[0]].item].kin
        return "" if kin is None else kin.rule

    def _rule(self, kin: Kin) -> Rule | None:
        """The step or steps of one family between the two saves; by its own counter if this rank has it."""
        before, now = self._before.rules.get(kin.rule), self._now.get(kin.rule)
        if before is None or now is None:
            return None
        first, last = self._before.steps.get(kin.step), self._steps.get(kin.step)
        if first is None or last is None:
            first, last = before["step"], now["step"]
        key = (kin.rule, first, last)
        if key not in self._rules:
            self._rules[key] = _rule(before, now, first, last)
        return self._rules[key]

    def _bases(
        self, unit: list[int], data: list[memoryview], before: list[Stored | None], clean: list[bool]
    ) -> list[memoryview | None]:
        """The predecessor's bytes that may be used, each compared with what was recorded of it."""
        held, rule = self._before.held, self._rule_name(unit)
        usable = [b is not None for b in before]
        if held is None or not any(usable):
            return [None] * len(unit)
        if not self._chain.goes_on([b for b in before if b is not None], rule):
            # Unchanged chunks are not written anew: what they need must not keep the others from differences for good.
            usable = [b is not None and not same for b, same in zip(before, clean)]
            if not self._chain.goes_on([b for b, use in zip(before, usable) if b is not None and use], rule):
                return [None] * len(unit)
        found: list[memoryview | None] = []
        for index, view, node, same, use in zip(unit, data, before, clean, usable):
            base = None if node is None or not use else view if same else held.get(self._pieces.tasks[index].key)
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


def _rule(before: Mapping[str, float], now: Mapping[str, float], first: float, last: float) -> Rule | None:
    """What happened between two saves. A scheduler has stepped since, so the rates of before are likelier."""
    if not abs(first) <= _MOST_STEPS or not abs(last) <= _MOST_STEPS or before.keys() != now.keys():
        return None
    tries = tuple(dict.fromkeys((_hyper(before, last), _hyper(now, last))))
    return Rule("adam" if "beta1" in now else "momentum", max(0, round(last - first)), tries)


def _hyper(rates: Mapping[str, float], step: float) -> Hyper:
    """Hyper-parameters as they were, at the step that was reached since."""
    values = {**rates, "step": step}
    kinds = {"step": int, "decoupled": bool, "maximize": bool, "nesterov": bool}
    return Hyper(**{n: kinds.get(n, float)(values[n]) for n in Hyper._fields if n in values})


def steps_of(items: Sequence[Item], snapshot: Bytes) -> dict[str, float]:
    """The step counters of families among what this rank writes, by name."""
    wanted = {item.kin.step for item in items if item.kin is not None and item.kin.step}
    found = {}
    for item in items:
        if item.fqn in wanted and item.dtype in _COUNTERS and item.box.volume() == 1:
            (found[item.fqn],) = struct.unpack(_COUNTERS[item.dtype], snapshot.view(item.source))
    return found
