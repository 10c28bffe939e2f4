"""The simulated fleet: who is sent what and when, and that the live code decides for ours."""

from __future__ import annotations

import gzip
import json
from collections.abc import Sequence
from dataclasses import replace
from math import inf
from pathlib import Path
from random import Random

import pytest

from dispatcher.errors import SettingsError
from dispatcher.replay.traces import TraceRequest
from dispatcher.scheduling.choice import SchedulingParameters
from dispatcher.simulation.conditions import Conditions
from dispatcher.simulation.fleet import FleetResult, FleetSimulation, Router, coarse
from dispatcher.simulation.fleet_workload import FleetWorkload, Turn, open_loop, read_workload
from dispatcher.simulation.live_router import LiveRouter
from dispatcher.simulation.policies import BY_NAME, Arrival, Policy, World
from dispatcher.simulation.policy_router import PolicyRouter
from dispatcher.simulation.profiles import PROFILES

BLOCK = 256
TEST = replace(coarse(PROFILES["test"], BLOCK), prefill_token_s=1e-4, kv_blocks=1_000)


def turns(*prompts: tuple[float, int, tuple[int, ...]], output_tokens: int = 5) -> FleetWorkload:
    """One turn a session: when, how many tokens, which blocks."""
    sessions = [
        [Turn(pause_s=at_s, prompt_tokens=tokens, output_tokens=output_tokens, blocks=blocks)]
        for at_s, tokens, blocks in prompts
    ]
    return FleetWorkload(sessions=sessions, block_tokens=BLOCK, per_s=1.0)


def chatter(requests: int, *, seed: int = 7, per_s: float = 40.0) -> FleetWorkload:
    """Prompts of which many begin alike."""
    rng = Random(seed)
    at_s, prompts = 0.0, []
    for number in range(requests):
        at_s += rng.expovariate(per_s)
        stem = tuple(1_000 * rng.randrange(60) + place for place in range(rng.randrange(1, 8)))
        own = tuple(100_000 + 100 * number + place for place in range(rng.randrange(3)))
        prompts.append((at_s, BLOCK * (len(stem) + len(own)) + rng.randrange(1, BLOCK), stem + own))
    return turns(*prompts, output_tokens=20)


def simulate(
    workload: FleetWorkload,
    router: Router,
    *,
    nodes: int = 4,
    rate: float = 1.0,
    seed: int = 1,
    conditions: Conditions | None = None,
) -> FleetResult:
    return FleetSimulation(
        workload, router, nodes=nodes, profile=TEST, rate=rate, seed=seed, conditions=conditions
    ).run()


class Noted(Policy):
    """The first node for all; keeps what it was told."""

    name = "noted"
    poll_s = 0.5
    wants_kv_events = True
    kv_event_delay_s = 0.25

    def start(self, world: World) -> None:
        self.world = world
        self.seen: list[tuple[float, float, int, int]] = []
        self.told: list[tuple[str, float, int]] = []
        self.blocks: list[tuple[float, int, tuple[int, ...]]] = []

    def choose(self, arrival: Arrival) -> int:
        signal = self.world.signal(0)
        self.seen.append((self.world.now_s, signal.at_s, signal.running, signal.waiting_tokens))
        return 0

    def first_token(self, arrival: Arrival, node: int) -> None:
        self.told.append(("first", self.world.now_s, arrival.number))

    def finished(self, arrival: Arrival, node: int) -> None:
        self.told.append(("last", self.world.now_s, arrival.number))

    def stored(self, node: int, blocks: Sequence[int]) -> None:
        self.blocks.append((self.world.now_s, node, tuple(blocks)))

    def removed(self, node: int, blocks: Sequence[int]) -> None:
        self.blocks.append((self.world.now_s, node, tuple(blocks)))

    def for_decode(self) -> Policy:
        return Noted()


def round_robin() -> PolicyRouter:
    return PolicyRouter(BY_NAME["round_robin"]())


def test_a_lone_request_takes_what_the_profile_says() -> None:
    result = simulate(turns((0.0, 1_000, ())), round_robin(), nodes=1)
    prefill_s = TEST.step_s(1_000, 0, 0, 0, 0)
    assert result.ttft_s[0] == pytest.approx(prefill_s)
    assert result.tpot_s[0] == pytest.approx(TEST.step_s(0, 0, 0, 1, 1_000))
    assert result.busy_s[0] == pytest.approx(result.span_s)


