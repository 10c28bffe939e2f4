"""Which node a request gets, and when it waits for one."""

from __future__ import annotations

import random
from collections import Counter
from typing import Any

import pytest

from dispatcher.protocol.assignment import Envelope
from dispatcher.protocol.node import Medium, NodeIdentity, NodeReport
from dispatcher.scheduling.breaker import FAILURES, LONGEST_PROBATION_S
from dispatcher.scheduling.choice import Choice, SchedulingParameters
from dispatcher.scheduling.fleet import Fleet, NodeState
from dispatcher.scheduling.policies import POLICIES
from dispatcher.scheduling.predictor import Predictor, PrefillCost, PrefillShape
from dispatcher.scheduling.prefix_index import PrefixIndex
from dispatcher.scheduling.scheduler import ALL_LOOKED_AT, LOAD_S_PER_TOKEN, Scheduler

COST = PrefillCost(fixed_s=0.01, token_s=1e-4, attention_s=0.0)
BLOCK = 256


def blocks(*path: int) -> tuple[bytes, ...]:
    """A chain of routing blocks."""
    return tuple(bytes(path[: n + 1]).ljust(8, b"\xff") for n in range(len(path)))


def request(*path: int, extra_tokens: int = 100, **fields: Any) -> Envelope:
    """A prompt of these blocks and some more tokens."""
    return Envelope(
        ref="i0_0",
        id="r",
        **{
            "model": "m",
            "prompt_tokens": len(path) * BLOCK + extra_tokens,
            "max_tokens": 10,
            "block_size": BLOCK,
            "block_hashes": tuple(block.hex() for block in blocks(*path)),
            **fields,
        },
    )


class Scene:
    """A fleet of equal nodes, all known and idle."""

    def __init__(self, count: int, policy: str = "prefill_cost", **parameters: Any) -> None:
        self.fleet = Fleet()
        self.index = PrefixIndex()
        self.healthy_s = 0.0
        self.now_s = 0.0
        for number in range(count):
            self.add(f"n{number}")
        self.scheduler = Scheduler(
            self.fleet,
            self.index,
            policy=policy,
            parameters=SchedulingParameters(
                **{
                    "near_tie": 0.0,
                    "work_weight": 0.0,
                    "stall_weight": 0.0,
                    "burst_weight": 0.0,
                    "pressure_s": 0.0,
                    **parameters,
                }
            ),
            rng=random.Random(5),
            healthy_s=lambda: self.healthy_s,
            now_s=lambda: self.now_s,
        )

    def add(self, name: str, **identity: Any) -> NodeState:
        fields = {"models": ("m",), "max_running": 8, "engine_block_size": 16, **identity}
        node = self.fleet.admit(
            NodeIdentity(node=name, incarnation="x", **fields),
            0.0,
        )
        node.admitted = True
        node.predictor = Predictor(PrefillShape(COST))
        return node

    def report(self, name: str, **fields: Any) -> None:
        report = NodeReport(node=name, incarnation="x", sequence=1, **fields)
        self.fleet.nodes[name].hear(report, self.healthy_s, 0.0)

    def choose(self, envelope: Envelope, *excluded: str, planned: dict[str, float] | None = None) -> Choice:
        choice = self.scheduler.choose(envelope, excluded, {} if planned is None else planned)
        assert choice is not None
        return choice


def test_the_node_that_holds_the_prefix_is_chosen_and_its_hits_are_predicted() -> None:
    scene = Scene(4)
    scene.index.store("n2", Medium.GPU, blocks(1, 2, 3))
    choice = scene.choose(request(1, 2, 3, 4))
    assert (choice.node.name, choice.hit_tokens, choice.uncached_tokens) == ("n2", 3 * BLOCK, BLOCK + 100)
    assert choice.prefill_s == pytest.approx(COST.seconds(BLOCK + 100, 3 * BLOCK))
    assert choice.has_room


