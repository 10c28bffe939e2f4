"""Prefill and decode nodes between real servers: one answer in two stages, and what breaks between them."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator
from typing import Any, NamedTuple

import aiohttp
import pytest

from dispatcher.app import Dispatcher
from dispatcher.backends.connect import KafkaClients
from dispatcher.local.valkey import ValkeyServer
from dispatcher.protocol.node import Role
from dispatcher.protocol.outcome import Outcome, OutcomeKind
from dispatcher.simulation.tokens import Answer, tokenise
from tests.contract.test_agent import chunks_of, running_agent
from tests.support.pool import MODEL, Pool, request
from tests.support.wait import wait_until
from workers_agent.engines.openai_http import OpenAIEngine
from workers_agent.simulator.kv_transfer import Lender
from workers_agent.simulator.server import Simulator, SimulatorSettings

pytestmark = pytest.mark.kafka

PROMPT = "Once upon a time, in a land of many blocks, there lived a prompt of some length."
TOKENS = 12
BODY = {"model": MODEL, "prompt": PROMPT, "max_tokens": TOKENS}


class Led(NamedTuple):
    """A pool, and the dispatcher that leads it."""

    pool: Pool
    dispatcher: Dispatcher

    def knows(self, name: str) -> bool:
        """Whether a node may be given work."""
        state = self.dispatcher.state
        node = state.fleet.nodes.get(name) if state is not None else None
        return node is not None and node.is_eligible


@pytest.fixture
async def led(kafka_clients: KafkaClients, valkey: ValkeyServer, pool: str) -> AsyncIterator[Led]:
    """A pool with a dispatcher that splits everything, and no node."""
    async with (
        Pool(kafka_clients, valkey.url, pool, policy="least_outstanding_tokens") as one,
        one.running(one.dispatcher()) as dispatcher,
    ):
        await wait_until(lambda: dispatcher.state is not None, "a leader")
        yield Led(one, dispatcher)


@contextlib.asynccontextmanager
async def node(led: Led, name: str, role: Role) -> AsyncIterator[Simulator]:
    """An agent of that role; its engine."""
    simulator = Simulator(SimulatorSettings(model=MODEL, time_scale=0.0))
    engine = OpenAIEngine(await simulator.start())
    try:
        async with running_agent(led.pool, engine, node=name, heartbeat_ttl_s=20, role=role):
            await wait_until(lambda: led.knows(name), f"node {name}")
            yield simulator
    finally:
        await simulator.close()


async def answered(led: Led, **fields: Any) -> Outcome:
    """The outcome of one request."""
    await led.pool.append(request("r1", **{"body": BODY, **fields}))
    return await led.pool.outcome("r1")


def text_of(outcome: Outcome) -> str:
    """The first choice."""
    return outcome.choices[0].text


WHOLE = Answer(tokenise(PROMPT)).text(TOKENS)


async def test_one_node_computes_the_prompt_and_the_other_answers(led: Led) -> None:
    async with node(led, "p", Role.PREFILL) as prefill, node(led, "d", Role.DECODE) as decode:
        outcome = await answered(led)
        chunks = await chunks_of(led.pool, "r1")
        await wait_until(lambda: not prefill.engine.kv_used_blocks, "the lent blocks back")
    assert (outcome.kind, text_of(outcome)) == (OutcomeKind.COMPLETED, WHOLE)
    assert (outcome.prefill_node, outcome.node) == ("p", "d")
    assert {chunk.node for chunk in chunks} == {"d"}
    length = len(tokenise(PROMPT))
    assert prefill.engine.computed_prompt_tokens == length
    assert decode.engine.computed_prompt_tokens == 1
    assert (outcome.usage.prompt_tokens, outcome.usage.cached_tokens) == (length, 0)
    assert outcome.attempt.endswith("_2")
    assert not prefill.lender.expired


async def test_cached_tokens_are_the_prefill_nodes(led: Led) -> None:
    async with node(led, "p", Role.PREFILL), node(led, "d", Role.DECODE):
        await answered(led)
        await led.pool.append(request("r2", body=BODY))
        again = await led.pool.outcome("r2")
    length = len(tokenise(PROMPT))
    assert again.prefill_node == "p"
    assert 0 < again.usage.cached_tokens < length


async def test_blocks_that_are_lent_no_more_are_computed_again(
    led: Led, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = 0
    told = Lender.tokens_of

    def forgets_once(lender: Lender, engine_id: str, request: str) -> int | None:
        nonlocal asked
        asked += 1
        return None if asked == 1 else told(lender, engine_id, request)

    monkeypatch.setattr(Lender, "tokens_of", forgets_once)
    async with node(led, "p", Role.PREFILL), node(led, "d", Role.DECODE):
        outcome = await answered(led)
    assert (outcome.kind, text_of(outcome)) == (OutcomeKind.COMPLETED, WHOLE)
    assert asked > 1
    assert int(outcome.attempt.rpartition("_")[2]) > 2


async def test_an_engine_that_names_no_blocks_is_passed_over(
    led: Led, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Simulator, "_lent", lambda *_: None)
    async with node(led, "p", Role.PREFILL), node(led, "d", Role.DECODE):
        outcome = await answered(led)
    assert (outcome.kind, text_of(outcome)) == (OutcomeKind.COMPLETED, WHOLE)
    assert (outcome.prefill_node, outcome.node) == ("", "d")


async def test_several_choices_are_not_split(led: Led) -> None:
    async with node(led, "p", Role.PREFILL) as prefill, node(led, "d", Role.DECODE):
        outcome = await answered(led, body={**BODY, "n": 2})
    assert outcome.kind is OutcomeKind.COMPLETED
    assert len(outcome.choices) == 2
    assert (outcome.prefill_node, outcome.node) == ("", "d")
    assert not prefill.engine.generated_tokens


async def test_a_request_waits_between_the_stages_while_its_decode_node_is_away(led: Led) -> None:
    async with node(led, "p", Role.PREFILL):
        # Nobody else serves the model: the prefill node answers alone.
        outcome = await answered(led)
    assert (outcome.kind, outcome.node, outcome.prefill_node) == (OutcomeKind.COMPLETED, "p", "")


async def test_a_loan_ends_with_its_lease() -> None:
    released: list[int] = []

    lender = Lender("engine", released.append, lambda _: 0.0)
    params = lender.lend("r", 7, 33, "host", 80, 16)
    assert params["remote_block_ids"] == [[0, 1, 2]]
    assert lender.tokens_of("engine", "r") == 33
    assert lender.tokens_of("another", "r") is None
    await wait_until(lambda: bool(released), "the end of the lease")
    assert (released, lender.expired, lender.tokens_of("engine", "r")) == ([7], 1, None)


async def test_the_simulated_engine_refuses_what_vllm_refuses() -> None:
    simulator = Simulator(SimulatorSettings(model=MODEL, time_scale=0.0))
    url = await simulator.start()
    try:
        async with aiohttp.ClientSession() as session:

            async def status(**fields: Any) -> int:
                body = {**BODY, **fields}
                async with session.post(f"{url}/v1/completions", json=body) as response:
                    return response.status

            ask = {"do_remote_decode": True}
            assert await status(max_tokens=1, kv_transfer_params=ask) == 200
            assert await status(max_tokens=2, kv_transfer_params=ask) == 400
            assert await status(max_tokens=1, n=2, kv_transfer_params=ask) == 400
            assert await status(kv_transfer_params={"do_remote_decode": "yes"}) == 400
            assert await status(kv_transfer_params={"do_remote_prefill": True}) == 400
            gone = {"remote_host": "127.0.0.1", "remote_port": 1, "remote_request_id": "r"}
            assert await status(kv_transfer_params={"do_remote_prefill": True, **gone}) == 500
    finally:
        await simulator.close()
        await asyncio.sleep(0)
