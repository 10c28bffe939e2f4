"""The frontend as its users see it: OpenAI's own SDK and plain HTTP over a log, every status and stream.

The log is the simulation's, on a loop with real sockets and real time, and Apache Kafka. The other side of
the topics (leader and agents) is the test itself.
"""

from __future__ import annotations

import asyncio
import dataclasses
import io
import json
import random
import socket
import sys
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from typing import Any, cast

import aiohttp
import msgspec
import openai
import pytest
from openai import AsyncOpenAI
from prometheus_client import CollectorRegistry

from dispatcher.backends.connect import KafkaClients, connect_kafka, connect_redis
from dispatcher.backends.node_store import Claimed, Ending
from dispatcher.frontend.api_keys import ApiKeys
from dispatcher.frontend.app import Frontend
from dispatcher.frontend.settings import MAX_BODY_BYTES, FrontendSettings
from dispatcher.local.apache_kafka import ApacheKafka
from dispatcher.local.valkey import ValkeyServer
from dispatcher.protocol import codec
from dispatcher.protocol.chunk import ChoiceDelta, Chunk, ChunkKind
from dispatcher.protocol.outcome import Choice, Outcome, OutcomeKind, Reason, Usage
from dispatcher.protocol.request import Endpoint, InferenceRequest, Tokens
from dispatcher.telemetry.logging import Log
from tests.contract.test_client import ANOTHER, ATTEMPT, OtherSide, completed
from tests.support.pool import Pool, ScriptedNode
from tests.support.servers import KafkaAddress
from tests.support.sim.kafka import SimKafka
from tests.support.sim.loop import OUTSIDE, START_EPOCH_S, VirtualLoop
from tests.support.sim.network import CALM, Network
from tests.support.wait import wait_until

MESSAGES: Any = [{"role": "user", "content": "hello"}]
BODY = {"model": "m", "prompt": "hello", "max_tokens": 3}
TRACE = "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01"
LIMIT_S = 30.0


class AllSides(OtherSide):
    """An agent whose engine makes more than plain text."""

    async def chunks(self, id: str, ref: str, choices: tuple[ChoiceDelta, ...], tokens: int) -> None:
        chunk = Chunk(id=id, ref=ref, attempt=ATTEMPT, kind=ChunkKind.TOKENS, choices=choices, tokens=tokens)
        await self._plain.send_and_wait(self.names.replies, codec.encode(chunk), key=id.encode())


class TalkingNode(ScriptedNode):
    """A node that answers with text."""

    def completed(self, job: Claimed) -> Ending:
        ending = super().completed(job)
        outcome = codec.outcomes.decode(ending.payload)
        choices = (Choice(text="abc", finish_reason="stop"),)
        payload = codec.encode(msgspec.structs.replace(outcome, choices=choices))
        return dataclasses.replace(ending, payload=payload)


class Served:
    """A frontend over a log, the other side of that log, and HTTP to talk to the frontend."""

    def __init__(self, side: AllSides, frontend: Frontend, http: aiohttp.ClientSession) -> None:
        self.side = side
        self.frontend = frontend
        self.http = http
        self.url = f"http://127.0.0.1:{frontend.port}"
        self._running: set[asyncio.Task[Any]] = set()

    @asynccontextmanager
    async def openai(self, **options: Any) -> AsyncIterator[AsyncOpenAI]:
        async with AsyncOpenAI(
            base_url=f"{self.url}/v1", **{"api_key": "any", "max_retries": 0, "timeout": LIMIT_S, **options}
        ) as client:
            yield client

    def begin(self, call: Awaitable[Any]) -> asyncio.Task[Any]:
        """Start a request that somebody else has to answer."""
        task = asyncio.ensure_future(call)
        self._running.add(task)
        return task

    async def post(
        self, body: Any, *, path: str = "/v1/completions", **headers: str
    ) -> tuple[int, dict[str, Any], Any]:
        """One POST: status, answer, headers."""
        data = body if isinstance(body, bytes) else json.dumps(body).encode()
        named = {name.replace("_", "-"): value for name, value in headers.items()}
        async with self.http.post(self.url + path, data=io.BytesIO(data), headers=named) as response:
            return response.status, json.loads(await response.read()), response.headers

    async def refused(self, status: int, body: Any = BODY, **headers: str) -> dict[str, Any]:
        """A POST that gets an error object of this status."""
        seen, answer, _ = await self.post(body, **headers)
        assert seen == status, answer
        assert set(answer) == {"error"}
        assert set(answer["error"]) == {"message", "type", "param", "code"}
        return cast(dict[str, Any], answer["error"])

    async def cancelled(self, id: str) -> None:
        """Wait for the record that cancels `id`."""
        record, _ = await self.side.record()
        assert record.topic == self.side.names.cancels
        assert json.loads(record.value) == {"id": id}

    async def metric(self, line: str) -> bool:
        async with self.http.get(self.url + "/metrics") as response:
            return line in (await response.text()).splitlines()

    async def leave(self) -> None:
        for task in self._running:
            task.cancel()
        await asyncio.gather(*self._running, return_exceptions=True)


