"""The jumping engine against the step-by-step one: the same workload, the same schedule."""

from __future__ import annotations

import heapq
import random
from collections.abc import Sequence
from dataclasses import dataclass, replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dispatcher.simulation.engine import EngineModel, Made, Pull
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
    """`kept_s` after its end its blocks are released; its prompt comes `pull_s` after it was asked for."""

    at_s: float
    prompt: tuple[int, ...]
    output_tokens: int
    kept_s: float | None = None
    pull_s: float | None = None


def workload(seed: int, jobs: int, *, mean_gap_s: float, longest: int, are_apart: bool = False) -> list[Job]:
    """Random prompts of which many begin alike; with `are_apart` most are handed over or from elsewhere."""
    rng = random.Random(seed)
    stems = [tuple(rng.randrange(1_000) for _ in range(longest)) for _ in range(4)]
    at_s, made = 0.0, []
    for _ in range(jobs):
        at_s += rng.expovariate(1 / mean_gap_s)
        stem = rng.choice(stems)[: rng.randrange(longest)]
        own = tuple(rng.randrange(1_000) for _ in range(rng.randrange(1, longest)))
        job = Job(at_s, stem + own, rng.randrange(1, longest))
        match rng.randrange(4) if are_apart else 3:
            case 0:
                job = replace(job, output_tokens=1, kept_s=rng.expovariate(1 / (3 * mean_gap_s)))
            case 1:
                job = replace(job, pull_s=rng.expovariate(1 / (3 * mean_gap_s)))
            case 2:
                job = replace(job, kept_s=rng.expovariate(30.0), pull_s=rng.expovariate(30.0))
        made.append(job)
    return made


Outcome = dict[int, tuple[float, float, int]]
"""By key: time of the first token, of the last, cached tokens."""


class StepByStep:
    """`EngineModel`, called as `JumpingEngine` is."""

    def __init__(self, profile: Profile) -> None:
        self.engine = EngineModel(profile)

    @property
    def due(self) -> float | None:
        return self.engine.due

    def submit(self, key: int, job: Job, now_s: float) -> None:
        # What an answer says is shared with nobody here, as in the jumping engine.
        self.engine.submit(
            key,
            job.prompt,
            job.output_tokens,
            output=lambda place: 10_000 + key,
            keeps=job.kept_s is not None,
            is_remote=job.pull_s is not None,
        )
        self._begin(now_s)

    def pulled(self, key: int, now_s: float) -> None:
        self.engine.pulled(key)
        self._begin(now_s)

    def release(self, key: int, now_s: float) -> None:
        self.engine.release(key)
        self._begin(now_s)

    def _begin(self, now_s: float) -> None:
        if self.engine.due is None:
            self.engine.step(now_s)

    def advance(self) -> Sequence[Made]:
        assert self.engine.due is not None
        return self.engine.step(self.engine.due)

    def take_pulls(self) -> list[Pull]:
        return self.engine.take_pulls()


class InJumps:
    """`JumpingEngine`, of prompts that are tokens."""

    def __init__(self, profile: Profile) -> None:
        self.engine = JumpingEngine(profile)
        self.pulled = self.engine.pulled
        self.release = self.engine.release
        self.advance = self.engine.advance
        self.take_pulls = self.engine.take_pulls

    @property
    def due(self) -> float | None:
        return self.engine.due

    def submit(self, key: int, job: Job, now_s: float) -> None:
        blocks = [block >> 1 for block in block_hashes(job.prompt, self.engine.profile.block_tokens)]
        self.engine.submit(
            key,
            len(job.prompt),
            job.output_tokens,
            blocks,
            now_s,
            keeps=job.kept_s is not None,
            is_remote=job.pull_s is not None,
        )


def outcome(engine: StepByStep | InJumps, jobs: list[Job]) -> tuple[Outcome, dict[int, int]]:
    """Run the jobs; when each had its tokens, and how many tokens each asked of another engine."""
    first: dict[int, float] = {}
    done: Outcome = {}
    asked: dict[int, int] = {}
    events: list[tuple[float, int, str]] = [(job.at_s, key, "submit") for key, job in enumerate(jobs)]
    heapq.heapify(events)
    while events or engine.due is not None:
        if events and (engine.due is None or events[0][0] <= engine.due):
            now_s, key, what = heapq.heappop(events)
            match what:
                case "submit":
                    engine.submit(key, jobs[key], now_s)
                case "pulled":
                    engine.pulled(key, now_s)
                case _:
                    engine.release(key, now_s)
        else:
            assert engine.due is not None
            now_s = engine.due
            for made in engine.advance():
                if made.is_first:
                    first[made.key] = now_s
                if made.is_last:
                    done[made.key] = (first[made.key], now_s, made.cached_tokens)
                    kept_s = jobs[made.key].kept_s
                    if kept_s is not None:
                        heapq.heappush(events, (now_s + kept_s, made.key, "release"))
        for key, tokens in engine.take_pulls():
            pull_s = jobs[key].pull_s
            assert pull_s is not None
            asked[key] = tokens
            heapq.heappush(events, (now_s + pull_s, key, "pulled"))
    return done, asked


