"""What a shadow makes of a leader's decision: whether both agree, and what its own is better in."""

from __future__ import annotations

import random
from typing import Any

import pytest

from dispatcher.protocol.assignment import Envelope
from dispatcher.protocol.node import Medium, Role
from dispatcher.scheduling.fleet import NodeState
from dispatcher.scheduling.scheduler import ALL_LOOKED_AT
from dispatcher.scheduling.shadow import REMEMBERED, Comparison, Tally, Verdict, compare
from dispatcher.shadow_text import VERDICTS, as_text
from tests.unit.test_scheduler import Scene, blocks, request


def judged(scene: Scene, envelope: Envelope, leader: str, *excluded: str, **how: Any) -> Comparison:
    """What a shadow says of a leader that chose this node."""
    return compare(scene.scheduler, envelope, excluded, scene.fleet.nodes.get(leader), **how)


def test_the_same_node_is_agreement() -> None:
    scene = Scene(3)
    scene.index.store("n1", Medium.GPU, blocks(1, 2, 3))
    found = judged(scene, request(1, 2, 3), "n1")
    assert (found.verdict, found.own, found.leader) == (Verdict.SAME, "n1", "n1")
    assert found.own_ttft_s == found.leader_ttft_s == pytest.approx(0.01 + 100 * 1e-4)


def test_equals_are_a_near_tie_whatever_chance_says() -> None:
    scene = Scene(5, near_tie=0.05)
    found = [judged(scene, request(1), f"n{number % 5}").verdict for number in range(50)]
    assert set(found) == {Verdict.SAME, Verdict.NEAR_TIE}


def busy(scene: Scene, name: str) -> None:
    """Give a node work that takes long."""
    scene.fleet.reserve(name, f"b-{name}", 100, uncached_tokens=10_000, prefill_s=1.0)


def full(scene: Scene, name: str) -> None:
    """Give a node all that it may hold."""
    for number in range(9):
        scene.fleet.reserve(name, f"b{number}-{name}", 1)


@pytest.mark.parametrize(
    ("parameters", "spoil", "verdict"),
    [
        ({}, busy, Verdict.QUEUE),
        ({}, full, Verdict.SLOT),
        ({"pressure_s": 5.0}, lambda scene, name: scene.fleet.reserve(name, "b", 1), Verdict.FULL),
        ({"stall_weight": 500.0}, lambda scene, name: scene.fleet.reserve(name, "b", 1), Verdict.STALL),
    ],
    ids=lambda value: value.value if isinstance(value, Verdict) else "",
)
def test_a_verdict_names_what_the_shadows_node_is_better_in(
    parameters: dict[str, Any], spoil: Any, verdict: Verdict
) -> None:
    scene = Scene(3, **parameters)
    for name in ("n0", "n2"):
        spoil(scene, name)
    found = judged(scene, request(*range(1, 20)), "n2")
    assert (found.verdict, found.own) == (verdict, "n1")
    assert found.own_ttft_s is not None
    assert found.leader_ttft_s is not None
    assert found.own_ttft_s <= found.leader_ttft_s


def test_a_cached_prompt_is_named_too_and_its_time_is_told() -> None:
    scene = Scene(2)
    scene.index.store("n0", Medium.GPU, blocks(1, 2, 3, 4))
    found = judged(scene, request(1, 2, 3, 4), "n1")
    assert (found.verdict, found.own) == (Verdict.CACHE, "n0")
    assert found.leader_ttft_s == found.leader_prefill_s == pytest.approx(0.01 + (4 * 256 + 100) * 1e-4)
    assert found.own_ttft_s == pytest.approx(0.01 + 100 * 1e-4)


def test_long_prompts_of_late_are_named() -> None:
    scene = Scene(2, burst_weight=50.0)
    node = scene.fleet.nodes["n1"]
    for number in range(30):
        node.burst.add(1.0, 0.01 * number)
    scene.now_s = 1.0
    assert judged(scene, request(1), "n1").verdict is Verdict.BURST


def test_what_the_shadow_did_not_look_at_is_no_fault_of_the_leader() -> None:
    scene = Scene(ALL_LOOKED_AT + 60)
    for node in scene.fleet.nodes.values():
        busy(scene, node.name)
    idle = scene.fleet.nodes["n5"]
    scene.fleet.release("n5", "b-n5")
    verdicts = {judged(scene, request(1), idle.name).verdict for _ in range(40)}
    assert verdicts == {Verdict.NOT_LOOKED_AT, Verdict.SAME}


