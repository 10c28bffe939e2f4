"""The engine model: what batching, caching and preemption must keep."""

from __future__ import annotations

import random
from array import array
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dispatcher.simulation.engine import EngineModel, Made
from dispatcher.simulation.kv_cache import BlocksRemoved, BlocksStored, CacheCleared, CacheEvent, block_hashes
from dispatcher.simulation.profile import Profile
from dispatcher.simulation.tokens import Answer, tokenise, word

SMALL = Profile(
    name="small",
    source="made up",
    fixed_s=0.001,
    prefill_token_s=1e-5,
    attention_s=1e-9,
    decode_sequence_s=1e-4,
    decode_context_s=1e-8,
    max_batched_tokens=64,
    max_running=4,
    block_tokens=4,
    kv_blocks=32,
)


def prompt(*numbers: int) -> array[int]:
    """Four tokens for each number."""
    return array("I", [1000 + number * 4 + place for number in numbers for place in range(4)])


def drain(model: EngineModel, made: list[Made] | None = None) -> list[Made]:
    """Step until nothing is left to do."""
    made = [] if made is None else made
    made += model.step(0.0 if model.due is None else model.due)
    while model.due is not None:
        made += model.step(model.due)
    return made


def submit(model: EngineModel, key: int, tokens: array[int], output_tokens: int = 1, salt: str = "") -> None:
    model.submit(key, tokens, output_tokens, output=Answer(tokens).token_id, salt=salt)


def replayed(events: list[CacheEvent]) -> set[int]:
    """The blocks that whoever follows the events believes in; checks that each event makes sense."""
    held: set[int] = set()
    for event in events:
        match event:
            case BlocksStored():
                assert event.parent is None or event.parent in held
                assert not held & set(event.hashes)
                assert len(event.token_ids) % len(event.hashes) == 0
                held |= set(event.hashes)
            case BlocksRemoved():
                assert set(event.hashes) <= held
                held -= set(event.hashes)
            case CacheCleared():
                held.clear()
    return held


def test_a_step_lasts_what_its_profile_says() -> None:
    model = EngineModel(SMALL)
    submit(model, 1, prompt(1, 2, 3), 2)
    assert model.step(10.0) == []
    assert model.due == pytest.approx(10.0 + 0.001 + 12e-5 + 144e-9)
    assert [one.is_first for one in model.step(model.due or 0.0)] == [True]
    assert [one.is_last for one in drain(model)] == [True]
    assert model.busy_s == pytest.approx(0.001 + 12e-5 + 144e-9 + 0.001 + 1e-4 + 12e-8)


def test_a_long_prompt_is_computed_in_chunks_within_the_budget() -> None:
    model = EngineModel(replace(SMALL, max_batched_tokens=16))
    submit(model, 1, prompt(*range(10)))
    steps = 0
    made = model.step(0.0)
    while model.due is not None:
        steps += 1
        made += model.step(model.due)
    assert steps == 3
    assert len(made) == 1
    assert model.computed_prompt_tokens == 40


def test_each_chunk_of_a_prompt_reads_back_what_came_before() -> None:
    model = EngineModel(replace(SMALL, max_batched_tokens=16, attention_s=0.0, prefill_context_s=1e-6))
    submit(model, 1, prompt(*range(10)))
    drain(model)
    assert model.busy_s == pytest.approx(3 * 0.001 + 40e-5 + (16 + 32) * 1e-6)


def test_a_prompt_waits_until_the_cache_has_room_for_all_of_it() -> None:
    model = EngineModel(replace(SMALL, max_batched_tokens=8, kv_blocks=8))
    submit(model, 1, prompt(1, 2, 3), 6)
    submit(model, 2, prompt(4, 5, 6, 7, 8, 9), 1)
    made = model.step(0.0)
    while not any(one.is_last for one in made):
        assert model.due is not None
        assert (model.running, model.waiting) == (1, 1)
        made += model.step(model.due)
    drain(model, made)
    assert [one.key for one in made if one.is_last] == [1, 2]
    assert model.preemptions == 0


