"""Saves as differences, end to end: exact whatever happens, small where they should be, within the bounds asked for."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import gpumove
from gpumove.inspection.run import open_run, pick
from gpumove.inspection.summary import Detail, detail
from tests.runs import flip
from tests.save.jobs import Mixed, Plain, adamw, same

SETTINGS: dict[str, Any] = {"every_s": None, "keep_last": None, "codec": "small", "max_restore_amplification": 8.0}


@pytest.fixture
def url(tmp_path: Path) -> str:
    return str(tmp_path / "run")


def look(url: str, step: int | None = None) -> Detail:
    with open_run(url) as log:
        return detail(log, pick(log.read(), step, url=url), config=gpumove.Config())


def run(url: str, job: Any, steps: int, *, first: int = 0, apart: int = 1, **settings: Any) -> dict[int, Any]:
    """Train and save every ``apart`` steps; the state at each save, and the bytes that it sent."""
    truth = {}
    with gpumove.Checkpointer(url, **{**SETTINGS, **job.parts(), **settings}) as ckpt:
        assert ckpt.restore() == first
        for step in range(first + 1, first + steps * apart + 1):
            job.step()
            if step % apart == 0:
                truth[step] = job.state()
                ckpt.save(step).wait(60)
    return truth


def check(url: str, job: Any, truth: dict[int, Any]) -> None:
    """Every checkpoint, read by itself into fresh objects, is what the training had."""
    for step, state in truth.items():
        parts = {k: v for k, v in job.parts().items() if k in ("model", "optimizer")}
        gpumove.load(url, step, **parts)
        assert same(job.state(), state), f"step {step}"


def sent(url: str) -> list[float]:
    """What each checkpoint sent, of its state's bytes."""
    return [c.new_bytes / c.state_bytes for c in gpumove.checkpoints(url)]


@pytest.mark.parametrize("settings", [{}, {"foreach": False}, {"fused": True}, {"amsgrad": True}])
def test_one_step_apart_only_the_gradient_is_sent(url: str, settings: dict[str, Any]) -> None:
    def make(parameters: Any) -> torch.optim.Optimizer:
        return torch.optim.AdamW(parameters, lr=1e-3, **settings)

    truth = run(url, Plain(make), 6)
    check(url, Plain(make, seed=9), truth)
    # amsgrad keeps a third moment, which no rule predicts.
    assert max(sent(url)[3:]) < (0.55 if "amsgrad" in settings else 0.36)


@pytest.mark.parametrize("kind", ["sgd", "nesterov", "adam", "rmsprop", "adafactor"])
def test_other_optimizers(url: str, kind: str) -> None:
    made = {
        "sgd": lambda p: torch.optim.SGD(p, lr=0.05, momentum=0.9),
        "nesterov": lambda p: torch.optim.SGD(p, lr=0.05, momentum=0.9, nesterov=True, weight_decay=0.01),
        "adam": lambda p: torch.optim.Adam(p, lr=1e-3, weight_decay=0.01),
        "rmsprop": lambda p: torch.optim.RMSprop(p, lr=1e-3, momentum=0.5),
        "adafactor": lambda p: torch.optim.Adafactor(p),
    }[kind]
    truth = run(url, Plain(made), 5)
    check(url, Plain(made, seed=9), truth)
    assert max(sent(url)[3:]) < {"sgd": 0.5, "nesterov": 0.5, "adam": 0.36}.get(kind, 0.85)


def test_mixed_precision_derives_the_copy_and_sends_bf16_gradients(url: str) -> None:
    truth = run(url, Mixed(), 6)
    check(url, Mixed(seed=9), truth)
    assert max(sent(url)[3:]) < 0.17
    ways = {name: way for g in look(url).groups for name, way in g.ways.items() if g.name.startswith("model.live")}
    assert set(ways) <= {"derived", "inline", "clean"}


def test_many_steps_apart(url: str) -> None:
    truth = run(url, Plain(), 4, apart=10)
    check(url, Plain(seed=9), truth)
    assert sent(url)[2] < 0.84