@asynccontextmanager
async def served(
    kafka: KafkaClients, pool: str, *, keys: ApiKeys | None = None, redis: str = "", **settings: Any
) -> AsyncIterator[Served]:
    side = AllSides(kafka, pool)
    await side.start()
    frontend = Frontend(
        FrontendSettings(port=0, pool=pool, **settings),
        kafka=kafka,
        redis=connect_redis(redis) if redis else None,
        keys=keys,
        registry=CollectorRegistry(),
        log=Log(process="frontend"),
    )
    try:
        async with frontend, aiohttp.ClientSession() as http:
            together = Served(side, frontend, http)
            try:
                yield together
            finally:
                await together.leave()
    finally:
        await side.stop()


def settings(**given: Any) -> Callable[[Body], Body]:
    """The settings a test wants its frontend to have."""

    def wanted(body: Body) -> Body:
        body.settings = given  # type: ignore[attr-defined]
        return body

    return wanted


Body = Callable[[Served], Awaitable[None]]
USAGE = Usage(prompt_tokens=7, completion_tokens=3, cached_tokens=4)


async def a_chat_is_answered_whole(served: Served) -> None:
    async with served.openai() as client:
        asking = served.begin(
            client.chat.completions.create(
                model="m",
                messages=MESSAGES,
                max_tokens=3,
                extra_body={"top_k": 5, "cache_salt": "blue"},
                extra_headers={
                    "X-Request-Id": "mine",
                    "X-FlexLB-Priority": "90",
                    "X-FlexLB-Deadline-Ms": "5000",
                    "X-FlexLB-TTFT-SLO-Ms": "100",
                    "X-FlexLB-Lane": "batch",
                    "traceparent": TRACE,
                },
            )
        )
        record, ref = await served.side.record()
        request = msgspec.json.decode(record.value, type=InferenceRequest)
        assert (ref[0], tuple(record.headers)) == ("b", (("traceparent", TRACE.encode()),))
        sent = {"model": "m", "messages": MESSAGES, "max_tokens": 3, "top_k": 5, "cache_salt": "blue"}
        assert json.loads(bytes(request.body)) == sent
        assert request.lease
        assert msgspec.structs.replace(request, body=msgspec.Raw(b"{}"), lease=None) == InferenceRequest(
            id="mine",
            model="m",
            endpoint=Endpoint.CHAT,
            body=msgspec.Raw(b"{}"),
            priority=90,
            deadline_ms=5000,
            ttft_slo_ms=100,
            cache_salt="blue",
        )
        call = msgspec.Raw(
            b'{"tool_calls":[{"index":0,"id":"c1","type":"function","function":{"name":"f","arguments":"{"}}]}'
        )
        more = msgspec.Raw(b'{"tool_calls":[{"index":0,"function":{"arguments":"}"}}]}')
        choice = Choice(text="abc", finish_reason="tool_calls", deltas=(call, more))
        await served.side.publish(completed("mine", ref, choices=(choice,), usage=USAGE))
        answer = await asking
    assert (answer.id, answer.object, answer.model) == ("chatcmpl-mine", "chat.completion", "m")
    assert answer._request_id == "mine"
    (one,) = answer.choices
    assert (one.message.role, one.message.content, one.finish_reason) == ("assistant", "abc", "tool_calls")
    (called,) = one.message.tool_calls
    assert (called.id, called.function.name, called.function.arguments) == ("c1", "f", "{}")
    assert (answer.usage.prompt_tokens, answer.usage.completion_tokens, answer.usage.total_tokens) == (
        7,
        3,
        10,
    )
    assert answer.usage.prompt_tokens_details.cached_tokens == 4


async def a_completion_is_answered_whole(served: Served) -> None:
    async with served.openai() as client:
        asking = served.begin(client.completions.create(model="m", prompt=[1, 2, 3], max_tokens=3, n=2))
        request, ref = await served.side.request()
        assert (request.endpoint, request.tokens) == (Endpoint.COMPLETIONS, Tokens(count=3))
        assert (request.deadline_ms, request.priority) == (600_000, 50)
        choices = (
            Choice(index=1, text="xyz", finish_reason="length"),
            Choice(index=0, text="abc", finish_reason="stop"),
        )
        await served.side.publish(completed(request.id, ref, choices=choices))
        answer = await asking
    assert (answer.id, answer.object) == (f"cmpl-{request.id}", "text_completion")
    assert [(one.index, one.text, one.finish_reason) for one in answer.choices] == [
        (0, "abc", "stop"),
        (1, "xyz", "length"),
    ]


async def a_chat_is_streamed(served: Served) -> None:
    side = served.side
    async with served.openai() as client:
        opening = served.begin(
            client.chat.completions.create(
                model="m", messages=MESSAGES, stream=True, stream_options={"include_usage": True}
            )
        )
        request, ref = await side.request()
        id = request.id
        await side.chunk(id, ref, ATTEMPT, ChunkKind.BEGIN)
        await side.chunk(id, ref, ATTEMPT, ChunkKind.TOKENS, "ab")
        stream = await opening
        first, second = await anext(stream), await anext(stream)
        assert first.choices[0].delta.role == "assistant"
        assert second.choices[0].delta.content == "ab"
        await side.chunk(id, ref, ATTEMPT, ChunkKind.TOKENS, "c", first_token=2)
        third = await anext(stream)
        assert (third.choices[0].delta.content, third.choices[0].delta.role) == ("c", None)
        await side.publish(completed(id, ref, usage=USAGE))
        *_, finish, last = rest = [chunk async for chunk in stream]
    assert len(rest) == 2
    assert (finish.choices[0].finish_reason, finish.choices[0].delta.content) == ("stop", None)
    assert (finish.usage, last.choices, last.usage.prompt_tokens_details.cached_tokens) == (None, [], 4)
    assert {chunk.id for chunk in (first, second, third, *rest)} == {f"chatcmpl-{id}"}
    assert {chunk.created for chunk in (first, second, third, *rest)} == {first.created}
    assert await served.metric(
        'flexlb_frontend_requests_total{endpoint="/v1/chat/completions",status="2xx"} 1.0'
    )
    assert await served.metric('flexlb_frontend_ttft_seconds_count{endpoint="/v1/chat/completions"} 1.0')
    assert await served.metric("flexlb_frontend_in_flight 0.0")


