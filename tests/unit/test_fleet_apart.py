"""The simulated fleet with prefill and decode apart: what a request's way takes, and who is told of it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from random import Random

import pytest

from dispatcher.protocol.handoff import Stage
from dispatcher.simulation.fleet import FleetResult, FleetSimulation, Router, coarse
from dispatcher.simulation.fleet_workload import FleetWorkload, Turn
from dispatcher.simulation.handover import HOP_S, LEASE_S, LINK_BYTES_PER_S, Handover
from dispatcher.simulation.live_router import LiveRouter, LiveTiming
from dispatcher.simulation.policies import BY_NAME, Arrival, Policy, World
from dispatcher.simulation.policies.llmd_weighted import LLMDWeighted
from dispatcher.simulation.policy_router import PolicyRouter
from dispatcher.simulation.profiles import PROFILES

BLOCK = 256
TEST = replace(coarse(PROFILES["test"], BLOCK), prefill_token_s=1e-4, kv_blocks=1_000)
TOKEN_S = TEST.kv_token_bytes / LINK_BYTES_PER_S


def turns(*prompts: tuple[float, int, tuple[int, ...]], output_tokens: int = 5) -> FleetWorkload:
    """One turn a session: when, how many tokens, which blocks."""
    sessions = [
        [Turn(pause_s=at_s, prompt_tokens=tokens, output_tokens=output_tokens, blocks=blocks)]
        for at_s, tokens, blocks in prompts
    ]
    return FleetWorkload(sessions=sessions, block_tokens=BLOCK, per_s=1.0)


def stems(requests: int = 400) -> FleetWorkload:
    """Prompts of one of 16 stems of eight blocks and a block of their own."""
    rng = Random(3)
    at_s, prompts = 0.0, []
    for number in range(requests):
        at_s += rng.expovariate(30.0)
        stem = rng.randrange(16)
        prompts.append((at_s, BLOCK * 9 + 5, (*range(100 * stem, 100 * stem + 8), 100_000 + number)))
    return turns(*prompts, output_tokens=20)


def fleet_of(workload: FleetWorkload, router: Router, *, prefill: int, decode: int) -> FleetSimulation:
    return FleetSimulation(
        workload, router, nodes=prefill + decode, decode=decode, profile=TEST, rate=1.0, seed=1
    )


def simulate(workload: FleetWorkload, router: Router, *, prefill: int = 2, decode: int = 1) -> FleetResult:
    return fleet_of(workload, router, prefill=prefill, decode=decode).run()


def round_robin() -> PolicyRouter:
    return PolicyRouter(BY_NAME["round_robin"]())


def test_a_lone_request_is_prefilled_handed_over_and_decoded() -> None:
    result = simulate(turns((0.0, 1_000, ())), round_robin(), prefill=1)
    prefill_s = TEST.step_s(1_000, 0, 0, 0, 0)
    first_s = TEST.step_s(0, 0, 0, 1, 999)
    assert result.ttft_s[0] == pytest.approx(prefill_s + HOP_S + 1_000 * TOKEN_S + first_s)
    assert result.tpot_s[0] == pytest.approx(TEST.step_s(0, 0, 0, 1, 1_000))
    assert result.busy_s == pytest.approx([prefill_s, first_s + 4 * TEST.step_s(0, 0, 0, 1, 1_000)])


def test_each_half_of_a_request_takes_its_way_to_the_scheduler() -> None:
    slow = replace(TEST, request_s=0.5)
    fleet = FleetSimulation(
        turns((0.0, 1_000, ())), round_robin(), nodes=2, decode=1, profile=slow, rate=1.0, seed=1
    )
    quick = simulate(turns((0.0, 1_000, ())), round_robin(), prefill=1)
    assert fleet.run().ttft_s[0] == pytest.approx(1.0 + quick.ttft_s[0])


def test_what_the_decode_node_has_cached_does_not_travel_again() -> None:
    blocks = tuple(range(20))
    workload = turns((0.0, 20 * BLOCK + 1, blocks), (5.0, 20 * BLOCK + 1, blocks))
    fleet = fleet_of(workload, round_robin(), prefill=2, decode=1)
    result = fleet.run()
    # Two prefill nodes, in turn: neither has it cached, the decode node has it the second time.
    assert result.cached_tokens == 0
    assert result.ttft_s[0] - result.ttft_s[1] == pytest.approx(20 * BLOCK * TOKEN_S)


def test_one_link_carries_one_transfer_at_a_time() -> None:
    links = Handover(4, 1_000)
    for number, source in enumerate((0, 0, 1)):
        links.hold(number, source, 0.0)
    second_s = 1_000_000 * 1_000 / LINK_BYTES_PER_S
    # Out of node 0 to two nodes, then out of node 1 into one that is still reading.
    assert links.read(0, 2, 1_000_000, 1.0) == pytest.approx(1.0 + second_s + HOP_S)
    assert links.read(1, 3, 1_000_000, 1.0) == pytest.approx(1.0 + 2 * second_s + HOP_S)
    assert links.read(2, 3, 1_000_000, 1.0) == pytest.approx(1.0 + 3 * second_s + HOP_S)
    assert list(links.free_s) == pytest.approx([1.0 + second_s * times for times in (2, 3, 1, 3)])


class HandsOverLate(PolicyRouter):
    """Sends requests on `after_s` after their prefill; keeps what was cached there."""

    def __init__(self, after_s: float) -> None:
        super().__init__(BY_NAME["round_robin"]())
        self.after_s = after_s
        self.fleet: FleetSimulation

    def start(self, fleet: FleetSimulation) -> None:
        super().start(fleet)
        self.fleet = fleet

    def prefilled(self, arrival: Arrival, node: int, cached_tokens: int) -> None:
        self.fleet.hand_over(arrival, self.fleet.decode_nodes[0], after_s=self.after_s)


def kept_blocks(router: HandsOverLate, at_s: Sequence[float]) -> tuple[list[int], FleetResult]:
    fleet = fleet_of(turns((0.0, 1_000, ())), router, prefill=1, decode=1)
    seen: list[int] = []
    for one in at_s:
        fleet.call_at(one, lambda: seen.append(fleet.engines[0].cache.used))
    return seen, fleet.run()


def test_a_prompt_is_held_until_it_was_read() -> None:
    seen, result = kept_blocks(HandsOverLate(20.0), (0.2, 20.1, 20.13))
    assert seen == [4, 4, 0]
    assert result.ttft_s[0] == pytest.approx(20.12, abs=0.05)


def test_a_prompt_that_nobody_came_for_is_dropped_and_computed_again() -> None:
    seen, result = kept_blocks(HandsOverLate(LEASE_S + 5.0), (LEASE_S - 1.0, LEASE_S + 1.0))
    assert seen == [4, 0]
    prefill_s = TEST.step_s(1_000, 0, 0, 0, 0)
    assert result.ttft_s[0] == pytest.approx(LEASE_S + 5.0 + 2 * prefill_s)
    assert result.busy_s[1] > prefill_s


class StartsAnew(HandsOverLate):
    """Has every prompt computed again 20 s after the first time, by another prefill node."""

    times = 0

    def prefilled(self, arrival: Arrival, node: int, cached_tokens: int) -> None:
        self.times += 1
        if self.times == 1:
            self.fleet.send(arrival, 1, after_s=20.0)
        else:
            super().prefilled(arrival, node, cached_tokens)


def test_a_prompt_that_is_computed_again_is_held_once_and_by_its_own_lease() -> None:
    router = StartsAnew(20.0)
    workload = turns((0.0, 1_000, (1, 2, 3)))
    fleet = fleet_of(workload, router, prefill=2, decode=1)
    held: list[list[int]] = []
    for at_s in (19.0, 21.0, LEASE_S + 5.0):
        fleet.call_at(at_s, lambda: held.append([engine.cache.used for engine in fleet.engines]))
    result = fleet.run()
    # The first lease ends at 30.1 s, when the second node holds it.
    assert held == [[4, 0, 0], [0, 4, 0], [0, 4, 0]]
    prefill_s = TEST.step_s(1_000, 0, 0, 0, 0)
    assert result.ttft_s[0] == pytest.approx(40.0 + 2 * prefill_s, abs=0.05)
    assert result.cached_tokens == 0


def test_a_prompt_whose_request_waits_at_the_decode_node_is_held_beyond_the_lease() -> None:
    profile = replace(TEST, kv_blocks=8, decode_sequence_s=0.1)
    workload = turns((0.0, 6 * BLOCK, ()), (1.0, 6 * BLOCK, ()), output_tokens=500)
    fleet = FleetSimulation(workload, round_robin(), nodes=3, decode=1, profile=profile, rate=1.0, seed=1)
    held: list[int] = []
    fleet.call_at(LEASE_S + 10.0, lambda: held.append(fleet.engines[1].cache.used))
    result = fleet.run()
    # The first answer takes 50 s, and there are blocks for one at a time.
    assert held == [6]
    assert result.ttft_s[1] > 50.0
    assert result.busy_s[2] < 1.1 * 1_000 * (0.1 + TEST.fixed_s)


class Seen(Policy):
    """The first node for all; keeps what it was told."""

    name = "seen"
    poll_s = 0.5
    wants_kv_events = True
    kv_event_delay_s = 0.0

    def __init__(self, log: list[tuple[str, str, int]], role: str = "prefill", late: bool = False) -> None:
        self.log = log
        self.role = role
        self.binds_late = late

    def start(self, world: World) -> None:
        self.world = world
        self.log.append((self.role, "start", world.nodes))

    def choose(self, arrival: Arrival) -> int:
        assert self.world.signal(self.world.nodes - 1).total_blocks == TEST.kv_blocks
        self.log.append((self.role, "choose", arrival.number))
        return self.world.nodes - 1

    def first_token(self, arrival: Arrival, node: int) -> None:
        self.log.append((self.role, "first", node))

    def finished(self, arrival: Arrival, node: int) -> None:
        self.log.append((self.role, "finished", node))

    def stored(self, node: int, blocks: Sequence[int]) -> None:
        self.log.append((self.role, "stored", node))

    def for_decode(self) -> Policy:
        return Seen(self.log, "decode", self.binds_late)


@pytest.mark.parametrize("late", [False, True])
def test_each_of_two_policies_sees_its_own_nodes_and_its_part(late: bool) -> None:
    log: list[tuple[str, str, int]] = []
    simulate(turns((0.0, 1_000, (1, 2, 3))), PolicyRouter(Seen(log, late=late)), prefill=3, decode=2)
    chosen = ("decode", "choose", 0)
    prefill = [("prefill", "choose", 0), ("prefill", "first", 2), ("prefill", "finished", 2)]
    ways = [*prefill, chosen] if late else [chosen, *prefill]
    stored = [one for one in log if one[1] == "stored"]
    assert sorted(stored) == [("decode", "stored", 1), ("prefill", "stored", 2)]
    assert [one for one in log if one[1] != "stored"] == [
        ("prefill", "start", 3),
        ("decode", "start", 2),
        *ways,
        ("decode", "first", 1),
        ("decode", "finished", 1),
    ]


def test_a_decode_node_with_the_prefix_makes_all_of_a_request() -> None:
    blocks = tuple(range(4))
    workload = turns((0.0, 4 * BLOCK + 1, blocks), (5.0, 4 * BLOCK + 1, blocks), (9.0, 10 * BLOCK, blocks))
    result = simulate(workload, PolicyRouter(LLMDWeighted(non_cached_tokens=300)), prefill=1)
    # The first and the last have 300 tokens and more to compute; the second has one.
    assert result.busy_s[0] == pytest.approx(
        TEST.step_s(4 * BLOCK + 1, 0, 0, 0, 0) + TEST.step_s(6 * BLOCK, 0, 0, 0, 0)
    )
    assert result.ttft_s[1] == pytest.approx(TEST.step_s(1, 0, 0, 0, 0))
    assert result.cached_tokens == 4 * BLOCK * 2


@pytest.mark.parametrize("name", sorted(BY_NAME))
def test_every_policy_answers_everything_and_the_seed_decides(name: str) -> None:
    def run() -> tuple[FleetResult, FleetSimulation]:
        fleet = fleet_of(stems(), PolicyRouter(BY_NAME[name]()), prefill=4, decode=3)
        return fleet.run(), fleet

    (result, fleet), (again, _) = run(), run()
    assert min(result.ttft_s) > 0
    assert max(result.ttft_s) < 60
    assert result.ttft_s == again.ttft_s
    assert min(result.busy_s) > 0
    # Every prompt was given up by who held it.
    assert [engine.cache.used for engine in fleet.engines] == [0] * 7


def test_every_policy_of_the_field_says_what_chooses_its_decode_nodes() -> None:
    chosen = {name: policy().for_decode().name for name, policy in BY_NAME.items()}
    assert chosen == {
        "random": "random",
        "round_robin": "round_robin",
        "least_outstanding_tokens": "least_kv",
        "sglang_cache_aware": "sglang_cache_aware",
        "smg_expected_wait": "smg_expected_wait",
        "dynamo_kv": "dynamo_decode",
        "llmd_weighted": "llmd_weighted",
        "llmd_sticky": "least_requests",
        "lmetric": "least_requests",
        "lpwl": "least_kv",
        "mooncake": "least_kv",
        "rtp_llm_cost": "rtp_llm_decode",
    }


def test_a_fleet_has_a_prefill_node() -> None:
    with pytest.raises(ValueError, match="decode: expected 0 to 1"):
        FleetSimulation(stems(1), round_robin(), nodes=2, decode=2, profile=TEST, rate=1.0, seed=1)


def test_ours_binds_a_decode_node_when_the_prompt_is_computed() -> None:
    timing = LiveTiming()
    ours = LiveRouter("round_robin", timing=timing)
    fleet = fleet_of(turns((0.0, 1_000, ())), ours, prefill=2, decode=2)
    bound: list[tuple[str, Stage]] = []
    fleet.call_at(0.05, lambda: bound.extend((one.job.node, one.stage) for one in ours.state.bound.values()))
    fleet.call_at(0.15, lambda: bound.extend((one.job.node, one.stage) for one in ours.state.bound.values()))
    result = fleet.run()
    ways_s = timing.intake_s + timing.assign_s + timing.handoff_s + timing.assign_s
    first_s = TEST.step_s(1_000, 0, 0, 0, 0) + HOP_S + 1_000 * TOKEN_S + TEST.step_s(0, 0, 0, 1, 999)
    assert result.ttft_s[0] == pytest.approx(ways_s + first_s)
    (prefill, is_prefill), (decode, is_decode) = bound
    assert (is_prefill, is_decode) == (Stage.PREFILL, Stage.DECODE)
    assert prefill in {"n0", "n1"}
    assert decode in {"n2", "n3"}


@pytest.mark.parametrize("policy", ["prefill_cost", "random", "shortest_ttft", "least_outstanding_tokens"])
def test_the_live_policies_answer_everything_the_same_each_time(policy: str) -> None:
    def run() -> tuple[FleetResult, FleetSimulation, LiveRouter]:
        router = LiveRouter(policy)
        fleet = fleet_of(stems(), router, prefill=4, decode=3)
        return fleet.run(), fleet, router

    (result, fleet, router), (again, _, _) = run(), run()
    assert 0.1 < max(result.ttft_s) < 60
    assert result.ttft_s == again.ttft_s
    assert min(result.busy_s) > 0
    assert [engine.cache.used for engine in fleet.engines] == [0] * 7
    assert not len(router.state.window)
    # The outcomes of the very last answers are still on their way.
    assert len(router.state.bound) <= 20


def test_what_waits_too_long_for_a_decode_node_is_computed_again() -> None:
    ours = LiveRouter("round_robin")
    profile = replace(TEST, max_running=1, decode_sequence_s=0.1)
    prompts = [(at_s, 6 * BLOCK, ()) for at_s in (0.0, 0.5, 1.0)]
    workload = turns(*prompts, output_tokens=500)
    fleet = FleetSimulation(workload, ours, nodes=3, decode=1, profile=profile, rate=1.0, seed=1)
    bound: list[int] = []
    fleet.call_at(40.0, lambda: bound.append(len(ours.state.bound)))
    result = fleet.run()
    prefill_s = TEST.step_s(6 * BLOCK, 0, 0, 0, 0)
    token_s = profile.step_s(0, 0, 0, 1, 0)
    # The decode node has one that runs, 54 s long, and one in its queue; the third waits in the window. Its
    # hand-off is good for 20 s: at about 21 and 41 s its prompt is computed again, by another node and by the
    # first one, which still has all but its last block.
    assert bound == [2]
    again_s = TEST.step_s(BLOCK, 0, 0, 0, 0)
    assert sum(result.busy_s[:2]) == pytest.approx(4 * prefill_s + again_s)
    # The prompts of the second and third are held for 30 s, less than they wait in the queue.
    assert result.busy_s[2] == pytest.approx(1_498 * token_s + 2 * prefill_s)
    assert [engine.cache.used for engine in fleet.engines] == [0, 0, 0]
