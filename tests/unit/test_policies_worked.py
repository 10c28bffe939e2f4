"""Each policy of the field on examples worked by hand from its published formula."""

from collections import Counter

import pytest

from dispatcher.simulation.policies import Arrival, Policy, Signal
from dispatcher.simulation.policies.dynamo_decode import DynamoDecode
from dispatcher.simulation.policies.dynamo_kv import DynamoKV
from dispatcher.simulation.policies.least_kv import LeastKV
from dispatcher.simulation.policies.least_requests import LeastRequests
from dispatcher.simulation.policies.llmd_sticky import LLMDSticky
from dispatcher.simulation.policies.llmd_weighted import LLMDWeighted
from dispatcher.simulation.policies.lmetric import LPWL, LMetric
from dispatcher.simulation.policies.mooncake import Mooncake
from dispatcher.simulation.policies.outstanding_tokens import LeastOutstandingTokens
from dispatcher.simulation.policies.rtp_llm_cost import RTPLLMCost
from dispatcher.simulation.policies.rtp_llm_decode import RTPLLMDecode
from dispatcher.simulation.policies.sglang_cache_aware import SGLangCacheAware
from dispatcher.simulation.policies.smg_expected_wait import SMGExpectedWait
from tests.support.policy_world import PolicyWorld


def begin(policy: Policy, nodes: int, block_tokens: int = 16) -> PolicyWorld:
    world = PolicyWorld(nodes, 0, block_tokens)
    world.begin(policy)
    return world


def ask(number: int, tokens: int, blocks: range | tuple[int, ...]) -> Arrival:
    return Arrival(number, 0.0, tokens, 100, tuple(blocks))


def ask_again(policy: Policy, count: int, tokens: int, blocks: range) -> list[int]:
    return [policy.choose(ask(number, tokens, blocks)) for number in range(count)]


class TestLeastOutstandingTokens:
    def test_the_fewest_tokens_until_the_answer_ends(self) -> None:
        policy = LeastOutstandingTokens()
        begin(policy, 2)
        long = ask(0, 1000, ())
        at = policy.choose(long)
        other = 1 - at
        # 600 and then 1,000 against 1,000 that are held until their answer ends; 800 then are the fewer.
        assert [policy.choose(ask(1, 600, ())), policy.choose(ask(2, 401, ()))] == [other, other]
        assert policy.choose(ask(3, 100, ())) == at
        policy.first_token(long, at)
        assert policy.choose(ask(4, 1, ())) == other
        policy.finished(long, at)
        assert policy.choose(ask(5, 1, ())) == at

    def test_or_until_the_first_token(self) -> None:
        policy = LeastOutstandingTokens(until="first_token")
        begin(policy, 2)
        long = ask(0, 1000, ())
        at = policy.choose(long)
        policy.first_token(long, at)
        policy.finished(long, at)
        assert Counter(policy.choose(ask(1 + number, 10, ())) for number in range(2)) == {0: 1, 1: 1}


class TestSGLangCacheAware:
    def test_a_match_needs_more_than_three_tenths_of_the_prompt(self) -> None:
        policy = SGLangCacheAware()
        begin(policy, 2)
        # Both idle: the first of equals.
        assert policy.choose(ask(0, 160, range(10))) == 0
        # 48 of 160 tokens are 0.3, not more: the node with none in flight.
        assert policy.choose(ask(1, 160, (0, 1, 2, *range(100, 107)))) == 1
        # 64 of 160 are more: the tenant, busy as it is.
        assert policy.choose(ask(2, 160, (0, 1, 2, 3, *range(200, 206)))) == 0
        assert policy.choose(ask(3, 160, range(10))) == 0

    def test_imbalance_takes_all_affinity_away(self) -> None:
        policy = SGLangCacheAware()
        begin(policy, 2)
        # In flight 0..64 on node 0 and none on node 1: a difference of 65 is the first above 64.
        assert ask_again(policy, 66, 160, range(10)) == [0] * 65 + [1]

    def test_imbalance_is_relative_too(self) -> None:
        policy = SGLangCacheAware(balance_abs_threshold=0, balance_rel_threshold=3.0)
        begin(policy, 2)
        assert policy.choose(ask(0, 160, range(10))) == 0
        # 1 against 0: imbalanced. Then 1:1, 2:1 and 3:1 stay with the tenant: 3 is no more than 3 * 1.
        assert ask_again(policy, 5, 160, range(10)) == [1, 0, 0, 0, 1]

    def test_the_first_tenant_keeps_the_prefix(self) -> None:
        policy = SGLangCacheAware(balance_abs_threshold=1, balance_rel_threshold=1.0)
        begin(policy, 2)
        assert ask_again(policy, 3, 160, range(10)) == [0, 0, 1]
        assert policy.choose(ask(3, 160, range(10))) == 0

    def test_eviction_leaves_what_fits_and_takes_tails_first(self) -> None:
        # 64 characters a block of 16 tokens: room for two.
        policy = SGLangCacheAware(max_tree_chars=128)
        world = begin(policy, 2)
        assert policy.choose(ask(0, 80, range(5))) == 0
        world.now_s = 60.0
        # Two of five blocks are left: 0.4 of the prompt, still node 0's.
        assert policy.choose(ask(1, 80, range(5))) == 0
        world.now_s = 120.0
        # Two of seven are less than 0.3.
        assert policy.choose(ask(2, 112, range(7))) == 1