def test_a_whole_prompt_in_cache_still_computes_its_last_engine_block() -> None:
    scene = Scene(1)
    scene.index.store("n0", Medium.GPU, blocks(1, 2))
    assert scene.choose(request(1, 2, extra_tokens=0)).hit_tokens == 2 * BLOCK - 16


def test_a_holder_is_left_for_an_idle_node_once_its_queue_costs_more_than_the_cache_saves() -> None:
    scene = Scene(2)
    scene.index.store("n1", Medium.GPU, blocks(1, 2, 3, 4))
    prompt = request(1, 2, 3, 4)
    scene.report("n1", queued_uncached_tokens=1_000)
    assert scene.choose(prompt).node.name == "n1"
    scene.report("n1", queued_uncached_tokens=1_100)
    assert scene.choose(prompt).node.name == "n0"


def decoding(scene: Scene, name: str, count: int) -> None:
    """Requests whose prompts are computed: reports cover them."""
    for number in range(count):
        scene.fleet.reserve(name, f"{name} {number}", 10)


def test_a_long_prompt_goes_where_fewest_decode_and_a_short_one_to_its_holder() -> None:
    scene = Scene(2, stall_weight=2.5, tpot_slo_s=0.05)
    for node in scene.fleet.nodes.values():
        node.answers.observe(100)
    decoding(scene, "n1", 4)
    scene.index.store("n1", Medium.GPU, blocks(1))
    # The cache saves 26 ms. Four stalls of 5 s answers: 4 x 0.01 s x 0.01 s / 5 s x 2.5, or of two seconds.
    assert scene.choose(request(1)).node.name == "n1"
    assert scene.choose(request(1, extra_tokens=20_000)).node.name == "n0"


def test_short_prompts_keep_away_from_where_long_ones_went() -> None:
    scene = Scene(2, burst_weight=1.0)
    scene.fleet.reserve("n0", "long", 10, uncached_tokens=20_000, number=1, prefill_s=2.0)
    scene.report("n0", seen_seq=1)
    assert scene.fleet.nodes["n0"].decoding == 1, "it is computed"
    scene.report("n1", queued_uncached_tokens=1_500)
    assert scene.fleet.nodes["n0"].burst.seconds(0.0) == pytest.approx(4 / 20)
    assert scene.choose(request(1)).node.name == "n1"
    scene.now_s = 30.0
    assert scene.choose(request(1)).node.name == "n0", "that was long ago"


def test_a_full_node_is_left_for_its_fullness() -> None:
    scene = Scene(2, pressure_s=0.15)
    decoding(scene, "n0", 5)
    assert scene.choose(request(1)).node.name == "n1"
    scene.report("n1", queued_uncached_tokens=1_800)
    assert scene.choose(request(1)).node.name == "n1", "5 of 9: 0.1875 s"
    scene.report("n1", queued_uncached_tokens=1_900)
    assert scene.choose(request(1)).node.name == "n0"


def test_the_turn_of_a_request_comes_later_for_its_own_prefill() -> None:
    scene = Scene(2, size_weight=10.0)
    assert scene.scheduler.longer_ms(request(*range(40))) == pytest.approx(10_340, rel=0.1)
    scene.index.store("n1", Medium.GPU, blocks(*range(40)))
    assert scene.scheduler.longer_ms(request(*range(40))) < 500, "it is cached"
    assert scene.scheduler.longer_ms(request(1, model="other")) == 0


def test_a_request_waits_for_its_busy_holder_while_that_beats_computing_elsewhere() -> None:
    scene = Scene(2)
    long = tuple(range(100))
    scene.index.store("n1", Medium.GPU, blocks(*long))
    scene.report("n1", queued_uncached_tokens=20_000)
    choice = scene.choose(request(*long))
    assert choice.node.name == "n1"
    assert not choice.has_room
    assert choice.wait_s == pytest.approx(2.0)


