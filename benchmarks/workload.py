"""The training that everything is measured beside: a GPT-2-like decoder of any size with AdamW. Knows no checkpoint."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from time import perf_counter

import torch
import xxhash
from torch import nn
from torch.distributed.tensor import DTensor
from torch.nn import functional
from torch.optim.optimizer import register_optimizer_step_pre_hook

_STATE_BYTES_PER_PARAMETER = 12  # fp32: the parameter and two AdamW moments
_GPT2_PARAMETERS = 124e6
_GPT2_VOCABULARY = 50257
_HEAD = 64


class Block(nn.Module):
    """Attention and MLP, each behind a LayerNorm."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        batch, tokens, width = x.shape
        heads = self.qkv(self.norm1(x)).view(batch, tokens, 3, width // _HEAD, _HEAD).permute(2, 0, 3, 1, 4)
        mixed = functional.scaled_dot_product_attention(*heads, is_causal=True).transpose(1, 2)
        x = x + self.out(mixed.reshape(batch, tokens, width))
        return x + self.down(functional.gelu(self.up(self.norm2(x))))


class Decoder(nn.Module):
    """GPT-2's shape; input and output share the embedding unless they are to be told apart (``tied=False``)."""

    def __init__(self, *, vocabulary: int, width: int, layers: int, context: int = 1024, tied: bool = True) -> None:
        super().__init__()
        self.tokens, self.positions = nn.Embedding(vocabulary, width), nn.Embedding(context, width)
        self.blocks = nn.ModuleList(Block(width) for _ in range(layers))
        self.norm = nn.LayerNorm(width)
        self.head = None if tied else nn.Linear(width, vocabulary, bias=False)
        # As GPT-2 does it. With torch's defaults the tied output is so sure of itself that gradients vanish, and state
        # that does not change makes every checkpointer look good.
        for name, parameter in self.named_parameters():
            if parameter.dim() == 2:
                nn.init.normal_(parameter, std=0.02)
            elif name.endswith("bias"):
                nn.init.zeros_(parameter)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        x = self.tokens(tokens) + self.positions.weight[: tokens.shape[1]]
        for block in self.blocks:
            x = block(x)
        return functional.linear(self.norm(x), (self.tokens if self.head is None else self.head).weight)


def decoder(size_mb: float, *, layers: int = 12) -> Decoder:
    """A decoder whose parameters and AdamW state together have about this many megabytes (1500: GPT-2 small)."""
    wanted = size_mb * 1e6 / _STATE_BYTES_PER_PARAMETER
    vocabulary = max(256, round(_GPT2_VOCABULARY * min(1.0, wanted / _GPT2_PARAMETERS)))
    context = 1024 if wanted > 0.5 * _GPT2_PARAMETERS else 128
    linear, square = vocabulary + context, 12 * layers
    width = (math.sqrt(linear**2 + 4 * square * wanted) - linear) / (2 * square)
    heads = max(1, round(width / _HEAD))
    return Decoder(vocabulary=vocabulary, width=heads * _HEAD, layers=layers, context=context)


@dataclass
class StepTimes:
    """One training step, in seconds. ``wait_s`` is what it waited for whoever saves."""

    compute_s: float = 0.0
    wait_s: float = 0.0
    optimizer_s: float = 0.0

    @property
    def total_s(self) -> float:
        return self.compute_s + self.wait_s + self.optimizer_s


class Job:
    """A model, its optimizer, and steps that are timed from outside of any checkpointer."""

    def __init__(self, model: nn.Module, optimizer: torch.optim.Optimizer, loss: Callable[[], torch.Tensor]) -> None:
        self.model, self.optimizer, self.loss = model, optimizer, loss
        self.step = 0
        self._before = self._after = 0.0
        self._hooks = [register_optimizer_step_pre_hook(self._note_before)]

    def _note_before(self, *_: object) -> None:
        self._before = perf_counter()

    def _note_after(self, *_: object) -> None:
        self._after = perf_counter()

    def close_bracket(self) -> None:
        """Take the time behind all hooks that were registered meanwhile: what lies between is what they waited."""
        self._hooks.append(register_optimizer_step_pre_hook(self._note_after))

    def train_step(self) -> StepTimes:
        """One step: forward, backward, optimizer, zero_grad."""
        began = perf_counter()
        self.loss().backward()
        self.optimizer.step()
        self.optimizer.zero_grad()
        ended = perf_counter()
        self.step += 1
        if not self._after:
            return StepTimes(self._before - began, 0.0, ended - self._before)
        return StepTimes(self._before - began, self._after - self._before, ended - self._after)

    def tensors(self) -> Iterator[tuple[str, torch.Tensor]]:
        """Every tensor of the state, each once, by name; of a sharded one what is here."""
        for name, parameter in self.model.named_parameters():
            yield name, _local(parameter.detach())
            for key, value in sorted(self.optimizer.state.get(parameter, {}).items()):
                if isinstance(value, torch.Tensor):
                    yield f"{name}.{key}", _local(value)

    @property
    def state_bytes(self) -> int:
        return sum(t.numel() * t.element_size() for _, t in self.tensors())

    def digest(self) -> str:
        """One number for the whole state, names included."""
        return digest_of(self.tensors)

    def scramble(self) -> None:
        """Make every tensor wrong, so that a restore that does nothing is noticed."""
        with torch.no_grad():
            for _, tensor in self.tensors():
                tensor.fill_(-1.0)


def _local(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def gpt(size_mb: float, *, seed: int = 0, tokens: int = 16, layers: int = 12) -> Job:
    """A decoder in fp32 with AdamW, on a few random tokens per step."""
    torch.manual_seed(seed)
    model = decoder(size_mb, layers=layers)
    # The fused kernel is the only one on the CPU that is not ten times slower than the memory it walks through.
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)
    return Job(model, optimizer, partial(next_token_loss, model, model.tokens.num_embeddings, tokens))


def next_token_loss(model: nn.Module, vocabulary: int, tokens: int) -> torch.Tensor:
    """Of a decoder on random tokens."""
    drawn = torch.randint(0, vocabulary, (1, tokens + 1))
    logits = model(drawn[:, :-1])
    return functional.cross_entropy(logits.view(-1, vocabulary), drawn[:, 1:].reshape(-1))


def digest_of(tensors: Callable[[], Iterator[tuple[str, torch.Tensor]]]) -> str:
    """A digest of named tensors: names, dtypes, shapes and bytes."""
    hasher = xxhash.xxh3_128()
    for name, tensor in tensors():
        hasher.update(f"{name} {tensor.dtype} {tuple(tensor.shape)};".encode())
        hasher.update(tensor.contiguous().reshape(-1).view(torch.uint8).numpy())
    return hasher.hexdigest()