class TestSMGExpectedWait:
    def test_expected_wait(self) -> None:
        policy = SMGExpectedWait()
        world = begin(policy, 1)
        ask_again(policy, 4, 900, range(0))
        world.now_s = 2.0
        policy.choose(ask(4, 500, ()))
        world.signals[0] = Signal(
            1.0, running=2, waiting=1, waiting_tokens=3000, active_blocks=500, total_blocks=1000
        )
        # The report has seen four. Of five in flight it knows three, one is since: one is unaccounted for.
        expected = (3000 + (2 + 1) * 1024 + 500) / 2000 + 0.15 * 0.5 / 0.5
        assert policy.expected_wait_s(0) == pytest.approx(expected)

    def test_a_queue_without_tokens_counts_the_mean_prefill(self) -> None:
        policy = SMGExpectedWait()
        world = begin(policy, 1)
        world.signals[0] = Signal(1.0, 0, 3, 0, 0, 1000)
        assert policy.expected_wait_s(0) == pytest.approx(3 * 1024 / 2000)

    def test_an_overloaded_holder_spills_and_gets_a_second(self) -> None:
        policy = SMGExpectedWait()
        begin(policy, 4)
        chosen = ask_again(policy, 8, 160, range(10))
        # n on one of four: over when n > n/4 + 4; 5 aren't (5.25), 6 are (5.5): the seventh goes elsewhere.
        assert chosen[:6] == [chosen[0]] * 6
        assert chosen[6] != chosen[0]
        # 6 and 1, mean 1.75: the first holder is over 5.75, the second isn't.
        assert chosen[7] == chosen[6]

    def test_the_margin_grows_with_the_mean_up_to_its_bound(self) -> None:
        policy = SMGExpectedWait(balance_rel_threshold=0.0)
        begin(policy, 2)
        # n on one of two: over when n/2 > max(4, ceil(2 sqrt(n/2))). 10: 5 > 5 is false; 11: 5.5 > 5.
        chosen = ask_again(policy, 12, 160, range(10))
        assert chosen.index(1 - chosen[0]) == 11

    def test_a_spill_goes_to_no_other_overloaded_node(self) -> None:
        policy = SMGExpectedWait(balance_abs_threshold=0.0, balance_rel_threshold=0.0)
        world = begin(policy, 3)
        world.signals[2].waiting_tokens = 1_000_000
        # Two prefixes, two holders, each over the mean of 2/3: the third node it is, whatever waits there.
        assert {policy.choose(ask(0, 160, range(10))), policy.choose(ask(1, 160, range(50, 60)))} == {0, 1}
        assert policy.choose(ask(2, 160, range(10))) == 2

    def test_a_node_that_queues_eight_gets_nothing_while_another_does_not(self) -> None:
        policy = SMGExpectedWait()
        world = begin(policy, 2)
        holder = policy.choose(ask(0, 160, range(10)))
        world.signals[holder].waiting = 8
        assert policy.choose(ask(1, 160, range(10))) == 1 - holder
        world.signals[holder].waiting = 7
        world.signals[1 - holder].active_blocks = 8_000
        assert policy.choose(ask(2, 160, range(10))) == holder

    def test_of_a_large_pool_only_holders_and_sixteen_are_read(self) -> None:
        policy = SMGExpectedWait()
        world = begin(policy, 200)
        read: Counter[int] = Counter()
        told = world.signal
        world.signal = lambda node: (read.update((node,)), told(node))[1]  # type: ignore[method-assign]
        holder = policy.choose(ask(0, 160, range(10)))
        read.clear()
        assert policy.choose(ask(1, 160, range(10))) == holder
        assert len(read) <= 17
        assert read[holder] > 0