async def a_stream_of_two_choices_and_tool_calls_is_passed_on(served: Served) -> None:
    side = served.side
    call = (
        b'{"tool_calls":[{"index":0,"id":"c1","type":"function","function":{"name":"f","arguments":"{}"}}]}'
    )
    async with served.openai() as client:
        opening = served.begin(client.chat.completions.create(model="m", messages=MESSAGES, stream=True, n=2))
        request, ref = await side.request()
        id = request.id
        await side.chunk(id, ref, ATTEMPT, ChunkKind.BEGIN)
        deltas = (ChoiceDelta(index=0, text="a"), ChoiceDelta(index=1, deltas=(msgspec.Raw(call),)))
        await side.chunks(id, ref, deltas, tokens=2)
        choices = (
            Choice(index=0, text="a", finish_reason="stop"),
            Choice(index=1, finish_reason="tool_calls", deltas=(msgspec.Raw(call),)),
        )
        await side.publish(completed(id, ref, choices=choices))
        seen: dict[int, list[Any]] = {0: [], 1: []}
        async for chunk in await opening:
            (choice,) = chunk.choices
            seen[choice.index].append(choice)
    for index, finish in ((0, "stop"), (1, "tool_calls")):
        assert [choice.delta.role for choice in seen[index]] == ["assistant", None, None]
        assert [choice.finish_reason for choice in seen[index]] == [None, None, finish]
    assert seen[0][1].delta.content == "a"
    (called,) = seen[1][1].delta.tool_calls
    assert (called.index, called.id, called.function.name, called.function.arguments) == (0, "c1", "f", "{}")


async def a_completion_is_streamed(served: Served) -> None:
    async with served.openai() as client:
        opening = served.begin(client.completions.create(model="m", prompt="x", stream=True))
        request, ref = await served.side.request()
        await served.side.publish(completed(request.id, ref))
        chunks = [chunk async for chunk in await opening]
    assert [(one.choices[0].text, one.choices[0].finish_reason) for one in chunks] == [
        ("abc", None),
        ("", "stop"),
    ]


ENDINGS: list[tuple[OutcomeKind, Reason, int, int]] = [
    (OutcomeKind.REJECTED, Reason.MALFORMED, 0, 400),
    (OutcomeKind.REJECTED, Reason.TOO_LARGE, 0, 413),
    (OutcomeKind.REJECTED, Reason.UNKNOWN_MODEL, 0, 404),
    (OutcomeKind.REJECTED, Reason.PROMPT_TOO_LONG, 0, 400),
    (OutcomeKind.REJECTED, Reason.ID_IN_USE, 0, 409),
    (OutcomeKind.EVICTED, Reason.DEADLINE_EXCEEDED, 0, 504),
    (OutcomeKind.FAILED, Reason.ENGINE_REFUSED, 422, 422),
    (OutcomeKind.FAILED, Reason.ENGINE_REFUSED, 500, 502),
    (OutcomeKind.FAILED, Reason.ATTEMPTS_EXHAUSTED, 0, 502),
    (OutcomeKind.CANCELLED, Reason.CLIENT_CANCELLED, 0, 499),
]


async def every_ending_has_its_status(served: Served) -> None:
    """Also of a stream, as long as nothing of it was shown; and the SDK does not ask again."""
    async with served.openai(max_retries=2) as client:
        for is_streamed in (False, True):
            for kind, reason, http_status, status in ENDINGS:
                asking = served.begin(client.completions.create(model="m", prompt="x", stream=is_streamed))
                request, ref = await served.side.request()
                outcome = completed(
                    request.id,
                    ref,
                    kind=kind,
                    reason=reason,
                    choices=(),
                    message="what happened",
                    http_status=http_status,
                )
                await served.side.publish(outcome)
                with pytest.raises(openai.APIStatusError) as caught:
                    await asking
                assert caught.value.status_code == status
                assert caught.value.message.endswith("what happened")
                assert caught.value.code in (reason, "model_not_found", "context_length_exceeded")


SHED = [(Reason.OVERLOADED, 429), (Reason.DEADLINE_UNREACHABLE, 429), (Reason.NO_CAPACITY, 503)]