def assert_same(profile: Profile, jobs: list[Job]) -> tuple[EngineModel, JumpingEngine]:
    by_step, in_jumps = StepByStep(profile), InJumps(profile)
    expected, expected_pulls = outcome(by_step, jobs)
    seen, pulls = outcome(in_jumps, jobs)
    assert seen.keys() == expected.keys() == set(range(len(jobs)))
    for key, (first_s, last_s, cached_tokens) in expected.items():
        assert seen[key][:2] == pytest.approx((first_s, last_s), abs=1e-9), key
        assert seen[key][2] == cached_tokens, key
    assert pulls == expected_pulls
    assert pulls.keys() == {key for key, job in enumerate(jobs) if job.pull_s is not None}
    model, engine = by_step.engine, in_jumps.engine
    assert engine.preemptions == model.preemptions
    assert engine.busy_s == pytest.approx(model.busy_s)
    assert engine.cache.used == model.cache.used == 0
    assert engine.waiting == engine.running == engine.waiting_tokens == 0
    return model, engine


@settings(max_examples=120, deadline=None)
@given(seed=st.integers(0, 10**9), gap=st.sampled_from([0.0005, 0.005, 0.03, 0.2]))
def test_jumps_keep_every_time_and_hit_of_a_roomy_engine(seed: int, gap: float) -> None:
    assert_same(ROOMY, workload(seed, 40, mean_gap_s=gap, longest=90))


@settings(max_examples=120, deadline=None)
@given(seed=st.integers(0, 10**9), gap=st.sampled_from([0.0005, 0.005, 0.03, 0.2]))
def test_jumps_keep_every_time_and_hit_of_an_engine_short_of_blocks(seed: int, gap: float) -> None:
    assert_same(TIGHT, workload(seed, 40, mean_gap_s=gap, longest=70))


@settings(max_examples=120, deadline=None)
@given(seed=st.integers(0, 10**9), gap=st.sampled_from([0.0005, 0.005, 0.03, 0.2]))
def test_jumps_keep_every_time_and_pull_of_prompts_handed_over(seed: int, gap: float) -> None:
    assert_same(ROOMY, workload(seed, 40, mean_gap_s=gap, longest=90, are_apart=True))


@settings(max_examples=200, deadline=None)
@given(seed=st.integers(0, 10**9), gap=st.sampled_from([0.0005, 0.005, 0.03, 0.2]))
def test_jumps_keep_every_time_and_pull_of_an_engine_short_of_blocks(seed: int, gap: float) -> None:
    assert_same(TIGHT, workload(seed, 40, mean_gap_s=gap, longest=70, are_apart=True))


def test_the_handed_over_preempt_evict_and_hit_too() -> None:
    jobs = workload(4, 60, mean_gap_s=0.005, longest=70, are_apart=True)
    model, engine = assert_same(TIGHT, jobs)
    assert engine.preemptions > 5
    assert model.prefix_hit_tokens > 100
    pulled = outcome(InJumps(TIGHT), jobs)[1]
    assert any(tokens < len(jobs[key].prompt) for key, tokens in pulled.items())


@pytest.mark.parametrize("kind", [StepByStep, InJumps])
def test_a_prompt_from_elsewhere_costs_one_decoded_token(kind: type[StepByStep] | type[InJumps]) -> None:
    engine = kind(ROOMY)
    engine.submit(1, Job(0.0, tuple(range(41)), 2, pull_s=1.0), 0.0)
    # Its blocks are taken before anything of it is here; nothing is computed meanwhile.
    assert engine.take_pulls() == [Pull(1, 41)]
    assert (engine.due, engine.engine.waiting, engine.engine.cache.used) == (None, 1, 11)
    engine.pulled(1, 1.0)
    assert engine.due == pytest.approx(1.0 + ROOMY.step_s(0, 0, 0, 1, 40))
    (made,) = engine.advance()
    assert (made.is_first, made.is_last) == (True, False)
    while engine.due is not None:
        engine.advance()
    # The next one has ten of eleven blocks here already.
    engine.submit(2, Job(2.0, tuple(range(41)), 2, pull_s=1.0), 2.0)
    assert engine.take_pulls() == [Pull(2, 1)]


@pytest.mark.parametrize("kind", [StepByStep, InJumps])
def test_a_prompt_from_elsewhere_waits_for_blocks_before_it_is_asked_for(
    kind: type[StepByStep] | type[InJumps],
) -> None:
    engine = kind(replace(TIGHT, kv_blocks=20))
    engine.submit(1, Job(0.0, tuple(range(60)), 1, kept_s=1.0), 0.0)
    while engine.due is not None:
        engine.advance()
    # 15 of 20 blocks are kept by who is done: ten more can't be had.
    assert (engine.engine.running, engine.engine.cache.used) == (0, 15)
    engine.submit(2, Job(1.0, tuple(range(100, 140)), 2, pull_s=1.0), 1.0)
    assert engine.take_pulls() == []
    engine.release(1, 3.0)
    assert engine.take_pulls() == [Pull(2, 40)]


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
