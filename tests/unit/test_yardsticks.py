"""What a workload allows: hits, working set and what `random` carries, on workloads small enough to count."""

from __future__ import annotations

from array import array
from dataclasses import replace
from random import Random

import pytest

from dispatcher.replay.traces import read_excerpt
from dispatcher.replay.yardsticks import Workload, cache_bounds, carried_per_s, workload_of
from dispatcher.simulation.profiles import PROFILES

PROFILE = replace(
    PROFILES["test"], block_tokens=4, kv_blocks=1000, fixed_s=0.01, prefill_token_s=0.001, max_running=1
)


def workload(*prompts: list[int], output: int = 1, span_s: float = 1.0) -> Workload:
    return Workload(
        prompts=[array("I", one) for one in prompts], outputs=[output] * len(prompts), span_s=span_s
    )


def test_the_working_set_counts_each_block_once() -> None:
    first, second = list(range(8)), list(range(100, 108))
    bounds = cache_bounds(workload(first, first, second, [*first, *second]), 4)
    assert bounds.working_set_tokens == 8 + 8 + 8  # a block after another beginning is another block


def test_ideal_hits_are_whole_blocks_short_of_the_last_token() -> None:
    same = list(range(8))
    # The second could have 7 of its 8 tokens cached, so one block of 4; the third knows 2 of its 3 blocks.
    bounds = cache_bounds(workload(same, same, [*same, 1, 2, 3, 4]), 4)
    assert bounds.ideal_hit_ratio == pytest.approx((4 + 8) / (8 + 8 + 12))


def test_a_block_after_an_unknown_one_is_no_hit() -> None:
    bounds = cache_bounds(workload([1, 2, 3, 4, 5, 6, 7, 8, 9], [0, 2, 3, 4, 5, 6, 7, 8, 9]), 4)
    assert bounds.ideal_hit_ratio == 0


def test_one_node_carries_what_its_steps_allow() -> None:
    # Two prompts of 10 tokens, one step of 10 ms + 10 x 1 ms each, nothing shared.
    carried = carried_per_s(workload(list(range(10)), list(range(50, 60))), PROFILE, 1, Random(0))
    assert carried == pytest.approx(2 / 0.04)


def test_more_nodes_carry_more_and_shared_prefixes_too() -> None:
    prompts = [[1, 2, 3, 4, 5, 6, 7, 8, number] for number in range(40)]
    alone = carried_per_s(workload(*prompts), PROFILE, 1, Random(0))
    four = carried_per_s(workload(*prompts), PROFILE, 4, Random(0))
    unlike = carried_per_s(
        workload(*([number, *p[1:]] for number, p in enumerate(prompts))), PROFILE, 1, Random(0)
    )
    assert 3 * alone < four < 4.5 * alone
    assert unlike < alone


def test_the_excerpt_is_what_replay_sends() -> None:
    requests = read_excerpt()[:50]
    made = workload_of(requests)
    assert [len(prompt) for prompt in made.prompts] == [request.prompt_tokens for request in requests]
    assert made.per_s == pytest.approx(50 / made.span_s)
    bounds = cache_bounds(made, 16)
    assert 0 < bounds.ideal_hit_ratio < 0.5
    assert bounds.working_set_tokens <= sum(map(len, made.prompts))
