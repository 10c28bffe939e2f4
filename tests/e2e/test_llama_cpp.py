"""The whole path to llama.cpp's own server, an engine that we did not write, on real Kafka and Valkey.

The model is random and tiny; its greedy answers are the same on every run, so they can be compared with what
the engine answers when asked directly. llama.cpp has no KV events, so nothing here is about routing by cache;
simulated engines are for that. One stack serves all tests of this file.
"""

from __future__ import annotations

import asyncio
import uuid
from collections.abc import AsyncIterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import pytest_asyncio

from dispatcher.audit import audit
from dispatcher.backends.connect import connect_redis
from dispatcher.client.client import Client
from dispatcher.client.reader import TextAdded
from dispatcher.local.stack import LocalStack, StackSettings
from dispatcher.protocol import codec
from dispatcher.protocol.node import NodeReport
from dispatcher.protocol.outcome import Outcome, OutcomeKind, Reason
from dispatcher.protocol.request import Tokens
from tests.support.llama_cpp import MODEL, SLOT_TOKENS, SLOTS, LlamaServer
from tests.support.servers import KafkaAddress
from tests.support.wait import wait_until

pytestmark = [pytest.mark.kafka, pytest.mark.timeout(120), pytest.mark.asyncio(loop_scope="module")]

COMPLETIONS, CHAT = "/v1/completions", "/v1/chat/completions"
GREEDY = {"temperature": 0, "cache_prompt": False}
"""Without a cached prompt, so that sums are taken in the same order each time."""
MOST_TOKENS = SLOT_TOKENS - 100
LONG_TOKENS = 10_000
LONG = {"prompt": "bana", "max_tokens": LONG_TOKENS, **GREEDY}
ENDLESS = {"prompt": "bana", "max_tokens": MOST_TOKENS, **GREEDY}


@dataclass(frozen=True, kw_only=True)
class Served:
    """An engine and the stack before it."""

    engine: LlamaServer
    stack: LocalStack

    def client(self) -> Client:
        """A client of the stack."""
        return Client(self.stack.kafka, self.stack.settings.pool)

    async def report(self) -> NodeReport:
        """The node's last report."""
        redis = connect_redis(self.stack.redis)
        try:
            told = await redis.hget(self.stack.names.load("node-1"), "report")
        finally:
            await redis.aclose()
        assert told is not None, "the node has fallen silent"
        return codec.reports.decode(told)

    async def is_idle(self) -> bool:
        """Whether the engine runs nothing."""
        return await self.engine.busy_slots() == 0


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def served(kafka: KafkaAddress, tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Served]:
    """One engine behind one dispatcher and one agent."""
    folder: Path = tmp_path_factory.mktemp("llama")
    async with LlamaServer(folder / "engine") as engine:
        settings = StackSettings(
            nodes=1,
            dispatchers=1,
            kafka=kafka.bootstrap,
            engines=(engine.url,),
            pool=f"t{uuid.uuid4().hex}",
            partitions=1,
            model=MODEL,
            max_running=2 * SLOTS,
        )
        async with LocalStack(settings, folder=folder / "stack") as stack:
            yield Served(engine=engine, stack=stack)


async def followed(client: Client, id: str) -> tuple[list[str], Outcome]:
    """The text of each event until the outcome, and the outcome."""
    async with asyncio.timeout(60):
        texts = [event.text async for event in client.stream(id) if isinstance(event, TextAdded)]
        return texts, await client.outcome(id)


async def has_begun(client: Client, id: str) -> None:
    """Return once some text has come."""
    async with asyncio.timeout(30):
        async for event in client.stream(id):
            if isinstance(event, TextAdded):
                return
    raise AssertionError(f"{id} ended without any text")


@pytest.mark.parametrize(
    ("endpoint", "prompt"),
    [
        (COMPLETIONS, {"prompt": "bana bare"}),
        (CHAT, {"messages": [{"role": "user", "content": "bana bare"}]}),
    ],
    ids=["completion", "chat"],
)
async def test_answer_is_streamed_and_is_what_the_engine_says_itself(
    served: Served, endpoint: str, prompt: dict[str, Any]
) -> None:
    body = {**prompt, **GREEDY, "max_tokens": 300}
    status, direct = await served.engine.ask(endpoint, body)
    assert status == 200
    choice = direct["choices"][0]
    said = choice["text"] if endpoint == COMPLETIONS else choice["message"]["content"]
    async with served.client() as client:
        texts, outcome = await followed(client, await client.submit(MODEL, endpoint, body))
    assert (outcome.kind, outcome.reason) == (OutcomeKind.COMPLETED, Reason.FINISHED)
    assert [(one.text, one.finish_reason) for one in outcome.choices] == [(said, "length")]
    assert "".join(texts) == said
    assert outcome.usage.completion_tokens == direct["usage"]["completion_tokens"] == 300
    assert outcome.usage.prompt_tokens == direct["usage"]["prompt_tokens"]
    assert outcome.timing.appended <= outcome.timing.first_token <= outcome.timing.ended


async def test_a_stop_word_ends_the_answer_before_it(served: Served) -> None:
    async with served.client() as client:
        whole = await client.submit(MODEL, COMPLETIONS, {"prompt": "gure", **GREEDY, "max_tokens": 30})
        words = (await client.outcome(whole)).choices[0].text.split()
        stop = words[10]
        body = {"prompt": "gure", **GREEDY, "max_tokens": 30, "stop": [stop]}
        outcome = await client.outcome(await client.submit(MODEL, COMPLETIONS, body))
    assert outcome.choices[0].finish_reason == "stop"
    assert outcome.choices[0].text.split() == words[: words.index(stop)]
    assert 0 < outcome.usage.completion_tokens < 30


