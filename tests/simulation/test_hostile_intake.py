"""Arbitrary records among the clients' own, with faults: each gets its one answer, and the pool goes on."""

from __future__ import annotations

import os

import pytest

from tests.support.cluster import simulate

RECORDS = 60
SEEDS = 6
LONG_SEEDS = 500


@pytest.mark.parametrize("seed", range(SEEDS))
def test_every_record_is_answered_or_dead_lettered_once(seed: int) -> None:
    result = simulate(seed, hostile_records=RECORDS)
    assert not result.violations, result.explain()


@pytest.mark.long
@pytest.mark.timeout(1200)
@pytest.mark.skipif(os.environ.get("FLEXLB_TEST_PROFILE") != "long", reason="the long profile only")
@pytest.mark.parametrize("first", range(SEEDS, LONG_SEEDS, 50))
def test_many_more_records(first: int) -> None:
    for seed in range(first, first + 50):
        result = simulate(seed, hostile_records=RECORDS)
        assert not result.violations, result.explain()
