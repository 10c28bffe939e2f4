"""The jumping engine against the step-by-step one: the same workload, the same schedule."""

from __future__ import annotations

import random
from dataclasses import dataclass, replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dispatcher.simulation.engine import EngineModel
from dispatcher.simulation.jumping_engine import JumpingEngine
from dispatcher.simulation.kv_cache import block_hashes
from dispatcher.simulation.profile import Profile

TIGHT = Profile(
    name="tight",
    source="made up",
    fixed_s=0.0013,
    prefill_token_s=1.1e-5,
    attention_s=1e-9,
    prefill_context_s=3e-8,
    decode_sequence_s=1e-4,
    decode_context_s=1.7e-7,
    max_batched_tokens=64,
    max_running=8,
    block_tokens=4,
    kv_blocks=60,
)
ROOMY = replace(TIGHT, name="roomy", kv_blocks=4_000, max_running=32)


@dataclass(frozen=True)
class Job:
    at_s: float
    prompt: tuple[int, ...]
    output_tokens: int


def workload(seed: int, jobs: int, *, mean_gap_s: float, longest: int) -> list[Job]:
    """Random prompts of which many begin alike."""
    rng = random.Random(seed)
    stems = [tuple(rng.randrange(1_000) for _ in range(longest)) for _ in range(4)]
    at_s, made = 0.0, []
    for _ in range(jobs):
        at_s += rng.expovariate(1 / mean_gap_s)
        stem = rng.choice(stems)[: rng.randrange(longest)]
        own = tuple(rng.randrange(1_000) for _ in range(rng.randrange(1, longest)))
        made.append(Job(at_s, stem + own, rng.randrange(1, longest)))
    return made


Outcome = dict[int, tuple[float, float, int]]
"""By key: time of the first token, of the last, cached tokens."""


def step_by_step(profile: Profile, jobs: list[Job]) -> tuple[Outcome, EngineModel]:
    engine = EngineModel(profile)
    first: dict[int, float] = {}
    done: Outcome = {}
    pending = list(enumerate(jobs))
    while pending or engine.due is not None:
        if pending and (engine.due is None or pending[0][1].at_s <= engine.due):
            key, job = pending.pop(0)
            # What an answer says is shared with nobody here, as in the jumping engine.
            engine.submit(key, job.prompt, job.output_tokens, output=lambda place, key=key: 10_000 + key)  # type: ignore[misc]
            if engine.due is None:
                engine.step(job.at_s)
            continue
        assert engine.due is not None
        ended_s = engine.due
        for made in engine.step(ended_s):
            if made.is_first:
                first[made.key] = ended_s
            if made.is_last:
                done[made.key] = (first[made.key], ended_s, made.cached_tokens)
    return done, engine


def in_jumps(profile: Profile, jobs: list[Job]) -> tuple[Outcome, JumpingEngine]:
    engine = JumpingEngine(profile)
    first: dict[int, float] = {}
    done: Outcome = {}
    pending = list(enumerate(jobs))
    while pending or engine.due is not None:
        if pending and (engine.due is None or pending[0][1].at_s <= engine.due):
            key, job = pending.pop(0)
            blocks = [block >> 1 for block in block_hashes(job.prompt, profile.block_tokens)]
            engine.submit(key, len(job.prompt), job.output_tokens, blocks, job.at_s)
            continue
        ended_s = engine.due
        assert ended_s is not None
        for made in engine.advance():
            if made.is_first:
                first[made.key] = ended_s
            if made.is_last:
                done[made.key] = (first[made.key], ended_s, made.cached_tokens)
    return done, engine


def assert_same(profile: Profile, jobs: list[Job]) -> tuple[EngineModel, JumpingEngine]:
    expected, model = step_by_step(profile, jobs)
    seen, engine = in_jumps(profile, jobs)
    assert seen.keys() == expected.keys() == set(range(len(jobs)))
    for key, (first_s, last_s, cached_tokens) in expected.items():
        assert seen[key][:2] == pytest.approx((first_s, last_s), abs=1e-9), key
        assert seen[key][2] == cached_tokens, key
    assert engine.preemptions == model.preemptions
    assert engine.busy_s == pytest.approx(model.busy_s)
    assert engine.cache.used == 0
    assert engine.waiting_tokens == 0
    return model, engine


@settings(max_examples=120, deadline=None)
@given(seed=st.integers(0, 10**9), gap=st.sampled_from([0.0005, 0.005, 0.03, 0.2]))
def test_jumps_keep_every_time_and_hit_of_a_roomy_engine(seed: int, gap: float) -> None:
    assert_same(ROOMY, workload(seed, 40, mean_gap_s=gap, longest=90))


@settings(max_examples=120, deadline=None)
@given(seed=st.integers(0, 10**9), gap=st.sampled_from([0.0005, 0.005, 0.03, 0.2]))
def test_jumps_keep_every_time_and_hit_of_an_engine_short_of_blocks(seed: int, gap: float) -> None:
    assert_same(TIGHT, workload(seed, 40, mean_gap_s=gap, longest=70))


def test_the_workloads_preempt_evict_and_hit() -> None:
    model, engine = assert_same(TIGHT, workload(3, 60, mean_gap_s=0.005, longest=70))
    assert engine.preemptions > 5
    assert model.prefix_hit_tokens > 100
    assert engine.take_removed()


def test_a_long_answer_is_decoded_in_few_jumps() -> None:
    engine = JumpingEngine(replace(ROOMY, block_tokens=256))
    engine.submit(1, 1_000, 2_000, (), 0.0)
    jumps = 0
    while engine.due is not None:
        engine.advance()
        jumps += 1
    assert jumps < 1_000 / 64 + 2_000 / 256 + 3


def test_stored_and_removed_blocks_add_up_to_what_is_cached() -> None:
    engine = JumpingEngine(TIGHT)
    told: set[int] = set()
    for key, job in enumerate(workload(5, 50, mean_gap_s=1.0, longest=70)):
        blocks = [block >> 1 for block in block_hashes(job.prompt, TIGHT.block_tokens)]
        engine.submit(key, len(job.prompt), job.output_tokens, blocks, job.at_s)
        while engine.due is not None:
            engine.advance()
            stored, removed = set(engine.take_stored()), set(engine.take_removed())
            told = (told | stored) - removed
            assert told == {block for block in engine.cache.cached if block >= 0}


@pytest.mark.parametrize(("prompt_tokens", "output_tokens"), [(0, 1), (1, 0), (200, 41)])
def test_what_can_never_run_is_refused(prompt_tokens: int, output_tokens: int) -> None:
    with pytest.raises(ValueError, match="expected"):
        JumpingEngine(TIGHT).submit(1, prompt_tokens, output_tokens, (), 0.0)


def test_more_slots_than_tokens_of_a_step_are_refused() -> None:
    with pytest.raises(ValueError, match="max_running"):
        JumpingEngine(replace(TIGHT, max_running=65))