def test_what_others_wait_for_counts_before_it() -> None:
    scene = Scene(2)
    scene.index.store("n1", Medium.GPU, blocks(1, 2, 3, 4))
    assert scene.choose(request(1, 2, 3, 4), planned={"n1": 0.09}).node.name == "n1"
    assert not scene.choose(request(1, 2, 3, 4), planned={"n1": 0.09}).has_room
    assert scene.choose(request(1, 2, 3, 4), planned={"n1": 0.11}).node.name == "n0"


@pytest.mark.parametrize("policy", sorted(POLICIES))
@pytest.mark.parametrize("count", [3, ALL_LOOKED_AT + 8])
def test_two_suspects_are_never_bound_to_one_node(policy: str, count: int) -> None:
    scene = Scene(count, policy)
    bound = []
    for number in range(count):
        choice = scene.scheduler.choose(request(1), ("n0",), {}, is_suspect=True)
        assert choice is not None
        bound.append(choice.node.name)
        scene.fleet.reserve(choice.node.name, f"i0_{number}", 10, is_suspect=True)
    assert sorted(bound) == sorted(scene.fleet.nodes)
    assert bound[-1] == "n0", "an excluded node is used when no other is free of suspects"
    assert scene.scheduler.choose(request(1), (), {}, is_suspect=True) is None
    assert scene.choose(request(1)) is not None, "others may go where a suspect is"
    scene.fleet.reserve("n2", "i0_other", 10)
    scene.fleet.release("n2", "i0_other")
    assert scene.scheduler.choose(request(1), (), {}, is_suspect=True) is None
    scene.fleet.release("n1", f"i0_{bound.index('n1')}")
    choice = scene.scheduler.choose(request(1), (), {}, is_suspect=True)
    assert choice is not None
    assert choice.node.name == "n1"


def test_a_node_on_probation_gets_nothing_then_one_request_at_a_time() -> None:
    scene = Scene(2)
    scene.index.store("n1", Medium.GPU, blocks(1, 2, 3, 4))
    prompt, rng = request(1, 2, 3, 4), random.Random(0)
    breaker = scene.fleet.nodes["n1"].breaker
    for _ in range(FAILURES):
        assert scene.choose(prompt).node.name == "n1"
        breaker.failed("r", 0.0, rng)
    assert scene.choose(prompt).node.name == "n0"
    breaker.tick(LONGEST_PROBATION_S)
    assert scene.choose(prompt).node.name == "n1"
    scene.fleet.reserve("n1", "i0_1", 600)
    assert scene.choose(prompt).node.name == "n0"
    scene.fleet.release("n1", "i0_1")
    assert scene.choose(prompt).node.name == "n1"


def test_an_assignment_counts_until_a_report_covers_its_number() -> None:
    scene = Scene(1)
    node = scene.fleet.nodes["n0"]
    scene.fleet.reserve("n0", "i0_1", 600, uncached_tokens=500)
    scene.report("n0", seen_seq=7)
    assert node.queued_tokens == 500
    scene.fleet.note_number("n0", "i0_1", 8)
    scene.report("n0", seen_seq=7)
    assert node.queued_tokens == 500
    scene.report("n0", seen_seq=8, queued_uncached_tokens=480)
    assert node.queued_tokens == 480
    scene.fleet.reserve("n0", "i0_2", 600, uncached_tokens=500, number=9)
    scene.fleet.release("n0", "i0_2")
    assert node.queued_tokens == 480


def test_a_number_that_came_after_its_report_is_seen_at_once() -> None:
    scene = Scene(1)
    scene.fleet.reserve("n0", "i0_1", 600, uncached_tokens=500)
    scene.report("n0", seen_seq=3)
    scene.fleet.note_number("n0", "i0_1", 3)
    assert scene.fleet.nodes["n0"].queued_tokens == 0