def test_a_leader_s_node_that_can_not_be_chosen_is_named() -> None:
    scene = Scene(2)
    scene.fleet.nodes["n1"].cordoned = True
    assert judged(scene, request(1), "n1").verdict is Verdict.BARRED
    assert judged(scene, request(1), "n0", "n0").verdict is Verdict.SAME, "no other can take it"
    assert judged(scene, request(1), "nobody").verdict is Verdict.UNKNOWN_NODE
    scene.fleet.nodes["n0"].cordoned = True
    found = judged(scene, request(1), "n0")
    assert (found.verdict, found.own, found.own_ttft_s) == (Verdict.NO_NODE, "", None)


@pytest.mark.parametrize("policy", ["round_robin", "random", "shortest_ttft"])
def test_a_policy_without_costs_differs_by_its_rule(policy: str) -> None:
    scene = Scene(4, policy)
    verdicts = {judged(scene, request(1), "n0").verdict for _ in range(40)}
    assert verdicts <= {Verdict.SAME, Verdict.RULE}
    assert Verdict.RULE in verdicts


def test_a_choice_that_would_wait_is_told() -> None:
    scene = Scene(2)
    scene.index.store("n0", Medium.GPU, blocks(*range(1, 60)))
    busy(scene, "n0")
    found = judged(scene, request(*range(1, 60)), "n1")
    assert (found.own, found.would_wait) == ("n0", True)


def decode_node(scene: Scene, name: str, held: int) -> NodeState:
    node = scene.add(name, role=Role.DECODE, kv_total_tokens=10_000)
    if held:
        scene.fleet.reserve(name, f"b{name}", held)
    return node


def test_decode_stages_are_judged_by_the_kv_cache() -> None:
    scene = Scene(0)
    scene.add("p", role=Role.PREFILL)
    for name, held in (("d0", 3_000), ("d1", 0), ("d2", 0)):
        decode_node(scene, name, held)
    found = judged(scene, request(1), "d0", is_decode=True)
    assert found.verdict is Verdict.KV
    assert (found.own_ttft_s, found.leader_ttft_s) == (None, None)
    verdicts = {judged(scene, request(1), "d1", is_decode=True).verdict for _ in range(30)}
    assert verdicts == {Verdict.SAME, Verdict.NEAR_TIE}
    scene.fleet.nodes["d0"].cordoned = True
    assert judged(scene, request(1), "d0", is_decode=True).verdict is Verdict.BARRED


def test_judging_reserves_nothing() -> None:
    scene = Scene(3)
    for _ in range(20):
        judged(scene, request(1), "n1")
    assert all(not node.held and not node.unseen for node in scene.fleet.nodes.values())


def test_a_tally_counts_shares_and_times() -> None:
    tally = Tally("prefill_cost", "least_kv")
    assert tally.summary().agreement == 0.0
    for number in range(100):
        verdict = Verdict.SAME if number < 60 else Verdict.NEAR_TIE if number < 75 else Verdict.QUEUE
        own = "a" if verdict is Verdict.SAME else "b"
        tally.add(
            Comparison(
                verdict=verdict,
                own=own,
                leader="a",
                would_wait=number % 10 == 0,
                own_ttft_s=0.1,
                leader_ttft_s=0.1 if own == "a" else 0.3,
            ),
            is_decode=False,
        )
    tally.add(Comparison(verdict=Verdict.KV, own="c", leader="d"), is_decode=True)
    tally.measure(0.2, 0.25)
    found = tally.summary()
    assert (found.compared, found.agreement, found.would_wait) == (101, round(75 / 101, 4), 10)
    assert found.verdicts == {"same": 60, "queue": 25, "near_tie": 15, "kv": 1}
    assert found.decode_verdicts == {"kv": 1}
    assert (found.own_ttft.count, found.own_ttft.mean_ms) == (100, 100.0)
    assert found.leader_ttft.mean_ms == pytest.approx(180.0)
    assert (found.leader_ttft_apart.count, found.leader_ttft_apart.p50_ms) == (40, 300.0)
    assert (found.predicted.mean_ms, found.measured.mean_ms) == (200.0, 250.0)
    text = as_text(found)
    assert "agreement 74.3%; 10 would have waited" in text
    assert max(map(len, text.splitlines())) <= 110


def test_percentiles_are_of_the_last_and_memory_is_bounded() -> None:
    tally = Tally("prefill_cost", "least_kv")
    rng = random.Random(1)
    for _ in range(3 * REMEMBERED):
        seconds = rng.random()
        tally.add(
            Comparison(verdict=Verdict.SAME, own="a", leader="a", own_ttft_s=seconds, leader_ttft_s=seconds),
            is_decode=False,
        )
    found = tally.summary().own_ttft
    assert found.count == 3 * REMEMBERED
    assert found.p50_ms == pytest.approx(500, abs=30)
    assert found.p90_ms == pytest.approx(900, abs=30)
    assert len(tally._own.last) == REMEMBERED


def test_every_verdict_has_words() -> None:
    assert set(VERDICTS) == set(Verdict)
