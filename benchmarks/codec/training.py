"""One training of a regime, step by step, with torch's own optimizers. Knows no file and no codec."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import torch
from torch.nn import functional

from benchmarks.codec.model import adapt
from benchmarks.codec.regimes import Regime, Scale
from benchmarks.workload import Decoder

_MOMENTS = ("exp_avg", "exp_avg_sq", "momentum_buffer")
_SEED = 20


class Training:
    """A model, its optimizer and its schedule, ready for the first step."""

    def __init__(
        self, regime: Regime, scale: Scale, tokens: np.ndarray, weights: Mapping[str, torch.Tensor] | None
    ) -> None:
        torch.manual_seed(_SEED)
        self.regime, self.scale, self.steps, self.loss = regime, scale, 0, math.nan
        self._tokens = torch.from_numpy(tokens)
        self._random = torch.Generator().manual_seed(_SEED)
        self._mixed = regime.precision == "mixed"
        shape = {"vocabulary": scale.vocabulary, "width": scale.width, "layers": scale.layers, "context": scale.context}
        model = Decoder(**shape, tied=False)
        if weights is not None:
            model.load_state_dict(dict(weights))
        if regime.adapters:
            adapt(model)
        trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
        # What the optimizer changes: the model's own parameters, or fp32 masters of them.
        self.held = {name: p.detach().clone() if self._mixed else p for name, p in trained.items()}
        self.model = model.to(torch.bfloat16) if self._mixed else model
        self._make_optimizer()

    def _make_optimizer(self) -> None:
        regime, decays = self.regime, {name: p.dim() >= 2 for name, p in self.held.items()}
        self.group_of = {name: int(not decay) for name, decay in decays.items()}
        groups = [
            {"params": [p for name, p in self.held.items() if self.group_of[name] == n], "weight_decay": decay}
            for n, decay in enumerate((regime.weight_decay, 0.0))
        ]
        groups = [group for group in groups if group["params"]]
        if regime.optimizer == "sgd":
            self.optimizer: torch.optim.Optimizer = torch.optim.SGD(groups, lr=regime.lr, momentum=0.9)
        else:
            self.optimizer = torch.optim.AdamW(groups, lr=regime.lr, betas=regime.betas)
        self.schedule = torch.optim.lr_scheduler.LambdaLR(self.optimizer, self._factor)

    def _factor(self, step: int) -> float:
        warm, total = self.regime.warm, self.regime.total
        if step < warm:
            return (step + 1) / warm
        return 0.5 * (1 + math.cos(math.pi * min(1.0, (step - warm) / (total - warm))))

    def step(self) -> None:
        """Forward, backward, clip at 1.0, optimizer, schedule; for mixed precision, masters back into the model."""
        parts = 2 if self._mixed and self.regime.wide else 1
        self.loss = sum(self._backward(self.scale.batch // parts) for _ in range(parts)) / parts
        if self.regime.wide:
            torch.nn.utils.clip_grad_norm_(self.held.values(), 1.0)
        self.optimizer.step()
        self.schedule.step()
        self.optimizer.zero_grad()
        if self._mixed:
            with torch.no_grad():
                for name, parameter in self.model.named_parameters():
                    parameter.copy_(self.held[name])
        self.steps += 1

    def _backward(self, batch: int) -> float:
        at = torch.randint(0, len(self._tokens) - self.scale.context - 1, (batch,), generator=self._random)
        tokens = torch.stack([self._tokens[i : i + self.scale.context + 1] for i in at.tolist()])
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=self.regime.precision == "autocast"):
            logits = self.model(tokens[:, :-1])
        loss = functional.cross_entropy(logits.float().flatten(0, 1), tokens[:, 1:].flatten())
        loss.backward()
        if self._mixed:
            self._collect()
        return loss.item()

    def _collect(self) -> None:
        """The model's gradients, added up in fp32 on the masters."""
        for name, parameter in self.model.named_parameters():
            if parameter.grad is None:
                continue
            master, gradient = self.held[name], parameter.grad.float()
            master.grad = gradient if master.grad is None else master.grad.add_(gradient)
            parameter.grad = None

    def tensors(self) -> Iterator[tuple[str, str, torch.Tensor]]:
        """Everything that a checkpoint holds: parameter's name, role in its family, and the tensor."""
        for name, parameter in self.model.named_parameters():
            held = self.held.get(name, parameter)
            yield name, "parameter", held.detach()
            state = self.optimizer.state.get(held, {})
            yield from ((name, key, state[key]) for key in _MOMENTS if key in state)
            if held is not parameter and self._mixed:
                yield name, "copy", parameter.detach()

    def about(self) -> dict[str, str]:
        """Hyper-parameters as a checkpoint taken now would hold them: the schedule has stepped already."""
        rates = [self._rates(group) for group in self.optimizer.param_groups]
        return {
            "rates": json.dumps(rates),
            "group_of": json.dumps(self.group_of),
            "steps": str(self.steps),
            "loss": f"{self.loss:.4f}",
        }

    def _rates(self, group: Mapping[str, Any]) -> dict[str, float]:
        keys = ("lr", "eps", "weight_decay", "maximize", "momentum", "dampening", "nesterov")
        found = {key: float(group[key]) for key in keys if key in group}
        if "betas" in group:
            # torch.optim.AdamW decays the weights by themselves, not through the gradient.
            found |= {"beta1": group["betas"][0], "beta2": group["betas"][1], "decoupled": 1.0}
        return found | {"step": float(self.steps)}
