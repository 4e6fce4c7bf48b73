"""``gpumove.estimate`` and ``gpumove estimate``, from a run to a verdict; and beside what a real copy takes."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

import gpumove
from gpumove import cli
from gpumove.errors import ConfigError
from gpumove.estimates.against import against
from gpumove.estimates.facts import Facts, Speed
from gpumove.estimates.interval import Range
from gpumove.estimates.outlook import Case
from gpumove.estimates.places import place
from gpumove.estimates.said import Said
from gpumove.estimates.tables import our_gpus, read_prices
from gpumove.estimates.transfer import Link as Way
from gpumove.estimates.transfer import Transfer
from tests.estimates.test_facts import silent_train
from tests.runs import train
from tests.servers import Bucket
from tests.servers.link import Link
from tests.servers.proxy import Proxy

SAID: dict[str, Any] = {
    "runs_at": "aws:us-east-1:p5.48xlarge", "state_bytes": 200e9, "delta_bytes": 20e9, "every_s": 600.0,
    "rate_bytes_s": Range.exact(500e6), "remaining_hours": 100.0, "save_s": 10.0, "restore_s": 20.0,
}  # fmt: skip
H100, A100, SPOT = (
    "lambda:us-east-1:gpu_8x_h100_sxm5",
    "aws:us-east-1:p4d.24xlarge",
    "gcp:us-central1:a3-ultragpu-8g:spot",
)


@pytest.fixture
def call(capsys: pytest.CaptureFixture[str]) -> Any:
    def call(*arguments: str | Path) -> tuple[int, str, str]:
        capsys.readouterr()
        code = cli.main(["estimate", *map(str, arguments)])
        return code, *capsys.readouterr()

    return call


# -------------------------------------------------------------------- from numbers that were said


def test_by_hand() -> None:
    """200 GB at 500 MB/s take 400 s, in which a commit comes, and that takes 40 s. 5504 $ against 3192 $; once: the new
    machine for 440 s, 3.90 $, both for 40 + 30 s, 1.69 $ (and a handover that nobody has measured), and 240 GB - 100 of
    egress at 9 cents, 12.60 $."""
    found = gpumove.estimate(to=H100, **SAID)
    (outlook,) = found.outlooks
    costs, transfer = outlook.costs, outlook.transfer
    assert (found.gpus, found.gpu, outlook.gpus, outlook.machines, outlook.mapping) == (8, "H100-SXM", 8, 1, "same")
    assert transfer.rounds == Range(1, 2, 2)
    assert transfer.nbytes is not None
    assert transfer.nbytes.value == pytest.approx(240e9)
    assert costs.stay_usd == Range.exact(5504.0)
    assert costs.egress_usd is not None
    assert costs.egress_usd.value == pytest.approx(12.60)
    assert costs.double_usd is not None
    assert costs.double_usd.value == pytest.approx(3.90 + 1.69, abs=0.01)
    assert costs.go_usd is not None
    assert costs.go_usd.value == pytest.approx(3192 + 12.60 + 3.90 + 1.69, abs=0.01)
    assert outlook.verdict.answer == "go"
    assert outlook.fit.answer == "yes"
    assert transfer.blackout_s is None
    assert "nobody has measured handover" in transfer.unknown[0]


def test_the_cheapest_finish_comes_first_and_the_unknown_last() -> None:
    found = gpumove.estimate(to=[A100, "foo:bar:baz", SPOT, H100], **SAID)
    assert [o.target and o.target.provider for o in found.outlooks] == ["lambda", "gcp", "aws", "foo"]
    foo = found.outlooks[-1]
    assert foo.verdict.answer == "unknown"
    assert foo.costs.go_usd is None
    assert any("no row for it" in why for why in foo.unknown)


def test_what_does_not_fit_is_impossible() -> None:
    found = gpumove.estimate(to=[A100, H100], **{**SAID, "peak_bytes": 70e9})
    assert [o.verdict.answer for o in found.outlooks] == ["go", "impossible"]
    assert "the peak is 70 GB" in found.outlooks[1].verdict.reasons[0]


def test_a_rate_for_each_target() -> None:
    found = gpumove.estimate(to=[H100, A100], **{**SAID, "rate_bytes_s": [1e9, 5e8]})
    rates = {o.target.provider: o.rate_bytes_s.value for o in found.outlooks if o.target and o.rate_bytes_s}
    assert rates == {"lambda": 1e9, "aws": 5e8}
    with pytest.raises(ConfigError, match="2 rates for 1 targets"):
        gpumove.estimate(to=H100, **{**SAID, "rate_bytes_s": [1e9, 5e8]})


@pytest.mark.parametrize(
    "name", ["rate_bytes_s", "remaining_hours", "runs_at", "delta_bytes", "state_bytes", "every_s"]
)
def test_what_is_not_said_is_not_guessed(name: str) -> None:
    found = gpumove.estimate(to=H100, **{k: v for k, v in SAID.items() if k != name})
    (outlook,) = found.outlooks
    assert outlook.costs.saving_usd is None
    assert outlook.verdict.answer == "unknown"
    assert [*found.unknown, *outlook.unknown]


@pytest.mark.parametrize(
    "wrong",
    [{"nonsense": 1}, {"step_s": 0.0}, {"remaining_hours": -1.0}, {"delta_bytes": float("nan")}, {"rate_bytes_s": 0.0},
     {"rate_bytes_s": [1e6, -1]}, {"save_s": float("inf")}, {"runs_at": "here"}],
)  # fmt: skip
def test_what_cannot_be_is_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(ConfigError):
        gpumove.estimate(to=H100, **{**SAID, **wrong})


def test_without_a_run_and_without_numbers_nothing_is_known() -> None:
    found = gpumove.estimate()
    assert found.outlooks[0].transfer.nbytes is None
    assert found.unknown


# -------------------------------------------------------------------- from a run


def test_a_run_without_traces(tmp_path: Path, call: Any) -> None:
    silent_train(tmp_path / "run", [1, 2, 3])
    code, out, err = call(tmp_path / "run", "--to", H100, "--remaining-steps", "1000", "--rate", "1Gbit/s")
    assert (code, err) == (0, "")
    assert "no trace has step times, so commits were counted" in out
    assert "what the run costs now: say where it trains (--from)" in out
    assert "its manifests name no device" in out
    assert "nobody has measured handover and restore" in out, "what a save takes is in the manifests"


def test_one_checkpoint_only(tmp_path: Path, call: Any) -> None:
    train(str(tmp_path / "run"), [1])
    code, out, _ = call(tmp_path / "run", "--to", H100, "--rate", "1Gbit/s", "--from", SAID["runs_at"])
    assert code == 0
    assert "what a commit brings: there is only one checkpoint" in out
    assert "it is not known what a commit brings, or how often one comes" in out
    assert "unknown\n" in out


def test_a_target_that_cannot_be_reached(tmp_path: Path, call: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GPUMOVE_RETRY_S", "2")
    train(str(tmp_path / "run"), [1, 2])
    (tmp_path / "there").write_text("a file is in the way")
    code, out, _ = call(tmp_path / "run", "--to", H100, "--probe", tmp_path / "there")
    assert code == 0
    assert "the link could not be measured: " in out
    assert "how long it takes: the link could not be measured" in out


def test_no_run(tmp_path: Path, call: Any) -> None:
    code, _, err = call(tmp_path / "nothing")
    assert code == 2
    assert "there is no gpumove run" in err


def test_a_probe_makes_the_link(tmp_path: Path, call: Any) -> None:
    train(str(tmp_path / "run"), [1, 2, 3])
    before = sorted((tmp_path / "run").rglob("*"))
    code, out, _ = call(tmp_path / "run", "--probe", tmp_path / "there", "--json")
    data = json.loads(out)
    (outlook,) = data["outlooks"]
    assert code == 0
    assert outlook["rate_bytes_s"]["low"] > 0
    assert "measured with 64 MB from" in outlook["rate_how"]
    assert outlook["transfer"]["parts"]["handover"]["value"] > 0
    assert data["facts"]["speeds"][0]["ranks"] == 1
    assert [p for p in sorted((tmp_path / "run").rglob("*")) if p.name != "probe"] == before


def test_a_probe_alone(tmp_path: Path, call: Any) -> None:
    code, out, _ = call("--probe", tmp_path / "there")
    assert code == 0
    assert [line.split()[0] for line in out.splitlines()] == ["store", "up", "down"]


def test_manifests_that_contradict_are_told() -> None:
    prices, gpus = read_prices(), our_gpus()
    source = place(SAID["runs_at"], prices, gpus)
    for device, many in (("NVIDIA A100-SXM4-80GB", 1), ("NVIDIA H100 80GB HBM3", 0), (None, 0)):
        case = Case.of(Facts(ranks=8, device=device), Said(), source, prices, gpus, None)
        assert sum("its manifests say A100-SXM-80GB; H100-SXM" in why for why in case.unknown) == many


def test_measured_step_times_win_over_the_table(tmp_path: Path) -> None:
    """A run that has trained on the target's GPUs before: what it measured there counts."""
    prices, gpus = read_prices(), our_gpus()
    here = Speed(Range.exact(2.0), 8, "NVIDIA A100-SXM4-80GB", "measured")
    there = Speed(Range(0.9, 1.0, 1.2), 8, "NVIDIA H100 80GB HBM3", "measured")
    facts = Facts(ranks=8, device=here.device, speeds=(here, there), full_bytes=1.0)
    target = place(H100, prices, gpus)
    ratios = []
    for known in (facts, replace(facts, speeds=(here,))):
        case = Case.of(known, Said(), None, prices, gpus, None)
        ratios.append(case.outlook(target, Way(None, "")))
    assert ratios[0].ratio == Range(0.45, 0.5, 0.6)
    assert "measured" in ratios[0].ratio_how
    assert "peak figures" in ratios[1].ratio_how


