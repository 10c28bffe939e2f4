"""Prefill and decode nodes: who computes a prompt, who answers it, and what happens when one kind is gone."""

from __future__ import annotations

import random
from typing import Any

import pytest

from dispatcher.protocol.assignment import Envelope
from dispatcher.protocol.handoff import Handoff, Stage, stage_of
from dispatcher.protocol.names import Lane, Ref
from dispatcher.protocol.node import NodeIdentity, NodeReport, Role
from dispatcher.scheduling.choice import SchedulingParameters
from dispatcher.scheduling.fleet import Fleet, NodeState
from dispatcher.scheduling.policies import POLICIES
from dispatcher.scheduling.predictor import Predictor, PrefillCost, PrefillShape
from dispatcher.scheduling.prefix_index import PrefixIndex
from dispatcher.scheduling.scheduler import Scheduler
from dispatcher.scheduling.stages import DECODE_POLICIES, HOP_S, least_kv, transfer_s, use_after
from dispatcher.scheduling.window import Waiting, Window

COST = PrefillCost(fixed_s=0.01, token_s=1e-4, attention_s=0.0)


def request(prompt_tokens: int = 1000, offset: int = 0) -> Envelope:
    """A prompt that nobody has cached."""
    return Envelope(
        ref=f"i0_{offset}", id="r", model="m", prompt_tokens=prompt_tokens, max_tokens=100, tokens_exact=True
    )


class Scene:
    """Idle nodes of the given roles: p0, p1, d0, f0, ..."""

    def __init__(self, *roles: Role, policy: str = "prefill_cost", **parameters: Any) -> None:
        self.fleet = Fleet()
        for role in roles:
            number = sum(node.identity.role is role for node in self.fleet.nodes.values())
            self.add(f"{role.value[0]}{number}", role)
        self.scheduler = Scheduler(
            self.fleet,
            PrefixIndex(),
            policy=policy,
            parameters=SchedulingParameters(**parameters),
            rng=random.Random(1),
        )

    def add(self, name: str, role: Role) -> NodeState:
        """Enter a node."""
        identity = NodeIdentity(
            node=name, incarnation="x", models=("m",), role=role, max_running=8, kv_total_tokens=20_000
        )
        node = self.fleet.admit(identity, 0.0)
        node.admitted = True
        node.predictor = Predictor(PrefillShape(COST))
        node.hear(NodeReport(node=name, incarnation="x", sequence=1), 0.0, 0.0)
        return node

    def choose(self, envelope: Envelope, **more: Any) -> tuple[str, Stage]:
        """The node's name and the stage."""
        choice = self.scheduler.choose(envelope, more.pop("excluded", ()), {}, **more)
        assert choice is not None
        return choice.node.name, choice.stage

    def hold(self, name: str, requests: int, tokens: int = 100) -> None:
        """Let a node hold requests that are past their prompts."""
        for number in range(requests):
            self.fleet.reserve(name, f"{name}-{number}", tokens)


def test_a_long_prompt_goes_to_a_prefill_node_while_others_decode() -> None:
    scene = Scene(Role.PREFILL, Role.DECODE)
    scene.hold("d0", 6)
    assert scene.choose(request(8000)) == ("p0", Stage.PREFILL)


def test_a_short_prompt_skips_the_hop_when_its_decode_node_would_be_sooner() -> None:
    scene = Scene(Role.PREFILL, Role.DECODE)
    scene.fleet.reserve("p0", "long", 10_000, uncached_tokens=10_000, prefill_s=1.0)
    scene.hold("d0", 2)
    assert scene.choose(request(50)) == ("d0", Stage.WHOLE)


def test_a_hop_is_priced_by_the_bytes_that_move() -> None:
    assert transfer_s(0) == HOP_S
    assert transfer_s(100_000) == pytest.approx(HOP_S + 100_000 * 131_072 / 25e9)


def test_without_decode_nodes_a_prefill_node_answers_too() -> None:
    scene = Scene(Role.PREFILL, Role.DECODE)
    scene.fleet.nodes["d0"].available = False
    assert scene.choose(request(8000)) == ("p0", Stage.WHOLE)


def test_without_prefill_nodes_a_decode_node_computes_its_prompts() -> None:
    scene = Scene(Role.PREFILL, Role.DECODE)
    scene.fleet.nodes["p0"].available = False
    assert scene.choose(request(8000)) == ("d0", Stage.WHOLE)


@pytest.mark.parametrize("policy", sorted(set(POLICIES) - {"prefill_cost"}))
def test_policies_that_predict_nothing_leave_decode_nodes_to_their_part(policy: str) -> None:
    scene = Scene(Role.PREFILL, Role.DECODE, Role.DECODE, policy=policy)
    assert {scene.choose(request(100, offset)) for offset in range(20)} == {("p0", Stage.PREFILL)}
    scene.fleet.nodes["p0"].available = False
    assert {scene.choose(request(100, offset))[1] for offset in range(20)} == {Stage.WHOLE}


def test_fused_nodes_go_on_from_prompts_where_there_are_no_decode_nodes() -> None:
    scene = Scene(Role.PREFILL, Role.FUSED)
    assert scene.choose(request(100), is_decode=True) == ("f0", Stage.DECODE)