class TestDynamoKV:
    def test_cost_cold_and_warm_as_the_router_logs_it(self) -> None:
        policy = DynamoKV()
        begin(policy, 2)
        prompt = ask(0, 515, range(32))
        policy.stored(1, range(32))
        # 515/16 + 32 decode blocks; all 32 full blocks cached: 3/16 + 32.
        assert policy.costs(prompt, [0, 32]) == [64.1875, 32.1875]
        assert policy.choose(prompt) == 1

    def test_the_worked_example_of_its_documentation(self) -> None:
        # Documented: raw 10; overlaps 2, 5, 8; decode blocks 10, 5, 9; costs 18, 10, 11. Decode blocks
        # include the request's own ten, so here each has five more, and costs 23, 15, 16.
        policy = DynamoKV()
        begin(policy, 3)
        for node, (overlap, active) in enumerate(((2, 5), (5, 0), (8, 4))):
            others = range(1000 * node + 1000, 1000 * node + 1000 + active)
            if active:
                policy.stored(node, others)
                assert policy.choose(ask(node, 16 * active, others)) == node
            policy.stored(node, range(overlap))
        prompt = ask(9, 160, range(10))
        assert policy.costs(prompt, [2, 5, 8]) == [23.0, 15.0, 16.0]
        assert policy.choose(prompt) == 1

    def test_shared_blocks_of_active_sequences_count_once(self) -> None:
        policy = DynamoKV()
        begin(policy, 1)
        policy.choose(ask(0, 160, range(10)))
        # 160 tokens are being prefilled; of 12 blocks 10 are active already.
        assert policy.costs(ask(1, 192, range(12)), [0]) == [(160 + 192) / 16 + 12]
        policy.first_token(ask(0, 160, range(10)), 0)
        assert policy.costs(ask(1, 192, range(12)), [0]) == [192 / 16 + 12]
        policy.choose(ask(1, 192, range(12)))
        policy.finished(ask(0, 160, range(10)), 0)
        assert policy.costs(ask(2, 16, (77,)), [0]) == [(192 + 16) / 16 + 12 + 1]

    def test_decay_of_the_credit_under_excess_prefill(self) -> None:
        policy = DynamoKV(overlap_score_credit_decay=1.0)
        begin(policy, 2)
        policy.stored(0, range(4))
        assert policy.choose(ask(0, 128, range(8))) == 0
        # Node 0 prefills 64 tokens, four blocks more than node 1; a prompt of 8 blocks: decay 1/(1 + 4/8).
        costs = policy.costs(ask(1, 128, (0, 1, 2, 3, 50, 51, 52, 53)), [4, 0])
        assert costs == pytest.approx([(64 + 128) / 16 - 4 / 1.5 + 12, 8 + 8])

    def test_temperature_samples_scaled_costs(self) -> None:
        policy = DynamoKV(temperature=1.0)
        begin(policy, 2)
        policy.stored(0, range(10))
        counts: Counter[int] = Counter()
        for number in range(2000):
            prompt = ask(number, 160, range(10))
            node = policy.choose(prompt)
            counts[node] += 1
            policy.finished(prompt, node)
        # exp(-1) against 1: 0.269 of 2,000, give or take five deviations of 20.
        assert counts[1] == pytest.approx(538, abs=100)

    def test_running_requests_are_forgotten_after_five_minutes(self) -> None:
        policy = DynamoKV()
        world = begin(policy, 1)
        old = ask(0, 160, range(10))
        policy.choose(old)
        world.now_s = 299.0
        policy.choose(ask(1, 16, (99,)))
        assert policy.costs(ask(2, 16, (98,)), [0]) == [(160 + 16 + 16) / 16 + 12]
        world.now_s = 361.0
        policy.choose(ask(3, 16, (97,)))
        assert policy.costs(ask(2, 16, (98,)), [0]) == [(16 + 16 + 16) / 16 + 3]
        policy.finished(old, 0)
        assert policy.costs(ask(2, 16, (98,)), [0]) == [(16 + 16 + 16) / 16 + 3]