# -------------------------------------------------------------------- the command


def test_the_table_of_prices(call: Any) -> None:
    code, out, _ = call("--prices")
    assert code == 0
    assert "p5.48xlarge" in out
    assert "from memory, to be checked" in out
    rows = json.loads(call("--prices", "--json")[1])
    assert all(row["source"] and row["read"] for row in (*rows["egress"], *rows["instances"]))


def test_a_comparison(call: Any) -> None:
    words = ["--from", SAID["runs_at"], "--state-bytes", "200GB", "--delta-bytes", "20GB", "--every", "10min"]
    words += ["--rate", "4Gbit/s", "--remaining-hours", "100", "--save-time", "10s", "--restore-time", "20s"]
    code, out, err = call("--to", f"{A100},{H100},foo:bar:baz", *words)
    assert (code, err) == (0, "")
    rows = [line.split()[0] for line in out.split("\n\n")[1].splitlines()]
    assert rows == ["place", "stay", H100, A100, "foo:bar:baz"]
    assert f"{H100}: go" in out
    assert "it has paid after" in out
    assert out.count("link ") == 1  # the same for all
    assert re.search(r"in \d \(1 to 2\) rounds .*; the first round takes 6\.7 min .*, all of them 7\.\d min ", out)


@pytest.mark.parametrize(
    ("words", "why"),
    [
        ([], "nothing to estimate"),
        (["--to", "here"], "nothing to estimate"),
        (["--to", "here", "--state-bytes", "1GB"], "is no place"),
        (["--state-bytes", "much"], "takes a size"),
        (["--remaining-hours", "long", "--state-bytes", "1GB"], "takes hours"),
        (["--prices", "--prices-file", "/nowhere"], "cannot be read"),
    ],
)
def test_wrong_calls(words: list[str], why: str, call: Any) -> None:
    code, _, err = call(*words)
    assert code == 2
    assert why in err


