"""Other GPUs: faster or slower, larger or smaller, and whether the job fits."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gpumove.estimates.speed import Devices, compare, fits, ratio
from gpumove.estimates.tables import Gpu, our_gpus

GB = 1e9
GPUS = our_gpus().gpus
DEVICES = st.builds(Devices, st.sampled_from(GPUS), st.integers(1, 512))


def some(name: str, count: int = 8) -> Devices:
    gpu = our_gpus().named(name)
    assert isinstance(gpu, Gpu)
    return Devices(gpu, count)


@pytest.mark.parametrize(
    ("here", "there", "word"),
    [
        (some("H100-SXM"), some("H100-SXM"), "same"),
        (some("A100-SXM-80GB"), some("H100-SXM"), "larger"),
        (some("H100-SXM"), some("A100-SXM-40GB"), "smaller"),
        (some("H100-SXM"), some("H100-SXM", 16), "larger"),
        (some("H100-SXM"), some("L40S", 16), "different"),
    ],
)
def test_mapping(here: Devices, there: Devices, word: str) -> None:
    assert compare(here, there) == word


def test_from_a100_to_h100_by_hand() -> None:
    """989 / 312 in bf16, 67 / 19.5 in fp32, 3350 / 2039 of bandwidth: steps take from 0.29 to 0.61 of their time, a
    tenth more or less; the middle is the geometric mean."""
    found = ratio(some("A100-SXM-80GB"), some("H100-SXM"))
    assert found.low == pytest.approx(19.5 / 67 / 1.1)
    assert found.high == pytest.approx(2039 / 3350 * 1.1)
    assert found.value == pytest.approx((19.5 / 67 * 2039 / 3350) ** 0.5)


def test_more_gpus_bring_between_half_and_all_of_what_their_number_promises() -> None:
    found = ratio(some("H100-SXM", 8), some("H100-SXM", 16))
    assert found.low == pytest.approx(0.95 * 0.5)
    assert found.high == pytest.approx(1.1 * 0.75)


@given(DEVICES, DEVICES)
def test_there_and_back_is_about_where_it_was(here: Devices, there: Devices) -> None:
    both = ratio(here, there) * ratio(there, here)
    assert both.low <= 1 <= both.high
    assert both.value == pytest.approx(1, rel=1e-6)


@given(DEVICES, DEVICES)
def test_what_is_larger_one_way_is_smaller_the_other(here: Devices, there: Devices) -> None:
    opposite = {"same": "same", "larger": "smaller", "smaller": "larger", "different": "different"}
    assert compare(there, here) in (opposite[compare(here, there)], "larger")  # alike in all figures: larger, both ways


@pytest.mark.parametrize(
    ("there", "state", "peak", "here", "answer"),
    [
        (some("H100-SXM"), 200 * GB, None, some("H100-SXM"), "yes"),  # as here
        (some("H100-SXM"), 700 * GB, None, some("A100-SXM-80GB", 16), "no"),  # 640 GB in all
        (some("A100-SXM-40GB"), 200 * GB, None, some("H100-SXM"), "unknown"),  # who knows what else there is
        (some("A100-SXM-40GB"), 200 * GB, 38 * GB, some("H100-SXM"), "yes"),
        (some("A100-SXM-40GB"), 200 * GB, 60 * GB, some("H100-SXM"), "no"),
        (some("A100-SXM-40GB", 16), 200 * GB, 60 * GB, some("H100-SXM"), "unknown"),  # sharded or not
        (some("H200", 4), 200 * GB, 70 * GB, some("H100-SXM"), "yes"),  # at most twice as much
        (some("H200", 4), 200 * GB, 75 * GB, some("H100-SXM"), "unknown"),
        (some("H100-SXM"), None, None, None, "unknown"),
    ],
)
def test_fits(there: Devices, state: float | None, peak: float | None, here: Devices | None, answer: str) -> None:
    assert fits(there, state_bytes=state, peak_bytes=peak, here=here).answer == answer
