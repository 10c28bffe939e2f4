"""Synthesised prompts share tokens exactly where their traces share blocks."""

from __future__ import annotations

import itertools
import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dispatcher.protocol.prefix_hash import block_hashes
from dispatcher.protocol.request import INLINE_BODY_BYTES, Endpoint
from dispatcher.replay.synthesis import prompt_tokens, scaled, synthesise
from dispatcher.replay.traces import TraceRequest, read_excerpt


def request(length: int, *block_ids: int, output: int = 7, block_tokens: int = 512) -> TraceRequest:
    return TraceRequest(
        arrival_s=0,
        prompt_tokens=length,
        output_tokens=output,
        block_ids=block_ids,
        block_tokens=block_tokens if block_ids else 0,
    )


def test_a_request_says_what_the_router_and_the_engine_need() -> None:
    made = synthesise(request(1100, 5, 6, 7), index=0, model="m")
    body = json.loads(made.body)
    assert made.endpoint is Endpoint.COMPLETIONS
    assert (body["model"], body["max_tokens"], made.max_tokens) == ("m", 7, 7)
    assert len(body["prompt"]) == made.tokens.count == 1100
    assert made.tokens.block_size == 256
    assert made.tokens.block_hashes == block_hashes(body["prompt"], model="m")
    assert len(made.tokens.block_hashes) == 4


def test_tokens_depend_on_the_block_id_alone() -> None:
    one, other = request(1024, 5, 6), request(1024, 5, 9)
    first, second = prompt_tokens(one, index=0), prompt_tokens(other, index=99)
    assert first[:512] == second[:512]
    assert first[512:] != second[512:]
    assert first[:4].tolist() == [11464, 12923, 2444, 15099]


def test_a_trace_block_is_two_routing_blocks() -> None:
    shared = synthesise(request(1024, 5, 6), index=0, model="m").tokens.block_hashes
    other = synthesise(request(1024, 5, 8), index=1, model="m").tokens.block_hashes
    assert shared[:2] == other[:2]
    assert shared[2] != other[2]


def test_what_no_block_covers_is_shared_with_nobody() -> None:
    assert prompt_tokens(request(600), index=1) != prompt_tokens(request(600), index=2)
    tails = [prompt_tokens(request(700, 5), index=index) for index in (1, 2)]
    assert tails[0][:512] == tails[1][:512]
    assert tails[0][512:] != tails[1][512:]


@given(st.integers(1, 5000), st.lists(st.integers(0, 9), max_size=6), st.sampled_from([1.0, 0.5, 0.1, 0.01]))
def test_a_prompt_has_its_scaled_length(length: int, block_ids: list[int], scale: float) -> None:
    prompt = prompt_tokens(request(length, *block_ids), index=3, token_scale=scale)
    assert len(prompt) == scaled(length, scale) >= 1
    assert all(1000 <= token < 17_384 for token in prompt)


def test_scaled_prompts_still_share_their_prefix() -> None:
    scale = 0.1
    prompts = [prompt_tokens(request(2048, 1, 2, 3, last), index=last, token_scale=scale) for last in (7, 8)]
    assert prompts[0][:153] == prompts[1][:153]
    assert prompts[0][153:] != prompts[1][153:]


def test_output_is_at_least_one_token() -> None:
    assert synthesise(request(10, output=0), index=0, model="m").max_tokens == 1
    assert synthesise(request(10, output=40), index=0, model="m", token_scale=0.1).max_tokens == 4


def test_prompts_of_real_size_travel_by_reference() -> None:
    sizes = [
        len(synthesise(one, index=index, model="m").body)
        for index, one in enumerate(itertools.islice(read_excerpt(), 100))
    ]
    assert sum(size > INLINE_BODY_BYTES for size in sizes) > 50


@pytest.mark.parametrize("block_size", [64, 512])
def test_the_routing_block_is_the_pools(block_size: int) -> None:
    made = synthesise(request(1024, 1, 2), index=0, model="m", block_size=block_size)
    assert (made.tokens.block_size, len(made.tokens.block_hashes)) == (block_size, 1024 // block_size)
