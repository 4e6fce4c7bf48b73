"""Bit-exact continuation for what people train with: optimizers, schedulers, scalers, loaders, odd parameters."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from torch.optim import lr_scheduler as lrs
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from torchdata.stateful_dataloader import StatefulDataLoader

import gpumove
from gpumove.format.codec import digest
from tests.jobs import dataset

OPTIMIZERS: dict[str, Callable[[Any], torch.optim.Optimizer]] = {
    "adam_amsgrad": lambda p: torch.optim.Adam(p, lr=1e-2, amsgrad=True),
    "adamw_capturable_lr": lambda p: torch.optim.AdamW(p, lr=torch.tensor(1e-2)),
    "adamax": lambda p: torch.optim.Adamax(p, lr=1e-2),
    "adadelta": lambda p: torch.optim.Adadelta(p),
    "adagrad": lambda p: torch.optim.Adagrad(p, lr=1e-2),
    "asgd": lambda p: torch.optim.ASGD(p, lr=1e-2),
    "nadam": lambda p: torch.optim.NAdam(p, lr=1e-2),
    "radam": lambda p: torch.optim.RAdam(p, lr=1e-2),
    "rprop": lambda p: torch.optim.Rprop(p, lr=1e-2),
    "sgd_plain": lambda p: torch.optim.SGD(p, lr=1e-1),
    "adafactor": lambda p: torch.optim.Adafactor(p, lr=1e-2),
    "lbfgs": lambda p: torch.optim.LBFGS(p, lr=0.1, max_iter=3, history_size=4),
}
SCHEDULERS: dict[str, Callable[[torch.optim.Optimizer], Any]] = {
    "one_cycle": lambda o: lrs.OneCycleLR(o, max_lr=0.1, total_steps=40),
    "cosine_restarts": lambda o: lrs.CosineAnnealingWarmRestarts(o, T_0=5),
    "sequential": lambda o: lrs.SequentialLR(
        o, [lrs.LinearLR(o, total_iters=4), lrs.ExponentialLR(o, 0.9)], milestones=[4]
    ),
    "chained": lambda o: lrs.ChainedScheduler([lrs.ConstantLR(o, total_iters=5), lrs.StepLR(o, 3)]),
    "multi_step": lambda o: lrs.MultiStepLR(o, [3, 7, 7]),
    "plateau": lambda o: lrs.ReduceLROnPlateau(o, patience=1),
    "cyclic": lambda o: lrs.CyclicLR(o, 1e-3, 1e-1, step_size_up=4, cycle_momentum=False),
    "polynomial": lambda o: lrs.PolynomialLR(o, total_iters=30, power=2.0),
}


class Training:
    """One job: a model, an optimizer and whatever else is put into ``more``."""

    def __init__(self, model: nn.Module, optimizer: torch.optim.Optimizer, **more: Any) -> None:
        self.model, self.optimizer, self.more = model, optimizer, more
        self.losses: list[float] = []
        self.after: Callable[[torch.Tensor], None] = lambda _loss: None

    def step(self) -> None:
        x = torch.randn(16, 12) * random.random() + np.random.rand()

        def closure() -> torch.Tensor:
            self.optimizer.zero_grad()
            loss = self.model(x).square().mean()
            loss.backward()
            return loss

        if isinstance(self.optimizer, torch.optim.LBFGS):
            loss = self.optimizer.step(closure)
        else:
            loss = closure()
            self.optimizer.step()
        self.after(loss.detach())
        self.losses.append(float(loss.detach()))

    def state(self) -> str:
        tensors = [v for v in self.model.state_dict().values() if isinstance(v, torch.Tensor)]
        rows = [v.detach().contiguous().view(-1).view(torch.uint8) for v in tensors]
        return digest(b"".join(r.numpy().tobytes() for r in rows))


def make_net() -> nn.Module:
    return nn.Sequential(nn.Linear(12, 17), nn.Tanh(), nn.Dropout(0.1), nn.Linear(17, 3))


def seed() -> None:
    torch.manual_seed(11)
    random.seed(11)
    np.random.seed(11)


def check(url: Path, make: Callable[[], Training], *, stop: int = 7, until: int = 15) -> None:
    """A run that is stopped and resumed by fresh objects equals the uninterrupted one, bit for bit."""
    seed()
    whole = make()
    for _ in range(until):
        whole.step()
    seed()
    first = make()
    with gpumove.Checkpointer(str(url), model=first.model, optimizer=first.optimizer, **first.more) as ckpt:
        for _ in range(ckpt.restore(), stop):
            first.step()
        ckpt.save(stop)
        first.step()
        first.step()
    torch.manual_seed(5)
    again = make()
    with gpumove.Checkpointer(str(url), model=again.model, optimizer=again.optimizer, **again.more) as ckpt:
        assert ckpt.restore() == stop
        for step in range(stop, until):
            again.step()
            ckpt.step(step + 1)
    assert again.losses == whole.losses[stop:]
    assert again.state() == whole.state()


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_optimizers(tmp_path: Path, name: str) -> None:
    def make() -> Training:
        net = make_net()
        return Training(net, OPTIMIZERS[name](net.parameters()))

    check(tmp_path, make)


@pytest.mark.parametrize("name", SCHEDULERS)
def test_schedulers(tmp_path: Path, name: str) -> None:
    def make() -> Training:
        net = make_net()
        optimizer = torch.optim.SGD(net.parameters(), lr=0.05, momentum=0.9)
        scheduler = SCHEDULERS[name](optimizer)
        job = Training(net, optimizer, scheduler=scheduler)
        takes_loss = isinstance(scheduler, lrs.ReduceLROnPlateau)
        job.after = lambda loss: scheduler.step(loss) if takes_loss else scheduler.step()
        return job

    check(tmp_path, make)


def test_several_groups_with_different_settings(tmp_path: Path) -> None:
    def make() -> Training:
        net = make_net()
        decay = [p for p in net.parameters() if p.dim() > 1]
        rest = [p for p in net.parameters() if p.dim() == 1]
        groups = [{"params": decay, "weight_decay": 0.1}, {"params": rest, "lr": 3e-2, "betas": (0.8, 0.9)}]
        optimizer = torch.optim.AdamW(groups, lr=1e-2)
        return Training(net, optimizer, scheduler=lrs.LambdaLR(optimizer, [lambda n: 0.9**n, lambda n: 0.8**n]))

    check(tmp_path, make)


def test_a_gradient_scaler(tmp_path: Path) -> None:
    def make() -> Training:
        net = make_net()
        optimizer = torch.optim.SGD(net.parameters(), lr=0.05, momentum=0.9)
        scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10, growth_interval=3)
        job = Training(net, optimizer, scaler=scaler)

        def step() -> None:
            optimizer.zero_grad()
            loss = net(torch.randn(16, 12)).square().mean()
            scaler.scale(loss).backward()
            scaler.step(optimizer)
            scaler.update()
            job.losses.append(float(loss) + scaler.get_scale())

        job.step = step  # type: ignore[method-assign]
        return job

    check(tmp_path, make)


def test_an_average_of_the_weights(tmp_path: Path) -> None:
    averages = []

    def make() -> Training:
        net = make_net()
        average = AveragedModel(net, multi_avg_fn=get_ema_multi_avg_fn(0.9), use_buffers=True)
        averages.append(average)
        job = Training(net, torch.optim.AdamW(net.parameters(), lr=1e-2), objects={"ema": average})
        job.after = lambda _loss: average.update_parameters(net)
        return job

    check(tmp_path, make)
    for a, b in zip(averages[0].state_dict().values(), averages[2].state_dict().values()):
        assert torch.equal(a, b)


@pytest.mark.parametrize("workers", [0, 2])
def test_a_stateful_data_loader(tmp_path: Path, workers: int) -> None:
    running = []

    def make() -> Training:
        net = nn.Sequential(nn.Embedding(32, 8), nn.Flatten(), nn.Linear(48, 4))
        loader = StatefulDataLoader(dataset(48), batch_size=6, shuffle=True, num_workers=workers)
        job = Training(net, torch.optim.AdamW(net.parameters(), lr=1e-2), loader=loader)

        def forever() -> Any:
            while True:
                yield from loader

        batches = forever()
        running.append((batches, loader))

        def step() -> None:
            ids, _ = next(batches)
            job.optimizer.zero_grad()
            loss = net(ids).square().mean()
            loss.backward()
            job.optimizer.step()
            job.losses.append(float(loss) + float(ids.sum()))

        job.step = step  # type: ignore[method-assign]
        return job

    check(tmp_path, make, stop=11, until=20)
    for batches, loader in running:  # workers whose iterator is left to the garbage collector take five seconds to end
        batches.close()
        loader._iterator = None


def test_odd_parameters(tmp_path: Path) -> None:
    class Odd(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(1, 4, 3, padding=1).to(memory_format=torch.channels_last)
            self.norm = nn.utils.parametrizations.spectral_norm(nn.Linear(12, 12))
            self.weight_norm = nn.utils.parametrizations.weight_norm(nn.Linear(12, 5))
            self.scale = nn.Parameter(torch.tensor(1.5))
            self.late = nn.Parameter(torch.ones(5))
            self.frozen = nn.Parameter(torch.ones(5), requires_grad=False)
            self.brief = nn.Parameter(torch.ones(5, dtype=torch.bfloat16))
            self.calls = 0

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            self.calls += 1
            y = self.conv(self.norm(x).view(-1, 1, 3, 4)).mean(1).flatten(1)
            y = self.weight_norm(y) * self.scale * self.frozen + self.brief.float()
            return y * self.late if self.calls > 4 else y  # its optimizer state appears late

        def get_extra_state(self) -> Any:
            return {"calls": self.calls}

        def set_extra_state(self, state: Any) -> None:
            self.calls = state["calls"]

    def make() -> Training:
        net = Odd()
        return Training(net, torch.optim.AdamW(net.parameters(), lr=1e-2))

    check(tmp_path, make, stop=3, until=9)
    check(tmp_path / "late", make, stop=6, until=9)


def test_a_compiled_model_restores_into_a_plain_one(tmp_path: Path) -> None:
    def make() -> Training:
        net = torch.compile(make_net(), backend="eager")
        return Training(net, torch.optim.AdamW(net.parameters(), lr=1e-2))

    check(tmp_path, make)
    plain = make_net()
    assert gpumove.load(str(tmp_path), model=plain) == 7


def test_two_models_and_two_optimizers(tmp_path: Path) -> None:
    seed()

    def make() -> tuple[dict[str, nn.Module], dict[str, torch.optim.Optimizer]]:
        models = {"gen": make_net(), "disc": make_net()}
        return models, {k: torch.optim.Adam(m.parameters(), lr=1e-2) for k, m in models.items()}

    def step(models: dict[str, nn.Module], optimizers: dict[str, torch.optim.Optimizer]) -> float:
        total = 0.0
        for name, optimizer in optimizers.items():
            optimizer.zero_grad()
            loss = models[name](torch.randn(8, 12)).square().mean()
            loss.backward()
            optimizer.step()
            total += float(loss)
        return total

    models, optimizers = make()
    with gpumove.Checkpointer(str(tmp_path), model=models, optimizer=optimizers) as ckpt:
        ckpt.restore()
        for _ in range(4):
            step(models, optimizers)
        ckpt.save(4)
        expected = [step(models, optimizers) for _ in range(4)]
    models, optimizers = make()
    with gpumove.Checkpointer(str(tmp_path), model=models, optimizer=optimizers) as ckpt:
        assert ckpt.restore() == 4
        assert [step(models, optimizers) for _ in range(4)] == expected