def test_a_node_that_stopped_reporting_counts_as_its_peers_and_never_as_idle() -> None:
    scene = Scene(4)
    scene.healthy_s = 10.0
    for name in ("n0", "n1", "n2"):
        scene.report(name, queued_uncached_tokens=2_000)
    chosen = Counter(scene.choose(request(9)).node.name for _ in range(200))
    assert 20 < chosen["n3"] < 80, "an equal, neither shunned nor herded on"
    assert scene.scheduler.is_stale(scene.fleet.nodes["n3"])


def test_kv_pressure_turns_requests_away() -> None:
    scene = Scene(2, pressure_s=0.15)
    scene.report("n0", kv_used_tokens=90_000, kv_total_tokens=100_000)
    scene.report("n1", kv_used_tokens=10_000, kv_total_tokens=100_000)
    assert {scene.choose(request(1)).node.name for _ in range(20)} == {"n1"}


def test_slower_tiers_are_priced_by_their_load_time() -> None:
    scene = Scene(1)
    scene.index.store("n0", Medium.GPU, blocks(1, 2))
    fast = scene.choose(request(1, 2)).prefill_s
    for medium in (Medium.CPU, Medium.DISK, Medium.EXTERNAL):
        scene.index.replace("n0", {Medium.GPU: blocks(1), medium: [blocks(1, 2)[1]]})
        slow = scene.choose(request(1, 2)).prefill_s
        assert slow - fast == pytest.approx(BLOCK * LOAD_S_PER_TOKEN[medium])


def test_equal_nodes_share_equally() -> None:
    scene = Scene(8)
    chosen = Counter(scene.choose(request(1)).node.name for _ in range(800))
    assert len(chosen) == 8
    assert max(chosen.values()) < 160


def test_a_near_tie_prefers_more_cached() -> None:
    scene = Scene(2, near_tie=0.05)
    scene.index.store("n1", Medium.GPU, blocks(1))
    scene.report("n1", queued_uncached_tokens=300)
    prompt = request(1, *range(20, 60))
    assert {scene.choose(prompt).node.name for _ in range(20)} == {"n1"}


def test_a_large_fleet_is_sampled_and_its_holders_are_always_looked_at() -> None:
    scene = Scene(500)
    scene.index.store("n77", Medium.GPU, blocks(1, 2, 3))
    for number in range(500):
        scene.index.store(f"n{number}", Medium.GPU, blocks(1))
    for _ in range(50):
        choice = scene.choose(request(1, 2, 3))
        assert choice.node.name == "n77"
        assert choice.looked_at <= 32


def test_a_prefix_that_everybody_holds_sends_nobody_to_the_same_few() -> None:
    scene = Scene(200)
    for number in range(200):
        scene.index.store(f"n{number}", Medium.GPU, blocks(1))
    chosen = Counter(scene.choose(request(1)).node.name for _ in range(1_000))
    assert len(chosen) > 150
    assert max(chosen.values()) < 30


def test_an_excluded_node_is_used_only_when_no_other_is_eligible() -> None:
    scene = Scene(2)
    scene.index.store("n0", Medium.GPU, blocks(1, 2, 3))
    assert scene.choose(request(1, 2, 3), "n0").node.name == "n1"
    scene.report("n1", draining=True)
    assert scene.choose(request(1, 2, 3), "n0").node.name == "n0"


@pytest.mark.parametrize("policy", sorted(POLICIES))
@pytest.mark.parametrize("count", [3, ALL_LOOKED_AT + 10])
def test_no_policy_uses_a_node_that_may_not_take_the_request(policy: str, count: int) -> None:
    scene = Scene(count, policy)
    fleet = scene.fleet.nodes
    fleet["n0"].available = False
    fleet["n1"].admitted = False
    scene.add("small", max_model_len=100)
    scene.add("other", models=("another",))
    scene.add("plain")
    scene.add("tuned", loras=("sql",))
    scene.report("n2", engine_ok=False)
    usable = {f"n{number}" for number in range(3, count)} | {"plain", "tuned"}
    chosen = {scene.choose(request(1)).node.name for _ in range(300)}
    assert chosen <= usable
    assert {scene.choose(request(1, lora="sql")).node.name for _ in range(20)} == {"tuned"}
    assert scene.scheduler.choose(request(1, model="unknown"), (), {}) is None


