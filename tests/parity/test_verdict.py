"""Verdicts and causes from made-up rows: what is compared, what is evidence, and what the sentence says."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import msgspec
import pytest

from gpumove.errors import ConfigError, ParityError
from gpumove.format.manifest import TraceRow
from gpumove.parity.rows import Setting
from gpumove.parity.verdict import Certificate, judge, read_certificate

N = 10
SAME = Setting(url="u", run="r", step=0, entry=1, asked=N, recorded=N, same_devices=True, reproducible=True)
GPU = msgspec.structs.replace(SAME, reproducible=False)
OTHER = msgspec.structs.replace(GPU, same_devices=False, differences=("GPU: A100 -> H100",))
RANKS = msgspec.structs.replace(SAME, world_sizes=(2, 4))


def rows(change: Any = None, *, norm: bool = True, keep: Any = ()) -> list[TraceRow]:
    """Ten steps; ``change(step)`` gives a relative change of loss and norm, or a dict of facts."""
    found = []
    for step in range(1, N + 1):
        facts: dict[str, Any] = {"samples": f"s{step}", "rng": f"r{step}", "lr": 0.1 * step, "rank_samples": f"b{step}"}
        facts |= {"grad_norm": 2.0 / step} if norm else {}
        loss: float | None = 3.0 / step + 0.1
        told = change(step) if change is not None else None
        if isinstance(told, dict):
            facts |= told
            loss = facts.pop("loss_is", loss)
        elif told:
            loss = loss * (1 + told)
            if norm:
                facts["grad_norm"] *= 1 + told
        found.append(TraceRow(step, loss, {k: v for k, v in facts.items() if not keep or k in keep}))
    return found


def certify(change: Any, setting: Setting = SAME, **options: Any) -> Certificate:
    return judge(rows(**options), rows(change, **options), setting)


def test_equal_bits_are_bitwise_and_the_evidence_is_named() -> None:
    found = certify(None)
    assert (found.verdict, found.cause, found.largest, found.first) == ("bitwise", "", 0.0, None)
    assert found.why.startswith("10 steps (1 to 10) gave the same bits: the loss, the gradient norm, the samples")
    found.check()
    alone = judge([TraceRow(1, 1.5)], [TraceRow(1, 1.5)], msgspec.structs.replace(SAME, asked=1, recorded=1))
    assert alone.text == "bitwise: 1 step (1 to 1) gave the same bits: the loss"


@pytest.mark.parametrize(
    ("change", "cause", "step", "fact"),
    [
        (lambda s: {"samples": "x", "loss_is": 9.0}, "samples", 1, "samples"),
        (lambda s: {"rank_samples": "x", "loss_is": 9.0}, "samples", 1, "rank_samples"),
        (lambda s: {"rng": "x", "loss_is": 9.0}, "rng", 1, "rng"),
        (lambda s: {"rng": "x", "loss_is": 9.0 if s > 3 else 3.0 / s + 0.1}, "rng", 1, "rng"),
        (lambda s: {"rng": "x" if s > 4 else f"r{s}", "loss_is": 9.0 if s > 1 else 3.1}, "optimizer", 2, "loss"),
        (lambda s: {"lr": 0.1 * s + 0.01} if s == 1 else {"lr": 0.2 * s, "loss_is": 8.0}, "scheduler", 1, "lr"),
        (lambda s: 1e-3, "model", 1, "loss"),
        (lambda s: 1e-5, "model", 1, "loss"),
        (lambda s: {"grad_norm": 5.0} if s == 1 else 1e-3, "backward", 1, "grad_norm"),
        (lambda s: 1e-5 * s if s > 1 else 0, "optimizer", 2, "loss"),
        (lambda s: 1e-2 if s > 4 else 0, "optimizer", 5, "loss"),
        (lambda s: {"loss_is": None, "loss": "nan"} if s > 2 else None, "optimizer", 3, "loss"),
        # A plateau scheduler follows the loss: the loss was first.
        (lambda s: {"loss_is": 5.0, "lr": 7.0} if s > 2 else None, "optimizer", 3, "loss"),
    ],
)  # fmt: skip
def test_on_the_same_machine_the_first_difference_tells_the_cause(
    change: Any, cause: str, step: int, fact: str
) -> None:
    found = certify(change)
    assert (found.verdict, found.cause) == ("different", cause), found.why
    assert found.first is not None
    assert (found.first.step, found.first.fact) == (step, fact)
    with pytest.raises(ParityError, match=r"u after step 0: different: ") as caught:
        found.check()
    assert caught.value.code == "parity.different"


def test_generators_that_stand_elsewhere_are_no_other_job_as_long_as_no_number_shows_it() -> None:
    found = certify(lambda s: {"rng": "x"} if s > 1 else None)
    assert (found.verdict, found.cause, found.good) == ("within tolerance", "rng", True)
    assert "every loss has the same bits, but the random generators differ from step 2 on" in found.why
    assert found.first is not None
    assert (found.first.step, found.first.fact) == (2, "rng")
    found = certify(lambda s: {"rng_device": "y", "loss_is": (3.0 / s + 0.1) * (1 + 1e-6)}, GPU)
    assert (found.verdict, found.cause) == ("within tolerance", "numerics"), "the run did not record it"


def test_last_bits_are_within_tolerance_and_the_largest_is_named() -> None:
    found = certify(lambda s: 1e-7 * s)
    assert (found.verdict, found.cause, found.largest_step) == ("within tolerance", "numerics", 10)
    assert found.largest == pytest.approx(1e-6, rel=1e-3)
    assert "no loss differs by more than 0.0001 %; the loss differs from step 1 on" in found.why
    assert "the loss of step 1 differs by 570 %: " in certify(lambda s: 5.7).why


def test_a_jump_is_no_rounding_where_bits_could_be_expected() -> None:
    jump = lambda s: 1e-4 if s > 1 else 0  # noqa: E731 - below the tolerance of a loss
    assert certify(jump).cause == "optimizer"
    assert certify(jump, GPU).cause == "optimizer", "the gradient norm of step 1 was equal in every bit"
    assert certify(jump, GPU, norm=False).verdict == "within tolerance", "nothing says that this machine repeats itself"
    assert certify(jump, OTHER).verdict == "within tolerance"
    creeping = lambda s: 1e-7 * 4 ** (s - 1)  # noqa: E731
    assert certify(creeping).verdict == certify(creeping, GPU).verdict == "different"
    assert certify(creeping).cause == "numerics"


def test_other_devices_have_a_wider_tolerance_and_are_named() -> None:
    found = certify(lambda s: 2e-3, OTHER)
    assert (found.verdict, found.tolerance) == ("within tolerance", 0.005)
    assert found.why.endswith("the machines differ: GPU: A100 -> H100")
    assert certify(lambda s: 2e-3, GPU).verdict == "different"
    assert certify(lambda s: 6e-3, OTHER).verdict == "different"
    unknown = msgspec.structs.replace(GPU, same_devices=None)
    assert certify(lambda s: 2e-3, unknown).verdict == "different", "what is not known is not lenient"
    given = msgspec.structs.replace(OTHER, tolerance=0.001)
    assert certify(lambda s: 2e-3, given).verdict == "different"
    assert certify(lambda s: 1e-6 if s < 2 else 0.3, OTHER).cause == "optimizer"


def test_at_another_number_of_ranks_local_facts_are_no_evidence() -> None:
    local = lambda s: {"rng": "x", "rank_samples": "y", "rng_device": "z"}  # noqa: E731
    assert certify(local, RANKS).verdict == "bitwise"
    assert certify(lambda s: {"samples": "x"}, RANKS).cause == "samples"
    found = certify(lambda s: 0.02, RANKS)
    assert (found.verdict, found.cause) == ("different", "world_size")
    assert "2 ranks then, 4 now" in found.why
    alone = msgspec.structs.replace(SAME, world_sizes=(1, 2))
    assert "the machines differ: 1 rank then, 2 now" in certify(lambda s: 1e-7, alone).why
    moved = msgspec.structs.replace(OTHER, same_kind=False)
    assert certify(lambda s: {"rng": "x"}, moved).verdict == "bitwise", "a GPU draws elsewhere"


def test_unknown_never_looks_good() -> None:
    for before, after in (([], rows()), (rows(), []), (rows(), rows(keep=("lr",)))):
        after = [TraceRow(r.step, None, r.facts) for r in after]
        found = judge(before, after, SAME)
        assert (found.verdict, found.good) == ("unknown", False)
        with pytest.raises(ParityError) as caught:
            found.check()
        assert caught.value.code == "parity.unknown"
    found = judge(rows(), [TraceRow(r.step, None, {"samples": "x"}) for r in rows()], SAME)
    assert found.verdict == "different", "other samples are other samples, with or without a loss"


def test_what_was_not_compared_is_said() -> None:
    assert judge(rows(), rows()[:4], SAME).why.endswith("(only 4 of 10 recorded steps were trained again)")
    few = msgspec.structs.replace(SAME, asked=20)
    assert judge(rows(), rows(), few).why.endswith("(no more than 10 of the 20 steps asked for were recorded)")
    blind = certify(lambda s: 0.1, keep=("lr", "rng", "grad_norm"))
    assert (blind.cause, blind.why.endswith("(or the data is: the samples were not recorded)")) == ("model", True)


def test_nan_is_nan_and_losses_may_cross_zero() -> None:
    nan = lambda s: {"loss_is": None, "loss": "nan"}  # noqa: E731
    assert judge(rows(nan), rows(nan), SAME).verdict == "bitwise"
    found = judge(rows(), rows(nan), OTHER)
    assert (found.verdict, found.largest, found.steps[0].after) == ("different", None, "nan")
    assert found.why.startswith("the loss of step 1 was 3.1 and is nan: parameters or buffers")
    small = [TraceRow(s, (s - 5) * 1.0 + 1e-12, {}) for s in range(1, 11)]
    moved = [TraceRow(s, (s - 5) * 1.0 - 1e-12, {}) for s in range(1, 11)]
    assert judge(small, moved, OTHER).verdict == "within tolerance"


def test_losses_in_bfloat16_cannot_be_told_apart_closer_than_they_are() -> None:
    def coarse(times: float) -> list[TraceRow]:
        values = [round(2.0 ** (s / 7) * 128) / 128 for s in range(N)]  # 8 bits between 1 and 2
        return [TraceRow(s, v * times if s == 3 else v, {}) for s, v in enumerate(values) if v < 2]

    found = judge(coarse(1), [TraceRow(r.step, (r.loss or 0) + 2**-7 * (r.step == 3), {}) for r in coarse(1)], GPU)
    assert found.verdict == "within tolerance"
    assert "bfloat16" in found.why
    assert judge(coarse(1), coarse(1.25), GPU).verdict == "different"


def test_a_learning_rate_of_another_library_is_no_other_rate() -> None:
    assert certify(lambda s: {"lr": math.nextafter(0.1 * s, 1)}).verdict == "bitwise"


def test_a_certificate_is_a_file_that_comes_back(tmp_path: Path) -> None:
    found = certify(lambda s: {"loss_is": None, "loss": "inf"} if s > 3 else None)
    path = tmp_path / "c.json"
    path.write_bytes(msgspec.json.encode(found))
    assert read_certificate(path) == found
    path.write_text("{}")
    for bad in (path, tmp_path / "absent"):
        with pytest.raises(ConfigError, match="no certificate"):
            read_certificate(bad)
