"""What judges in the performance benches: percentiles, backlogs, predicted hits, samples, prompts."""

from __future__ import annotations

import random
from pathlib import Path

import pytest

from tests.bench import prompts
from tests.bench.conversations import SYSTEM_SHARE, SYSTEMS, Conversations
from tests.bench.decision import BATCH, decide_round
from tests.bench.leader import judge_hit
from tests.bench.open_loop import Run, percentile_of
from tests.bench.profile_stages import REST, read_stages
from tests.bench.steady_fleet import SteadyFleet


def test_percentiles_of_counts_are_those_of_the_values() -> None:
    counts = [(1, 98), (5, 1), (90, 1)]
    assert [percentile_of(counts, share) for share in (0.5, 0.98, 0.99, 1.0)] == [1, 1, 5, 90]
    assert percentile_of([], 0.5) == 0


@pytest.mark.parametrize(
    ("backlog", "lag_s", "published_per_s", "is_held"),
    [
        ([0, 5, 6, 4, 5, 5, 5, 5], 0.0, 97.0, True),
        ([0, 5, 10, 15, 40, 70, 90, 99], 0.0, 97.0, False),
        ([0, 5, 6, 4, 5, 5, 5, 5], 1.0, 97.0, False),
        ([0, 50, 50, 50, 50, 50, 50, 50], 0.0, 75.0, False),
    ],
)
def test_a_rate_is_held_when_it_was_sent_and_answered_and_its_backlog_is_flat(
    backlog: list[int], lag_s: float, published_per_s: float, is_held: bool
) -> None:
    run = Run(rate=100, seconds=2, backlog=backlog, lag_s=lag_s, published_per_s=published_per_s)
    assert run.is_held is is_held


def test_a_predicted_hit_is_compared_with_the_held_beginning() -> None:
    blocks = ("a", "b", "c")
    two = 2 * prompts.BLOCK_TOKENS
    assert judge_hit(two, blocks, {"a", "b"}) == "hits as held"
    assert judge_hit(two, blocks, {"a", "b", "c"}) == "fewer than held"
    assert judge_hit(two, blocks, {"a", "c"}) == "more than was held"
    assert judge_hit(0, blocks, {"b", "c"}) == "no hit, none held"


def test_samples_are_counted_by_stage_and_function(tmp_path: Path) -> None:
    path = tmp_path / "samples"
    path.write_text(
        "asyncio/base_events.py:run;services/intake.py:_take;scheduling/admission.py:admit 3\n"
        "asyncio/base_events.py:run;services/dispatch.py:_choose;scheduling/window.py:choose 4\n"
        "services/dispatch.py:_choose;scheduling/window.py:choose;scheduling/scheduler.py:choose 2\n"
        "asyncio/base_events.py:run 1\n"
    )
    read = read_stages(path)
    assert read.samples == 10
    assert read.stages == {"window: take out": 0.4, "admit": 0.3, "choose": 0.2, REST: 0.1}
    assert next(iter(read.functions.items())) == ("scheduling/window.py:choose", 0.4)


def test_conversations_grow_by_a_block_and_share_their_systems() -> None:
    conversations = Conversations(50, 16, random.Random(3))
    before = list(conversations.under_way)
    for _ in range(400):
        prompt = conversations.next()
        assert len(prompt) <= 16 * 5 // 4
        for number, ended, begun in conversations.replaced:
            assert before[number] == ended
            before[number] = begun
        conversations.replaced.clear()
        number = conversations.under_way.index(prompt)
        assert prompt[:-1] == before[number]
        before[number] = prompt
    assert len({prompt[: 16 // SYSTEM_SHARE] for prompt in before}) <= SYSTEMS


def test_prompts_without_shared_prefixes_share_nothing() -> None:
    conversations = Conversations(5, 8, random.Random(3), is_shared=False)
    seen = [block for _ in range(20) for block in conversations.next()]
    assert len(set(seen)) == len(seen) == 160


def test_a_record_has_the_size_and_the_blocks_that_its_home_holds() -> None:
    key, value = prompts.record(5, 10, "x")
    assert key == b"x-5"
    assert prompts.RECORD_BYTES - 5 <= len(value) <= prompts.RECORD_BYTES
    home = 5 * prompts.STRIDE % (10 * prompts.PER_NODE) % 10
    assert prompts.request_blocks(5, 10)[: prompts.HELD_BLOCKS] in prompts.view(home, 10)


def test_a_steady_fleet_goes_on_deciding_under_load() -> None:
    fleet = SteadyFleet(20, 8, cached_blocks=200)
    decided = 0
    for _ in range(30):
        for _ in range(64):
            fleet.state.enter(fleet.request())
        chosen = decide_round(fleet, BATCH)
        assert all(choice.has_room for _, choice in chosen)
        decided += len(chosen)
        fleet.pass_time(chosen, 64)
    assert decided >= 0.95 * 30 * 64
    held = sum(len(node.held) for node in fleet.nodes)
    assert held == len(fleet.state.bound) <= 16 * 20
    hits = [choice.hit_tokens for _, choice in chosen]
    assert sum(hit > 0 for hit in hits) > len(hits) / 2