class TestLLMDWeighted:
    def test_weighted_sum(self) -> None:
        policy = LLMDWeighted(kv_events=True)
        world = begin(policy, 3)
        policy.stored(0, range(10))
        policy.stored(1, range(5))
        world.signals = [
            Signal(0.0, 0, 4, 0, 500, 1000),
            Signal(0.0, 0, 1, 0, 250, 1000),
            Signal(0.0, 0, 0, 0, 0, 1000),
        ]
        # 3 + 0 + 1 + 1 = 5; 1.5 + 1.5 + 1.5 + 1 = 5.5; 0 + 2 + 2 + 1 = 5.
        assert policy.choose(ask(0, 160, range(10))) == 1
        world.signals[1].waiting = 3
        # 1.5 + 0.5 + 1.5 + 1 = 4.5: now a tie of nodes 0 and 2, at 5.
        assert {policy.choose(ask(1, 160, range(10))) for _ in range(30)} == {0, 2}

    def test_cold_prompts_go_to_the_least_recently_cold(self) -> None:
        policy = LLMDWeighted()
        begin(policy, 3)
        cold = [policy.choose(ask(n, 160, range(100 * n, 100 * n + 10))) for n in range(5)]
        assert cold == [0, 1, 2, 0, 1]

    def test_own_routing_is_what_it_knows(self) -> None:
        policy = LLMDWeighted()
        begin(policy, 3)
        assert ask_again(policy, 3, 160, range(10)) == [0, 0, 0]
        policy.stored(2, range(10))
        assert policy.choose(ask(3, 160, range(10))) == 0


class TestLLMDSticky:
    def test_sticky_until_the_penalty_then_the_fewest_tokens(self) -> None:
        policy = LLMDSticky(kv_events=True, peak_prefill_throughput=1000.0, max_ttft_penalty_s=2.0)
        begin(policy, 2, block_tokens=250)
        policy.stored(0, range(8))
        # 8 of 10 blocks are 0.8: sticky. Each adds 500: up to 2 s it stays, at 2.5 it doesn't,
        # and then 2,500 + 500 stand against 2,500.
        assert ask_again(policy, 6, 2500, range(10)) == [0, 0, 0, 0, 0, 1]
        policy.first_token(ask(0, 2500, range(10)), 0)
        assert policy.choose(ask(6, 2500, range(10))) == 0

    def test_less_than_the_threshold_is_not_sticky(self) -> None:
        policy = LLMDSticky(kv_events=True)
        begin(policy, 2, block_tokens=250)
        policy.stored(0, range(7))
        # 750 and 750 more against 2,500, then 2,250 + 750 against it.
        assert ask_again(policy, 4, 2500, range(10)) == [0, 0, 0, 1]

    def test_a_throughput_of_zero_is_calibrated_on_the_profile(self) -> None:
        policy = LLMDSticky(kv_events=True, peak_prefill_throughput=0.0, max_ttft_penalty_s=0.1)
        begin(policy, 2, block_tokens=250)
        policy.stored(0, range(8))
        # 20,000 tokens/s: 2,000 tokens are 0.1 s.
        assert ask_again(policy, 6, 2500, range(10)) == [0, 0, 0, 0, 0, 1]