def test_a_prompt_that_waits_does_not_keep_its_cached_prefix() -> None:
    model = EngineModel(replace(SMALL, kv_blocks=8, max_batched_tokens=64))
    submit(model, 1, prompt(1, 2, 3))
    drain(model)
    submit(model, 2, prompt(4, 5, 6), 12)
    model.step(0.0)
    submit(model, 3, prompt(1, 2, 3, 7, 8))
    made = drain(model)
    assert {one.key: one.cached_tokens for one in made} == {2: 0, 3: 8}


def test_a_shared_prefix_is_computed_once_but_the_last_token_always() -> None:
    model = EngineModel(SMALL)
    submit(model, 1, prompt(1, 2, 3))
    drain(model)
    submit(model, 2, prompt(1, 2, 3))
    submit(model, 3, prompt(1, 2, 9))
    submit(model, 4, prompt(9, 1, 2))
    submit(model, 5, prompt(1, 2, 3), salt="blue")
    assert {one.key: one.cached_tokens for one in drain(model)} == {2: 8, 3: 8, 4: 0, 5: 0}
    assert (model.prefix_queried_tokens, model.prefix_hit_tokens) == (60, 16)


def test_generated_tokens_are_cached_too() -> None:
    model = EngineModel(SMALL)
    first = prompt(1)
    submit(model, 1, first, 9)
    answer = array("I", [one.token_id for one in drain(model)])
    submit(model, 2, first + answer + prompt(7))
    assert [one.cached_tokens for one in drain(model)] == [12]


def test_decoding_goes_on_while_a_long_prompt_is_computed() -> None:
    model = EngineModel(SMALL)
    submit(model, 1, prompt(1), 30)
    model.step(0.0)
    assert model.due is not None
    model.step(model.due)
    submit(model, 2, prompt(*range(10, 28)))
    made: list[Made] = []
    while not any(one.key == 2 for one in made):
        assert model.due is not None
        made += model.step(model.due)
    assert sum(one.key == 1 for one in made) >= 2


def test_the_sequence_admitted_last_gives_way_and_loses_nothing() -> None:
    tight = replace(SMALL, kv_blocks=8)
    model = EngineModel(tight)
    prompts = {1: prompt(1, 2), 2: prompt(3, 4), 3: prompt(5, 6)}
    for key, tokens in prompts.items():
        submit(model, key, tokens, 20)
    made = drain(model)
    assert model.preemptions > 0
    for key, tokens in prompts.items():
        answer = Answer(tokens)
        assert [one.token_id for one in made if one.key == key] == [answer.token_id(n) for n in range(20)]
    assert next(one.key for one in made if one.is_last) == 1


def test_an_aborted_sequence_frees_its_slot_and_leaves_its_blocks() -> None:
    model = EngineModel(replace(SMALL, max_running=1))
    submit(model, 1, prompt(1, 2), 100)
    submit(model, 2, prompt(1, 2), 1)
    model.step(0.0)
    assert model.due is not None
    model.step(model.due)
    assert (model.running, model.waiting) == (1, 1)
    model.abort(1)
    model.abort(77)
    made = drain(model)
    assert [(one.key, one.cached_tokens) for one in made] == [(2, 4)]
    assert model.kv_used_blocks == 0


def test_the_oldest_tails_are_evicted_first() -> None:
    model = EngineModel(replace(SMALL, kv_blocks=8))
    submit(model, 1, prompt(1, 2, 3, 4, 5))
    drain(model)
    submit(model, 2, prompt(6, 7, 8, 9))
    drain(model)
    removed = [event for event in model.take_events() if isinstance(event, BlocksRemoved)]
    of_first = block_hashes(prompt(1, 2, 3, 4, 5), 4)
    assert [block for event in removed for block in event.hashes] == [of_first[4]]


