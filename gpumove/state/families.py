"""Which tensors belong together, and by what rule an optimizer changes them: what predictions are made from.

A family is one parameter with everything of its shape that an optimizer keeps for it, and copies of it in another
precision. Its members are written by one rank, cut alike, and coded together. Nothing here has to be right for a
checkpoint to be right: a family or a rule that does not fit the numbers only costs bytes.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch

from gpumove.state.locals import local_tensor
from gpumove.state.values import dtype_name

_LOW = ("bfloat16", "float16")
_MOMENTS = ("exp_avg", "exp_avg_sq", "momentum_buffer")


class Kin(NamedTuple):
    """A tensor's place in a family. ``rule`` names the optimizer's parameter group, ``step`` the family's counter."""

    family: str
    role: str
    rule: str
    step: str = ""


@dataclass(frozen=True)
class Rule:
    """What one parameter group does, as of one capture. ``tensors`` are hyper-parameters, read from the copy."""

    kind: str
    numbers: dict[str, float] = field(default_factory=dict)
    tensors: dict[str, torch.Tensor] = field(default_factory=dict)


def kin_of(
    parameter: torch.Tensor, name: str | None, where: str, state: Mapping[str, Any], *, rule: str
) -> dict[str, Kin]:
    """The family of one parameter.

    Args:
        parameter: as the optimizer knows it.
        name: what it is called in the checkpoint; None if it is not in it.
        where: what its state tensors' names begin with.
        state: the optimizer's state for it.
        rule: its group.
    """
    family = name or where
    step = f"{where}.step" if isinstance(state.get("step"), torch.Tensor) else ""
    found = {
        f"{where}.{key}": Kin(family, _role(key, value, parameter), rule, step)
        for key, value in state.items()
        if isinstance(value, torch.Tensor) and value.shape == parameter.shape and value.dim()
    }
    if found and name is not None:
        found[name] = Kin(family, "parameter", rule, step)
    return found


def _role(key: str, value: torch.Tensor, parameter: torch.Tensor) -> str:
    if key in _MOMENTS:
        return key
    low = dtype_name(parameter.dtype) in _LOW
    return "master" if low and value.dtype == torch.float32 and "master" in key else ""


def rule_of(optimizer: torch.optim.Optimizer, group: Mapping[str, Any]) -> Rule | None:
    """The rule of a parameter group, from the state that it keeps; None if it is none that predicts anything.

    It never raises: groups hold what their optimizers and schedulers like.
    """
    state = next((s for p in group["params"] if p.requires_grad and (s := optimizer.state.get(p))), None)
    if state is None:
        return None
    given: dict[str, Any] = {"step": state.get("step", group.get("step", 0))}
    if {"exp_avg", "exp_avg_sq"} <= state.keys():
        kind, betas = "adam", group.get("betas")
        if not isinstance(betas, (tuple, list)) or len(betas) != 2:
            return None
        given |= {"beta1": betas[0], "beta2": betas[1]}
        # AdamW is a kind of Adam in some versions of torch; what the group says is nearer to the truth than the class.
        given["decoupled"] = group.get("decoupled_weight_decay", "adamw" in type(optimizer).__name__.lower())
    elif "momentum_buffer" in state:
        kind = "momentum"
    else:
        return None
    for key in ("lr", "eps", "weight_decay", "maximize", "momentum", "dampening", "nesterov"):
        given[key] = group.get(key, 0)
    tensors = {k: v for k, v in given.items() if isinstance(v, torch.Tensor) and v.numel() == 1}
    numbers = {k: n for k, v in given.items() if k not in tensors and (n := _number(v)) is not None}
    return Rule(kind, numbers, tensors) if given.keys() == numbers.keys() | tensors.keys() else None


def _number(value: Any) -> float | None:
    """A finite number, whatever its type (schedulers leave numpy's behind); None if it is not one."""
    try:
        found = float(value)
    except (TypeError, ValueError, RuntimeError):
        return None
    return found if math.isfinite(found) else None


def copies(models: Sequence[tuple[str, Mapping[str, torch.Tensor]]], kin: Mapping[str, Kin]) -> dict[str, Kin]:
    """Low-precision tensors of one model that have an fp32 namesake, with an optimizer, in another.

    Args:
        models: each model's name and tensors.
        kin: what is known from optimizers.
    """
    masters: dict[str, tuple[Kin, torch.Tensor]] = {}
    for inner, fqn, tensor in _inner(models):
        if fqn in kin and kin[fqn].role == "parameter" and tensor.dtype == torch.float32:
            masters[inner] = (kin[fqn], tensor)
    found = {}
    for inner, fqn, tensor in _inner(models):
        if fqn not in kin and inner in masters and dtype_name(tensor.dtype) in _LOW:
            near, master = masters[inner]
            if master.shape == tensor.shape:
                found[fqn] = near._replace(role="copy")
    return found


def aliases(sources: Iterable[Mapping[str, torch.Tensor]], kin: Mapping[str, Kin]) -> dict[str, Kin]:
    """Further names of tensors that have a family: tied weights are written once, so all their names go together."""
    tensors = {fqn: local_tensor(t) for source in sources for fqn, t in source.items()}
    rest = {fqn: t for fqn, t in tensors.items() if fqn not in kin and t.numel()}
    addresses = {t.data_ptr() for t in rest.values()}
    known = ((fqn, t) for fqn, t in tensors.items() if fqn in kin and t.data_ptr() in addresses)
    places = {_place(t): kin[fqn] for fqn, t in known}
    found = ((fqn, places.get(_place(t))) for fqn, t in rest.items()) if places else ()
    return {fqn: near for fqn, near in found if near is not None}


def _place(tensor: torch.Tensor) -> tuple[Any, ...]:
    return tensor.data_ptr(), tensor.dtype, tensor.shape, tensor.stride(), tensor.device


def _inner(models: Iterable[tuple[str, Mapping[str, torch.Tensor]]]) -> Iterable[tuple[str, str, torch.Tensor]]:
    for name, tensors in models:
        for fqn, tensor in tensors.items():
            yield fqn.removeprefix(f"{name}."), fqn, tensor


def settled(
    rules: Mapping[str, Rule], scalars: Mapping[tuple[str, str], int], view: Callable[[int], memoryview]
) -> dict[str, dict[str, float]]:
    """The rules' hyper-parameters as numbers, those that are tensors read from a finished snapshot.

    Args:
        rules: by name.
        scalars: (rule, hyper-parameter) -> number of the source.
        view: a source's bytes.
    """
    found = {name: dict(rule.numbers) for name, rule in rules.items()}
    for (name, key), source in scalars.items():
        value = _number(torch.frombuffer(view(source), dtype=rules[name].tensors[key].dtype)[0])
        if value is None:
            found.pop(name, None)
        elif name in found:
            found[name][key] = value
    return found