async def what_is_shed_says_when_to_ask_again(served: Served) -> None:
    """Also of a stream; and the SDK asks again by itself, then, as another request."""
    for is_streamed in (False, True):
        for reason, status in SHED:
            asking = served.begin(served.post({**BODY, "stream": is_streamed}))
            request, ref = await served.side.request()
            await served.side.publish(shed(request.id, ref, reason, retry_after_ms=2_100))
            seen, answer, headers = await asking
            assert (seen, answer["error"]["code"]) == (status, reason)
            assert (headers["Retry-After"], headers["retry-after-ms"]) == ("3", "2100")
            assert "x-should-retry" not in headers
    async with served.openai(max_retries=1) as client:
        asking = served.begin(client.completions.create(model="m", prompt="x"))
        first, ref = await served.side.request()
        await served.side.publish(shed(first.id, ref, Reason.OVERLOADED, retry_after_ms=1))
        second, ref = await served.side.request()
        await served.side.publish(completed(second.id, ref))
        assert (await asking).choices[0].text == "abc"
    assert first.id != second.id


def shed(id: str, ref: str, reason: Reason, *, retry_after_ms: int) -> Outcome:
    """A request that was turned away for now."""
    return completed(
        id, ref, kind=OutcomeKind.REJECTED, reason=reason, choices=(), retry_after_ms=retry_after_ms
    )


async def an_error_in_a_stream_is_an_event(served: Served) -> None:
    side = served.side
    async with served.openai() as client:
        opening = served.begin(client.completions.create(model="m", prompt="x", stream=True))
        request, ref = await side.request()
        await side.chunk(request.id, ref, ATTEMPT, ChunkKind.BEGIN)
        await side.chunk(request.id, ref, ATTEMPT, ChunkKind.TOKENS, "ab")
        stream = await opening
        assert (await anext(stream)).choices[0].text == "ab"
        evicted = completed(
            request.id,
            ref,
            "ab",
            kind=OutcomeKind.EVICTED,
            reason=Reason.DEADLINE_EXCEEDED,
            message="too late",
        )
        await side.publish(evicted)
        with pytest.raises(openai.APIError, match="too late"):
            await anext(stream)
    assert await served.metric('flexlb_frontend_requests_total{endpoint="/v1/completions",status="5xx"} 1.0')


async def read_stream(response: aiohttp.ClientResponse) -> list[Any]:
    """The rest of a stream: the events' JSON, and whether it was done."""
    text = (await response.read()).decode()
    events = [event.removeprefix("data: ") for event in text.split("\n\n") if event]
    assert events[-1] == "[DONE]"
    return [json.loads(event) for event in events[:-1]]


async def a_retry_that_says_the_same_is_continued_silently(served: Served) -> None:
    side = served.side
    async with served.openai() as client:
        opening = served.begin(client.completions.create(model="m", prompt="x", stream=True))
        request, ref = await side.request()
        id = request.id
        await side.chunk(id, ref, ATTEMPT, ChunkKind.BEGIN)
        await side.chunk(id, ref, ATTEMPT, ChunkKind.TOKENS, "abc")
        stream = await opening
        texts = [(await anext(stream)).choices[0].text]
        await side.chunk(id, ref, ANOTHER, ChunkKind.BEGIN, restarted=True)
        await side.chunk(id, ref, ANOTHER, ChunkKind.TOKENS, "ab")
        await side.chunk(id, ref, ANOTHER, ChunkKind.TOKENS, "cde", first_token=2)
        texts.append((await anext(stream)).choices[0].text)
        await side.publish(completed(id, ref, "abcdef"))
        texts += [chunk.choices[0].text async for chunk in stream]
    assert texts == ["abc", "de", "f", ""]


async def a_retry_that_says_something_else_ends_the_stream_and_is_cancelled(served: Served) -> None:
    side = served.side

    async def ask() -> list[Any]:
        async with served.http.post(
            served.url + "/v1/completions", json={**BODY, "stream": True}
        ) as response:
            assert response.status == 200
            return await read_stream(response)

    asking = served.begin(ask())
    request, ref = await side.request()
    id = request.id
    await side.chunk(id, ref, ATTEMPT, ChunkKind.BEGIN)
    await side.chunk(id, ref, ATTEMPT, ChunkKind.TOKENS, "abc")
    await wait_until(
        lambda: served.metric('flexlb_frontend_ttft_seconds_count{endpoint="/v1/completions"} 1.0'), "text"
    )
    await side.chunk(id, ref, ANOTHER, ChunkKind.BEGIN, restarted=True)
    await side.chunk(id, ref, ANOTHER, ChunkKind.TOKENS, "xyz")
    shown, error = await asking
    assert shown["choices"][0]["text"] == "abc"
    assert error["error"]["code"] == "restarted"
    await served.cancelled(id)
    assert await served.metric("flexlb_frontend_broken_streams_total 1.0")


async def an_answer_shorter_than_what_was_streamed_is_an_error(served: Served) -> None:
    side = served.side
    async with served.openai() as client:
        opening = served.begin(client.completions.create(model="m", prompt="x", stream=True))
        request, ref = await side.request()
        await side.chunk(request.id, ref, ATTEMPT, ChunkKind.BEGIN)
        await side.chunk(request.id, ref, ATTEMPT, ChunkKind.TOKENS, "abc")
        stream = await opening
        await anext(stream)
        await side.publish(completed(request.id, ref, "ab"))
        with pytest.raises(openai.APIError, match="does not begin with"):
            await anext(stream)


