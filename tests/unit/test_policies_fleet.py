"""Every policy of the field routes a simulated fleet, and those that know of caches find more in them."""

from dataclasses import replace
from random import Random

import pytest

from dispatcher.simulation.fleet import FleetResult, FleetSimulation, coarse
from dispatcher.simulation.fleet_workload import FleetWorkload, Turn
from dispatcher.simulation.policies import BY_NAME
from dispatcher.simulation.policy_router import PolicyRouter
from dispatcher.simulation.profiles import PROFILES

BLOCK = 256
BLIND = {"random", "round_robin", "least_outstanding_tokens"}
REQUESTS = 400


def _stems(seed: int) -> FleetWorkload:
    """Prompts of one of 16 stems of eight blocks and a block of their own."""
    rng = Random(seed)
    at_s, sessions = 0.0, []
    for number in range(REQUESTS):
        at_s += rng.expovariate(30.0)
        stem = rng.randrange(16)
        blocks = (*range(100 * stem, 100 * stem + 8), 100_000 + number)
        sessions.append([Turn(pause_s=at_s, prompt_tokens=BLOCK * 9 + 5, output_tokens=20, blocks=blocks)])
    return FleetWorkload(sessions=sessions, block_tokens=BLOCK, per_s=1.0)


def _run(name: str) -> FleetResult:
    profile = replace(coarse(PROFILES["test"], BLOCK), prefill_token_s=5e-5, kv_blocks=100)
    router = PolicyRouter(BY_NAME[name]())
    return FleetSimulation(_stems(3), router, nodes=4, profile=profile, rate=1.0, seed=1).run()


@pytest.mark.parametrize("name", sorted(BY_NAME))
def test_every_request_is_answered_and_the_seed_decides(name: str) -> None:
    result = _run(name)
    assert len(result.ttft_s) == REQUESTS
    assert min(result.ttft_s) > 0.0
    assert result.ttft_s == _run(name).ttft_s


@pytest.mark.parametrize("name", sorted(set(BY_NAME) - BLIND))
def test_who_knows_of_caches_finds_more_in_them(name: str) -> None:
    # Each cache holds 100 blocks of the 128 of all stems: dealt out in turn, they push each other out.
    assert _run(name).cached_tokens > 1.15 * _run("round_robin").cached_tokens