def test_a_policy_sees_loads_as_of_its_last_poll_and_events_late() -> None:
    policy = Noted()
    simulate(
        turns((0.1, 8_000, tuple(range(31))), (0.4, 300, ()), (0.6, 300, ()), (3.0, 300, ())),
        PolicyRouter(policy),
        nodes=1,
    )
    # Polls at 0, 0.5, ...: the one at 0 saw an idle node, the one at 0.5 the first prompt being computed.
    assert [(at_s, running) for _, at_s, running, _ in policy.seen] == [
        (0.0, 0),
        (0.0, 0),
        (0.5, 1),
        (3.0, 0),
    ]
    assert policy.seen[2][3] > 8_000
    first_s = next(at_s for kind, at_s, number in policy.told if (kind, number) == ("first", 0))
    told_s, node, blocks = policy.blocks[0]
    assert (node, blocks) == (0, tuple(range(31)))
    assert told_s == pytest.approx(first_s + 0.25)


def test_late_reports_show_earlier_polls() -> None:
    workload = turns((0.1, 8_000, ()), (0.6, 300, ()), (1.1, 300, ()), (1.3, 300, ()), (3.0, 300, ()))
    prompt, late = Noted(), Noted()
    simulate(workload, PolicyRouter(prompt), nodes=1)
    simulate(workload, PolicyRouter(late), nodes=1, conditions=Conditions(report_delay_s=0.6))
    assert [at_s for _, at_s, _, _ in prompt.seen] == [0.0, 0.5, 1.0, 1.0, 3.0]
    # The poll at 0 arrives at 0.6, the one at 0.5 at 1.1, the one at 2 at 2.6.
    assert [at_s for _, at_s, _, _ in late.seen] == [0.0, 0.0, 0.5, 0.5, 2.0]
    assert [running for _, _, running, _ in late.seen] == [0, 0, 1, 1, 0]
    assert late.seen[2][3] == prompt.seen[1][3] == 8_000


def test_slow_nodes_take_longer_and_the_seed_says_which() -> None:
    conditions = Conditions(slow_share=0.5, slow_factor=0.25)
    nominal = simulate(turns((0.0, 1_000, ())), round_robin(), nodes=1)
    slow = simulate(
        turns((0.0, 1_000, ())),
        round_robin(),
        nodes=1,
        conditions=Conditions(slow_share=1, slow_factor=0.25),
    )
    assert slow.ttft_s[0] == pytest.approx(4 * nominal.ttft_s[0])
    assert slow.tpot_s[0] == pytest.approx(4 * nominal.tpot_s[0])
    drawn = {tuple(conditions.speeds(8, seed)) for seed in range(5)}
    assert len(drawn) > 1
    assert all(sorted(speeds) == [0.25] * 4 + [1.0] * 4 for speeds in drawn)


def test_ours_learns_which_nodes_are_slow() -> None:
    conditions = Conditions(slow_share=0.5, slow_factor=0.25)
    ours = LiveRouter()
    workload = chatter(400, per_s=8.0)
    result = simulate(workload, ours, conditions=conditions)
    blind = simulate(workload, LiveRouter("random"), conditions=conditions)
    speeds = conditions.speeds(4, 1)
    costs = [ours.state.fleet.nodes[f"n{node}"].predictor.cost.seconds(2_000, 0) for node in range(4)]
    slow = [cost for cost, speed in zip(costs, speeds, strict=True) if speed < 1]
    fast = [cost for cost, speed in zip(costs, speeds, strict=True) if speed == 1]
    assert min(slow) > 2 * max(fast)
    assert sum(result.ttft_s) < 0.6 * sum(blind.ttft_s)


