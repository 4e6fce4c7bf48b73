"""The live objects of a job, each behind one small interface: names for its tensors, values for the rest, and back.

A member never copies: it hands out live tensors by reference, under names that DDP, FSDP2 and TP agree on, and it says
which of them may change outside ``optimizer.step``.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from operator import attrgetter, eq, is_
from typing import Any, NamedTuple, Protocol, TypeAlias

import numpy as np
import torch
from torch import nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict, set_model_state_dict
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

from gpumove.errors import ConfigError
from gpumove.state import rng
from gpumove.state.families import Kin, Rule
from gpumove.state.locals import local_tensors
from gpumove.state.values import flatten, tensor_names

Tensors: TypeAlias = dict[str, torch.Tensor]
_WRAPPERS = ("_orig_mod", "_checkpoint_wrapped_module", "_fsdp_wrapped_module")


class Meta(NamedTuple):
    """A saved tensor as a member sees it before its bytes are read."""

    dtype: str
    shape: tuple[int, ...]


@dataclass
class Live:
    """What a member is made of now.

    ``tensors`` are global; ``local`` are this rank's own; both by reference. ``at_once`` names those that may change
    before the next ``optimizer.step``. ``shared`` is equal on all ranks, ``own`` is this rank's. ``kin`` and ``rules``
    say how tensors belong together.
    """

    tensors: Tensors = field(default_factory=dict)
    local: Tensors = field(default_factory=dict)
    at_once: set[str] = field(default_factory=set)
    shared: Any = None
    own: Any = None
    kin: dict[str, Kin] = field(default_factory=dict)
    rules: dict[str, Rule] = field(default_factory=dict)


class Member(Protocol):
    """One live object in the checkpoint."""

    name: str

    def live(self) -> Live:
        """The object's present state, by reference."""

    def targets(self, saved: Mapping[str, Meta]) -> Tensors:
        """The tensors to fill from a checkpoint that holds ``saved`` for this member; creates what is missing."""

    def load(self, values: Any, tensors: Tensors) -> None:
        """Take over values, after all tensors were filled. ``tensors`` are those that no target was given for."""


class Signature:
    """Identity, address and view of tensors: where it holds, references taken earlier are still the live ones."""

    def __init__(self, tensors: Sequence[torch.Tensor]) -> None:
        self._tensors = list(tensors)
        self._sharded = any(isinstance(t, DTensor) for t in tensors)
        self._looks = list(_looks(local_tensors(tensors)))

    def holds(self, values: Sequence[Any]) -> bool:
        """Whether these are the same objects, and where they were."""
        if len(values) != len(self._tensors) or not all(map(is_, values, self._tensors)):
            return False
        there = local_tensors(self._tensors) if self._sharded else self._tensors
        return all(map(eq, _looks(there), self._looks))

    def alike(self, tensors: Sequence[torch.Tensor]) -> bool:
        """Whether these have the same bytes, in the same view of them, whatever the objects."""
        return len(tensors) == len(self._tensors) and all(map(eq, _looks(local_tensors(tensors)), self._looks))


def _looks(there: Iterable[torch.Tensor]) -> Iterator[tuple[Any, ...]]:
    """One tensor after the other: a model's are in no cache when it is saved, and going over all of them again for each
    thing to look at takes twice as long."""
    return zip(*(map(look, there) for look in (torch.Tensor.data_ptr, torch.Tensor.numel, torch.Tensor.stride, _DTYPE)))


_DTYPE = attrgetter("dtype")


class ModelMember:
    """An ``nn.Module``: parameters and persistent buffers, under torch's canonical names."""

    def __init__(self, name: str, module: nn.Module) -> None:
        self.name, self.module = name, module
        self._sharded = [m for m in module.modules() if isinstance(m, FSDPModule)]
        self._signature: Signature | None = None
        self._live = Live()

    def live(self) -> Live:
        """References from torch's own API, kept as long as every parameter and buffer stays where it is."""
        self._reshard()
        present = _members(self.module)
        if self._signature is None or self._live.shared or not self._signature.holds(present):
            self._live, self._signature = self._read(), Signature(present)
        return self._live

    def _reshard(self) -> None:
        """After a forward without backward, FSDP2 leaves parameters whole: other objects, that no optimizer knows."""
        for part in self._sharded:
            part.reshard()

    def _read(self) -> Live:
        buffers = {canonical(self.module, n) for n, _ in self.module.named_buffers(remove_duplicate=False)}
        urgent = {canonical(self.module, n) for n in _forward_mutated(self.module)}
        live, extra = Live(), {}
        for key, value in get_model_state_dict(self.module).items():
            fqn = f"{self.name}.{key}"
            if not isinstance(value, torch.Tensor) or key.rpartition(".")[2] == "_extra_state":
                extra[key] = value  # a tensor of get_extra_state() is new each time, and goes back by set_extra_state()
            elif key in buffers and not isinstance(value, DTensor):
                live.local[fqn] = value.detach()  # BatchNorm and the like differ between ranks: each keeps its own
            else:
                live.tensors[fqn] = value.detach()
                if key in urgent:
                    live.at_once.add(fqn)
        if extra:
            live.shared = flatten(f"{self.name}.extra", extra, live.local)
        return live

    def parameter_names(self) -> dict[int, str]:
        """id(parameter) -> its name as optimizer state refers to it."""
        self._reshard()
        prefix = self.name.removeprefix("model").lstrip(".")
        return {
            id(p): ".".join(filter(None, (prefix, canonical(self.module, n))))
            for n, p in self.module.named_parameters()
        }

    def tensor_names(self) -> dict[int, str]:
        """id(parameter) -> the name of its tensor in the checkpoint."""
        return {id(p): f"{self.name}.{canonical(self.module, n)}" for n, p in self.module.named_parameters()}

    def targets(self, saved: Mapping[str, Meta]) -> Tensors:
        """The live parameters and buffers themselves."""
        live = self.live()
        extras = tensor_names(live.shared)
        return {**live.tensors, **{n: t for n, t in live.local.items() if n not in extras}}

    def load(self, values: Any, tensors: Tensors) -> None:
        """Hand extra state (``get_extra_state``) back; everything else was filled in place."""
        if values:
            set_model_state_dict(self.module, values, options=StateDictOptions(strict=False))


