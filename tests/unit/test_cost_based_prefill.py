"""The original's policies live, held against arithmetic by hand; names and constants of theirs."""

from __future__ import annotations

import random
from collections import Counter
from typing import get_args

import pytest

from dispatcher.backends.legacy_environment import POLICIES as ORIGINAL
from dispatcher.backends.legacy_environment import our_policy
from dispatcher.protocol.node import Medium
from dispatcher.scheduling.batches import Batches
from dispatcher.scheduling.cost_based_prefill import CandidatePool, CostBased
from dispatcher.scheduling.policies import POLICIES
from dispatcher.settings import DispatcherSettings
from tests.unit.test_scheduler import Scene, blocks, request

# Tests' nodes compute 10,000 tokens a second, and each prefill takes 10 ms besides (`test_scheduler.COST`).
EXACT = CostBased(tie_share=0.0, tie_s=0.0)


def scene(count: int, constants: CostBased = EXACT, **parameters: object) -> Scene:
    return Scene(count, "cost_based_prefill", cost_based=constants, **parameters)


def chosen(of: Scene, *path: int, times: int = 60) -> set[str]:
    return {of.choose(request(*path)).node.name for _ in range(times)}


def test_the_least_sum_of_wait_and_prefill() -> None:
    of = scene(2)
    of.index.store("n1", Medium.GPU, blocks(1, 2, 3, 4))
    assert chosen(of, 1, 2, 3, 4) == {"n1"}
    # 1,024 cached tokens are 102.4 ms; a third of the mean wait and more is another filter's business.
    of.report("n0", queued_uncached_tokens=500)
    of.report("n1", queued_uncached_tokens=1_500)
    assert chosen(of, 1, 2, 3, 4) == {"n1"}
    of.report("n1", queued_uncached_tokens=1_600)
    assert chosen(of, 1, 2, 3, 4) == {"n0"}


@pytest.mark.parametrize(
    ("extra", "tied"),
    [(190, True), (210, False)],  # 19 and 21 ms beside a score of 45.6: the 20 ms count
)
def test_scores_within_twenty_milliseconds_are_equal(extra: int, tied: bool) -> None:
    of = scene(2, CostBased(imbalance_multiplier=100))
    of.report("n0", queued_uncached_tokens=1)
    of.report("n1", queued_uncached_tokens=1 + extra)
    assert chosen(of, 1) == ({"n0", "n1"} if tied else {"n0"})


@pytest.mark.parametrize(("extra", "tied"), [(1_000, True), (1_100, False)])
def test_scores_within_a_tenth_of_the_least_are_equal(extra: int, tied: bool) -> None:
    # The least score is 1 s of queue and 45.6 ms: a tenth are 104.6 ms.
    of = scene(2, CostBased(tie_s=0.0))
    of.report("n0", queued_uncached_tokens=10_000)
    of.report("n1", queued_uncached_tokens=10_000 + extra)
    assert chosen(of, 1) == ({"n0", "n1"} if tied else {"n0"})


def test_equals_are_drawn_evenly() -> None:
    of = scene(4)
    counts = Counter(of.choose(request(1)).node.name for _ in range(2_000))
    assert all(count == pytest.approx(500, abs=90) for count in counts.values())
    assert len(counts) == 4


def test_a_node_with_more_than_three_times_the_mean_of_requests_is_left_out() -> None:
    of = scene(4)
    of.index.store("n0", Medium.GPU, blocks(1, 2, 3))
    for number in range(3):
        of.fleet.reserve(f"n{number + 1}", f"r{number}", 10)
    for number in range(9):
        of.fleet.reserve("n0", f"s{number}", 10)
    assert chosen(of, 1, 2, 3) == {"n0"}, "9 of a mean of 3"
    of.fleet.reserve("n0", "t", 10)
    of.fleet.release("n3", "r2")
    assert "n0" not in chosen(of, 1, 2, 3), "10 of a mean of 3"


def test_requests_that_an_engine_has_from_elsewhere_count() -> None:
    of = scene(4)
    of.index.store("n0", Medium.GPU, blocks(1, 2, 3))
    for node in ("n1", "n2", "n3"):
        of.fleet.reserve(node, f"r{node}", 10)
    of.report("n0", running=0, engine_running=30, engine_waiting=2)
    assert of.fleet.nodes["n0"].pending == 32
    assert "n0" not in chosen(of, 1, 2, 3)
    of.report("n0", running=32, engine_running=30, engine_waiting=2)
    assert of.fleet.nodes["n0"].pending == 0, "they are our own, and ended"


def test_a_node_with_more_than_three_times_the_mean_wait_is_left_out() -> None:
    of = scene(4)
    of.index.store("n0", Medium.GPU, blocks(*range(1, 40)))
    for name, tokens in (("n0", 6_100), ("n1", 700), ("n2", 700), ("n3", 500)):
        of.report(name, queued_uncached_tokens=tokens)
    assert chosen(of, *range(1, 40)) == {"n3"}, "6.1 of a mean of 2, though it would have the least score"
    of.report("n0", queued_uncached_tokens=5_600)
    assert chosen(of, *range(1, 40)) == {"n0"}, "5.6 of a mean of 1.875"


