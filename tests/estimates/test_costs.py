"""Dollars and hours: cases by hand, and what must be so whatever the numbers."""

from __future__ import annotations

import dataclasses
import datetime as dt

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gpumove.estimates.costs import Costs, Situation, egress, internet, reckon
from gpumove.estimates.interval import Range
from gpumove.estimates.places import Place
from gpumove.estimates.speed import Fit
from gpumove.estimates.tables import Egress, Prices, Tier
from gpumove.estimates.transfer import Transfer
from gpumove.estimates.verdict import judge

EXACT, GB = Range.exact, 1e9
TODAY = dt.date(2026, 11, 21)
BY_HAND = Situation(
    remaining_h=EXACT(100.0), ratio=EXACT(0.5), source_usd_h=EXACT(50.0), target_usd_h=EXACT(80.0),
    egress_usd=EXACT(20.0), copy_s=EXACT(3600.0), blackout_s=EXACT(36.0),
)  # fmt: skip


def test_by_hand() -> None:
    """100 h at 50 $ are 5000 $; 50 h at 80 $ are 4000 $. Once: 20 $ of egress, an hour of waiting, 80 $, and 36 s of
    both, 1.30 $. An hour of work saves 50 - 0.5 * 80 = 10 $."""
    found = reckon(BY_HAND)
    assert found.stay_usd == EXACT(5000.0)
    assert found.once_usd is not None
    assert found.once_usd.value == pytest.approx(101.30)
    assert found.go_usd is not None
    assert found.go_usd.value == pytest.approx(4101.30)
    assert found.saving_usd is not None
    assert found.saving_usd.value == pytest.approx(898.70)
    assert found.break_even_h is not None
    assert found.break_even_h.value == pytest.approx(10.13)
    assert found.go_h is not None
    assert (found.stay_h, found.go_h.value) == (EXACT(100.0), pytest.approx(50.01))


def test_a_commitment_is_paid_twice_over_if_nobody_uses_it() -> None:
    """30 committed hours at 50 $ are lost if the job goes; it would have used them."""
    found = reckon(dataclasses.replace(BY_HAND, committed_h=30.0))
    assert found.lost_usd == EXACT(1500.0)
    assert found.saving_usd is not None
    assert found.saving_usd.value == pytest.approx(898.70 - 1500)


def test_of_a_commitment_that_is_longer_than_the_work_the_rest_is_lost_either_way() -> None:
    found = reckon(dataclasses.replace(BY_HAND, committed_h=300.0))
    assert found.stay_usd == EXACT(15_000.0)
    assert found.saving_usd is not None
    assert found.saving_usd.value == pytest.approx(898.70 - 100 * 50)


@pytest.mark.parametrize("name", ["remaining_h", "ratio", "source_usd_h", "target_usd_h", "egress_usd", "blackout_s"])
def test_whatever_is_missing_no_saving_is_told(name: str) -> None:
    found = reckon(dataclasses.replace(BY_HAND, **{name: None}))
    assert found.saving_usd is None
    verdict = judge(found, Transfer(), Fit("yes", ""), None, spot=False)
    assert (verdict.answer, verdict.reasons[0]) == ("unknown", "what it saves is not known")


def test_what_costs_more_by_the_hour_never_pays() -> None:
    found = reckon(dataclasses.replace(BY_HAND, ratio=EXACT(2.0)))
    assert found.break_even_h is None
    assert found.saving_usd is not None
    assert found.saving_usd.high < 0
    verdict = judge(found, Transfer(), Fit("yes", ""), EXACT(2.0), spot=True)
    assert verdict.answer == "stay"
    assert "it may never pay" in verdict.reasons[1]
    assert verdict.reasons[2] == "steps take some 2.00 of what they take now (2.00 to 2.00)"
    assert "a spot machine may be taken away" in verdict.reasons[3]


# -------------------------------------------------------------------- properties

MONEY, HOURS, RATIOS = st.floats(0, 1e4), st.floats(0, 1e4), st.floats(0.05, 20)


