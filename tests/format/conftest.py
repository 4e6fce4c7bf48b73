"""A fixture that runs a test on the native core and again on numpy."""

from __future__ import annotations

import pytest

from gpumove.format import native


@pytest.fixture(params=["native", "numpy"])
def both_ways(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """The test runs twice. ``pytestmark = pytest.mark.usefixtures("both_ways")`` for a whole file."""
    if request.param == "numpy":
        monkeypatch.setattr(native, "core", None)
    else:
        assert native.core is not None, "not built: .venv/bin/python setup.py build_ext --inplace"
    return str(request.param)
