"""The simulated engine's model: what a step gives, how long it lasts, what the cache saves."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from workers_agent.simulator.model import (
    Answer,
    EngineModel,
    Profile,
    Token,
    block_hashes,
    count_tokens,
)

PROFILE = Profile(
    prefill_tokens_per_s=1_000,
    decode_step_s=0.01,
    decode_step_s_per_sequence=0.001,
    max_running=2,
    max_prefill_tokens=100,
    cache_blocks=8,
)


def run(engine: EngineModel, now: float = 0.0) -> list[tuple[float, Token]]:
    """Step to the end; each token with the time it was made at."""
    made = [(now, token) for token in engine.step(now)]
    while engine.due is not None:
        now = engine.due
        made += [(now, token) for token in engine.step(now)]
    return made


def test_prefill_gives_the_first_token_and_each_step_one_more() -> None:
    engine = EngineModel(PROFILE)
    engine.submit(1, prompt_tokens=50, output_tokens=3)
    made = run(engine, now=10.0)
    assert [at for at, _ in made] == pytest.approx([10.05, 10.06, 10.07])
    assert [token.is_last for _, token in made] == [False, False, True]


def test_a_larger_batch_takes_longer_steps() -> None:
    engine = EngineModel(PROFILE)
    engine.submit(1, prompt_tokens=50, output_tokens=2)
    engine.submit(2, prompt_tokens=50, output_tokens=2)
    made = run(engine)
    assert [at for at, _ in made] == pytest.approx([0.1, 0.1, 0.111, 0.111])


def test_a_long_prompt_is_prefilled_in_chunks_while_others_decode() -> None:
    engine = EngineModel(PROFILE)
    engine.submit(1, prompt_tokens=10, output_tokens=4)
    engine.step(0.0)
    engine.submit(2, prompt_tokens=150, output_tokens=1)
    made = run(engine)
    assert [(round(at, 3), token.key) for at, token in made] == [
        (0.01, 1),
        (0.12, 1),
        (0.18, 1),
        (0.18, 2),
        (0.19, 1),
    ]


def test_what_does_not_fit_waits_in_order() -> None:
    engine = EngineModel(PROFILE)
    for key in range(4):
        engine.submit(key, prompt_tokens=1, output_tokens=2)
    engine.step(0.0)
    assert (engine.running, engine.waiting) == (2, 2)
    assert [token.key for _, token in run(engine) if token.is_last] == [0, 1, 2, 3]
    assert (engine.running, engine.waiting) == (0, 0)


def test_an_aborted_sequence_makes_no_token_and_frees_its_slot() -> None:
    engine = EngineModel(PROFILE)
    for key in range(3):
        engine.submit(key, prompt_tokens=1, output_tokens=5)
    engine.step(0.0)
    engine.abort(0)
    engine.abort(77)
    assert {token.key for _, token in run(engine)} == {1, 2}


def test_a_late_caller_gets_every_step_that_was_due() -> None:
    late, prompt = EngineModel(PROFILE), EngineModel(PROFILE)
    for engine in (late, prompt):
        engine.submit(1, prompt_tokens=50, output_tokens=5)
    late.step(0.0)
    assert late.step(9.0) == [token for _, token in run(prompt)]
    assert late.due is None


def test_a_repeated_prompt_is_cached_but_for_its_last_token() -> None:
    engine = EngineModel(PROFILE)
    prompt = list(range(64))
    engine.submit(1, prompt_tokens=64, output_tokens=1, blocks=block_hashes(prompt))
    assert [token.cached_tokens for _, token in run(engine)] == [0]
    engine.submit(2, prompt_tokens=64, output_tokens=1, blocks=block_hashes(prompt))
    ((at, token),) = run(engine)
    assert token.cached_tokens == 63
    assert at == pytest.approx(0.001)
    engine.submit(3, prompt_tokens=64, output_tokens=1, blocks=block_hashes(prompt, salt="other"))
    assert [token.cached_tokens for _, token in run(engine)] == [0]


def test_the_cache_forgets_the_least_recent_from_its_end() -> None:
    engine = EngineModel(PROFILE)
    first, second = list(range(64)), list(range(100, 196))
    cached = []
    for key, prompt in enumerate((first, second, first)):
        engine.submit(key, prompt_tokens=200, output_tokens=1, blocks=block_hashes(prompt))
        cached += [token.cached_tokens for _, token in run(engine)]
    assert cached == [0, 0, 32]


def test_blocks_are_shared_by_a_common_beginning_only() -> None:
    one, other = block_hashes("a" * 64 + "b" * 64), block_hashes("a" * 64 + "c" * 100)
    assert one[0] == other[0]
    assert one[1] != other[1]
    assert block_hashes("a" * 63) == ()


@given(st.text(max_size=40))
def test_an_answer_depends_on_prompt_and_choice_alone(prompt: str) -> None:
    answer = Answer(prompt).text(6)
    assert answer == Answer(prompt).text(6)
    assert Answer(prompt).text(9).startswith(answer)
    assert answer != Answer(prompt, 1).text(6)
    assert answer != Answer(prompt + "x").text(6)


def test_prompts_are_counted_by_ids_or_by_four_characters() -> None:
    assert [count_tokens(prompt) for prompt in ("", "abc", "abcde", [1, 2, 3])] == [1, 1, 2, 3]


@pytest.mark.parametrize(("prompt_tokens", "output_tokens"), [(0, 1), (1, 0)])
def test_an_empty_sequence_is_a_mistake(prompt_tokens: int, output_tokens: int) -> None:
    with pytest.raises(ValueError, match="1 or more"):
        EngineModel(PROFILE).submit(1, prompt_tokens=prompt_tokens, output_tokens=output_tokens)


@given(
    st.lists(
        st.tuples(st.integers(1, 300), st.integers(1, 5), st.floats(0, 1), st.booleans()),
        min_size=1,
        max_size=12,
    )
)
def test_every_sequence_gets_exactly_its_tokens(arrivals: list[tuple[int, int, float, bool]]) -> None:
    engine = EngineModel(PROFILE)
    made: dict[int, list[bool]] = {key: [] for key in range(len(arrivals))}
    now = 0.0
    for key, (prompt_tokens, output_tokens, gap_s, _) in enumerate(arrivals):
        now += gap_s
        for token in engine.step(now):
            made[token.key].append(token.is_last)
        engine.submit(key, prompt_tokens=prompt_tokens, output_tokens=output_tokens)
        if arrivals[key - 1][3] and key:
            engine.abort(key - 1)
        assert engine.running <= PROFILE.max_running
    for _, token in run(engine, now):
        made[token.key].append(token.is_last)
    for key, (_, output_tokens, _, is_aborted) in enumerate(arrivals):
        whole = [False] * (output_tokens - 1) + [True]
        if is_aborted and key + 1 < len(arrivals):
            assert made[key] == whole[: len(made[key])]
        else:
            assert made[key] == whole