def test_the_cache_is_reset_only_when_nobody_holds_it() -> None:
    model = EngineModel(SMALL)
    submit(model, 1, prompt(1, 2), 3)
    model.step(0.0)
    assert not model.reset_cache()
    drain(model)
    assert model.reset_cache()
    assert replayed(model.take_events()) == set() == model.cache.cached


@pytest.mark.parametrize(
    ("tokens", "output_tokens", "words"),
    [(prompt(), 1, "1 or more"), (prompt(1), 0, "1 or more"), (prompt(*range(40)), 1, "at most 128 tokens")],
)
def test_what_can_never_run_is_refused(tokens: array[int], output_tokens: int, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        EngineModel(SMALL).submit(1, tokens, output_tokens, output=lambda place: place)


def test_a_key_in_use_is_refused() -> None:
    model = EngineModel(SMALL)
    submit(model, 1, prompt(1))
    with pytest.raises(ValueError, match="already known"):
        submit(model, 1, prompt(1))


requests = st.lists(
    st.tuples(
        st.lists(st.integers(0, 3), min_size=1, max_size=8),
        st.integers(0, 3),
        st.integers(1, 12),
        st.floats(0, 0.02),
        st.sampled_from(["", "", "blue"]),
        st.booleans(),
    ),
    min_size=1,
    max_size=14,
)


@settings(max_examples=200, deadline=None)
@given(requests, st.integers(12, 40), st.integers(4, 64), st.integers(1, 6))
def test_every_sequence_ends_with_its_own_answer_and_events_tell_the_cache(
    asked: list[tuple[list[int], int, int, float, str, bool]], kv_blocks: int, budget: int, slots: int
) -> None:
    profile = replace(SMALL, kv_blocks=kv_blocks, max_batched_tokens=budget, max_running=slots)
    model = EngineModel(profile)
    now = 0.0
    made: list[Made] = []
    events: list[CacheEvent] = []
    prompts: dict[int, array[int]] = {}
    aborted = set()
    for key, (numbers, extra, output_tokens, gap_s, salt, aborts) in enumerate(asked):
        tokens = prompt(*numbers) + array("I", range(extra))
        prompts[key] = tokens
        submit(model, key, tokens, output_tokens, salt)
        now += gap_s
        made += model.step(now)
        if aborts:
            aborted.add(key)
            model.abort(key)
        events += model.take_events()
        assert model.kv_used_blocks <= kv_blocks
        assert replayed(events) == model.cache.cached
    drain(model, made)
    events += model.take_events()
    assert replayed(events) == model.cache.cached
    assert (model.running, model.waiting, model.kv_used_blocks) == (0, 0, 0)
    for key, tokens in prompts.items():
        answer = Answer(tokens)
        got = [one.token_id for one in made if one.key == key]
        assert got == [answer.token_id(place) for place in range(len(got))]
        if key not in aborted:
            assert len(got) == asked[key][2]
            (first,) = {one.cached_tokens for one in made if one.key == key}
            assert first % 4 == 0
            assert first < len(tokens)


def test_equal_inputs_give_equal_outputs() -> None:
    def run() -> list[Made]:
        rng = random.Random(3)
        model = EngineModel(replace(SMALL, kv_blocks=20))
        made = []
        for key in range(40):
            submit(model, key, prompt(*(rng.randrange(4) for _ in range(rng.randrange(1, 8)))), 5)
            made += model.step(key * 0.002)
        return drain(model, made)

    assert run() == run()


def test_equal_text_beginnings_are_equal_tokens() -> None:
    whole = tokenise("the same beginning, then more")
    assert tokenise("the same beginning, then")[:6] == whole[:6]
    assert len(tokenise("")) == 1
    assert all(1000 <= one < 17_384 for one in whole)
    assert word(whole[0]).startswith(" ")