def _members(root: nn.Module) -> list[torch.Tensor]:
    """All parameters and buffers, in an order that lasts. torch's own walk builds every name, for nobody."""
    found: list[torch.Tensor | None] = []
    for part in root.modules():
        found += part._parameters.values()
        found += part._buffers.values()
    return [t for t in found if t is not None]


def canonical(root: nn.Module, name: str) -> str:
    """A parameter's name without the wrappers of DDP, torch.compile and activation checkpointing."""
    words, at = [], root
    for word in name.split("."):
        if word not in _WRAPPERS and not (word == "module" and isinstance(at, DistributedDataParallel)):
            words.append(word)
        at = getattr(at, word)
    return ".".join(words)


def _forward_mutated(module: nn.Module) -> list[str]:
    """Parameters that forward or backward change: ``Embedding(max_norm=)``, and optimizers that run in backward."""
    names = [
        f"{path}.weight".lstrip(".")
        for path, part in module.named_modules()
        if isinstance(part, (nn.Embedding, nn.EmbeddingBag)) and part.max_norm is not None
    ]
    return names + [n for n, p in module.named_parameters() if hasattr(p, "_in_backward_optimizers")]


class ObjectMember:
    """Anything with ``state_dict`` and ``load_state_dict``, a torch, numpy or python generator, or a dict of values."""

    def __init__(self, name: str, target: Any, *, shared: bool) -> None:
        self.name, self.target, self.shared = name, target, shared
        known = isinstance(target, (dict, torch.Generator, random.Random, np.random.Generator))
        if not known and not all(callable(getattr(target, a, None)) for a in ("state_dict", "load_state_dict")):
            raise ConfigError(
                f"{name} is a {type(target).__name__}: it needs state_dict() and load_state_dict(), "
                "or must be a random generator or a dict (which is updated in place)"
            )

    def live(self) -> Live:
        """A copy of the object's state by its own method; its tensors are copied at once."""
        state = _get_state(self.target)
        live = Live()
        sink = live.tensors if self.shared else live.local
        tree = flatten(self.name, state, sink)
        if sharded := [n for n, t in sink.items() if isinstance(t, DTensor)]:
            raise ConfigError(
                f"{sharded[0]} is a DTensor inside a plain state_dict, where it could not be put back on another mesh: "
                "pass the module that it belongs to, in model= or objects="
            )
        live.at_once.update(sink)
        if self.shared:
            live.shared = tree
        else:
            live.own = tree
        return live

    def targets(self, saved: Mapping[str, Meta]) -> Tensors:
        """None of its own: the object takes new tensors through ``load_state_dict``."""
        return {}

    def load(self, values: Any, tensors: Tensors) -> None:
        """Give the state back by the object's own method."""
        _set_state(self.target, values)


def _get_state(target: Any) -> Any:
    if isinstance(target, dict):
        return target
    if isinstance(target, torch.Generator):
        return target.get_state()
    if isinstance(target, random.Random):
        return target.getstate()
    if isinstance(target, np.random.Generator):
        return target.bit_generator.state
    return target.state_dict()


def _set_state(target: Any, state: Any) -> None:
    if isinstance(target, dict):
        target.clear()
        target.update(state)
    elif isinstance(target, torch.Generator):
        target.set_state(state)
    elif isinstance(target, random.Random):
        target.setstate(state)
    elif isinstance(target, np.random.Generator):
        target.bit_generator.state = state
    else:
        target.load_state_dict(state)


class RngMember:
    """Python's, numpy's and torch's global generators of this rank.

    Ranks of one stream draw alike. Those of one tensor-parallel group must, or their replicas drift apart; others must
    not.
    """

    name = "rng"

    def __init__(self, stream: Callable[[], int]) -> None:
        self.stream = stream

    def live(self) -> Live:
        """The generators' states, each a copy."""
        live = Live()
        live.own = flatten(self.name, {**rng.capture(), "stream": self.stream()}, live.local)
        live.at_once.update(live.local)
        return live

    def targets(self, saved: Mapping[str, Meta]) -> Tensors:
        """None: states are small and come as values."""
        return {}

    def load(self, values: Any, tensors: Tensors) -> None:
        """Put the generators back, or derive those of a stream that the checkpoint does not have."""
        stream = self.stream()
        if values["stream"] == stream:
            rng.restore(values)
        else:
            rng.derive(values, stream)