async def a_client_that_leaves_cancels_its_request(served: Served) -> None:
    side = served.side
    for is_streamed in (False, True):
        leaving = served.begin(served.post({**BODY, "stream": is_streamed}))
        request, _ = await side.request()
        leaving.cancel()
        await served.cancelled(request.id)
    async with served.openai() as client:
        opening = served.begin(client.completions.create(model="m", prompt="x", stream=True))
        request, ref = await side.request()
        await side.chunk(request.id, ref, ATTEMPT, ChunkKind.BEGIN)
        await side.chunk(request.id, ref, ATTEMPT, ChunkKind.TOKENS, "ab")
        stream = await opening
        await anext(stream)
        await stream.close()
        await served.cancelled(request.id)
    await wait_until(lambda: served.metric("flexlb_frontend_in_flight 0.0"), "the places to be free")
    assert await served.metric("flexlb_frontend_disconnects_total 3.0")


@settings(max_in_flight=1)
async def a_full_frontend_says_when_to_come_again(served: Served) -> None:
    first = served.begin(served.post(BODY))
    request, ref = await served.side.request()
    status, answer, headers = await served.post(BODY)
    assert (status, answer["error"]["code"], headers["Retry-After"]) == (429, "too_many_requests", "1")
    await served.side.publish(completed(request.id, ref))
    assert (await first)[0] == 200
    again = served.begin(served.post(BODY))
    request, ref = await served.side.request()
    await served.side.publish(completed(request.id, ref))
    assert (await again)[0] == 200


@settings(max_held_bytes=MAX_BODY_BYTES)
async def bodies_beyond_what_is_held_at_once_are_put_off(served: Served) -> None:
    async def slowly() -> AsyncIterator[bytes]:
        yield b"{"
        await arrived.wait()
        yield b'"model":"m"}'

    arrived = asyncio.Event()

    async def ask() -> int:
        async with served.http.post(served.url + "/v1/completions", data=slowly()) as response:
            return response.status

    # A body of unknown length may become as long as any.
    first = served.begin(ask())
    await wait_until(lambda: served.metric("flexlb_frontend_in_flight 1.0"), "the first one's body")
    assert (await served.refused(429))["code"] == "too_many_bytes"
    arrived.set()
    request, ref = await served.side.request()
    await wait_until(lambda: served.metric("flexlb_frontend_held_bytes 0.0"), "Kafka to have it")
    await served.side.publish(completed(request.id, ref))
    assert await first == 200


@settings(outcome_grace_s=0.1)
async def a_client_that_does_not_read_is_left_when_its_time_is_up(
    served: Served,
) -> None:
    side = served.side
    client = socket.socket()
    # The kernel would take most of the answer for a client that is merely slow.
    client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 65_536)
    client.setblocking(False)
    await asyncio.get_running_loop().sock_connect(client, ("127.0.0.1", served.frontend.port))
    reader, writer = await asyncio.open_connection(sock=client, limit=1024)
    body = json.dumps({**BODY, "stream": True}).encode()
    head = (
        "POST /v1/completions HTTP/1.1\r\nHost: x\r\nX-FlexLB-Deadline-Ms: 2000\r\n"
        f"Content-Length: {len(body)}\r\n\r\n"
    )
    writer.write(head.encode() + body)
    request, ref = await side.request()
    await side.chunk(request.id, ref, ATTEMPT, ChunkKind.BEGIN)
    at = 0
    for _ in range(64):
        text = "x" * 200_000
        await side.chunk(request.id, ref, ATTEMPT, ChunkKind.TOKENS, text, first_token=at)
        at += len(text)
    await served.cancelled(request.id)
    await wait_until(lambda: served.metric("flexlb_frontend_in_flight 0.0"), "the place to be free")
    received = 0
    while data := await reader.read(1 << 20):
        received += len(data)
    assert 0 < received < at
    writer.close()


@settings(models="a,b", max_body_bytes=2000, body_timeout_s=0.2)
async def a_request_that_can_not_be_served_is_told_why(served: Served) -> None:
    for header, value, expected in (
        ("X-FlexLB-Priority", "high", "a whole number from 1 to 100"),
        ("X-FlexLB-Priority", "101", "a whole number from 1 to 100"),
        ("X-FlexLB-Deadline-Ms", "0", "a whole number from 1 to 604800000"),
        ("X-FlexLB-TTFT-SLO-Ms", "-1", "a whole number from 1 to 86400000"),
        ("X-FlexLB-Lane", "slow", "interactive or batch"),
    ):
        error = await served.refused(400, **{header.replace("-", "_"): value})
        assert error["message"] == f"header {header}: expected {expected}, seen {value!r}"
        assert (error["type"], error["param"]) == ("invalid_request_error", header)
    for body, message in (
        (b"[1]", "expected a JSON object"),
        (b"", "expected a JSON object"),
        (b'{"a": ', "body: "),
        (b'{"prompt": "\xff"}', "body: "),
        ({"model": 7}, "at `$.model`"),
        ({"model": "m", "stream": "yes"}, "at `$.stream`"),
        ({"prompt": "x"}, "model: expected one of a, b, seen none"),
        ({"model": "x" * 257}, "at most 256 characters"),
    ):
        assert message in (await served.refused(400, body))["message"]
    assert "at most 2000 bytes" in (await served.refused(413, {**BODY, "user": "x" * 2000}))["message"]

    async def unending() -> AsyncIterator[bytes]:
        yield b"{"
        await asyncio.Event().wait()

    async with served.http.post(served.url + "/v1/completions", data=unending()) as response:
        assert response.status == 408
    async with served.http.get(served.url + "/v1/embeddings") as response:
        assert (response.status, "error" in await response.json()) == (404, True)
    async with served.http.get(served.url + "/v1/completions") as response:
        assert (response.status, "error" in await response.json()) == (405, True)