def test_who_knows_the_speeds_keeps_them_and_pays_for_no_learning() -> None:
    conditions = Conditions(slow_share=0.5, slow_factor=0.25)
    workload = chatter(60, per_s=8.0)
    knows = LiveRouter(knows_speeds=True)
    learned = simulate(workload, LiveRouter(), conditions=conditions)
    known = simulate(workload, knows, conditions=conditions)
    speeds = conditions.speeds(4, 1)
    # Slow nodes take four times as long: 1.6 and 0.4 beside the mean of 2.5.
    assert [knows.state.fleet.nodes[f"n{node}"].predictor.scale for node in range(4)] == pytest.approx(
        [1.6 if speed < 1 else 0.4 for speed in speeds]
    )
    # The shape is learned all the same: 2,000 tokens take 0.2 s and a step's 8 ms on a fast node.
    fast = knows.state.fleet.nodes[f"n{speeds.index(1.0)}"].predictor
    assert fast.cost.seconds(2_000, 0) == pytest.approx(0.208, rel=0.1)
    assert sum(known.ttft_s) < 0.9 * sum(learned.ttft_s)


def test_a_perturbed_engine_is_off_the_profile_and_nobody_is_told() -> None:
    conditions = Conditions(perturbed=0.3)
    seen = [conditions.engine(TEST, seed) for seed in range(50)]
    factors = [one.prefill_token_s / TEST.prefill_token_s for one in seen]
    assert all(0.7 <= factor <= 1.3 for factor in factors)
    assert min(factors) < 0.8
    assert max(factors) > 1.2
    assert len({one.fixed_s / TEST.fixed_s for one in seen} | set(factors)) == 100
    assert (
        conditions.engine(TEST, 7)
        == seen[7]
        == replace(TEST, fixed_s=seen[7].fixed_s, prefill_token_s=seen[7].prefill_token_s)
    )
    told: list[float] = []

    class Asks(Noted):
        def choose(self, arrival: Arrival) -> int:
            told.append(self.world.prefill_s(1_000, 0))
            return 0

    result = simulate(turns((0.0, 1_000, ())), PolicyRouter(Asks()), nodes=1, conditions=conditions)
    assert told == [TEST.step_s(1_000, 0, 0, 0, 0)]
    assert result.ttft_s[0] == pytest.approx(conditions.engine(TEST, 1).step_s(1_000, 0, 0, 0, 0))
    assert result.ttft_s[0] != pytest.approx(told[0], rel=0.01)


def test_late_reports_reach_ours_late_too() -> None:
    def seen(delay_s: float) -> list[int]:
        ours = LiveRouter()
        fleet = FleetSimulation(
            turns((0.0, 8_000, ())),
            ours,
            nodes=1,
            profile=TEST,
            rate=1.0,
            seed=1,
            conditions=Conditions(report_delay_s=delay_s),
        )
        running: list[int] = []
        for at_s in (0.3, 0.7):
            fleet.call_at(
                at_s, lambda: running.append(getattr(ours.state.fleet.nodes["n0"].report, "running", 0))
            )
        fleet.run()
        return running

    assert seen(0.0) == [1, 1]
    assert seen(0.5) == [0, 1]


@pytest.mark.parametrize("ours", [True, False])
def test_lost_block_events_are_never_heard_of(ours: bool) -> None:
    class Counts(LiveRouter):
        told = 0

        def blocks_changed(self, node: int, stored: Sequence[int], removed: Sequence[int]) -> None:
            self.told += bool(stored) + bool(removed)
            super().blocks_changed(node, stored, removed)

    def told(share: float) -> int:
        conditions = Conditions(dropped_kv_events=share)
        if ours:
            router = Counts()
            simulate(chatter(200), router, conditions=conditions)
            return router.told
        policy = Noted()
        simulate(chatter(200), PolicyRouter(policy), conditions=conditions)
        return len(policy.blocks)

    everything = told(0.0)
    assert told(1.0) == 0
    assert 0.2 * everything < told(0.5) < 0.8 * everything


def test_a_policy_that_names_no_node_is_an_error() -> None:
    class Lost(Noted):
        def choose(self, arrival: Arrival) -> int:
            return 4

    with pytest.raises(ValueError, match="expected a node from 0 to 3, seen 4"):
        simulate(chatter(1), PolicyRouter(Lost()))


def test_a_request_without_an_answer_is_none_that_was_quick() -> None:
    class Refuses(PolicyRouter):
        def arrive(self, arrival: Arrival) -> None:
            match arrival.number:
                case 0:
                    self._fleet.refuse(arrival)
                case 1:
                    super().arrive(arrival)

    result = simulate(chatter(3), Refuses(Noted()))
    assert [one < inf for one in result.ttft_s] == [False, True, False]