def test_when_all_are_filtered_the_least_wait_is_kept() -> None:
    assert list(EXACT.survivors([0.3, 0.2], [1, 1], [0.1, 0.1])) == [0, 1]
    late = CostBased(slo_s=0.2, slo_margin_s=0.1)
    assert list(late.survivors([0.3, 0.2], [1, 1], [0.1, 0.1])) == [1]


def test_the_slo_leaves_out_what_would_be_too_late() -> None:
    of = scene(2, CostBased(slo_s=0.5, slo_margin_s=0.1, tie_share=10.0))
    of.report("n0", queued_uncached_tokens=3_600)
    of.report("n1", queued_uncached_tokens=3_500)
    # 45.6 ms of prefill: 405.6 and 395.6 ms, against 400.
    assert chosen(of, 1) == {"n1"}
    of.report("n0", queued_uncached_tokens=3_500)
    assert chosen(of, 1) == {"n0", "n1"}


def test_a_full_queue_takes_no_more_until_fifteen_percent_are_free() -> None:
    of = scene(2, CostBased(queue_limit=20, hotspot_multiplier=100))
    of.index.store("n0", Medium.GPU, blocks(*range(1, 40)))
    for number in range(20):
        assert of.choose(request(*range(1, 40))).node.name == "n0"
        of.fleet.reserve("n0", f"r{number}", 10)
    assert of.choose(request(*range(1, 40))).node.name == "n1"
    for number, left in ((0, 19), (1, 18)):
        of.fleet.release("n0", f"r{number}")
        assert len(of.fleet.nodes["n0"].held) == left
        assert of.choose(request(*range(1, 40))).node.name == "n1"
    of.fleet.release("n0", "r2")
    assert of.choose(request(*range(1, 40))).node.name == "n0", "17 of 20"


def test_while_all_queues_are_full_a_request_waits() -> None:
    of = scene(2, CostBased(queue_limit=2))
    for name in ("n0", "n1"):
        for number in range(2):
            of.fleet.reserve(name, f"{name}{number}", 10)
    assert not of.choose(request(1)).has_room
    of.fleet.release("n1", "n10")
    assert of.choose(request(1)).node.name == "n1"
    assert of.choose(request(1)).has_room


def test_what_a_batch_waits_counts() -> None:
    of = scene(2)
    batches: Batches[str] = Batches(wait_s=0.3, size=3)
    of.scheduler._batches = batches
    of.now_s = 10.0
    batches.add("n1", "a", 9.9)
    assert chosen(of, 1) == {"n1"}, "0.2 s beside the 0.3 of a batch that begins"
    of.report("n1", queued_uncached_tokens=1_100)
    of.report("n0", queued_uncached_tokens=1)
    assert chosen(of, 1) == {"n0"}, "0.31 s beside 0.3"


@pytest.mark.parametrize(
    ("pool", "of_ten"),
    [
        (CandidatePool(), 3),
        (CandidatePool(ratio=0.39), 3),
        (CandidatePool(ratio=0.0), 1),
        (CandidatePool(ratio=0.1, least=4), 4),
        (CandidatePool(ratio=1.0, least=40), 10),
        (CandidatePool(mode="fixed"), 1),
        (CandidatePool(mode="fixed", size=6), 6),
        (CandidatePool(mode="fixed", size=60), 10),
    ],
)
def test_shortest_ttft_takes_turns_among_its_candidates(pool: CandidatePool, of_ten: int) -> None:
    assert pool.of(10) == of_ten
    of = Scene(10, "shortest_ttft", ttft_pool=pool)
    for number in range(10):
        # More than a turn apart, so that only the pool decides.
        of.report(f"n{number}", queued_uncached_tokens=1_000 * number)
    names = [of.choose(request(1)).node.name for _ in range(3 * of_ten)]
    assert sorted(names[:of_ten]) == [f"n{number}" for number in range(of_ten)]
    assert names[:of_ten] == names[of_ten : 2 * of_ten] == names[2 * of_ten :]


def test_a_hit_of_the_whole_prompt_leaves_something_to_compute() -> None:
    of = scene(1)
    of.index.store("n0", Medium.GPU, blocks(1, 2))
    choice = of.choose(request(1, 2, extra_tokens=0))
    assert (choice.hit_tokens, choice.uncached_tokens) == (496, 16)


def test_every_name_of_the_original_is_a_policy_that_the_settings_know() -> None:
    for original, ours in ORIGINAL.items():
        for spelled in (original, original.lower(), ours):
            assert our_policy(spelled) == ours
            assert DispatcherSettings.model_validate({"policy": spelled}).policy == ours
        assert ours in POLICIES
    assert {*get_args(DispatcherSettings.model_fields["policy"].annotation)} == POLICIES.keys()


def test_no_choice_among_none() -> None:
    assert CostBased().choose([0.0], [0], [0.1], random.Random(1)) == 0
    assert scene(0).scheduler.choose(request(1), (), {}) is None