@settings(header_timeout_s=0.3)
async def headers_that_do_not_end_are_told_so_and_hold_no_socket(served: Served) -> None:
    host, port = "127.0.0.1", served.frontend.port
    for sent in (b"GET /v1/models HTTP/1.1\r\nHost: x\r\n", b"G", b"\r\n", b""):
        reader, writer = await asyncio.open_connection(host, port)
        writer.write(sent)
        async with asyncio.timeout(20):
            answer = await reader.read()
        assert (b" 408 " in answer, b"headers: expected them within 0.3 s" in answer) == (bool(sent),) * 2
        writer.close()
    # One that answers is given its time, and the next request on its connection has its own.
    reader, writer = await asyncio.open_connection(host, port)
    writer.write(b"GET /v1/models HTTP/1.1\r\nHost: x\r\n\r\n")
    head = await reader.readuntil(b"\r\n\r\n")
    assert head.startswith(b"HTTP/1.1 200 ")
    (length,) = (
        int(line.split(b":")[1]) for line in head.splitlines() if line.lower().startswith(b"content-l")
    )
    await reader.readexactly(length)
    writer.write(b"GET /v1/mod")
    async with asyncio.timeout(20):
        assert b" 408 " in await reader.read()
    writer.close()


@settings(models="only")
async def a_body_without_a_model_goes_to_the_only_one(served: Served) -> None:
    asking = served.begin(served.post(b'{ "prompt":"x", "odd":  1.0}'))
    request, ref = await served.side.request()
    assert (request.model, bytes(request.body)) == ("only", b'{ "prompt":"x", "odd":  1.0}')
    await served.side.publish(completed(request.id, ref))
    assert (await asking)[1]["model"] == "only"


async def a_large_body_is_taken_up_to_the_size_of_a_record(served: Served) -> None:
    body = json.dumps({**BODY, "user": "x" * (16_000_000)}).encode()
    asking = served.begin(served.post(body))
    request, ref = await served.side.request()
    assert await served.side.body(request) == body
    await served.side.publish(completed(request.id, ref))
    assert (await asking)[0] == 200


async def an_id_used_again_gets_an_end_of_its_own(served: Served) -> None:
    ids = []
    for _ in range(2):
        asking = served.begin(served.post(BODY, X_Request_Id="same"))
        request, ref = await served.side.request()
        ids.append(request.id)
        await served.side.publish(completed(request.id, ref))
        status, answer, headers = await asking
        assert (status, answer["id"], headers["X-Request-Id"]) == (200, f"cmpl-{request.id}", "same")
    assert ids[0] == "same"
    assert ids[1].startswith("same.")
    asking = served.begin(served.post(BODY, X_Request_Id="not an id"))
    request, ref = await served.side.request()
    await served.side.publish(completed(request.id, ref))
    assert (await asking)[2]["X-Request-Id"] == request.id != "not an id"


@settings(outcome_grace_s=0.1)
async def without_a_dispatcher_the_wait_ends(served: Served) -> None:
    error = await served.refused(504, X_FlexLB_Deadline_Ms="100")
    assert (error["code"], "does a dispatcher lead" in error["message"]) == ("no_outcome", True)
    request, _ = await served.side.request()
    await served.cancelled(request.id)


@settings(keys=ApiKeys([("key-of-acme", "acme"), ("open-sesame", "")]))
async def a_key_is_a_tenant(served: Served) -> None:
    for wrong in ({}, {"Authorization": "Bearer other"}, {"Authorization": "Basic key-of-acme"}):
        assert (await served.refused(401, **wrong))["code"] == "invalid_api_key"
    async with served.http.get(served.url + "/v1/models") as response:
        assert response.status == 401
    for key, tenant in (("key-of-acme", "acme"), ("open-sesame", "")):
        async with served.openai(api_key=key) as client:
            asking = served.begin(client.completions.create(model="m", prompt="x"))
            request, ref = await served.side.request()
            assert request.tenant == tenant
            await served.side.publish(completed(request.id, ref, tenant=tenant))
            assert (await asking).choices[0].text == "abc"


@settings(models="org/a, b")
async def named_models_are_listed(served: Served) -> None:
    async with served.openai() as client:
        assert [model.id async for model in client.models.list()] == ["org/a", "b"]
        assert (await client.models.retrieve("org/a")).id == "org/a"
        with pytest.raises(openai.NotFoundError, match="expected one of org/a, b"):
            await client.models.retrieve("c")


@asynccontextmanager
async def connected(served: Served) -> AsyncIterator[aiohttp.ClientSession]:
    """A client with one connection to the frontend, which it keeps."""
    async with aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=1)) as http:
        async with http.get(served.url + "/health") as response:
            assert (response.status, (await response.json())["ok"]) == (200, True)
        yield http