@pytest.mark.parametrize("policy", ["round_robin", "round_robin_lowest_concurrency", "shortest_ttft"])
def test_idle_equal_nodes_take_turns(policy: str) -> None:
    scene = Scene(3, policy)
    names = []
    for number in range(6):
        choice = scene.choose(request(number))
        scene.fleet.reserve(choice.node.name, f"i0_{number}", 10, uncached_tokens=356)
        names.append(choice.node.name)
    assert sorted(names[:3]) == sorted(names[3:]) == ["n0", "n1", "n2"]


def test_lowest_concurrency_looks_at_what_nodes_hold() -> None:
    scene = Scene(3, "round_robin_lowest_concurrency")
    for number, name in enumerate(("n0", "n0", "n2")):
        scene.fleet.reserve(name, f"i0_{number}", 10)
    assert scene.choose(request(1)).node.name == "n1"


@pytest.mark.parametrize(
    "policy", ["random", "round_robin", "round_robin_lowest_concurrency", "shortest_ttft"]
)
def test_policies_of_routers_queue_at_the_node(policy: str) -> None:
    scene = Scene(1, policy)
    for number in range(50):
        assert scene.choose(request(1)).has_room
        scene.fleet.reserve("n0", f"i0_{number}", 10, uncached_tokens=10_000)
    assert scene.scheduler.has_room("m")


def test_a_full_node_frees_a_slot_no_sooner_than_its_requests_end() -> None:
    scene = Scene(2)
    busy = scene.fleet.nodes["n1"]
    scene.index.store("n1", Medium.GPU, blocks(1, 2, 3))
    for number in range(busy.request_bound):
        scene.fleet.reserve("n1", f"i0_{number}", 10, now_s=0.0)
    busy.service_s = 90.0
    busy.changed()
    assert scene.choose(request(1, 2, 3)).node.name == "n0"
    busy.service_s = 0.09
    busy.changed()
    choice = scene.choose(request(1, 2, 3))
    assert choice.node.name == "n1"
    assert not choice.has_room


def test_a_queue_counts_down_as_its_first_prompt_is_computed_and_by_what_reports_say_is_done() -> None:
    scene = Scene(1)
    node = scene.fleet.nodes["n0"]
    for number, seconds in ((1, 2.0), (2, 1.0)):
        scene.fleet.reserve(
            "n0", f"r{number}", 10, uncached_tokens=int(10_000 * seconds), number=number, prefill_s=seconds
        )
    assert node.queued_s(0.0) == pytest.approx(3.0)
    assert node.queued_s(0.5) == pytest.approx(2.5)
    # It takes longer than was predicted: the second has not begun, but for what a late report may hide.
    assert node.queued_s(2.9) == pytest.approx(1.0 - node.feedback_s)
    # Long overdue: as long again is to be expected.
    assert node.queued_s(9.0) == pytest.approx(1.0 - node.feedback_s + (9.0 - 1.5 * 2.0 - node.feedback_s))
    scene.now_s = 9.0
    node.hear(
        NodeReport(node="n0", incarnation="x", sequence=1, seen_seq=2, queued_uncached_tokens=10_000),
        0.0,
        9.0,
    )
    assert node.decoding == 1
    assert node.queued_s(9.0) == pytest.approx(1.0)
    scene.fleet.release("n0", "r2")
    assert node.queued_s(9.0) == pytest.approx(1.0), "the report still says that they are queued"
    scene.report("n0", seen_seq=2)
    assert node.queued_s(9.0) == 0.0


