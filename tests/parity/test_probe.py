"""``ckpt.probe``: what is recorded, how often, and that a probe leaves the training as it was."""

from __future__ import annotations

import logging
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import gpumove
from gpumove.errors import ConfigError
from gpumove.format.manifest import Checkpoint, Manifest
from gpumove.inspection.run import open_run
from gpumove.state.aside import aside
from gpumove.store.records import read_manifest
from tests.jobs import TrainingJob, new_job

IDS = torch.arange(12).view(2, 6)


def manifests(url: str) -> dict[int, Manifest]:
    with open_run(url) as log:
        return {c.step: read_manifest(log.store, c) for c in log.read().checkpoints}


def opened(url: str, job: TrainingJob, **settings: Any) -> gpumove.Checkpointer:
    return gpumove.Checkpointer(url, **job.parts(), **{"every_s": None, "keep_last": None, **settings})


def test_recorded_and_compared(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    url, job = str(tmp_path / "run"), new_job()
    with opened(url, job) as ckpt:
        ckpt.probe(lambda: {"logits": job.model(IDS)})
        assert ckpt.restore() == 0
        assert ckpt.probes == {}
        job.train(0, 3, ckpt)
        ckpt.save(3).wait()
    (probe,) = manifests(url)[3].probes
    job.model.eval()
    found = gpumove.check_probe(url, {"logits": job.model(IDS).detach()})
    assert (found.verdict, found.step, found.name, probe.name) == ("bitwise", 3, "probe", "probe")
    with torch.no_grad():
        job.model.mid.bias += 0.1
    assert gpumove.check_probe(url, job.model(IDS), step=3).verdict == "different"
    for spoil, verdict, level in ((0.0, "bitwise", logging.INFO), (0.1, "different", logging.WARNING)):
        again = new_job(seed=5)
        with opened(url, again) as ckpt, caplog.at_level(logging.INFO, logger="gpumove"):
            ckpt.probe(partial(lambda model, spoil: {"logits": model(IDS) + spoil}, again.model, spoil))
            caplog.clear()
            assert ckpt.restore() == 3
        assert {name: r.verdict for name, r in ckpt.probes.items()} == {"probe": verdict}
        (said,) = [r for r in caplog.records if r.getMessage().startswith("probe probe against step 3: ")]
        assert (said.levelno, verdict in said.getMessage()) == (level, True)


def test_how_often(tmp_path: Path) -> None:
    url, job, called = str(tmp_path / "run"), new_job(), {"each": 0, "third": 0}

    def count(name: str) -> torch.Tensor:
        called[name] += 1
        return torch.tensor(called[name])

    with opened(url, job, every_steps=1) as ckpt:
        ckpt.probe(lambda: count("each"), "each")
        ckpt.probe(lambda: count("third"), "third", every=3)
        ckpt.restore()
        for step in range(1, 8):
            job.train(step - 1, step, ckpt)
            ckpt._saver.last.wait()  # each is committed before the next is due
        ckpt.save(7).wait()
    names = {step: [p.name for p in m.probes] for step, m in manifests(url).items()}
    assert names == {step: ["each", "third"] if step in (1, 4, 7) else ["each"] for step in range(1, 8)}
    assert called == {"each": 8, "third": 4}


def test_the_training_goes_on_as_if_there_were_none(tmp_path: Path) -> None:
    plain = new_job()
    plain.train(0, 6)
    expected, probed = plain.fingerprint(), new_job()
    modes = []

    def rude() -> torch.Tensor:
        modes.append((probed.model.training, torch.is_grad_enabled()))
        probed.model.train()  # dropout draws, and batch norm learns
        out = probed.model(IDS)
        return out + torch.rand(1) + float(torch.randn(1))

    probed.model.drop.eval()  # a flag that is not as the others are
    plain_flags = [m.training for m in probed.model.modules()]
    probed.model.drop.train()
    with opened(str(tmp_path / "run"), probed, every_steps=2) as ckpt:
        ckpt.probe(rude)
        ckpt.restore()
        probed.train(0, 6, ckpt)
        ckpt.save(6).wait()
        assert probed.losses == plain.losses
        assert probed.fingerprint() == expected
        probed.model.drop.eval()
        ckpt.save(6).wait()
        assert [m.training for m in probed.model.modules()] == plain_flags
    assert set(modes) == {(False, False)}


class Merging(nn.Linear):
    """As adapters do it: train() and eval() change weights."""

    def train(self, mode: bool = True) -> Any:
        if mode != self.training:
            with torch.no_grad():
                self.weight.mul_(2.0 if mode else 0.5)
        return super().train(mode)


def test_modes_are_flags_and_nothing_else() -> None:
    layer = Merging(3, 3)
    before = layer.weight.detach().clone()
    with aside([layer]):
        assert not layer.training
        assert not layer(torch.ones(3)).requires_grad
    assert layer.training
    assert torch.equal(layer.weight, before)


@pytest.mark.parametrize("how", ["raises", "writes", "gives nothing that can be kept"])
def test_a_probe_that_fails_costs_a_warning(how: str, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    url, plain = str(tmp_path / "run"), new_job()
    plain.train(0, 4)
    expected, job, runs = plain.fingerprint(), new_job(), []

    def bad() -> Any:
        runs.append(how)
        if how == "raises":
            torch.rand(5)
            raise RuntimeError("out of luck")
        if how == "writes":
            job.model.mid.bias.add_(0.0)
            return torch.ones(1)
        return {"cache": object()}

    with opened(url, job, every_steps=2) as ckpt, caplog.at_level(logging.INFO, logger="gpumove"):
        ckpt.probe(bad, "bad")
        ckpt.probe(lambda: job.model(IDS), "good")
        ckpt.restore()
        for step in (2, 4):
            job.train(step - 2, step, ckpt)
            ckpt.save(step).wait()
        assert ckpt.failed == 0
    assert [p.name for p in manifests(url)[4].probes] == ["good"]
    assert job.fingerprint() == expected
    said = [r.getMessage() for r in caplog.records if "the probe 'bad' failed" in r.getMessage()]
    words = {"raises": "out of luck", "writes": "changed parameters"}.get(how, "give tensors")
    assert len(said) == 1
    assert words in said[0]
    assert (len(runs) == 1) == (how == "writes"), "what it has written cannot be put back, so that it is not run again"


def test_what_cannot_be_registered(tmp_path: Path) -> None:
    with opened(str(tmp_path / "run"), new_job()) as ckpt:
        ckpt.probe(lambda: 1.0, "one")
        for bad in (
            {"name": "one"}, {"name": ""}, {"every": 0}, {"every": 1.5}, {"tolerance": -1.0},
            {"tolerance": float("nan")}, {"fn": 3},
        ):  # fmt: skip
            with pytest.raises(ConfigError):
                ckpt.probe(**{"fn": lambda: 1.0, "name": "two", **bad})


def test_a_run_without_probes_and_one_that_lost_them(tmp_path: Path) -> None:
    url, job = str(tmp_path / "run"), new_job()
    with opened(url, job) as ckpt:
        ckpt.restore()
        job.train(0, 1, ckpt)
        ckpt.save(1).wait()
    again = new_job(seed=2)
    with opened(url, again) as ckpt:
        ckpt.probe(lambda: again.model(IDS))
        assert (ckpt.restore(), ckpt.probes) == (1, {})
        again.train(1, 2, ckpt)
        ckpt.save(2).wait()
    with opened(url, new_job(seed=3)) as ckpt:
        assert (ckpt.restore(), ckpt.probes) == (2, {})
    with pytest.raises(ConfigError, match="has recorded no probe"):
        gpumove.check_probe(url, torch.ones(1), step=1)
    assert isinstance(gpumove.checkpoints(url)[0], Checkpoint)


def test_a_lazy_restore_compares_too(tmp_path: Path) -> None:
    url, plain = str(tmp_path / "run"), new_job()
    plain.train(0, 4)
    job = new_job()
    with opened(url, job) as ckpt:
        ckpt.probe(lambda: job.model(IDS))
        ckpt.restore()
        job.train(0, 2, ckpt)
        ckpt.save(2).wait()
    again = new_job(seed=2)
    with opened(url, again) as ckpt:
        ckpt.probe(lambda: again.model(IDS))
        ckpt.restore(lazy=True)
        assert ckpt.probes["probe"].verdict == "bitwise"
        again.train(2, 4, ckpt)
    assert again.losses == {step: plain.losses[step] for step in (3, 4)}
