"""The original's decode policies, held against arithmetic by hand."""

from __future__ import annotations

import random
from collections import Counter

import pytest

from dispatcher.protocol.node import NodeIdentity, NodeReport
from dispatcher.scheduling.decode_policies import BY_NAME, DecodePolicy, cost_based_decode, weighted_cache
from dispatcher.scheduling.fleet import NodeState

BOTH = pytest.mark.parametrize("policy", [cost_based_decode, weighted_cache])


def node(name: str, *, used: int = 0, total: int = 100_000, held: int = 0, held_tokens: int = 0) -> NodeState:
    """A decode node that reports this KV use and holds so many requests of ours."""
    state = NodeState(identity=NodeIdentity(node=name, incarnation="x", models=("m",), kv_total_tokens=total))
    report = NodeReport(
        node=name, incarnation="x", sequence=1, kv_used_tokens=used, kv_total_tokens=total, seen_seq=0
    )
    state.hear(report, 0.0, 0.0)
    for number in range(held):
        state.reserve(f"{name} {number}", held_tokens // held, 0, 0, 0.0)
    return state


def drawn(
    policy: DecodePolicy, nodes: list[NodeState], tokens: int = 100, times: int = 4_000
) -> Counter[str]:
    """How often each node is drawn."""
    rng = random.Random(7)
    found = [policy(nodes, tokens, rng) for _ in range(times)]
    return Counter(one.name for one in found if one is not None)


@BOTH
def test_a_node_that_uses_a_thousand_tokens_more_has_a_weight_of_1_to_e(policy: DecodePolicy) -> None:
    # exp(-0.001 x 1,000) = 0.368: of both weights together that is 0.269.
    found = drawn(policy, [node("a", used=5_000), node("b", used=6_000)])
    assert found["b"] / 4_000 == pytest.approx(0.269, abs=0.02)


@BOTH
def test_equal_use_is_equal_chance(policy: DecodePolicy) -> None:
    found = drawn(policy, [node(name, used=2_000) for name in "abcd"])
    assert all(count / 4_000 == pytest.approx(0.25, abs=0.03) for count in found.values())
    assert len(found) == 4


@BOTH
def test_what_the_request_needs_must_fit(policy: DecodePolicy) -> None:
    roomy, tight = node("roomy", used=9_000, total=10_000), node("tight", used=0, total=999)
    rng = random.Random(1)
    assert policy([roomy, tight], 1_000, rng) is roomy
    assert policy([roomy, tight], 1_001, rng) is None


@BOTH
def test_a_node_that_tells_no_capacity_is_no_obstacle(policy: DecodePolicy) -> None:
    assert drawn(policy, [node("a", total=0)], tokens=10**9) == {"a": 4_000}


@BOTH
def test_no_nodes_are_no_node(policy: DecodePolicy) -> None:
    assert policy([], 1, random.Random(1)) is None


@BOTH
def test_what_was_bound_and_not_reported_yet_counts(policy: DecodePolicy) -> None:
    # 40,000 tokens apart: exp(-40) is never drawn.
    found = drawn(policy, [node("a", held=1, held_tokens=40_000), node("b", held=1, held_tokens=0)])
    assert found == {"b": 4_000}


def test_hot_spots_are_left_out_by_cost_alone() -> None:
    # Mean 10 / 4 = 2.5 requests, three times that is 7.5: ten are too many; KV is equal.
    crowded = [node("a", held=10), node("b"), node("c"), node("d")]
    assert "a" not in drawn(cost_based_decode, crowded)
    assert "a" in drawn(weighted_cache, crowded)


def test_a_node_at_just_three_times_the_mean_is_kept() -> None:
    # Mean of (3, 1, 0): 4/3, three times that 4.
    assert "a" in drawn(cost_based_decode, [node("a", held=3), node("b", held=1), node("c")])


def test_nodes_out_of_balance_are_left_out_by_cost_alone() -> None:
    # Mean 4,000 / 4, three times that 3,000: 4,000 is too many, and exp(-4) = 0.018 of the others' weight.
    uneven = [node("a", used=4_000), node("b"), node("c"), node("d")]
    assert "a" not in drawn(cost_based_decode, uneven)
    assert drawn(weighted_cache, uneven)["a"] / 4_000 == pytest.approx(0.0061, abs=0.004)


def test_none_is_left_when_the_only_one_with_room_is_a_hot_spot() -> None:
    full = [node(name, used=1_000, total=1_000) for name in "bcd"]
    assert cost_based_decode([node("a", held=10), *full], 100, random.Random(1)) is None
    found = weighted_cache([node("a", held=10), *full], 100, random.Random(1))
    assert found is not None
    assert found.name == "a"


def test_the_originals_names_are_known() -> None:
    assert BY_NAME["COST_BASED_DECODE"] is BY_NAME["cost_based_decode"] is cost_based_decode
    assert BY_NAME["WEIGHTED_CACHE"] is BY_NAME["weighted_cache"] is weighted_cache