class TestLMetric:
    def test_uncached_tokens_times_batch(self) -> None:
        policy = LMetric()
        begin(policy, 2, block_tokens=250)
        policy.stored(0, range(8))
        chosen = []
        for number in range(5):
            prompt = ask(number, 2500, range(10))
            chosen.append(policy.choose(prompt))
            policy.first_token(prompt, chosen[-1])
        # 500 times 1, 2, 3, 4, 5 against 2,500 times 1: the tie goes to the smaller batch.
        assert chosen == [0, 0, 0, 0, 1]

    def test_queued_tokens_count(self) -> None:
        policy = LMetric()
        begin(policy, 2, block_tokens=250)
        policy.stored(0, range(8))
        # 500 * 1; (500 + 500) * 2; (1000 + 500) * 3 against 2,500.
        assert ask_again(policy, 3, 2500, range(10)) == [0, 0, 1]

    def test_without_the_batch_it_is_lpwl(self) -> None:
        policy = LPWL()
        begin(policy, 2, block_tokens=250)
        policy.stored(0, range(8))
        # 500, 1000, 1500, 2000; then 2,500 each: the smaller batch.
        assert ask_again(policy, 5, 2500, range(10)) == [0, 0, 0, 0, 1]

    @pytest.mark.parametrize("seed", range(10))
    def test_the_last_token_is_never_cached(self, seed: int) -> None:
        policy = LPWL()
        PolicyWorld(2, seed, 250).begin(policy)
        policy.stored(0, range(10))
        policy.choose(ask(0, 2500, range(10)))
        # 250 are pending there, so 250 more against 500 is a tie of tokens: the smaller batch, not chance.
        assert policy.choose(ask(1, 500, (0, 1))) == 1


class TestMooncake:
    def test_queue_and_own_prefill(self) -> None:
        policy = Mooncake()
        begin(policy, 2, block_tokens=250)
        policy.stored(0, range(7))
        # 20,000 tokens/s: 37.5 ms each on node 0 (37.5, 75, 112.5, 150) against 125 ms.
        assert ask_again(policy, 4, 2500, range(10)) == [0, 0, 0, 1]
        policy.first_token(ask(0, 2500, range(10)), 0)
        policy.first_token(ask(1, 2500, range(10)), 0)
        # 37.5 ms are left there, 125 on node 1: 75 to 225 ms against 250, then 262.5.
        assert [policy.choose(ask(n, 2500, range(10))) for n in range(4, 10)] == [0, 0, 0, 0, 0, 1]


