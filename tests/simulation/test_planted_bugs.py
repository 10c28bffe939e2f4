"""The simulation catches what hurried changes break: see `planted_bugs`."""

from __future__ import annotations

import pytest

from tests.simulation.planted_bugs import BUGS, MOST_SEEDS, Plant, catch, seeds_from


@pytest.mark.parametrize("plant", BUGS, ids=lambda plant: plant.__name__)
def test_planted_bug_is_caught(plant: Plant) -> None:
    assert catch(plant, seeds_from(BUGS[plant])), f"{plant.__name__} survived {MOST_SEEDS} seeds"
