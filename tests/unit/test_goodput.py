"""Good requests by both objectives, and the search for the rate up to which enough of them are."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from math import inf

import pytest

from dispatcher.simulation.fleet import FleetSimulation
from dispatcher.simulation.fleet_workload import FleetWorkload, Turn
from dispatcher.simulation.goodput import Objectives, cold_prefill_s
from dispatcher.simulation.knee import FALLS, RESOLUTION, knee, search
from dispatcher.simulation.policies import BY_NAME
from dispatcher.simulation.policy_router import PolicyRouter
from dispatcher.simulation.profiles import PROFILES

PROFILE = PROFILES["h100-llama-8b"]


@pytest.mark.parametrize("prompt_tokens", [1, 300, 8_192, 8_193, 50_000])
def test_a_cold_prefill_is_what_a_lone_request_waits(prompt_tokens: int) -> None:
    profile = replace(PROFILES["b200-deepseek-r1-tp8"], attention_s=1e-10)
    turn = Turn(pause_s=0.0, prompt_tokens=prompt_tokens, output_tokens=2, blocks=())
    workload = FleetWorkload(sessions=[[turn]], block_tokens=profile.block_tokens, per_s=1.0)
    router = PolicyRouter(BY_NAME["round_robin"]())
    result = FleetSimulation(workload, router, nodes=1, profile=profile, rate=1.0, seed=1).run()
    assert cold_prefill_s(profile, prompt_tokens) == pytest.approx(result.ttft_s[0])


def test_both_objectives_are_to_be_kept() -> None:
    is_good = Objectives().judge(PROFILE)
    assert is_good(1.0, 0.05, 100)
    assert not is_good(1.01, 0.0, 100)
    assert not is_good(0.5, 0.051, 100)
    assert not is_good(inf, 0.0, 100)
    cold_s = cold_prefill_s(PROFILE, 60_000)
    assert cold_s > 1
    assert is_good(2.99 * cold_s, 0.05, 60_000)
    assert not is_good(3.01 * cold_s, 0.05, 60_000)


def found(attainment: Callable[[float], float], carried: float) -> tuple[float, list[float]]:
    """Search, and return the knee and the rates in the order they were asked for."""
    asked: list[float] = []
    searching = search(carried)
    rate = next(searching)
    try:
        while True:
            asked.append(rate)
            rate = searching.send(attainment(rate))
    except StopIteration:
        return knee([(rate, attainment(rate)) for rate in asked]), asked


@pytest.mark.parametrize("true_knee", [0.05, 0.7, 1.0, 1.19, 3.3])
def test_the_knee_is_no_artefact_of_the_steps(true_knee: float) -> None:
    seen, asked = found(lambda rate: 0.99 if rate <= true_knee else 0.2, 1.0)
    assert seen == pytest.approx(true_knee, rel=RESOLUTION)
    assert len(asked) <= 16


def test_a_search_takes_some_eight_runs() -> None:
    for tenths in range(5, 12):
        _, asked = found(lambda rate, knee=tenths / 10 + 0.03: 0.99 if rate <= knee else 0.2, 1.0)  # type: ignore[misc]
        assert len(asked) <= 10


def test_the_knee_lies_between_the_last_two_rates_by_a_line() -> None:
    assert knee([(1.0, 0.95), (2.0, 0.85)]) == pytest.approx(1.5)
    assert knee([(3.0, 1.0), (1.0, 0.95), (2.0, 0.85)]) == pytest.approx(1.5)
    assert knee([(1.0, 0.95), (2.0, 0.93)]) == 2.0
    assert knee([(1.0, 0.5), (2.0, 0.95)]) == 0.0


def test_what_never_keeps_its_objectives_has_no_knee() -> None:
    seen, asked = found(lambda rate: 0.0, 1.0)
    assert seen == 0.0
    assert len(asked) == 1 + FALLS
    seen, asked = found(lambda rate: 1.0, 1.0)
    assert seen == max(asked)