def test_a_session_ends_with_a_turn_that_was_refused() -> None:
    class Refuses(PolicyRouter):
        def arrive(self, arrival: Arrival) -> None:
            if arrival.number:
                self._fleet.refuse(arrival)
            else:
                super().arrive(arrival)

    turn = Turn(pause_s=1.0, prompt_tokens=300, output_tokens=5, blocks=())
    workload = FleetWorkload(sessions=[[turn] * 4], block_tokens=BLOCK, per_s=1.0)
    result = simulate(workload, Refuses(Noted()))
    assert [one < inf for one in result.ttft_s] == [True, False, False, False]
    assert result.prompt_tokens == [300, 300, 0, 0]


@pytest.mark.parametrize("policy", ["prefill_cost", "random", "shortest_ttft", "least_outstanding_tokens"])
def test_the_live_policies_answer_everything_the_same_each_time(policy: str) -> None:
    first, second = (simulate(chatter(150), LiveRouter(policy)) for _ in range(2))
    assert replace(first, wall_s=0) == replace(second, wall_s=0)
    assert min(first.ttft_s) > 0
    if policy in {"prefill_cost", "random"}:
        # The others leave nothing, or only ties, to chance.
        assert simulate(chatter(150), LiveRouter(policy), seed=2).ttft_s != first.ttft_s


def test_ours_finds_the_caches_and_the_ledger_is_empty_in_the_end() -> None:
    ours = LiveRouter()
    result = simulate(chatter(400), ours)
    blind = simulate(chatter(400), LiveRouter("random"))
    assert result.cached_tokens > 1.1 * blind.cached_tokens
    assert sum(result.ttft_s) < sum(blind.ttft_s)
    state = ours.state
    last = [node for node in state.fleet.nodes.values() if node.held]
    # The outcome of the very last answer is still on its way.
    assert sum(len(node.held) for node in last) == len(state.bound) <= 20
    assert not len(state.window)


def test_the_live_index_follows_the_engines_caches() -> None:
    ours = LiveRouter()
    blocks = tuple(range(10))
    fleet = FleetSimulation(
        turns((0.0, 2_600, blocks), (5.0, 2_600, blocks)), ours, nodes=4, profile=TEST, rate=1.0, seed=1
    )
    result = fleet.run()
    assert result.cached_tokens == 10 * BLOCK
    assert ours.state.index.blocks == 10


def test_late_binding_keeps_a_burst_in_the_window() -> None:
    ours = LiveRouter()
    burst = turns(*[(0.0, 4_000, ()) for _ in range(40)])
    fleet = FleetSimulation(burst, ours, nodes=2, profile=TEST, rate=1.0, seed=1)
    waiting: list[int] = []
    fleet.call_at(0.2, lambda: waiting.append(len(ours.state.window)))
    fleet.run()
    assert waiting[0] > 25


def test_a_session_goes_on_after_its_answer_and_pause() -> None:
    session = [
        Turn(pause_s=0.0, prompt_tokens=1_000, output_tokens=10, blocks=(1, 2, 3)),
        Turn(pause_s=4.0, prompt_tokens=1_300, output_tokens=10, blocks=(1, 2, 3, 4, 5)),
    ]
    policy = Noted()
    result = simulate(
        FleetWorkload(sessions=[session], block_tokens=BLOCK, per_s=1.0),
        PolicyRouter(policy),
        nodes=1,
        rate=2.0,
    )
    ended_s = next(at_s for kind, at_s, number in policy.told if (kind, number) == ("last", 0))
    assert policy.seen[1][0] == pytest.approx(ended_s + 2.0)
    assert result.cached_tokens == 3 * BLOCK


def test_blocks_of_a_trace_are_split_and_chained() -> None:
    def one(ids: tuple[int, ...], tokens: int) -> TraceRequest:
        return TraceRequest(
            arrival_s=0, prompt_tokens=tokens, output_tokens=1, block_ids=ids, block_tokens=512
        )

    workload = open_loop([one((1, 2, 3), 1_300), one((1, 2, 4), 1_536), one((9, 2), 700)], block_tokens=BLOCK)
    first, second, third = (session[0].blocks for session in workload.sessions)
    assert len(first) == 5
    assert len(second) == 6
    assert first[:4] == second[:4]
    assert first[4] != second[4]
    assert not set(third) & set(second)
    assert all(0 <= block < 1 << 62 for block in first)


