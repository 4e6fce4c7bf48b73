"""The tables that come with the package, a user's own over them, and places looked up in both."""

from __future__ import annotations

import io
from pathlib import Path

import pytest

from gpumove.errors import ConfigError
from gpumove.estimates.interval import Range
from gpumove.estimates.places import place
from gpumove.estimates.tables import our_gpus, price, read_prices

OWN = """
collected: 2026-11-20
egress:
  - {provider: aws, internet: [{usd_per_gb: 0.01}], source: our contract, read: 2026-11-20}
instances:
  - {provider: aws, region: us-east-1, instance: p5.48xlarge, gpu: H100-SXM, gpus: 8, usd_per_h: 30,
     source: ours, read: 2026-11-20}
  - {provider: mine, instance: box, gpu: Own, gpus: 4, usd_per_h: [1, 2, 4], source: ours, read: 2026-11-20}
"""


def test_every_row_of_ours_is_dated_sourced_and_of_use() -> None:
    prices, gpus = read_prices(), our_gpus()
    assert {e.provider for e in prices.egress} >= {"aws", "gcp", "azure", "coreweave", "lambda", "runpod", "nebius"}
    assert len(prices.instances) > 20
    for row in (*prices.egress, *prices.instances, *gpus.gpus):
        assert len(row.source) > 5
        assert row.read <= max(prices.collected, gpus.collected)
    for instance in prices.instances:
        assert gpus.named(instance.gpu), instance
        assert instance.usd_per_h is not None
    for gpu in gpus.gpus:
        assert gpu.bf16_tflops or gpu.fp32_tflops


def test_what_is_from_memory_alone_has_a_wide_range() -> None:
    found = [row for row in read_prices().instances if row.source.startswith("from memory")]
    assert found
    for row in found:
        assert row.usd_per_h is not None
        known = price(row.usd_per_h)
        assert known.high / known.low > 1.5, row


@pytest.mark.parametrize(
    ("device", "name"),
    [
        ("NVIDIA H100 80GB HBM3", "H100-SXM"), ("NVIDIA H100 PCIe", "H100-PCIe"), ("NVIDIA H100 NVL", "H100-NVL"),
        ("NVIDIA H200", "H200"), ("NVIDIA A100-SXM4-40GB", "A100-SXM-40GB"),
        ("NVIDIA A100 80GB PCIe", "A100-PCIe-80GB"),
        ("NVIDIA L4", "L4"), ("NVIDIA L40S", "L40S"), ("Tesla T4", "T4"), ("NVIDIA A10", "A10"),
    ],
)  # fmt: skip
def test_a_driver_s_name_finds_its_gpu(device: str, name: str) -> None:
    found = our_gpus().called(device)
    assert found is not None
    assert found.name == name


@pytest.mark.parametrize("device", ["", "cpu", "NVIDIA A10G", "NVIDIA H2000", "AMD Instinct MI300X", "NVIDIA L40"])
def test_a_gpu_that_is_not_in_the_table_is_not_taken_for_another(device: str) -> None:
    assert our_gpus().called(device) is None


def test_own_rows_win(tmp_path: Path) -> None:
    (tmp_path / "own.yaml").write_text(OWN)
    prices = read_prices(str(tmp_path / "own.yaml"))
    row = prices.instance("aws", "us-east-1", "p5.48xlarge")
    assert row is not None
    assert (row.usd_per_h, row.source) == (30, "ours")
    out = prices.egress_from("aws", "eu-west-1")
    assert out is not None
    assert out.source == "our contract"
    assert prices.instance("aws", "us-east-1", "p4d.24xlarge") is not None


def test_a_command_may_make_them(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.stdin", io.StringIO(OWN))
    assert read_prices("-").instance("mine", "anywhere", "box") is not None


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("collected: 2026-11-20\ninstances: [{provider: x}]", "instances"),
        ("collected: 2026-11-20\nprices: []", "prices"),
        ("instances: []", "collected"),
        ("{", "while parsing"),
        (OWN.replace("[1, 2, 4]", "[4, 2, 1]"), "is no price"),
        (OWN.replace("usd_per_h: 30", "usd_per_h: -30"), "is no price"),
        (OWN.replace("usd_per_h: 30", "usd_per_h: .nan"), "is no price"),
        (OWN.replace("usd_per_h: 30", "usd_per_h: cheap"), "usd_per_h"),
        (OWN.replace("gpus: 4", "gpus: 0"), "at least one GPU"),
        (OWN.replace("[{usd_per_gb: 0.01}]", "[]"), "the last have no bound"),
        (OWN.replace("[{usd_per_gb: 0.01}]", "[{up_to_gb: 5, usd_per_gb: 0.01}]"), "the last have no bound"),
    ],
)
def test_what_is_no_table(text: str, why: str, tmp_path: Path) -> None:
    (tmp_path / "own.yaml").write_text(text)
    with pytest.raises(ConfigError, match=why):
        read_prices(str(tmp_path / "own.yaml"))


def test_a_file_that_is_not_there() -> None:
    with pytest.raises(ConfigError, match="cannot be read"):
        read_prices("/nowhere/prices.yaml")


# -------------------------------------------------------------------- places


def test_a_place_is_looked_up() -> None:
    found = place("gcp:us-central1:2xa3-ultragpu-8g:spot", read_prices(), our_gpus())
    assert found.gpu is not None
    assert (found.gpu.name, found.gpus_each, found.machines, found.spot) == ("H200", 8, 2, True)
    assert found.usd_per_h == Range.exact(50.0856)
    assert found.count(64) == 2
    assert found.unknown == ()


@pytest.mark.parametrize(("gpus", "machines"), [(8, 1), (9, 2), (64, 8), (1, 1), (None, None)])
def test_as_many_machines_as_it_takes(gpus: int | None, machines: int | None) -> None:
    assert place("aws:us-east-1:p5.48xlarge", read_prices(), our_gpus()).count(gpus) == machines


def test_what_the_tables_do_not_have_is_unknown(tmp_path: Path) -> None:
    (tmp_path / "own.yaml").write_text(OWN)
    prices, gpus = read_prices(str(tmp_path / "own.yaml")), our_gpus()
    unknown = {text: place(text, prices, gpus).unknown for text in (
        "foo:bar:baz", "aws:eu-west-1:p5.48xlarge", "aws:us-east-1:p5.48xlarge:spot", "mine:here:box"
    )}  # fmt: skip
    assert unknown["foo:bar:baz"] == (
        "what foo:baz costs and has: the table of prices has no row for it: give one (--prices-file)",
    )
    assert "in eu-west-1, only in us-east-1" in unknown["aws:eu-west-1:p5.48xlarge"][0]
    assert "does not say" in unknown["aws:us-east-1:p5.48xlarge:spot"][0]
    assert unknown["mine:here:box"] == ("what the GPU Own can do: the table of GPUs has no row for it",)
    assert place("mine:here:box", prices, gpus).usd_per_h == Range(1, 2, 4)


@pytest.mark.parametrize("text", ["", "gcp", "gcp:us", "a:b:", "a:b:c:d", "a:b:0xc", "a:b c:d", "s3://x/y"])
def test_what_is_no_place(text: str) -> None:
    with pytest.raises(ConfigError, match="is no place"):
        place(text, read_prices(), our_gpus())
