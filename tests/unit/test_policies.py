"""What every routing policy of the field must keep, whatever it decides by."""

import random
from collections import Counter

import pytest

from dispatcher.simulation.policies import BY_NAME, TUNABLE, Arrival, Policy
from tests.support.policy_world import PolicyWorld, shared_prefix_arrivals

NAMES = sorted(BY_NAME)


def _choices(policy: Policy, nodes: int, seed: int, count: int) -> list[int]:
    world = PolicyWorld(nodes, seed)
    world.begin(policy)
    return [world.route(arrival) for arrival in shared_prefix_arrivals(random.Random(seed), count)]


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("nodes", [1, 2, 7, 64])
def test_every_choice_is_a_node(name: str, nodes: int) -> None:
    policy = BY_NAME[name]()
    assert policy.name == name
    assert set(_choices(policy, nodes, seed=3, count=300)) <= set(range(nodes))


@pytest.mark.parametrize("name", NAMES)
def test_the_same_seed_gives_the_same_choices(name: str) -> None:
    assert _choices(BY_NAME[name](), 16, 5, 400) == _choices(BY_NAME[name](), 16, 5, 400)


@pytest.mark.parametrize("name", NAMES)
def test_every_value_of_the_grid_is_accepted_and_the_default_comes_first(name: str) -> None:
    for constant, values in TUNABLE[name].items():
        assert len(set(values)) == len(values) >= 2
        by_default = _choices(BY_NAME[name](), 8, 1, 200)
        assert _choices(BY_NAME[name](**{constant: values[0]}), 8, 1, 200) == by_default
        for value in values[1:]:
            _choices(BY_NAME[name](**{constant: value}), 8, 1, 50)


def test_the_registry_and_the_grid_name_the_same_policies() -> None:
    assert set(BY_NAME) == set(TUNABLE)


def test_round_robin_takes_turns() -> None:
    assert _choices(BY_NAME["round_robin"](), 3, 0, 7) == [0, 1, 2, 0, 1, 2, 0]


def test_random_reaches_every_node_about_equally_often() -> None:
    counts = Counter(_choices(BY_NAME["random"](), 8, 0, 4000))
    # Binomial(4000, 1/8): mean 500, deviation 21; five deviations.
    assert all(395 < counts[node] < 605 for node in range(8))


def test_arrivals_are_values() -> None:
    first = Arrival(1, 0.0, 32, 8, (1, 2))
    assert first == Arrival(1, 0.0, 32, 8, (1, 2))