def test_a_short_trace_is_repeated_with_prompts_of_its_own() -> None:
    trace = [
        TraceRequest(arrival_s=at, prompt_tokens=600, output_tokens=3, block_ids=(1, 2), block_tokens=512)
        for at in (0.0, 1.0, 2.0)
    ]
    workload = open_loop(trace, requests=7)
    assert workload.requests == 7
    assert [session[0].pause_s for session in workload.sessions] == [0, 1, 2, 3, 4, 5, 6]
    blocks = [session[0].blocks for session in workload.sessions]
    assert blocks[0] == blocks[2] != blocks[3]


def test_sessions_of_agents_are_read(tmp_path: Path) -> None:
    path = tmp_path / "sessions.jsonl.gz"
    sessions = [
        {
            "id": name,
            "models": ["m"],
            "block_size": 64,
            "tool_tokens": 512,
            "system_tokens": 100,
            "requests": [
                [0.0, 1_100, 50, "main", 0, [[1, 18]], 0.0, 2.0, "tool_use"],
                [9.0, 1_400, 60, "main", 17, [[30, 5]], 7.0, None, None],
            ],
        }
        for name in ("a", "b")
    ]
    path.write_bytes(gzip.compress("\n".join(map(json.dumps, sessions)).encode()))
    workload = read_workload(path)
    assert workload.requests == 4
    one, other = workload.sessions
    assert one[0].blocks == one[1].blocks[:4]
    assert [turn.pause_s for turn in one] == [0.0, 7.0]
    # 612 tokens of tools and system prompt are common: two routing blocks.
    assert one[0].blocks[:2] == other[0].blocks[:2]
    assert not set(one[1].blocks[2:]) & set(other[1].blocks[2:])
    limited = read_workload(path, requests=3)
    assert [len(session) for session in limited.sessions] == [2, 1]
    with pytest.raises(SettingsError, match="up to 100 tokens"):
        read_workload(path, longest=100)


def test_a_session_that_cannot_be_read_stops_the_reading(tmp_path: Path) -> None:
    path = tmp_path / "sessions.jsonl"
    path.write_text(
        '{"tool_tokens": 1, "system_tokens": 1, "requests": [[1]], "id": "a", "block_size": 64}\n'
    )
    with pytest.raises(SettingsError, match="line 1"):
        read_workload(path)


def test_a_batching_window_holds_each_prompt_up_for_the_next() -> None:
    prompts = turns((0.0, 1_000, ()), (0.05, 1_000, ()), (5.0, 1_000, ()))
    plain = simulate(prompts, LiveRouter(), nodes=1)
    windowed = simulate(prompts, LiveRouter(parameters=SchedulingParameters(batch_wait_s=0.2)), nodes=1)
    assert plain.ttft_s[0] == pytest.approx(plain.ttft_s[2])
    assert windowed.ttft_s[0] >= plain.ttft_s[0] + 0.2, "it waits for the second"
    assert windowed.ttft_s[1] < windowed.ttft_s[0], "both are computed in one step"
    assert windowed.ttft_s[2] == pytest.approx(plain.ttft_s[2] + 0.2), "nobody comes"
    full = LiveRouter(parameters=SchedulingParameters(batch_wait_s=0.2, batch_size=2))
    assert simulate(prompts, full, nodes=1).ttft_s[0] == pytest.approx(windowed.ttft_s[0] - 0.15)


def test_a_batching_window_loses_nobody() -> None:
    result = simulate(
        chatter(300), LiveRouter(parameters=SchedulingParameters(batch_wait_s=0.05, batch_size=3))
    )
    assert all(ttft_s < inf for ttft_s in result.ttft_s)


def test_the_original_s_decision_makes_the_same_of_a_load_live_and_as_its_baseline() -> None:
    live = simulate(chatter(400), LiveRouter("cost_based_prefill"))
    baseline = simulate(chatter(400), PolicyRouter(BY_NAME["rtp_llm_cost"]()))
    shuffled = simulate(chatter(400), PolicyRouter(BY_NAME["random"]()))
    assert sum(live.ttft_s) == pytest.approx(sum(baseline.ttft_s), rel=0.3)
    assert max(sum(live.ttft_s), sum(baseline.ttft_s)) < sum(shuffled.ttft_s)