async def is_refused(served: Served) -> bool:
    try:
        _, writer = await asyncio.open_connection("127.0.0.1", served.frontend.port)
    except ConnectionRefusedError:
        return True
    writer.close()
    return False


async def a_stop_lets_running_requests_end_and_then_cuts_them_off(served: Served) -> None:
    side = served.side
    ending, lasting = served.begin(served.post(BODY)), served.begin(served.post({**BODY, "stream": True}))
    found = [await side.request() for _ in range(2)]
    by_stream = {b"stream" in bytes(request.body): (request, ref) for request, ref in found}
    async with connected(served) as asks, connected(served) as looks:
        draining = served.begin(served.frontend.drain(2.0))
        await wait_until(lambda: is_refused(served), "new connections to be refused")
        async with looks.get(served.url + "/health") as response:
            assert (response.status, response.headers["Connection"]) == (503, "close")
        # Who is connected is answered, and then is no more.
        late = served.begin(asks.post(served.url + "/v1/completions", json=BODY))
        for request, ref in (await side.request(), by_stream[False]):
            await side.publish(completed(request.id, ref))
        async with await late as response:
            assert (response.status, response.headers["Connection"]) == (200, "close")
        assert (await ending)[0] == 200
        assert not draining.done()
        status, answer, _ = await lasting
        assert (status, answer["error"]["code"]) == (503, "stopping")
        await draining
        await served.cancelled(by_stream[True][0].id)


async def a_detached_request_goes_on_without_its_client(served: Served) -> None:
    leaving = served.begin(served.post(BODY, X_FlexLB_Detached="true"))
    request, _ = await served.side.request()
    assert (request.detached, request.lease) == (True, None)
    leaving.cancel()
    await wait_until(lambda: served.metric("flexlb_frontend_disconnects_total 1.0"), "it to be seen")
    staying = served.begin(served.post(BODY, X_FlexLB_Detached="False"))
    # The next record is the next request, not a cancel.
    request, ref = await served.side.request()
    assert (request.detached, bool(request.lease)) == (False, True)
    await served.side.publish(completed(request.id, ref))
    assert (await staying)[0] == 200
    assert "true or false" in (await served.refused(400, X_FlexLB_Detached="1"))["message"]


def raw_request(**fields: Any) -> bytes:
    """A POST as it goes over the wire, on a connection that is kept."""
    body = json.dumps({**BODY, **fields}).encode()
    head = f"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: {len(body)}\r\n\r\n"
    return head.encode() + body


@settings(max_in_flight=8)
async def a_client_that_leaves_a_kept_connection_cancels_what_runs_on_it(served: Served) -> None:
    side = served.side
    for is_streamed in (False, True):
        reader, writer = await asyncio.open_connection("127.0.0.1", served.frontend.port)
        writer.write(raw_request())
        request, ref = await side.request()
        await side.publish(completed(request.id, ref))
        assert b"200 OK" in await reader.readuntil(b"\r\n")
        # Two at once: the second waits behind the first, and is never begun.
        writer.write(raw_request(stream=is_streamed) + raw_request(prompt="pipelined"))
        running, ref = await side.request()
        if is_streamed:
            await side.chunk(running.id, ref, ATTEMPT, ChunkKind.BEGIN)
            await side.chunk(running.id, ref, ATTEMPT, ChunkKind.TOKENS, "ab")
            await reader.readuntil(b"event-stream")
        writer.close()
        await served.cancelled(running.id)
    await wait_until(lambda: served.metric("flexlb_frontend_in_flight 0.0"), "the places to be free")
    assert await served.metric("flexlb_frontend_disconnects_total 2.0")
    asking = served.begin(served.post(BODY))
    request, ref = await side.request()
    assert json.loads(bytes(request.body))["prompt"] == "hello"
    await side.publish(completed(request.id, ref))
    assert (await asking)[0] == 200


async def is_unwell(served: Served) -> bool:
    async with served.http.get(served.url + "/health") as response:
        return response.status == 503


BODIES: list[Body] = [
    a_chat_is_answered_whole,
    a_completion_is_answered_whole,
    a_chat_is_streamed,
    a_stream_of_two_choices_and_tool_calls_is_passed_on,
    a_completion_is_streamed,
    every_ending_has_its_status,
    what_is_shed_says_when_to_ask_again,
    an_error_in_a_stream_is_an_event,
    a_retry_that_says_the_same_is_continued_silently,
    a_retry_that_says_something_else_ends_the_stream_and_is_cancelled,
    an_answer_shorter_than_what_was_streamed_is_an_error,
    a_client_that_leaves_cancels_its_request,
    a_full_frontend_says_when_to_come_again,
    bodies_beyond_what_is_held_at_once_are_put_off,
    a_client_that_does_not_read_is_left_when_its_time_is_up,
    a_request_that_can_not_be_served_is_told_why,
    a_body_without_a_model_goes_to_the_only_one,
    a_large_body_is_taken_up_to_the_size_of_a_record,
    an_id_used_again_gets_an_end_of_its_own,
    without_a_dispatcher_the_wait_ends,
    a_key_is_a_tenant,
    named_models_are_listed,
    a_stop_lets_running_requests_end_and_then_cuts_them_off,
    a_detached_request_goes_on_without_its_client,
    a_client_that_leaves_a_kept_connection_cancels_what_runs_on_it,
]
every_body = pytest.mark.parametrize("body", BODIES, ids=lambda body: body.__name__)


