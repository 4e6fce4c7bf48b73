"""All live objects of a job as one cut: what to stage, what to write as values, and how a checkpoint fits back in."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property, partial
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer

from gpumove.errors import ConfigError, LayoutError
from gpumove.state.families import Kin, Rule, aliases, copies
from gpumove.state.members import Member, Meta, ModelMember, ObjectMember, RngMember, Tensors
from gpumove.state.optimizer import OptimizerMember
from gpumove.state.peers import process_rank
from gpumove.state.plan import listed
from gpumove.state.values import dtype_name, dtype_of, tensor_names, unflatten


@dataclass(frozen=True)
class Capture:
    """One cut through the job, by reference.

    ``sources`` are the members' global tensors; as long as nothing was replaced or moved, they are the very same dicts
    as in the last cut, which is what plans and staging buffers are cached by.
    """

    sources: tuple[Tensors, ...]
    at_once: set[str]
    local: Tensors
    shared: dict[str, Any]
    own: dict[str, Any]
    kin: tuple[Mapping[str, Kin], ...] = ()
    rules: dict[str, Rule] = field(default_factory=dict)
    models: tuple[tuple[str, Tensors], ...] = ()

    @cached_property
    def relations(self) -> dict[str, Kin]:
        """Every tensor's place in a family, if it has one."""
        found = {fqn: kin for known in self.kin for fqn, kin in known.items()}
        found |= copies(self.models, found)
        return found | aliases(self.sources, found)


@dataclass(frozen=True)
class Saved:
    """A checkpoint as the live objects see it: what tensors and values it holds for this rank."""

    tensors: dict[str, Meta]
    local: dict[str, Meta]
    values: dict[str, Any]
    world_size: int


@dataclass(frozen=True)
class Targets:
    """What to fill: global tensors (possibly sharded) and this rank's own, by name."""

    tensors: Tensors
    local: Tensors