def test_the_chain_goes_on_after_a_restore(url: str) -> None:
    truth = run(url, Plain(), 3)
    job = Plain(seed=9)
    truth |= run(url, job, 2, first=3)
    check(url, Plain(seed=5), truth)
    assert sent(url)[3] < 0.36, "the first save of a resumed run is a difference"
    assert look(url).chain == 4


def test_the_chain_is_bounded_by_what_a_restore_fetches(url: str) -> None:
    truth = run(url, Plain(), 12, max_restore_amplification=1.5)
    details = [look(url, step) for step in truth]
    assert all(d.restore_bytes <= 1.55 * d.state_bytes for d in details)
    assert 1 < max(d.chain for d in details) < 6
    assert sum(d.chain == 0 for d in details) > 2
    check(url, Plain(seed=9), truth)


def test_the_chain_is_bounded_by_number(url: str) -> None:
    run(url, Plain(), 8, max_chain=2, max_restore_amplification=100.0)
    assert [look(url, step).chain for step in range(1, 9)] == [0, 1, 2, 0, 1, 2, 0, 1]


@pytest.mark.parametrize("settings", [{"delta": False}, {"predecessor_bytes": 0}, {"max_chain": 0}])
def test_without_a_predecessor_every_save_is_a_base(url: str, settings: dict[str, Any]) -> None:
    truth = run(url, Plain(), 3, **settings)
    assert [look(url, step).chain for step in truth] == [0, 0, 0]
    check(url, Plain(seed=9), truth)


def test_the_predecessor_may_lie_on_disk(url: str, tmp_path: Path) -> None:
    folder = tmp_path / "scratch"
    folder.mkdir()
    settings = {"predecessor_bytes": 0, "predecessor_dir": str(folder)}
    truth = run(url, Plain(), 4, **settings)
    truth |= run(url, Plain(seed=9), 2, first=4, **settings)
    check(url, Plain(seed=5), truth)
    assert max(sent(url)[2:]) < 0.36
    assert look(url).chain == 5
    assert not list(folder.iterdir()), "nothing is left behind"


def test_a_disk_that_fails_costs_only_the_differences(
    url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object) -> int:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("gpumove.save.predecessor.os.pwrite", full)
    truth = run(url, Plain(), 3, predecessor_bytes=0, predecessor_dir=str(tmp_path))
    assert [look(url, step).chain for step in truth] == [0, 0, 0]
    check(url, Plain(seed=9), truth)


def test_kept_bytes_that_went_bad_are_not_used(url: str) -> None:
    job = Plain()
    truth = {}
    with gpumove.Checkpointer(url, **{**SETTINGS, **job.parts()}) as ckpt:
        ckpt.restore()
        for step in (1, 2, 3):
            job.step()
            truth[step] = job.state()
            ckpt.save(step).wait(60)
            kept = ckpt._stager._kept
            assert kept is not None
            kept._memory[7] ^= 1
    check(url, Plain(seed=9), truth)


def test_everything_that_can_change_between_saves(url: str) -> None:
    """Rates, another optimizer, a parameter written to by hand, what is no number: bytes are lost, bits are not."""
    job = Plain()
    truth: dict[int, Any] = {}
    with gpumove.Checkpointer(url, **{**SETTINGS, **job.parts()}) as ckpt:
        ckpt.restore()

        def save(step: int) -> None:
            job.step()
            truth[step] = job.state()
            ckpt.save(step).wait(60)

        save(1)
        job.optimizer.param_groups[0].update(lr=0.5, betas=(0.5, 0.5), eps=1e-3, weight_decay=0.9)
        save(2)
        with torch.no_grad():
            job.model[0].weight[3] = float("nan")
            job.model[0].weight[4] = float("inf")
            job.model[0].weight[5] = -0.0
            job.model[0].weight[6] = 1e-41
            job.model[0].weight.view(torch.int32)[7] = 0x7FABCDEF
        save(3)
        for entries in job.optimizer.state.values():
            entries["exp_avg"].neg_()
            entries["step"].add_(100)
        save(4)
        save(5)
    check(url, Plain(seed=9), truth)