@st.composite
def situations(draw: st.DrawFn) -> tuple[Situation, Situation]:
    """What is known, and what is really so, which lies within it."""

    def some(values: st.SearchStrategy[float]) -> tuple[Range, Range]:
        low, value, real, high = sorted(draw(st.lists(values, min_size=4, max_size=4)))
        return Range(low, value, high), EXACT(real)

    kinds = {"remaining_h": HOURS, "ratio": RATIOS, "source_usd_h": MONEY, "target_usd_h": MONEY,
             "egress_usd": MONEY, "copy_s": HOURS, "blackout_s": HOURS}  # fmt: skip
    both = {name: some(values) for name, values in kinds.items()}
    committed = draw(HOURS)
    known, real = ({name: pair[i] for name, pair in both.items()} for i in (0, 1))
    return Situation(**known, committed_h=committed), Situation(**real, committed_h=committed)


@given(situations())
def test_what_is_told_holds_what_is_really_so(both: tuple[Situation, Situation]) -> None:
    told, real = ({f.name: getattr(reckon(one), f.name) for f in dataclasses.fields(Costs)} for one in both)
    for name, found in told.items():
        if found is not None:
            slack = 1e-9 * (1 + max(map(abs, (found.low, found.high))))
            assert found.low - slack <= real[name].value <= found.high + slack, name


@given(situations())
def test_a_verdict_that_is_sure_is_right(both: tuple[Situation, Situation]) -> None:
    known, real = both
    verdict = judge(reckon(known), Transfer(), Fit("yes", ""), known.ratio, spot=False)
    now = reckon(real)
    assert now.saving_usd is not None
    assert now.stay_usd is not None
    assert now.go_usd is not None
    slack = 1e-6 * (1 + now.stay_usd.value + now.go_usd.value)
    if verdict.answer == "go":
        assert now.go_usd.value <= now.stay_usd.value + slack
    elif verdict.answer == "stay":
        assert now.go_usd.value >= now.stay_usd.value - slack
    assert now.saving_usd.value == pytest.approx(now.stay_usd.value - now.go_usd.value, abs=slack)


# -------------------------------------------------------------------- egress

AWS = Egress("aws", (Tier(0.09, 10_240), Tier(0.085, 51_200), Tier(0.05)), "by hand", TODAY, free_gb=100,
             inter_region_usd_per_gb=(0.01, 0.02, 0.09))  # fmt: skip


def at(provider: str, region: str) -> Place:
    return Place("", provider, region, "x", 1, 8, None, None, False)


def test_egress_by_hand() -> None:
    """50 GB: free, or all at 9 cents. 20 000 GB: 10 240 at 9 cents and 9 660 at 8.5, or 9 760, if nothing is free."""
    assert internet(AWS, EXACT(50 * GB)) == Range(0.0, 0.0, 4.5)
    found = internet(AWS, EXACT(20_000 * GB))
    assert found.value == pytest.approx(921.6 + 821.1)
    assert found.high == pytest.approx(921.6 + 829.6)


def test_egress_depends_on_where_it_goes() -> None:
    prices, sent = Prices(TODAY, (AWS,)), EXACT(1000 * GB)
    assert egress(sent, ("aws", "us-east-1"), at("aws", "us-east-1"), prices) == EXACT(0.0)
    assert egress(sent, ("aws", "us-east-1"), at("aws", "eu-west-1"), prices) == Range(10.0, 20.0, 90.0)
    assert egress(sent, ("aws", ""), at("aws", "eu-west-1"), prices) == Range(0.0, 20.0, 90.0)
    assert egress(sent, ("aws", "us-east-1"), at("gcp", "us-east1"), prices) == internet(AWS, sent)


def test_what_egress_costs_is_not_guessed() -> None:
    prices, sent = Prices(TODAY, (AWS,)), EXACT(GB)
    assert "it is not known how much" in str(egress(None, ("aws", ""), at("gcp", "x"), prices))
    assert "which provider" in str(egress(sent, None, at("gcp", "x"), prices))
    assert "no row for mine" in str(egress(sent, ("mine", ""), at("gcp", "x"), prices))
    bare = Prices(TODAY, (Egress("oci", (Tier(0.01),), "by hand", TODAY),))
    assert "no price between regions" in str(egress(sent, ("oci", "a"), at("oci", "b"), bare))


@given(st.floats(0, 1e6), st.floats(0, 1e6))
def test_more_bytes_never_cost_less(a: float, b: float) -> None:
    less, more = (internet(AWS, EXACT(size * GB)) for size in sorted((a, b)))
    assert less.low <= more.low
    assert less.value <= more.value
    assert less.high <= more.high
