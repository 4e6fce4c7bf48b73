"""What tests of moves share: a run at one store, and an empty place at another."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.move.runs import Place
from tests.move.stage import Stage, tape


@pytest.fixture(scope="module")
def recorded() -> Place:
    """What the source's job writes."""
    return tape()


@pytest.fixture
def stage(recorded: Place) -> Iterator[Stage]:
    """Both ends. A module whose stage is another one has a fixture of its own."""
    made = Stage(recorded)
    yield made
    made.close()