class Job:
    """The objects that a Checkpointer was given."""

    def __init__(
        self,
        *,
        model: nn.Module | Mapping[str, nn.Module] | None = None,
        optimizer: Optimizer | Sequence[Optimizer] | Mapping[str, Optimizer] | None = None,
        scheduler: Any = None,
        scaler: Any = None,
        loader: Any = None,
        objects: Mapping[str, Any] | None = None,
        rng: bool = False,
    ) -> None:
        """Wrap live objects; the arguments are those of ``Checkpointer``.

        Schedulers, the scaler and an elastic loader are equal on all ranks and saved once. Any other loader, and every
        entry of ``objects``, is each rank's own; modules among them count as models.
        """
        extra = {f"objects.{k}": o for k, o in _checked(objects or {}).items()}
        modules = {n: o for n, o in extra.items() if isinstance(o, nn.Module)}
        models = [ModelMember(n, m) for n, m in {**_named("model", model), **modules}.items()]
        names = {key: name for member in models for key, name in member.parameter_names().items()}
        tensors = {key: name for member in models for key, name in member.tensor_names().items()}
        optimizers = [OptimizerMember(n, o, names, tensors) for n, o in _named("optimizer", optimizer).items()]
        elastic = bool(getattr(loader, "elastic", False))
        shared = {**_named("scheduler", scheduler), **_named("scaler", scaler)} | (
            {"loader": loader} if elastic else {}
        )
        own = ({} if elastic or loader is None else {"loader": loader}) | {
            n: o for n, o in extra.items() if n not in modules
        }
        self._world_bound = {"loader"} if loader is not None and not elastic else set()
        # The generators come last: loading another object may draw from them.
        self.stream = partial(_stream, loader)
        self.loader = loader
        self._rng = [RngMember(self.stream)] if rng else []
        self.members: list[Member] = [
            *models,
            *optimizers,
            *(ObjectMember(n, o, shared=True) for n, o in shared.items()),
            *(ObjectMember(n, o, shared=False) for n, o in own.items()),
            *self._rng,
        ]

    def capture(self) -> Capture:
        """The cut. Call it in the training thread, between two steps."""
        lives = [(m.name, m.live()) for m in self.members]
        return Capture(
            sources=tuple(live.tensors for _, live in lives),
            at_once=set().union(*(live.at_once for _, live in lives)),
            local={fqn: t for _, live in lives for fqn, t in live.local.items()},
            shared={name: live.shared for name, live in lives if live.shared is not None},
            own={name: live.own for name, live in lives if live.own is not None},
            kin=tuple(live.kin for _, live in lives),
            rules={name: rule for _, live in lives for name, rule in live.rules.items()},
            models=tuple(
                (m.name, live.tensors) for m, (_, live) in zip(self.members, lives) if isinstance(m, ModelMember)
            ),
        )

    def match(self, saved: Saved, *, world_size: int, strict: bool = True) -> Targets:
        """Find what every saved tensor is to be read into, creating optimizer state that is not there yet.

        Raises:
            LayoutError: names, shapes or dtypes do not fit; all differences are listed.
        """
        problems: list[str] = []
        owned = _by_member(saved, [m.name for m in self.members])
        targets: Tensors = {}
        local: Tensors = {}
        for member in self.members:
            theirs = owned.pop(member.name)
            problems += self._misfits(member, saved, world_size)
            for fqn, tensor in member.targets(theirs).items():
                found = saved.local.get(fqn) or saved.tensors.get(fqn)
                if found is None:
                    problems.append(f"the checkpoint lacks {fqn}")
                elif (found.dtype, found.shape) != (dtype_name(tensor.dtype), tuple(tensor.shape)):
                    here = f"{dtype_name(tensor.dtype)}{list(tensor.shape)}"
                    problems.append(f"{fqn} is {found.dtype}{list(found.shape)} in the checkpoint and {here} here")
                else:
                    (local if fqn in saved.local else targets)[fqn] = tensor
            if isinstance(member, ModelMember):
                extra = set(tensor_names(saved.values.get(member.name)))
                problems += [
                    f"the live objects lack {n}" for n in sorted(set(theirs) - set(targets) - set(local) - extra)
                ]
        if strict and (stray := sorted(owned)):
            problems.append(f"the checkpoint also holds {', '.join(stray)}, which no live object takes: pass it")
        if problems:
            raise LayoutError(
                f"the checkpoint and the live objects differ in {len(problems)} places: " + listed(problems)
            )
        return self._with_values(saved, Targets(targets, local))

    def _misfits(self, member: Member, saved: Saved, world_size: int) -> list[str]:
        """What is wrong before a single tensor is compared."""
        if isinstance(member, ModelMember):
            return []
        if member.name not in saved.values:
            return [f"the checkpoint holds no state of {member.name}"]
        if isinstance(member, OptimizerMember):
            return member.misfits(saved.values[member.name])
        if member.name in self._world_bound and saved.world_size != world_size:
            return [
                f"the {member.name}'s state is for {saved.world_size} ranks and there are {world_size}: "
                "use gpumove.ElasticLoader, or restore with as many ranks as saved"
            ]
        return []

    def _with_values(self, saved: Saved, targets: Targets) -> Targets:
        """Add new buffers for the tensors inside values, which their objects take over whole."""
        for member in self.members:
            for fqn in tensor_names(saved.values.get(member.name)):
                for table, into in ((saved.local, targets.local), (saved.tensors, targets.tensors)):
                    if fqn in table and fqn not in into:
                        meta = table[fqn]
                        into[fqn] = torch.empty(meta.shape, dtype=dtype_of(meta.dtype), device="cpu")
        return targets

    def optimizers(self) -> list[Optimizer]:
        """The optimizers among the objects."""
        return [member.optimizer for member in self.members if isinstance(member, OptimizerMember)]

    def optimizer_state(self, saved: Saved, targets: Targets) -> Tensors:
        """Of the targets, those that nobody but an optimizer uses, and only when it makes a step."""
        found: Tensors = {}
        for member in self.members:
            if isinstance(member, OptimizerMember):
                values = set(tensor_names(saved.values.get(member.name)))
                names = (fqn for fqn in targets.tensors if fqn.startswith(f"{member.name}.") and fqn not in values)
                found.update((fqn, targets.tensors[fqn]) for fqn in names)
        return found

    def load(self, saved: Saved, targets: Targets) -> None:
        """Hand the values back, after all targets were filled; generators last."""
        found = {**targets.tensors, **targets.local}
        for member in self.members:
            if member.name in saved.values:
                member.load(unflatten(saved.values[member.name], found.__getitem__), found)


def _stream(loader: Any) -> int:
    """Which ranks draw alike: those that read the same samples, if the loader tells; else each is on its own."""
    reads_as = getattr(loader, "data_rank", None)
    return process_rank() if reads_as is None else int(reads_as)


def _named(kind: str, given: Any) -> dict[str, Any]:
    """One object under the kind's name, or several under ``kind.name``."""
    if given is None:
        return {}
    if isinstance(given, (list, tuple)):
        given = {str(i): g for i, g in enumerate(given)}
    if isinstance(given, Mapping) and not hasattr(given, "state_dict"):
        return {f"{kind}.{k}": g for k, g in _checked(given).items()}
    return {kind: given}


def _checked(given: Mapping[str, Any]) -> Mapping[str, Any]:
    if bad := [k for k in given if not isinstance(k, str) or "." in k or not k]:
        raise ConfigError(f"names of objects must be words without dots, not {bad}")
    return given


def _by_member(saved: Saved, names: list[str]) -> dict[str, dict[str, Meta]]:
    """Saved tensors by the member whose name they start with; strays under their own first word."""
    owned: dict[str, dict[str, Meta]] = {n: {} for n in names}
    for fqn, meta in [*saved.tensors.items(), *saved.local.items()]:
        words = fqn.split(".")
        name = next((n for n in (".".join(words[:k]) for k in (2, 1)) if n in owned), words[0])
        owned.setdefault(name, {})[fqn] = meta
    for name in saved.values:
        owned.setdefault(name, {})
    return owned
