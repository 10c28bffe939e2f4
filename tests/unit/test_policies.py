"""What every routing policy of the field must keep, whatever it decides by."""

import random
from collections import Counter, deque

import pytest

from dispatcher.simulation.policies import BY_NAME, TUNABLE, Arrival, Policy, Signal
from dispatcher.simulation.policies.accounting import InFlight
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


@pytest.mark.parametrize("name", NAMES)
def test_an_idle_fleet_is_not_herded_by_index(name: str) -> None:
    policy = BY_NAME[name]()
    world = PolicyWorld(8, 0)
    world.begin(policy)
    counts: Counter[int] = Counter()
    for number in range(400):
        blocks = tuple(range(1000 * number, 1000 * number + 10))
        counts[world.route(Arrival(number, 100.0 * number, 160, 10, blocks))] += 1
        world.drain()
    if name == "sglang_cache_aware":
        assert counts == {0: 400}, "the original takes the first of equals"
    else:
        # Binomial(400, 1/8): mean 50, deviation 6.6; five deviations.
        assert all(17 < counts[node] < 83 for node in range(8)), counts


def test_sglang_can_be_told_to_break_ties_by_chance() -> None:
    policy = BY_NAME["sglang_cache_aware"](tie="random")
    PolicyWorld(8, 0).begin(policy)
    assert {policy.choose(Arrival(n, 0.0, 160, 1, ())) for n in range(8)} == set(range(8))


@pytest.mark.parametrize("name", NAMES)
def test_nothing_is_left_of_an_idle_fleet_whose_caches_are_empty(name: str) -> None:
    """What a policy keeps of requests goes with them; of blocks, with their events or by its bound."""
    policy = BY_NAME[name](**BOUNDED.get(name, {}))
    world = PolicyWorld(4, 0)
    world.signals = [Signal(0.0, 0, 0, 0, 0, 64) for _ in range(4)]
    world.begin(policy)
    arrivals = list(shared_prefix_arrivals(random.Random(0), 600))
    for arrival in arrivals:
        world.route(arrival)
    world.drain()
    for arrival in arrivals:
        for node in range(4):
            policy.removed(node, arrival.blocks)
    world.now_s += 1000.0
    chosen = policy.choose(Arrival(10_000, world.now_s, 16, 1, (1,)))
    policy.finished(Arrival(10_000, world.now_s, 16, 1, (1,)), chosen)
    for field, value in vars(policy).items():
        if field in ("_load", "_tokens", "_requests", "_prefill", "_pending", "_since_tokens"):
            load = [*value.requests, *value.prefill] if isinstance(value, InFlight) else value
            assert not any(load) or (field == "_since_tokens" and sum(load) == 16), field
    # 64 blocks on each of 4 nodes and the last prompt's, in three tables at most; 18,000 were routed.
    assert _entries(policy) <= 3 * (4 * 64 + 1) + 50


BOUNDED = {
    "sglang_cache_aware": {"max_tree_chars": 64 * 64},
    "smg_expected_wait": {"max_tree_tokens": 64 * 16 * 4},
}


def _entries(value: object, depth: int = 0) -> int:
    """Count what dictionaries and sequences hold, down through our own objects."""
    if isinstance(value, PolicyWorld | random.Random) or depth > 5:
        return 0
    if isinstance(value, dict):
        return len(value) + sum(_entries(one, depth + 1) for one in value.values())
    if isinstance(value, list | deque):
        return len(value) + sum(_entries(one, depth + 1) for one in value)
    if hasattr(value, "__dict__"):
        return sum(_entries(one, depth + 1) for one in vars(value).values())
    return 0