def test_a_prefill_node_is_expected_to_hold_the_prompt_alone() -> None:
    scene = Scene(Role.PREFILL, Role.DECODE)
    assert scene.fleet.nodes["p0"].expected_tokens(request(1000)) == 1001
    assert scene.fleet.nodes["d0"].expected_tokens(request(1000)) == 1100


def test_an_answer_goes_where_the_least_of_the_cache_is_used_by_capacity() -> None:
    scene = Scene(Role.PREFILL, Role.DECODE, Role.DECODE)
    scene.hold("d0", 2, tokens=1000)
    scene.hold("d1", 3, tokens=500)
    assert scene.choose(request(), is_decode=True) == ("d1", Stage.DECODE)
    # Ten times the cache: the same use is a tenth of it.
    big = scene.add("d2", Role.DECODE)
    big.identity = NodeIdentity(
        node="d2", incarnation="x", models=("m",), role=Role.DECODE, kv_total_tokens=200_000
    )
    scene.hold("d2", 3, tokens=1000)
    assert scene.choose(request(), is_decode=True) == ("d2", Stage.DECODE)


def test_a_full_decode_node_is_better_than_none_but_one_without_a_slot_is_waited_for() -> None:
    scene = Scene(Role.PREFILL, Role.DECODE, Role.DECODE)
    scene.hold("d0", 1, tokens=19_990)
    scene.hold("d1", 2, tokens=9_999)
    assert least_kv([scene.fleet.nodes["d0"], scene.fleet.nodes["d1"]], 1100, random.Random(1)) is None
    assert scene.choose(request(), is_decode=True)[1] is Stage.DECODE
    for name in ("d0", "d1"):
        scene.hold(name, 9, tokens=1)
    choice = scene.scheduler.choose(request(), (), {}, is_decode=True)
    assert choice is not None
    assert not choice.has_room


def test_ties_between_decode_nodes_are_broken_by_requests_then_by_chance() -> None:
    scene = Scene(Role.PREFILL, Role.DECODE, Role.DECODE)
    assert {scene.choose(request(offset=n), is_decode=True)[0] for n in range(30)} == {"d0", "d1"}
    scene.hold("d0", 1, tokens=0)
    assert {scene.choose(request(offset=n), is_decode=True)[0] for n in range(30)} == {"d1"}


def test_an_excluded_decode_node_is_used_only_when_there_is_no_other() -> None:
    scene = Scene(Role.PREFILL, Role.DECODE, Role.DECODE)
    assert scene.choose(request(), is_decode=True, excluded=("d0",)) == ("d1", Stage.DECODE)
    assert scene.choose(request(), is_decode=True, excluded=("d0", "d1"))[1] is Stage.DECODE


def test_use_is_that_of_requests_where_a_node_tells_no_cache() -> None:
    node = Scene(Role.DECODE).fleet.nodes["d0"]
    node.identity = NodeIdentity(node="d0", incarnation="x", models=("m",), max_running=8)
    assert use_after(node, 1000) == pytest.approx(1 / node.request_bound)


@pytest.mark.parametrize("name", sorted(DECODE_POLICIES))
def test_every_decode_policy_finds_a_node(name: str) -> None:
    scene = Scene(Role.PREFILL, Role.DECODE, Role.DECODE)
    scheduler = Scheduler(scene.fleet, PrefixIndex(), decode_policy=name, rng=random.Random(1))
    choice = scheduler.choose(request(), (), {}, is_decode=True)
    assert choice is not None
    assert choice.node.identity.role is Role.DECODE
    assert choice.has_room


def waiting(offset: int, *, expires_ms: int | None = None) -> Waiting:
    """A request, with its prompt computed when that is good until a time."""
    handoff = Handoff(node="p0", expires_ms=expires_ms) if expires_ms is not None else None
    return Waiting(ref=Ref(Lane.INTERACTIVE, 0, offset), envelope=request(offset=offset), handoff=handoff)


def test_what_waits_to_be_answered_is_not_held_up_by_what_waits_for_a_prefill_node() -> None:
    scene = Scene(Role.PREFILL, Role.DECODE, policy="least_outstanding_tokens")
    scene.hold("p0", 9)
    scene.hold("d0", 8)
    window = Window()
    for offset in range(40):
        window.push(waiting(offset))
    window.push(waiting(40, expires_ms=1000))
    round = window.begin_round()
    found = window.choose(scene.scheduler, round, 500)
    assert found is not None
    assert (found[0].ref.offset, found[1].stage) == (40, Stage.DECODE)


def test_a_prompt_that_is_lent_no_more_is_computed_again() -> None:
    scene = Scene(Role.PREFILL, Role.DECODE)
    scene.hold("d0", 6)
    window = Window()
    window.push(waiting(0, expires_ms=1000))
    found = window.choose(scene.scheduler, window.begin_round(), 1000)
    assert found is not None
    assert found[1].stage is not Stage.DECODE


def test_a_stage_of_another_release_is_the_whole() -> None:
    assert [stage_of(text) for text in ("", "prefill", "decode", "both")] == [
        Stage.WHOLE,
        Stage.PREFILL,
        Stage.DECODE,
        Stage.WHOLE,
    ]
