"""The calibration: a run that the model itself made is fitted and replayed to what it was made of."""

from __future__ import annotations

import random
from dataclasses import replace

import pytest

from dispatcher.simulation.profile import Profile
from tests.bench.calibration_fit import COEFFICIENTS, fit
from tests.bench.calibration_replay import predecessors, prompts, replay
from tests.bench.calibration_trace import Measured, Run, heard_until, with_unrecorded

ENGINE = Profile(
    name="known",
    source="made up",
    request_s=0.1,
    fixed_s=7e-3,
    prefill_token_s=2e-5,
    attention_s=1e-10,
    prefill_context_s=4e-6,
    decode_sequence_s=5e-4,
    decode_context_s=5e-9,
    block_tokens=32,
    kv_blocks=100_000,
)


def asked(number: int, sent_s: float, prompt: int, cached: int, output: int = 400) -> Measured:
    """A request that nobody has answered yet."""
    return Measured(
        user=f"User-{number:03}",
        family=f"User-{number:03}",
        prompt=prompt,
        cached=cached,
        output=output,
        sent_s=sent_s,
        first_s=sent_s,
        ended_s=sent_s,
        succeeded=True,
    )


def run_of(users: int, requests: list[Measured], heard_s: float = 1e6) -> Run:
    return Run(tp="tp8", users=users, offload=False, requests=tuple(requests), heard_s=heard_s)


def answered(users: int, turns: int, seed: int) -> Run:
    """What the model makes of `users` conversations of `turns` requests each."""
    rng = random.Random(seed)
    requests = []
    for number in range(1, users + 1):
        prompt = 0
        for turn in range(turns):
            cached = prompt
            prompt += rng.randrange(500, 3_000) if turn else rng.randrange(20_000, 120_000)
            requests.append(
                asked(number, turn * 1_000.0 + number * 0.01, prompt, cached, rng.randrange(300, 900))
            )
    requests.sort(key=lambda one: one.sent_s)
    made = replay(run_of(users, requests), ENGINE).requests
    return run_of(
        users,
        [
            replace(
                one,
                sent_s=made[place].sent_s,
                first_s=made[place].first_s,
                ended_s=made[place].ended_s or 0.0,
            )
            for place, one in enumerate(requests)
        ],
    )


def test_the_fit_finds_the_coefficients_that_made_the_runs() -> None:
    runs = [answered(1, 20, 1), answered(2, 20, 2), answered(8, 3, 3), answered(12, 3, 4), answered(16, 2, 5)]
    found = fit(runs, ENGINE.kv_tokens)
    # The end of one cold prompt shares a step with the beginning of the next.
    assert found.errors["cold prompt"]["median"] < 0.1
    assert found.errors["warm prompt"]["median"] < 0.02
    assert found.errors["answer"]["median"] < 0.02
    for name in COEFFICIENTS:
        assert found.coefficients[name] == pytest.approx(getattr(ENGINE, name), rel=0.15), name


def test_a_run_that_the_model_made_is_replayed_as_it_was() -> None:
    run = answered(8, 4, 6)
    again = replay(run, ENGINE).requests
    for place, one in enumerate(run.requests):
        assert again[place].first_s == pytest.approx(one.first_s)
        assert again[place].ended_s == pytest.approx(one.ended_s)


def test_a_prompt_shares_with_its_user_what_was_cached_and_nothing_else() -> None:
    requests = [
        asked(1, 0.0, 500, 0),
        asked(2, 0.1, 600, 0),
        asked(1, 1.0, 700, 500),
        asked(1, 2.0, 650, 300),
    ]
    first, other, second, third = prompts(requests)
    assert second[:500] == first
    assert third[:300] == first[:300]
    assert len(set(third[300:]) & (set(first) | set(other) | set(second))) == 0
    assert not set(other) & (set(first) | set(second))


def test_a_user_waits_for_its_own_family() -> None:
    requests = [
        replace(asked(1, 0.0, 10, 0), ended_s=5.0),
        replace(asked(2, 1.0, 10, 0), ended_s=6.0),
        replace(asked(3, 6.0, 10, 0), user="User-001-SA1", family="User-001", ended_s=9.0),
        replace(asked(1, 9.5, 10, 0), ended_s=12.0),
    ]
    assert predecessors(requests) == [None, None, 0, 2]


def test_nothing_is_trusted_from_the_first_long_silence_on() -> None:
    talking = [replace(asked(number, number * 10.0, 10, 0), first_s=50.0, ended_s=90.0) for number in (1, 2)]
    after = [replace(asked(number, 95.0 + number, 10, 0), first_s=900.0, ended_s=910.0) for number in (3, 4)]
    assert heard_until([*talking, *after]) == 99.0
    assert heard_until(talking) == 90.0


def test_users_without_a_record_were_being_answered_until_the_end() -> None:
    whole = run_of(3, [replace(asked(number, 1.0, 100 * number, 0), ended_s=9.0) for number in (1, 2, 3)])
    partial = run_of(2, [replace(asked(1, 1.0, 100, 0), ended_s=50.0)])
    recorded, added = with_unrecorded(partial, [whole, partial])
    assert recorded.user == "User-001"
    assert (added.user, added.prompt, added.succeeded, added.ended_s) == ("User-002", 200, False, 50.0)
