"""Agents between real servers and simulated engines: an answer that is cut goes on elsewhere."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator
from typing import Any

import pytest

from dispatcher.backends.connect import KafkaClients
from dispatcher.client.reader import ReplyReader
from dispatcher.local.valkey import ValkeyServer
from dispatcher.protocol import codec
from dispatcher.protocol.chunk import Chunk, ChunkKind
from dispatcher.protocol.outcome import Outcome, OutcomeKind, Usage
from dispatcher.simulation.tokens import Answer, tokenise
from tests.contract.test_agent import chunks_of, running_agent
from tests.support.pool import MODEL, Pool, request
from tests.support.wait import wait_until
from workers_agent.app import Agent
from workers_agent.engines.openai_http import OpenAIEngine
from workers_agent.simulator.faults import Faults
from workers_agent.simulator.server import Simulator, SimulatorSettings
from workers_agent.simulator.wire import Message, render_chat

pytestmark = pytest.mark.kafka

PROMPT = "Once upon a time"
TOKENS = 40
BODY = {"model": MODEL, "prompt": PROMPT, "max_tokens": TOKENS}
FAILS = Faults(stall_rate=1.0)
"""Each answer falls silent at its half."""


@pytest.fixture
async def led(kafka_clients: KafkaClients, valkey: ValkeyServer, pool: str) -> AsyncIterator[Pool]:
    """A pool with a dispatcher and no node."""
    async with Pool(kafka_clients, valkey.url, pool) as one, one.running(one.dispatcher()):
        yield one


@contextlib.asynccontextmanager
async def node(
    led: Pool, name: str, *, time_scale: float = 0.0, faults: Faults | None = None, **settings: Any
) -> AsyncIterator[tuple[Agent, asyncio.Event]]:
    """An agent and its simulated engine."""
    simulator = Simulator(SimulatorSettings(model=MODEL, time_scale=time_scale, faults=faults or Faults()))
    url = await simulator.start()
    try:
        engine = OpenAIEngine(url, inter_token_timeout_s=0.5 if faults else 20)
        async with running_agent(led, engine, node=name, heartbeat_ttl_s=20, **settings) as (agent, stop):
            yield agent, stop
    finally:
        await simulator.close()


def whole(prompt: str = PROMPT) -> tuple[str, tuple[int, ...]]:
    """Text and token ids of an unbroken run."""
    answer = Answer(tokenise(prompt))
    return answer.text(TOKENS), tuple(answer.token_id(place) for place in range(TOKENS))


def ids_of(chunks: list[Chunk]) -> list[int]:
    """The token ids that a client has taken, in the order of the log."""
    ids: list[int] = []
    for chunk in chunks:
        if chunk.restarted:
            ids.clear()
        for delta in chunk.choices:
            if chunk.first_token == len(ids):
                ids += delta.token_ids or ()
    return ids


def followed(chunks: list[Chunk], outcome: Outcome) -> ReplyReader:
    """A reader that has seen everything; the stream alone shows the whole answer."""
    reader = ReplyReader()
    for chunk in chunks:
        reader.read(chunk)
    assert reader.text == outcome.choices[0].text
    reader.end(outcome)
    return reader


def resumes(agent: Agent, result: str) -> float:
    """How often the agent made this of a checkpoint."""
    return float(agent.metrics.resumes.labels(result)._value.get())


async def two_runs(led: Pool, **fields: Any) -> tuple[Outcome, list[Chunk], Agent]:
    """A request whose first run breaks off at its half, on one node, and whose second is on another."""
    async with node(led, "n1", faults=FAILS) as (first, _):
        await led.append(request("r1", **fields))
        await wait_until(
            lambda: first.metrics.endings.labels("failed", "stalled")._value.get() > 0, "a failure"
        )
        async with node(led, "n2") as (second, _):
            outcome = await led.outcome("r1")
            return outcome, await chunks_of(led, "r1"), second


async def test_an_answer_that_breaks_off_goes_on_at_another_node(led: Pool) -> None:
    outcome, chunks, agent = await two_runs(led, body=BODY)
    text, ids = whole()
    assert (outcome.kind, outcome.node) == (OutcomeKind.COMPLETED, "n2")
    assert (outcome.choices[0].text, outcome.choices[0].finish_reason) == (text, "length")
    assert outcome.usage == Usage(
        prompt_tokens=len(tokenise(PROMPT)),
        completion_tokens=TOKENS,
        cached_tokens=outcome.usage.cached_tokens,
    )
    assert tuple(ids_of(chunks)) == ids
    assert followed(chunks, outcome).restarts == 0
    last = [chunk for chunk in chunks if chunk.node == "n2"]
    assert not last[0].restarted
    assert last[1].first_token >= TOKENS // 2
    assert resumes(agent, "continued") == 1
    assert agent.metrics.resumed_tokens._value.get() == last[1].first_token


async def test_a_chat_goes_on_too(led: Pool) -> None:
    messages = [{"role": "user", "content": "hello"}]
    outcome, chunks, _ = await two_runs(
        led,
        endpoint="/v1/chat/completions",
        body={"model": MODEL, "messages": messages, "max_tokens": TOKENS},
    )
    prompt = render_chat([Message(role="user", content="hello")])
    assert outcome.choices[0].text == whole(prompt)[0]
    assert followed(chunks, outcome).restarts == 0


@pytest.mark.parametrize("fields", [{"seed": 1}, {"stop": ["zz"]}, {"frequency_penalty": 0.5}], ids=str)
async def test_what_can_not_go_on_soundly_starts_over(led: Pool, fields: dict[str, Any]) -> None:
    outcome, chunks, _ = await two_runs(led, body={**BODY, **fields})
    assert outcome.choices[0].text == whole()[0]
    assert followed(chunks, outcome).restarts >= 1


async def test_an_engine_without_the_tokens_text_starts_over(
    led: Pool, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def other_text(*_: object) -> str:
        return "something else"

    monkeypatch.setattr(OpenAIEngine, "text_of", other_text)
    outcome, chunks, agent = await two_runs(led, body=BODY)
    assert outcome.choices[0].text == whole()[0]
    assert outcome.usage.completion_tokens == TOKENS
    assert followed(chunks, outcome).restarts >= 1
    assert resumes(agent, "unknown_tokens") >= 1


async def test_a_drained_node_hands_on_what_it_has_streamed(led: Pool) -> None:
    async with node(led, "n1", time_scale=20.0, drain_grace_s=0.0) as (first, stop):
        await led.append(request("r1", body=BODY))
        await wait_until(lambda: first.metrics.chunks._value.get() >= 3, "some chunks")
        async with node(led, "n2") as (second, _):
            stop.set()
            outcome = await led.outcome("r1")
            assert resumes(second, "continued") == 1
    assert (outcome.choices[0].text, outcome.node) == (whole()[0], "n2")
    assert followed(await chunks_of(led, "r1"), outcome).restarts == 0


async def test_a_checkpoint_is_kept_beside_the_lease(led: Pool) -> None:
    async with node(led, "n1", time_scale=20.0) as (agent, _):
        await led.append(request("r1", body=BODY))
        await wait_until(lambda: agent.state is not None and bool(agent.state.held), "a claim")
        assert agent.state is not None
        job = next(iter(agent.state.held))

        async def is_kept() -> bool:
            return bool(await led.redis.hget(led.names.job(job), "checkpoint"))

        await wait_until(is_kept, "the checkpoint")
        kept = codec.checkpoints.decode(await led.redis.hget(led.names.job(job), "checkpoint"))
        await led.cancel("r1")
        await led.outcome("r1")
    begun = [chunk for chunk in await chunks_of(led, "r1") if chunk.kind is ChunkKind.BEGIN]
    assert len(begun) == 1
    assert kept.offset == 0