async def test_every_choice_of_every_prompt_is_answered(served: Served) -> None:
    body = {"prompt": ["bana", "gure"], "n": 2, "max_tokens": 5, "temperature": 1.0}
    async with served.client() as client:
        outcome = await client.outcome(await client.submit(MODEL, COMPLETIONS, body))
    assert outcome.kind is OutcomeKind.COMPLETED, outcome
    assert [(one.index, one.finish_reason) for one in outcome.choices] == [(n, "length") for n in range(4)]
    assert all(len(one.text.split()) == 5 for one in outcome.choices)


async def test_what_the_engine_had_cached_is_in_the_usage(served: Served) -> None:
    body = {"prompt": "cesi " * 50, "max_tokens": 1, "temperature": 0}
    async with served.client() as client:
        first, second = [
            await client.outcome(await client.submit(MODEL, COMPLETIONS, body)) for _ in range(2)
        ]
    assert first.usage.cached_tokens < second.usage.cached_tokens == second.usage.prompt_tokens - 1


@pytest.mark.parametrize(
    ("endpoint", "body", "words"),
    [
        (COMPLETIONS, {"prompt": "x", "temperature": "hot"}, "type must be number, but is string"),
        (COMPLETIONS, {"prompt": "x", "grammar": "root ::= ("}, "failed to parse grammar"),
        (CHAT, {"messages": [{"role": "user"}]}, "must contain 'content'"),
        (COMPLETIONS, {"prompt": [1] * (SLOT_TOKENS + 1)}, "exceeds the available context size"),
    ],
    ids=["wrong type", "wrong grammar", "no content", "too long"],
)
async def test_what_the_engine_refuses_is_refused_in_its_words(
    served: Served, endpoint: str, body: dict[str, Any], words: str
) -> None:
    status, direct = await served.engine.ask(endpoint, body)
    async with served.client() as client:
        outcome = await client.outcome(await client.submit(MODEL, endpoint, body))
    assert (outcome.kind, outcome.reason) == (OutcomeKind.FAILED, Reason.ENGINE_REFUSED), outcome
    assert outcome.http_status == status == 400
    assert words in outcome.message
    assert direct["error"]["type"] in outcome.message


async def test_a_prompt_above_the_context_of_a_slot_never_reaches_the_engine(served: Served) -> None:
    async with served.client() as client:
        tokens = Tokens(count=SLOT_TOKENS + 1)
        id = await client.submit(MODEL, COMPLETIONS, {"prompt": "bana"}, tokens=tokens)
        outcome = await client.outcome(id)
    assert (outcome.kind, outcome.reason) == (OutcomeKind.REJECTED, Reason.PROMPT_TOO_LONG)


async def test_a_cancel_aborts_the_request_in_the_engine(served: Served) -> None:
    before = await served.engine.generated_tokens()
    async with served.client() as client:
        id = await client.submit(MODEL, COMPLETIONS, ENDLESS)
        await has_begun(client, id)
        assert await served.engine.busy_slots() == 1
        await client.cancel(id)
        _, outcome = await followed(client, id)
    assert (outcome.kind, outcome.reason) == (OutcomeKind.CANCELLED, Reason.CLIENT_CANCELLED)
    await wait_until(served.is_idle, "the engine to be idle")
    assert await served.engine.generated_tokens() - before < MOST_TOKENS


async def test_the_load_that_the_engine_tells_is_in_the_reports(served: Served) -> None:
    async with served.client() as client:
        ids = [await client.submit(MODEL, COMPLETIONS, ENDLESS) for _ in range(2 * SLOTS)]

        async def is_told() -> bool:
            report = await served.report()
            return (report.engine_running, report.engine_waiting) == (SLOTS, SLOTS)

        await wait_until(is_told, "a report of 4 requests running and 4 waiting in the engine")
        for id in ids:
            await client.cancel(id)
        for id in ids:
            await client.outcome(id)
    await wait_until(served.is_idle, "the engine to be idle")


async def test_a_killed_engine_costs_time_only(served: Served) -> None:
    _, direct = await served.engine.ask(COMPLETIONS, {**LONG, "max_tokens": 300})
    said = direct["choices"][0]["text"]
    async with served.client() as client:
        running = await client.submit(MODEL, COMPLETIONS, LONG)
        await has_begun(client, running)
        await served.engine.kill()

        async def is_known() -> bool:
            return not (await served.report()).engine_ok

        await wait_until(is_known, "a report that the engine does not work")
        waiting = await client.submit(MODEL, COMPLETIONS, {"prompt": "bana", "max_tokens": 5, **GREEDY})
        await served.engine.start()
        _, outcome = await followed(client, running)
        assert outcome.kind is OutcomeKind.COMPLETED, outcome
        assert outcome.usage.completion_tokens == len(outcome.choices[0].text.split()) == LONG_TOKENS
        assert outcome.choices[0].text.startswith(said)
        assert client.progress(running).attempts > 1
        assert (await client.outcome(waiting)).kind is OutcomeKind.COMPLETED
    found = await audit(served.stack.kafka, served.stack.settings.pool, settle_s=20)
    assert not found.findings, found