def test_another_optimizer_on_the_same_run(url: str) -> None:
    run(url, Plain(), 2)
    job = Plain(lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9), seed=9)
    gpumove.load(url, model=job.model)
    truth = {}
    with gpumove.Checkpointer(url, **{**SETTINGS, "model": job.model}) as ckpt:
        ckpt.restore(strict=False)
    with gpumove.Checkpointer(url + "2", **{**SETTINGS, **job.parts()}) as ckpt:
        ckpt.restore()
        for step in (1, 2, 3):
            job.step()
            truth[step] = job.state()
            ckpt.save(step).wait(60)
    check(url + "2", Plain(lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9)), truth)


def test_a_dtype_or_shape_that_changes_is_stored_anew(url: str) -> None:
    class Buffers(torch.nn.Module):
        def __init__(self, value: torch.Tensor) -> None:
            super().__init__()
            self.register_buffer("held", value)

    model = Buffers(torch.randn(200, 200))
    with gpumove.Checkpointer(url, model=model, rng=False, **SETTINGS) as ckpt:
        ckpt.restore()
        for step, value in enumerate((torch.randn(200, 200), torch.randn(200, 200).bfloat16(), torch.randn(400, 100))):
            model.held = value
            ckpt.save(step).wait(60)
            assert look(url).chain == 0
            fresh = Buffers(torch.zeros_like(value))
            gpumove.load(url, model=fresh)
            assert torch.equal(fresh.held, value)


def test_a_damaged_base_is_named_before_anything_is_copied(url: str) -> None:
    run(url, Plain(), 2)
    (pack,) = (Path(url) / "packs").glob("00000001-00000001/*.safetensors")
    flip(pack, pack.stat().st_size // 2)
    job = Plain(seed=9)
    with pytest.raises(gpumove.IntegrityError, match=r"\(a base of [a-z_.0-9, ]*\): its bytes hash"):
        gpumove.load(url, model=job.model, optimizer=job.optimizer)
    report = gpumove.verify(url, deep=True)
    assert not report.sound
    assert report.newest_sound is None
    assert {step for damage in report.damage for step in damage.steps} == {1, 2}


def test_deep_verify_decodes_differences(url: str) -> None:
    run(url, Plain(), 5)
    assert gpumove.verify(url, deep=True).sound
    newest = max((Path(url) / "packs").iterdir())
    (pack,) = newest.iterdir()
    flip(pack, pack.stat().st_size // 2)
    report = gpumove.verify(url, deep=True)
    assert report.newest_sound == 4
    assert [d.steps for d in report.damage] == [(5,)]


def test_retention_keeps_what_differences_need(url: str) -> None:
    truth = run(url, Plain(), 10, keep_last=2)
    kept = [c.step for c in gpumove.checkpoints(url)]
    assert len(kept) < 5
    assert gpumove.verify(url, deep=True).sound
    check(url, Plain(seed=9), {step: truth[step] for step in kept})


def test_export_and_load_of_the_model_alone(url: str, tmp_path: Path) -> None:
    from safetensors.torch import load_file

    truth = run(url, Plain(), 4)
    with open_run(url):
        pass
    from gpumove.inspection.export import export

    export(url, str(tmp_path / "out"))
    found = load_file(tmp_path / "out" / "model.safetensors")
    assert all(torch.equal(found[k], truth[4][f"0.{k}"]) for k in found)


def test_show_says_what_became_of_every_group(url: str) -> None:
    run(url, Plain(), 3)
    groups = {g.name: g for g in look(url).groups}
    assert {"optimizer.exp_avg", "optimizer.exp_avg_sq", "model.0"} <= set(groups)
    assert groups["optimizer.exp_avg_sq"].ways["predicted"].stored_bytes < 0.2 * groups["optimizer.exp_avg_sq"].nbytes
    assert groups["model.0"].ways["predicted"].stored_bytes < 0.1 * groups["model.0"].nbytes
    first = {name for g in look(url, 1).groups for name in g.ways}
    assert first <= {"base", "raw", "inline"}


def test_the_default_codes_only_what_the_store_is_too_slow_for(url: str) -> None:
    truth = run(url, Plain(adamw), 4, codec="auto")
    check(url, Plain(seed=9), truth)
