"""A run that moves while it trains: its probe says that the model arrived, and its published names come along."""

from __future__ import annotations

from collections.abc import Mapping

import pytest

import gpumove
from gpumove.inspection.run import open_run, pick
from gpumove.store.records import read_manifest
from tests.move.test_move_jobs import Clouds, clouds, compare, reference

__all__ = ["clouds", "reference"]
pytestmark = [pytest.mark.slow, pytest.mark.timeout(300)]  # real processes, which train for a while


def test_the_last_save_has_the_probe_and_names_come_along(clouds: Clouds, reference: Mapping[int, str]) -> None:
    probed = {"PROBED": "1", "GPUMOVE_KEEP_LAST": "none"}
    there, here = clouds.there(wait=True, settings=probed), clouds.here(settings=probed)
    clouds.training(here, 12)
    published = clouds.steps_here()[-1]
    gpumove.publish(clouds.source, published, "canary", storage_options=clouds.s3.options)
    ends = {"from_options": clouds.s3.options, "to_options": clouds.gcs.options}
    gpumove.replicate(clouds.source, clouds.target, step="all", **ends)  # a move brings the newest only
    gpumove.publish(clouds.source, published, "other", storage_options=clouds.s3.options)
    assert clouds.move().end()["phase"] == "done"
    assert here.end()[0] == 77, here.log
    assert there.end()[0] == 0, there.log
    compare(reference, here, there)  # with probes, and to the last bit as without
    last = max(here.losses())
    with open_run(clouds.target, storage_options=clouds.gcs.options) as log:
        left = pick(log.read(), last, url=clouds.target)
        assert [probe.name for probe in read_manifest(log.store, left).probes] == ["probe"]
    assert "probes: {'probe': 'bitwise'}" in there.log, there.log
    for name in ("canary", "other"):
        assert gpumove.resolve(clouds.target, name, storage_options=clouds.gcs.options).step == published
    promoted = gpumove.promote(clouds.target, "canary", "production", gate=False, storage_options=clouds.gcs.options)
    assert promoted.step == published
    with pytest.raises(gpumove.FencedError, match="was moved to"):
        gpumove.promote(clouds.source, "canary", "production", gate=False, storage_options=clouds.s3.options)