class TestRTPLLMCost:
    def test_the_least_score(self) -> None:
        policy = RTPLLMCost()
        begin(policy, 2, block_tokens=2500)
        policy.stored(0, range(7))
        # 0.375 s each on node 0 (0.375, 0.75, 1.125, 1.5) against 1.25; within 10 % only of itself.
        assert ask_again(policy, 4, 25_000, range(10)) == [0, 0, 0, 1]

    @pytest.mark.parametrize(("now_s", "chosen"), [(0.0, 1), (0.24, 1), (0.26, 0)])
    def test_waits_shrink_with_time_since_progress(self, now_s: float, chosen: int) -> None:
        policy = RTPLLMCost(tie_share=0.0, tie_s=0.0)
        world = begin(policy, 2, block_tokens=2500)
        policy.stored(0, range(7))
        ask_again(policy, 3, 25_000, range(10))
        # 3 * 0.375 - now + 0.375 against 1.25: even at 0.25.
        world.now_s = now_s
        assert policy.choose(ask(7, 25_000, range(10))) == chosen

    def test_scores_within_ten_percent_or_twenty_milliseconds_are_equal(self) -> None:
        # 20 ms are 400 tokens: 300 cached tokens of 600 don't count, 500 of 1,000 do; of 10,000 they are 5 %.
        for tokens, cached, reached in ((600, 3, {0, 1}), (1000, 5, {0}), (10_000, 5, {0, 1})):
            policy = RTPLLMCost()
            begin(policy, 2, block_tokens=100)
            policy.stored(0, range(cached))
            seen = set()
            for number in range(40):
                prompt = ask(number, tokens, range(tokens // 100))
                node = policy.choose(prompt)
                seen.add(node)
                policy.first_token(prompt, node)
                policy.finished(prompt, node)
            assert seen == reached

    def test_more_than_three_times_the_mean_pending_is_filtered(self) -> None:
        policy = RTPLLMCost()
        begin(policy, 4, block_tokens=2500)
        policy.stored(0, range(10))
        first = ask(0, 25_000, range(10))
        assert policy.choose(first) == 0
        policy.first_token(first, 0)
        # One request on one of four nodes: 1 > 3 * 0.25.
        assert policy.choose(ask(1, 25_000, range(10))) != 0

    def test_a_full_queue_opens_again_below_its_hysteresis(self) -> None:
        policy = RTPLLMCost(queue_limit=20)
        begin(policy, 2, block_tokens=100)
        policy.stored(0, range(5000))
        prompts = [ask(number, 500_000, range(5000)) for number in range(20)]
        for prompt in prompts:
            assert policy.choose(prompt) == 0
            policy.first_token(prompt, 0)
        assert policy.choose(ask(50, 500_000, range(5000))) == 1
        for prompt in prompts[:2]:
            policy.finished(prompt, 0)
        assert policy.choose(ask(51, 500_000, range(5000))) == 1
        # 17 = 20 * 0.85.
        policy.finished(prompts[2], 0)
        assert policy.choose(ask(52, 500_000, range(5000))) == 0


class TestLeastKV:
    def test_the_least_share_of_its_own_cache_until_the_answer_ends(self) -> None:
        policy = LeastKV()
        world = PolicyWorld(2, 0, 16)
        world.signals[1].total_blocks = 5_000
        world.begin(policy)
        # 100 blocks are 0.01 of node 0 and 0.02 of node 1. 99 more: 0.0199 of node 0, 0.0198 of node 1.
        assert policy.choose(ask(0, 1_600, ())) == 0
        assert policy.choose(ask(1, 1_584, ())) == 1
        # 0.02 and 0.0398.
        assert policy.choose(ask(2, 1_600, ())) == 0
        policy.first_token(ask(1, 1_584, ()), 1)
        policy.finished(ask(1, 1_584, ()), 1)
        # 0.03 and 0.02.
        assert policy.choose(ask(3, 1_600, ())) == 1


class TestLeastRequests:
    def test_the_least_occupied_in_rotation(self) -> None:
        policy = LeastRequests(ties="rotation")
        begin(policy, 3)
        assert [policy.choose(ask(number, 160, ())) for number in range(4)] == [0, 1, 2, 0]
        policy.finished(ask(1, 160, ()), 1)
        # 2, 0, 1; then 2, 1, 1: the first after node 1 is node 2.
        assert [policy.choose(ask(number, 160, ())) for number in range(4, 6)] == [1, 2]

    def test_a_prompt_that_is_nearly_there_needs_no_prefill_node(self) -> None:
        policy = LeastRequests(non_cached_tokens=32)
        begin(policy, 1)
        asked = []
        for tokens, blocks in ((160, range(10)), (192, range(12)), (191, range(11)), (191, range(11))):
            prompt = ask(0, tokens, blocks)
            asked.append(policy.wants_prefill(prompt, policy.choose(prompt)))
        # 160 to compute; 192 - 160 = 32; 191 - 176 = 15, as 11 of its blocks are among the 12.
        assert asked == [True, True, False, False]

    def test_without_a_limit_a_prefill_node_is_asked_always(self) -> None:
        policy = LeastRequests()
        begin(policy, 1)
        assert [policy.wants_prefill(ask(0, 1, ()), policy.choose(ask(0, 1, ()))) for _ in range(3)] == [
            True
        ] * 3


class TestDynamoDecode:
    def test_the_fewest_active_blocks_each_counted_for_itself(self) -> None:
        policy = DynamoDecode()
        begin(policy, 2)
        first = policy.choose(ask(0, 160, range(10)))
        other = 1 - first
        # The same ten blocks count again: 20 against 10; then 11 against 10, whatever is prefilled.
        assert policy.choose(ask(1, 176, range(11))) == other
        assert policy.choose(ask(2, 160, range(10))) == first
        policy.first_token(ask(1, 176, range(11)), other)
        # 20 against 11 until the one of eleven ends, then against none.
        assert policy.choose(ask(3, 160, range(10))) == other
        policy.finished(ask(0, 160, range(10)), first)
        policy.finished(ask(2, 160, range(10)), first)
        assert policy.choose(ask(4, 16, (7,))) == first

    def test_requests_count_when_they_have_a_weight(self) -> None:
        policy = DynamoDecode(decode_active_request_weight=64.0)
        begin(policy, 2)
        first = policy.choose(ask(0, 16, (1,)))
        assert policy.choose(ask(1, 160, range(10))) == 1 - first
        # 1 + 64 against 10 + 64.
        assert policy.choose(ask(2, 16, (1,))) == first
        # 2 + 128 against 10 + 64.
        assert policy.choose(ask(3, 16, (1,))) == 1 - first

    def test_running_requests_are_forgotten_after_five_minutes(self) -> None:
        policy = DynamoDecode()
        world = begin(policy, 2)
        first = policy.choose(ask(0, 1_600, range(100)))
        world.now_s = 299.0
        assert policy.choose(ask(1, 160, range(10))) == 1 - first
        world.now_s = 361.0
        assert policy.choose(ask(2, 16, (1,))) == first
        # The end of a forgotten one takes nothing away a second time.
        policy.finished(ask(0, 1_600, range(100)), first)
        assert policy.choose(ask(3, 16, (1,))) == first

    def test_it_is_chosen_when_the_prompt_is_computed(self) -> None:
        assert DynamoDecode.binds_late
        assert not any(
            policy.binds_late for policy in (LeastKV, LeastRequests, RTPLLMDecode, SGLangCacheAware)
        )


class TestRTPLLMDecode:
    def test_reservations_count_until_a_report_has_them(self) -> None:
        policy = RTPLLMDecode()
        world = begin(policy, 1)
        world.signals[0].active_blocks = 100
        policy.choose(ask(0, 500, ()))
        policy.choose(ask(1, 300, ()))
        # 1,600 reported, 800 and twice 1,000 expected; 160,000 - 1,600 - 800 are free.
        assert policy.tokens() == ([4_400], [157_600])
        policy.first_token(ask(0, 500, ()), 0)
        assert policy.tokens() == ([2_900], [158_100])
        policy.finished(ask(0, 500, ()), 0)
        policy.finished(ask(1, 300, ()), 0)
        assert policy.tokens() == ([1_600], [158_400])

    def test_filters(self) -> None:
        policy = RTPLLMDecode()
        begin(policy, 3)
        # Too little room on node 0, more than three times the mean (4,000) used on node 2.
        assert policy.survivors([0, 0, 12_000], [99, 100, 100], 100) == [1, 2]
        assert policy.survivors([0, 0, 12_001], [100, 100, 100], 100) == [0, 1, 2]
        begin(wide := RTPLLMDecode(imbalance_multiplier=1.0), 3)
        assert wide.survivors([0, 0, 12_000], [100, 100, 100], 100) == [0, 1]
        # No room anywhere: the least used.
        assert policy.survivors([5, 3, 4], [0, 0, 0], 1) == [1]

    def test_a_hot_spot_has_more_than_three_times_the_mean(self) -> None:
        policy = RTPLLMDecode(decay=0.0)
        world = begin(policy, 4)
        for node in range(3):
            world.signals[node].active_blocks = 10_000
        # Three are full: all go to node 3, four times the mean; then nobody is left, and the least used is.
        assert [policy.choose(ask(number, 100, ())) for number in range(3)] == [3, 3, 3]

    def test_the_weight_falls_with_absolute_tokens(self) -> None:
        policy = RTPLLMDecode()
        world = begin(policy, 2)
        world.signals[1].active_blocks = 62
        world.signals[0].active_blocks = 31
        counts: Counter[int] = Counter()
        for number in range(2000):
            prompt = ask(number, 160, ())
            node = policy.choose(prompt)
            counts[node] += 1
            policy.finished(prompt, node)
        # exp(-0.001 * 496) = 0.609 against 1: 0.3785 of 2,000, give or take five deviations of 22.
        assert counts[1] == pytest.approx(757, abs=110)


class TestLLMDWeightedDecider:
    def test_enough_must_be_left_to_compute(self) -> None:
        policy = LLMDWeighted(non_cached_tokens=16)
        begin(policy, 1)
        asked = []
        for tokens in (176, 176, 175, 160):
            prompt = ask(0, tokens, range(10))
            asked.append(policy.wants_prefill(prompt, policy.choose(prompt)))
        # Nothing there; then 160 of 176 are: 16 left; 15; none.
        assert asked == [True, True, False, False]
