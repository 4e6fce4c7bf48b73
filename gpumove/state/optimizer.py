"""A ``torch.optim.Optimizer`` as a member: state by parameter name, hyper-parameters by group.

Torch's own ``get_optimizer_state_dict`` is not used: on an optimizer without state it runs a step, and its loader casts
moments to the parameter's dtype. Neither is bit for bit.
"""

from __future__ import annotations

from collections.abc import Mapping
from itertools import chain
from operator import is_
from typing import Any

import torch
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer

from gpumove.errors import ConfigError
from gpumove.state.families import kin_of, rule_of
from gpumove.state.members import Live, Meta, Signature, Tensors
from gpumove.state.values import dtype_of, flatten

_OURS = frozenset({"params", "foreach", "fused", "capturable", "differentiable"})
"""Which kernels run is the live job's choice: a layout or a device may not have those that the saved job used."""


class OptimizerMember:
    """A ``torch.optim.Optimizer``: state by parameter name, hyper-parameters by group."""

    def __init__(
        self, name: str, optimizer: Optimizer, names: Mapping[int, str], tensors: Mapping[int, str] | None = None
    ) -> None:
        """Wrap an optimizer.

        Args:
            name: of the member.
            optimizer: any of torch's kind.
            names: id(parameter) -> its name, for those of the job's models.
            tensors: id(parameter) -> the name of its tensor in the checkpoint.
        """
        if not isinstance(optimizer, Optimizer):
            raise ConfigError(
                f"{name} is a {type(optimizer).__name__} and no torch.optim.Optimizer, so gpumove cannot know when it "
                "changes parameters: pass the optimizer that it wraps, or itself in objects= with overlap=False"
            )
        self.name, self.optimizer = name, optimizer
        self._names = dict(names)
        self._tensors = dict(tensors or {})
        for g, group in enumerate(optimizer.param_groups):
            for i, p in enumerate(group["params"]):
                self._names.setdefault(id(p), f"group{g}.{i}")
        self._in_backward = any(
            hasattr(p, "_in_backward_optimizers") for group in optimizer.param_groups for p in group["params"]
        )
        self._signature: Signature | None = None
        self._cached = Live()
        self._hyper: tuple[Live, list[str], Signature, Live] | None = None
        self._group_names: dict[int, tuple[list[Any], list[str]]] = {}
        self._filled: dict[int, tuple[str, ...]] = {}
        self._made: Tensors = {}

    def live(self) -> Live:
        """State tensors by reference. An optimizer that has not stepped has none, and is not made to have any."""
        state = self._state()
        hyper: Tensors = {}
        groups = [self._group(g, group, hyper) for g, group in enumerate(self.optimizer.param_groups)]
        both = self._with_hyper(state, hyper) if hyper else state
        shared = {"state": state.shared, "param_groups": groups}
        live = Live(tensors=both.tensors, at_once=both.at_once, shared=shared, kin=state.kin)
        for g, group in enumerate(self.optimizer.param_groups):
            if (rule := rule_of(self.optimizer, group)) is not None:
                live.rules[f"{self.name}.{g}"] = rule
        return live

    def _with_hyper(self, state: Live, hyper: Tensors) -> Live:
        """State and hyper-parameters that are tensors; the same object as long as nothing was replaced or moved."""
        names, tensors = list(hyper), list(hyper.values())
        kept = self._hyper
        if kept is None or kept[0] is not state or kept[1] != names or not kept[2].alike(tensors):
            # A scheduler may write to a tensor lr at any time.
            both = Live(tensors={**state.tensors, **hyper}, at_once=state.at_once | set(hyper))
            kept = self._hyper = state, names, Signature(tensors), both
        return kept[3]

    def _state(self) -> Live:
        """The state part of :meth:`live`, read again only if a tensor is another one or has moved."""
        values = list(chain.from_iterable(entries.values() for entries in self.optimizer.state.values()))
        if self._signature is not None and self._signature.holds(values):
            return self._cached
        tensors = [v for v in values if isinstance(v, torch.Tensor)]
        kept = self._signature is not None and self._signature.holds(tensors)
        fresh = self._read_state()
        if kept and fresh.tensors.keys() == self._cached.tensors.keys() and len(fresh.tensors) == len(tensors):
            fresh.tensors = self._cached.tensors  # only plain values, such as step counters, are others
        self._cached, self._signature = fresh, Signature(tensors)
        return fresh

    def _read_state(self) -> Live:
        live = Live()
        state: dict[str, dict[str, Any]] = {}
        rules = {
            id(p): f"{self.name}.{g}" for g, group in enumerate(self.optimizer.param_groups) for p in group["params"]
        }
        for p, entries in self.optimizer.state.items():
            where = f"{self.name}.{self._name_of(p)}"
            live.kin.update(kin_of(p, self._tensors.get(id(p)), where, entries, rule=rules.get(id(p), "")))
            for key, value in entries.items():
                if isinstance(value, torch.Tensor):
                    live.tensors[f"{where}.{key}"] = value.detach()
                else:
                    state.setdefault(self._name_of(p), {})[key] = flatten(f"{where}.{key}", value, live.tensors)
        if self._in_backward:
            live.at_once.update(live.tensors)
        live.shared = state
        return live

    def _name_of(self, p: object) -> str:
        if id(p) not in self._names:
            raise ConfigError(
                f"the optimizer {self.name!r} holds state for a parameter that was added or replaced after the "
                "Checkpointer was made: make the Checkpointer after add_param_group and after wrapping the model"
            )
        return self._names[id(p)]

    def _group(self, index: int, group: Mapping[str, Any], hyper: Tensors) -> dict[str, Any]:
        where = f"{self.name}.param_groups.{index}"
        saved: dict[str, Any] = {k: flatten(f"{where}.{k}", v, hyper) for k, v in group.items() if k != "params"}
        saved["params"] = self._names_of(index, group["params"])
        return saved

    def _names_of(self, index: int, params: list[Any]) -> list[str]:
        """The names of a group's parameters, worked out again only if it has others."""
        kept = self._group_names.get(index)
        if kept is None or len(kept[0]) != len(params) or not all(map(is_, kept[0], params)):
            kept = self._group_names[index] = list(params), [self._name_of(p) for p in params]
        return kept[1]

    def targets(self, saved: Mapping[str, Meta]) -> Tensors:
        """Live state tensors where they fit, new ones like the parameter where the optimizer has none yet.

        New ones are given to the optimizer in :meth:`load`, when they are filled and nothing has failed; until then
        whoever asks again, for the next checkpoint, gets the same.
        """
        keys: dict[str, list[str]] = {}
        for fqn in saved:
            where, _, key = fqn.rpartition(".")
            keys.setdefault(where, []).append(key)
        found: Tensors = {}
        self._filled = {}
        for group in self.optimizer.param_groups:
            for p in group["params"]:
                where = f"{self.name}.{self._name_of(p)}"
                self._filled[id(p)] = tuple(keys.get(where, ()))
                for key in keys.get(where, ()):
                    found[f"{where}.{key}"] = self._target(p, key, saved[f"{where}.{key}"], group)
        self._made = found
        return found

    def _target(self, p: torch.Tensor, key: str, meta: Meta, group: Mapping[str, Any]) -> torch.Tensor:
        dtype = dtype_of(meta.dtype)
        made = self._made.get(f"{self.name}.{self._name_of(p)}.{key}")
        for present in (self.optimizer.state.get(p, {}).get(key), made):
            if isinstance(present, torch.Tensor) and (present.dtype, tuple(present.shape)) == (dtype, meta.shape):
                return present
        if tuple(p.shape) == meta.shape and meta.shape:
            return torch.empty_like(p.detach(), dtype=dtype)  # a DTensor where the parameter is one
        if isinstance(p, DTensor) and meta.shape:
            raise ConfigError(
                f"the optimizer state {key!r} has the shape {list(meta.shape)}, not its sharded parameter's: "
                "run one optimizer step before restore(), so that the optimizer creates it"
            )
        # Step counters live on the host unless the kernel reads them on the device; all else is the parameter's.
        on_device = key != "step" or group.get("capturable") or group.get("fused")
        return torch.empty(meta.shape, dtype=dtype, device=p.device if on_device else "cpu")

    def load(self, values: Any, tensors: Tensors) -> None:
        """Hyper-parameters in place, and the state that is no plain tensor (LBFGS, say)."""
        self._made = {}
        for group in self.optimizer.param_groups:
            for p in group["params"]:
                where = f"{self.name}.{self._name_of(p)}"
                filled = {key: tensors[f"{where}.{key}"] for key in self._filled.get(id(p), ())}
                self._take_state(p, filled, values["state"].get(self._name_of(p), {}))
        for group, saved in zip(self.optimizer.param_groups, values["param_groups"]):
            for key, value in saved.items():
                if key in _OURS and key in group:
                    continue
                if isinstance(group.get(key), torch.Tensor) and isinstance(value, (torch.Tensor, float, int)):
                    group[key].copy_(torch.as_tensor(value))
                else:
                    group[key] = value

    def _take_state(self, p: torch.Tensor, filled: Tensors, entries: dict[str, Any]) -> None:
        """The checkpoint's state of one parameter, plain tensors and the rest, and away with what it does not have."""
        if not filled and not entries:
            self.optimizer.state.pop(p, None)
            return
        state = self.optimizer.state[p]
        for key in [k for k in state if k not in filled and k not in entries]:
            del state[key]
        state.update(filled)
        state.update({key: _moved(value, p.device) for key, value in entries.items()})

    def misfits(self, values: Any) -> list[str]:
        """How a saved optimizer's groups differ from the live one's."""
        saved, live = values["param_groups"], self.optimizer.param_groups
        if len(saved) != len(live):
            return [f"{self.name} has {len(live)} parameter groups, and the checkpoint {len(saved)}"]
        problems = []
        for index, (old, new) in enumerate(zip(saved, live)):
            names = {self._name_of(p) for p in new["params"]}
            if gone := sorted(set(old["params"]) - names):
                problems.append(f"{self.name} group {index} of the checkpoint also has {_some(gone)}")
            if more := sorted(names - set(old["params"])):
                problems.append(f"{self.name} group {index} of the checkpoint lacks {_some(more)}")
        return problems


def _some(names: list[str]) -> str:
    return ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")


def _moved(value: Any, device: torch.device) -> Any:
    """Tensors inside lists and dicts, such as LBFGS keeps, to their parameter's device."""
    if isinstance(value, torch.Tensor):
        return value.to(device)
    if isinstance(value, (list, tuple)):
        return type(value)(_moved(item, device) for item in value)
    return {k: _moved(v, device) for k, v in value.items()} if isinstance(value, dict) else value
