"""Engines that misbehave over real HTTP, each in one named way, and remember what they were asked.

`/health` answers 200 whatever else is wrong, as a hung engine does.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, field
from enum import StrEnum


class Behaviour(StrEnum):
    """What the engine does with each request to generate."""

    ANSWERS_400 = "answers 400"
    ANSWERS_429 = "answers 429"
    ANSWERS_500 = "answers 500"
    GARBAGE = "sends an event that is not JSON"
    WRONG_TYPES = "sends JSON of wrong types"
    WRONG_INDEX = "sends a choice that nobody asked for"
    NOT_UTF8 = "sends JSON with a byte that is not UTF-8 in a tool call"
    HTML = "answers a page of HTML"
    NOT_HTTP = "answers something that is not HTTP"
    SILENT = "accepts and never answers"
    PINGS = "sends comments and never an event"
    STALLS = "falls silent after 3 tokens"
    HANGS_UP = "closes before it answers"
    CUT = "closes in mid-stream without the end of the body"
    ENDS_EARLY = "ends the body in order, without a finish reason"
    DONE_EARLY = "sends [DONE] without a finish reason"
    DIES = "sends an error and then [DONE], as a killed vLLM does"
    DIES_FLAT = "sends an error object of the older flat form"
    ABORTS = "gives the finish reason abort"
    HALF_CHARACTER = "closes in the middle of a character"
    ENDLESS_LINE = "sends a line without an end"
    NO_DONE = "finishes, then closes without [DONE]"
    LINGERS = "finishes and keeps the body open"
    WHOLE = "answers one JSON completion although a stream was asked for"
    WHOLE_CHAT = "answers one JSON chat completion with a tool call"
    WHOLE_UNFINISHED = "answers one JSON completion without a finish reason"
    WHOLE_EMPTY = "answers a JSON object without choices"
    RICH = "streams reasoning, tool calls, logprobs and token ids"


@dataclass(frozen=True, kw_only=True)
class Received:
    """One request as it came; header names in lower case."""

    path: str
    headers: dict[str, str]
    body: bytes


@dataclass(kw_only=True)
class BadEngine:
    """A running one."""

    url: str = ""
    received: list[Received] = field(default_factory=list)
    connections: set[asyncio.StreamWriter] = field(default_factory=set)
    accepted: int = 0


def _head(status: str, content_type: str, *, chunked: bool = False) -> bytes:
    encoding = "Transfer-Encoding: chunked\r\n" if chunked else ""
    return (
        f"HTTP/1.1 {status}\r\nContent-Type: {content_type}\r\nConnection: close\r\n{encoding}\r\n".encode()
    )


def _whole(status: str, content_type: str, body: str) -> bytes:
    return _head(status, content_type) + body.encode("ascii")


def _chunk(data: bytes) -> bytes:
    return b"%x\r\n%s\r\n" % (len(data), data)


def _event(data: str) -> bytes:
    return f"data: {data}\n\n".encode()


def _token(text: str, finish: str = "null") -> bytes:
    return _event(f'{{"choices":[{{"index":0,"text":"{text}","finish_reason":{finish}}}]}}')


_THREE = _token(" a") + _token(" b") + _token(" c")
_DONE = _event("[DONE]")
_USAGE = _event('{"choices":[],"usage":{"prompt_tokens":5,"completion_tokens":4}}')
_ERROR = '{"error":{"message":"EngineCore died","type":"InternalServerError","code":500}}'
_FLAT_ERROR = '{"object":"error","message":"EngineCore died","type":"InternalServerError","code":500}'
_RICH = b"".join(
    (
        _event('{"choices":[{"index":0,"delta":{"role":"assistant","content":""},"finish_reason":null}]}'),
        _event('{"choices":[{"index":0,"delta":{"reasoning_content":"so"},"finish_reason":null}]}'),
        _event(
            '{"choices":[{"index":0,"delta":{"content":"hé","tool_calls":[]},'
            '"logprobs":{"content":[{"token":"h","logprob":-0.10}]},"token_ids":[7,8],"finish_reason":null}]}'
        ),
        _event(
            '{"choices":[{"index":0,"delta":{"content":null,'
            '"tool_calls":[{"index":0,"function":{"arguments":"{\\"a\\": 1e2}"}}]},"finish_reason":null}]}'
        ),
        _event('{"choices":[{"index":0,"delta":{},"finish_reason":"tool_calls"}]}'),
        _event(
            '{"choices":[],"usage":{"prompt_tokens":9,"completion_tokens":6,'
            '"prompt_tokens_details":{"cached_tokens":4}}}'
        ),
        _DONE,
    )
)
_STREAMED = {
    Behaviour.GARBAGE: _THREE + _event("<oops>"),
    Behaviour.WRONG_TYPES: _THREE + _event('{"choices":[{"index":"zero"}]}'),
    Behaviour.WRONG_INDEX: _THREE + _event('{"choices":[{"index":1,"text":" d"}]}'),
    Behaviour.NOT_UTF8: b'data: {"choices":[{"delta":{"tool_calls":["\xff"]}}]}\n\n',
    Behaviour.ENDS_EARLY: _THREE,
    Behaviour.DONE_EARLY: _THREE + _DONE,
    Behaviour.DIES: _THREE + _event(_ERROR) + _DONE,
    Behaviour.DIES_FLAT: _THREE + _event(_FLAT_ERROR) + _DONE,
    Behaviour.ABORTS: _THREE + _token("", '"abort"') + _DONE,
    Behaviour.HALF_CHARACTER: _THREE + 'data: {"choices":[{"text":"é'.encode()[:-1],
    Behaviour.ENDLESS_LINE: b"data: " + b"x" * (9 << 20),
    Behaviour.NO_DONE: _THREE + _token(" d", '"stop"'),
    Behaviour.RICH: _RICH,
}
_MESSAGE = (
    '{"role":"assistant","content":null,"tool_calls":[{"id":"t","function":{"name":"f","arguments":"{}"}}]}'
)
_ANSWERED = {
    Behaviour.ANSWERS_400: ("400 Bad Request", "application/json", '{"error":{"message":"bad prompt"}}'),
    Behaviour.ANSWERS_429: ("429 Too Many Requests", "text/plain", "later"),
    Behaviour.ANSWERS_500: ("500 Internal Server Error", "text/plain", "x" * 100_000),
    Behaviour.HTML: ("200 OK", "text/html", "<html>proxy</html>"),
    Behaviour.WHOLE: (
        "200 OK",
        "application/json",
        '{"choices":[{"index":0,"text":" a b","finish_reason":"stop"}],'
        '"usage":{"prompt_tokens":5,"completion_tokens":2}}',
    ),
    Behaviour.WHOLE_CHAT: (
        "200 OK",
        "application/json; charset=utf-8",
        f'{{"choices":[{{"index":0,"message":{_MESSAGE},"finish_reason":"tool_calls"}}]}}',
    ),
    Behaviour.WHOLE_UNFINISHED: ("200 OK", "application/json", '{"choices":[{"index":0,"text":" a"}]}'),
    Behaviour.WHOLE_EMPTY: ("200 OK", "application/json", "{}"),
}


async def _behave(behaviour: Behaviour, writer: asyncio.StreamWriter) -> None:
    """Answer one request; the connection is closed afterwards."""
    forever = asyncio.Event()
    if behaviour in _ANSWERED:
        writer.write(_whole(*_ANSWERED[behaviour]))
        return
    if behaviour in _STREAMED:
        writer.write(_head("200 OK", "text/event-stream") + _STREAMED[behaviour])
        return
    if behaviour is Behaviour.HANGS_UP:
        return
    if behaviour is Behaviour.NOT_HTTP:
        writer.write(b"SSH-2.0-OpenSSH_9.2\r\n\r\n")
        return
    if behaviour is Behaviour.SILENT:
        await forever.wait()
    writer.write(_head("200 OK", "text/event-stream", chunked=True))
    match behaviour:
        case Behaviour.PINGS:
            while True:
                writer.write(_chunk(b": ping\n\n"))
                await asyncio.sleep(0.01)
        case Behaviour.STALLS:
            writer.write(_chunk(_THREE))
            await forever.wait()
        case Behaviour.LINGERS:
            writer.write(_chunk(_THREE + _token(" d", '"stop"') + _USAGE + _DONE))
            await forever.wait()
        case _:
            assert behaviour is Behaviour.CUT
            writer.write(_chunk(_THREE))


async def _receive(reader: asyncio.StreamReader) -> Received:
    head = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1")
    first, *lines = head.rstrip("\r\n").split("\r\n")
    headers = {name.lower(): value.strip() for name, _, value in (line.partition(":") for line in lines)}
    body = await reader.readexactly(int(headers.get("content-length", "0")))
    return Received(path=first.split(" ")[1], headers=headers, body=body)


@asynccontextmanager
async def bad_engine(behaviour: Behaviour) -> AsyncIterator[BadEngine]:
    """Run an engine that behaves so, on a free port, until the block ends."""
    engine = BadEngine()
    serving: set[asyncio.Task[None]] = set()

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        received = await _receive(reader)
        if received.path == "/health":
            writer.write(_whole("200 OK", "text/plain", ""))
            return
        engine.received.append(received)
        behaving = asyncio.create_task(_behave(behaviour, writer))
        # Reading ends when the client closes: nothing more is sent to it then.
        leaving = asyncio.create_task(reader.read())
        try:
            await asyncio.wait((behaving, leaving), return_when=asyncio.FIRST_COMPLETED)
            if behaving.done():
                behaving.result()
                await writer.drain()
        finally:
            behaving.cancel()
            leaving.cancel()
            await asyncio.gather(behaving, leaving, return_exceptions=True)

    async def connect(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        serving.add(task)
        engine.connections.add(writer)
        engine.accepted += 1
        try:
            with suppress(ConnectionError, asyncio.IncompleteReadError):
                await serve(reader, writer)
        finally:
            writer.close()
            with suppress(ConnectionError):
                await writer.wait_closed()
            engine.connections.discard(writer)
            serving.discard(task)

    server = await asyncio.start_server(connect, "127.0.0.1", 0)
    engine.url = f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}"
    try:
        yield engine
    finally:
        server.close()
        for task in tuple(serving):
            task.cancel()
        await asyncio.gather(*serving, return_exceptions=True)
        await server.wait_closed()
