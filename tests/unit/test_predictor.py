"""Learning prefill times."""

from __future__ import annotations

import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dispatcher.scheduling.predictor import START, AnswerLength, Predictor, PrefillCost, PrefillShape

TRUE = PrefillCost(fixed_s=0.02, token_s=2.5e-5, attention_s=4e-10)


def taught(truth: PrefillCost, count: int, *, noise: float, seed: int) -> Predictor:
    rng = random.Random(seed)
    predictor = Predictor()
    for _ in range(count):
        uncached, cached = rng.randrange(50, 30_000), rng.randrange(0, 60_000)
        predictor.observe(
            uncached, cached, truth.seconds(uncached, cached) * rng.uniform(1 - noise, 1 + noise)
        )
    return predictor


@pytest.mark.parametrize("seed", range(5))
def test_it_learns_the_true_times_within_a_hundred_prefills(seed: int) -> None:
    predictor = taught(TRUE, 100, noise=0.1, seed=seed)
    for uncached, cached in ((100, 0), (2_000, 10_000), (20_000, 0), (30_000, 60_000)):
        assert predictor.cost.seconds(uncached, cached) == pytest.approx(
            TRUE.seconds(uncached, cached), rel=0.25
        )


def test_it_follows_a_node_that_becomes_slower() -> None:
    predictor = taught(TRUE, 200, noise=0.05, seed=1)
    rng = random.Random(2)
    for _ in range(300):
        uncached = rng.randrange(50, 30_000)
        predictor.observe(uncached, 0, 3 * TRUE.seconds(uncached, 0))
    assert predictor.cost.seconds(10_000, 0) == pytest.approx(3 * TRUE.seconds(10_000, 0), rel=0.2)


def test_one_stall_does_not_make_a_node_look_dead() -> None:
    predictor = taught(TRUE, 100, noise=0.05, seed=1)
    before = predictor.cost.seconds(5_000, 0)
    predictor.observe(5_000, 0, 300.0)
    assert predictor.cost.seconds(5_000, 0) < 3 * before


def test_many_equal_prompts_teach_their_time_and_stay_within_reason_elsewhere() -> None:
    predictor = Predictor()
    for _ in range(2_000):
        predictor.observe(1_000, 0, 0.05)
    assert predictor.cost.seconds(1_000, 0) == pytest.approx(0.05, rel=0.02)
    assert predictor.cost.seconds(4_000, 0) > 0.05


@given(
    st.lists(
        st.tuples(
            st.integers(-5, 10**6), st.integers(-5, 10**6), st.floats(allow_nan=True, allow_infinity=True)
        ),
        max_size=60,
    )
)
def test_no_observation_makes_a_prediction_absurd(seen: list[tuple[int, int, float]]) -> None:
    predictor = Predictor()
    for uncached, cached, seconds in seen:
        predictor.observe(uncached, cached, seconds)
    short, long = predictor.cost.seconds(100, 0), predictor.cost.seconds(10_000, 0)
    assert 0 < short < long < 1e9
    assert predictor.cost.seconds(0, 5_000) >= 0


def test_before_any_prefill_it_says_what_it_was_given() -> None:
    assert Predictor().cost == START
    assert Predictor(PrefillShape(TRUE)).cost == TRUE


def test_long_prompts_seen_by_one_node_teach_its_peers() -> None:
    shape = PrefillShape()
    rare, other = Predictor(shape), Predictor(shape)
    rng = random.Random(3)
    for _ in range(300):
        other.observe(uncached := rng.randrange(50, 3_000), 0, TRUE.seconds(uncached, 0))
        rare.observe(uncached := rng.randrange(50, 60_000), 0, 2 * TRUE.seconds(uncached, 0))
    assert other.cost.seconds(50_000, 0) == pytest.approx(TRUE.seconds(50_000, 0), rel=0.15)
    assert rare.cost.seconds(50_000, 0) == pytest.approx(2 * TRUE.seconds(50_000, 0), rel=0.1)


def test_answers_are_as_long_as_they_were_and_no_longer_than_allowed() -> None:
    answers = AnswerLength()
    assert answers.expected(4_000) == 4_000
    for tokens in (100, 0, 200, 300):
        answers.observe(tokens)
    assert answers.expected(4_000) == 200
    assert answers.expected(50) == 50
    for _ in range(5_000):
        answers.observe(1_000)
    assert answers.expected(4_000) == pytest.approx(1_000, abs=2)


def test_a_warm_up_does_not_make_a_new_node_look_dead() -> None:
    shape = PrefillShape()
    known = Predictor(shape)
    for _ in range(200):
        known.observe(1_000, 0, TRUE.seconds(1_000, 0))
    new = Predictor(shape)
    new.observe(1_000, 0, 60.0)
    assert new.cost.seconds(1_000, 0) < 10 * TRUE.seconds(1_000, 0)
    assert known.cost.seconds(1_000, 0) == pytest.approx(TRUE.seconds(1_000, 0), rel=0.1)


@pytest.mark.parametrize("times", [0.05, 20.0])
def test_a_new_node_is_taken_to_be_as_its_peers(times: float) -> None:
    shape, rng = PrefillShape(), random.Random(4)
    peers = [Predictor(shape) for _ in range(4)]
    for _ in range(400):
        uncached = rng.randrange(50, 30_000)
        rng.choice(peers).observe(uncached, 0, times * TRUE.seconds(uncached, 0))
    assert Predictor(shape).cost.seconds(5_000, 0) == pytest.approx(times * TRUE.seconds(5_000, 0), rel=0.2)


def test_scales_and_shape_do_not_drift_apart() -> None:
    shape, rng = PrefillShape(), random.Random(4)
    peers = [Predictor(shape) for _ in range(4)]
    for _ in range(60_000):
        uncached = int(min(80_000, max(20, rng.lognormvariate(6.5, 1.2))))
        rng.choice(peers).observe(uncached, 0, TRUE.seconds(uncached, 0) * rng.lognormvariate(0, 1.2))
    assert all(0.4 < one.scale < 2.5 for one in peers)


def test_an_answer_is_typically_as_long_as_others_whatever_one_request_allows() -> None:
    answers = AnswerLength()
    assert (answers.typical(1), answers.typical(4_000)) == (100, 4_000)
    answers.observe(300)
    assert answers.typical(1) == 300