def test_it_needs_no_torch() -> None:
    code = "import sys, gpumove; gpumove.estimate(); assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)


# -------------------------------------------------------------------- against what came of it


def test_against_a_report() -> None:
    rounds = [{"step": s, "nbytes": n, "seconds": t} for s, n, t in ((1, 100, 10.0), (2, 20, 2.5), (3, 10, 1.0))]
    states = ["begin", "round", "round", "request", "round", "sealed"]
    report = {"rounds": rounds, "events": [{"state": s} for s in states], "sent_bytes": 130, "blackout_s": 4.0}
    foretold = Transfer(nbytes=Range(100, 143, 200), copy_s=Range.exact(10.0), blackout_s=Range.exact(5.0))
    found = {c.name: c for c in against(foretold, report)}
    assert found["bytes"].off == pytest.approx(0.1)
    assert (found["copy_s"].measured, found["copy_s"].off) == (12.5, pytest.approx(-0.2))
    assert found["blackout_s"].off == pytest.approx(0.25)
    assert {c.name: c for c in against(foretold, report, blackout_s=5.0)}["blackout_s"].off == pytest.approx(0.0)
    assert against(Transfer(), report)[0].off is None


@pytest.mark.slow  # 150 MB over 100 Mbit/s
def test_a_real_copy_takes_what_was_foretold(s3_server: Bucket, tmp_path: Path) -> None:
    """The link is measured, the run is read, and a replica then takes as many bytes and as long, within a fifth."""
    from tests.estimates.large import large_run

    with Proxy(s3_server.endpoint, up=Link(100, 0.01), down=Link(100, 0.01)) as link:
        far = s3_server.via(link.endpoint)
        there = f"{far.url}/foretold"
        large_run(tmp_path / "run")
        (outlook,) = gpumove.estimate(
            str(tmp_path / "run"), probe_url=f"{far.url}/other", probe_options=far.options
        ).outlooks
        done = gpumove.replicate(str(tmp_path / "run"), there, to_options=far.options)
    first = outlook.transfer.first_s
    assert first is not None
    assert first.value == pytest.approx(done.seconds, rel=0.2)


def test_the_peak_of_the_manifests_counts_unless_another_one_is_said() -> None:
    prices, gpus = read_prices(), our_gpus()
    source, target = (place(text, prices, gpus) for text in (SPOT, SAID["runs_at"]))
    known = Facts(ranks=8, device="NVIDIA H200", peak_bytes=100e9, state_bytes=50e9)
    answers = [
        Case.of(known, said, source, prices, gpus, None).outlook(target, Way(None, "")).fit.answer
        for said in (Said(), Said(peak_bytes=60e9))
    ]
    assert answers == ["no", "yes"]