class _WallLoop(asyncio.SelectorEventLoop):
    """Real time and real sockets, with the two things more that the simulation asks of its loop."""

    def epoch_s(self) -> float:
        return START_EPOCH_S + self.time()

    def send_later(self, delay: float, callback: Callable[..., object], *args: object) -> None:
        self.call_later(delay, callback, *args, context=OUTSIDE)


@every_body
def test_over_the_simulated_log(body: Body) -> None:
    async def main() -> None:
        loop = cast(VirtualLoop, asyncio.get_running_loop())
        network = Network(random.Random(1), loop, CALM)
        kafka = SimKafka(network).clients(network.process("frontend"))
        async with served(kafka, "p", **getattr(body, "settings", {})) as together:
            await body(together)

    with asyncio.Runner(loop_factory=_WallLoop) as runner:
        runner.run(main())


@every_body
@pytest.mark.kafka
async def test_over_apache_kafka(body: Body, kafka: KafkaAddress, pool: str) -> None:
    async with served(kafka.clients, pool, **getattr(body, "settings", {})) as together:
        await body(together)


@pytest.mark.kafka
async def test_with_a_real_dispatcher_a_chat_is_answered_and_the_fleets_models_are_listed(
    kafka: KafkaAddress, valkey: ValkeyServer, pool: str
) -> None:
    async with Pool(kafka.clients, valkey.url, pool) as fleet:
        node = TalkingNode(fleet, "n1")
        async with served(kafka.clients, pool, redis=valkey.url, models="named") as together:
            async with together.openai() as client:
                assert [model.id async for model in client.models.list()] == ["named"]
                async with fleet.running(fleet.dispatcher()), fleet.running(node):
                    await wait_until(lambda: is_listed(client, "m"), "the node's model")
                    answer = await client.completions.create(model="m", prompt="x")
                    assert answer.choices[0].finish_reason == "stop"
                    with pytest.raises(openai.NotFoundError) as caught:
                        await client.completions.create(model="nobody serves it", prompt="x")
                    assert caught.value.code == "model_not_found"
                # Redis knows the node for an hour, but not as alive.
                await wait_until(lambda: is_listed(client, "named"), "the node to be gone")
                valkey.kill()
                assert [model.id async for model in client.models.list()] == ["named"]


async def is_listed(client: AsyncOpenAI, name: str) -> bool:
    return [model.id async for model in client.models.list()] == [name]


@pytest.mark.kafka
async def test_without_kafka_it_is_unwell_and_says_so_and_recovers(own_kafka: ApacheKafka, pool: str) -> None:
    kafka = connect_kafka(own_kafka.bootstrap)
    async with served(kafka, pool) as together:
        assert not await is_unwell(together)
        own_kafka.freeze()
        await wait_until(lambda: is_unwell(together), "the health to say 503")
        own_kafka.thaw()
        await wait_until(lambda: is_well(together), "the health to say 200")
        asking = together.begin(together.post(BODY))
        request, ref = await together.side.request()
        await together.side.publish(completed(request.id, ref))
        assert (await asking)[0] == 200


async def is_well(served: Served) -> bool:
    return not await is_unwell(served)


@pytest.mark.kafka
async def test_the_command_serves_until_sigterm_and_ends_what_runs(kafka: KafkaAddress, pool: str) -> None:
    side = AllSides(kafka.clients, pool)
    await side.start()
    arguments = ("--kafka", kafka.bootstrap, "--pool", pool, "--port", "0", "--models", "m")
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-m", "dispatcher", "frontend", *arguments, stderr=asyncio.subprocess.PIPE
    )
    assert process.stderr is not None
    try:
        async with asyncio.timeout(LIMIT_S):
            address = json.loads(await process.stderr.readline())["address"]
            async with AsyncOpenAI(base_url=address, api_key="any", max_retries=0) as client:
                asking = asyncio.ensure_future(client.completions.create(model="m", prompt="x"))
                request, ref = await side.request()
                process.terminate()
                assert json.loads(await process.stderr.readline())["event"] == "frontend stopping"
                await side.publish(completed(request.id, ref))
                assert (await asking).choices[0].text == "abc"
            assert await process.wait() == 0
            events = [json.loads(line)["event"] for line in (await process.stderr.read()).splitlines()]
            assert events == ["request", "frontend stopped"]
    finally:
        if process.returncode is None:
            process.kill()
            await process.wait()
        await side.stop()


@pytest.mark.kafka
async def test_a_port_in_use_is_an_error_that_says_so(kafka: KafkaAddress, pool: str) -> None:
    async with served(kafka.clients, pool) as together:
        process = await asyncio.create_subprocess_exec(
            *(sys.executable, "-m", "dispatcher", "frontend", "--kafka", kafka.bootstrap, "--pool", pool),
            *("--port", str(together.frontend.port)),
            stderr=asyncio.subprocess.PIPE,
        )
        _, said = await process.communicate()
    assert process.returncode == 2
    assert f"--port: expected a free port on 127.0.0.1, seen {together.frontend.port}" in said.decode()
