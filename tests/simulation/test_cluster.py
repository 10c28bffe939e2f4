"""The cluster simulation: seeded workloads, networks and faults, production code, invariants throughout."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from tests.support.cluster import simulate

SEEDS = 200
SPLIT_SEEDS = 60
LONG_SEEDS = 10_000
BATCH = 20
WINDOW = {"batch_wait_ms": 300, "batch_size": 3}
"""Requests wait for others of their node, though long in a leader that may die."""


@pytest.mark.parametrize("first", range(0, SEEDS, BATCH))
def test_nothing_is_lost_and_answered_once(first: int) -> None:
    resumed_tokens = clients_gone = 0
    for seed in range(first, first + BATCH):
        result = simulate(seed)
        assert not result.violations, result.explain()
        resumed_tokens += result.resumed_tokens
        clients_gone += result.clients_gone
    assert resumed_tokens, "no attempt went on from where another ended"
    assert clients_gone, "no client that left had its requests cancelled"


@pytest.mark.parametrize("first", range(0, SPLIT_SEEDS, BATCH))
def test_nothing_is_lost_between_prefill_and_decode_nodes(first: int) -> None:
    handed_over = 0
    for seed in range(first, first + BATCH):
        result = simulate(seed, is_split=True)
        assert not result.violations, result.explain() + " (with --split)"
        handed_over += result.handed_over
    assert handed_over, "no prompt was computed for another node"


@pytest.mark.parametrize("first", range(0, 40, BATCH))
def test_nothing_is_lost_that_waits_for_its_batch(first: int) -> None:
    for seed in range(first, first + BATCH):
        result = simulate(seed, is_split=seed % 4 == 3, settings=WINDOW)
        assert not result.violations, result.explain() + f" (with {WINDOW})"


@pytest.mark.parametrize("policy", ["cost_based_prefill", "shortest_ttft"])
def test_nothing_is_lost_under_a_policy_of_the_original(policy: str) -> None:
    for seed in range(BATCH):
        result = simulate(seed, is_split=seed % 2 == 1, settings={"policy": policy})
        assert not result.violations, result.explain() + f" (with {policy})"


@pytest.mark.parametrize("seed", [3, 11])
def test_a_seed_takes_the_same_steps_again(seed: int) -> None:
    def steps() -> list[str]:
        lines: list[str] = []
        simulate(seed, trace=lines.append)
        return lines

    first = steps()
    assert len(first) > 500
    assert first == steps()


def test_a_seed_takes_the_same_steps_in_every_process() -> None:
    # What iterates over a set of strings goes by the hashes that a process draws.
    steps = []
    for hashes in ("77", "154"):
        command = [sys.executable, "-m", "tests.simulation", "6", "8", "--trace"]
        steps.append(subprocess.check_output(command, env={**os.environ, "PYTHONHASHSEED": hashes}))
    assert len(steps[0]) > 100_000
    assert steps[0] == steps[1]


@pytest.mark.long
@pytest.mark.timeout(600)
@pytest.mark.skipif(os.environ.get("FLEXLB_TEST_PROFILE") != "long", reason="the long profile only")
@pytest.mark.parametrize("first", range(SEEDS, LONG_SEEDS, 100))
def test_many_more_seeds(first: int) -> None:
    for seed in range(first, first + 100):
        result = simulate(seed)
        assert not result.violations, result.explain()