def test_what_a_new_leader_finds_queued_counts_by_its_tokens() -> None:
    scene = Scene(1)
    scene.fleet.reserve("n0", "old", 10)
    scene.report("n0", queued_uncached_tokens=5_000)
    assert scene.fleet.nodes["n0"].queued_s(0.0) == pytest.approx(0.5)


def test_room_is_reckoned_by_the_answers_that_come_and_not_by_those_that_are_allowed() -> None:
    scene = Scene(1)
    node = scene.add("small", kv_total_tokens=10_000)
    scene.fleet.forget("n0")
    scene.fleet.reserve("small", "r0", 4_000)
    allowed = request(1, max_tokens=20_000)
    assert not scene.choose(allowed).has_room
    node.answers.observe(300)
    assert scene.choose(allowed).has_room
    scene.report("small", kv_used_tokens=9_900, kv_total_tokens=10_000)
    assert not scene.choose(allowed).has_room, "what is used counts when it is more"


def test_a_bound_request_without_a_number_holds_nobody_behind_it_in_the_queue() -> None:
    scene = Scene(1)
    node = scene.fleet.nodes["n0"]
    scene.fleet.reserve("n0", "a", 600, uncached_tokens=500, prefill_s=0.5)
    scene.fleet.note_number("n0", "a", 0)
    scene.fleet.reserve("n0", "b", 600, uncached_tokens=500, prefill_s=0.5, number=2)
    scene.report("n0", seen_seq=2, queued_uncached_tokens=1_000)
    assert node.queued_s(0.0) == pytest.approx(0.5 + 500 * COST.token_s)
    scene.report("n0", seen_seq=2)
    assert (node.queued_s(0.0), node.decoding) == (0.0, 2)


def test_what_a_prompt_stalls_are_others_answers_however_short_its_own_is() -> None:
    scene = Scene(2, stall_weight=2.0)
    for node in scene.fleet.nodes.values():
        node.answers.observe(300)
    decoding(scene, "n0", 4)
    scene.report("n1", queued_uncached_tokens=10_000)
    chosen = [scene.choose(request(extra_tokens=5_000, max_tokens=most)).node.name for most in (1, 4_000)]
    assert chosen == ["n0", "n0"]


def test_a_node_that_comes_back_with_other_models_teaches_those_it_left_nothing() -> None:
    fleet = Fleet()
    first = fleet.admit(NodeIdentity(node="n0", incarnation="1", models=("a",)), 0.0)
    again = fleet.admit(NodeIdentity(node="n0", incarnation="2", models=("a",)), 0.0)
    assert again.predictor is first.predictor
    other = fleet.admit(NodeIdentity(node="n0", incarnation="3", models=("b",)), 0.0)
    assert other.predictor.shape is not first.predictor.shape


def test_no_identity_makes_a_cost_infinite() -> None:
    scene = Scene(1)
    scene.add("n1", max_running=-1)
    assert scene.choose(request(1)) is not None


def test_what_was_learned_of_models_that_nobody_serves_is_forgotten() -> None:
    fleet = Fleet()
    for number in range(20):
        fleet.admit(NodeIdentity(node="n0", incarnation=str(number), models=(f"m{number}",)), 0.0)
    assert (len(fleet._shapes), len(fleet._answers)) == (1, 1)


def test_the_longest_prompt_of_a_model_follows_who_is_there() -> None:
    scene = Scene(1)
    usual = scene.fleet.longest_prompt("m")
    assert usual > 0
    assert scene.fleet.longest_prompt("unknown") == 0
    scene.add("big", max_model_len=usual + 1_000)
    assert scene.fleet.longest_prompt("m") == usual + 1_000
    scene.add("big", max_model_len=usual + 1_000, kv_total_tokens=usual + 500)
    assert scene.fleet.longest_prompt("m") == usual + 500
    scene.fleet.forget("big")
    assert scene.fleet.longest_prompt("m") == usual
    assert scene.fleet.longest_prompt("unknown") == 0
