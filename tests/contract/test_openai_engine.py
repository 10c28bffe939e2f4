"""OpenAIEngine over real HTTP: against engines that misbehave, and against the simulated one."""

from __future__ import annotations

import asyncio
import json
import signal
import socket
import sys
import threading
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import aclosing, asynccontextmanager
from dataclasses import replace

import aiohttp
import pytest

from dispatcher.errors import SettingsError
from dispatcher.protocol.assignment import Work
from dispatcher.protocol.outcome import FailureCause, Usage
from dispatcher.protocol.request import Endpoint
from dispatcher.simulation.profiles import PROFILES
from dispatcher.simulation.tokens import Answer, tokenise
from tests.support.bad_engines import Behaviour, bad_engine
from tests.support.wait import wait_until
from workers_agent.engines.engine import Engine, EngineFailure, Piece
from workers_agent.engines.openai_http import OpenAIEngine, streaming_body
from workers_agent.simulator.faults import Faults
from workers_agent.simulator.server import Simulator, SimulatorSettings
from workers_agent.simulator.wire import Message, render_chat

PROMPT = {"model": "sim", "prompt": "Once upon a time", "max_tokens": 6}
CHAT = {"model": "sim", "messages": [{"role": "user", "content": "hello"}], "max_tokens": 5}
PATIENCE_S = 0.8


def work(endpoint: Endpoint = Endpoint.COMPLETIONS, *, id: str = "request-7", traceparent: str = "") -> Work:
    return Work(ref="i-0-7", id=id, model="sim", endpoint=endpoint, traceparent=traceparent)


@asynccontextmanager
async def engine_at(
    url: str, *, first_token_timeout_s: float = 20, inter_token_timeout_s: float = 20
) -> AsyncIterator[OpenAIEngine]:
    engine = OpenAIEngine(
        url,
        connect_timeout_s=2,
        first_token_timeout_s=first_token_timeout_s,
        inter_token_timeout_s=inter_token_timeout_s,
    )
    try:
        yield engine
    finally:
        await engine.close()


@asynccontextmanager
async def simulator(**settings: object) -> AsyncIterator[tuple[Simulator, str]]:
    simulator = Simulator(SimulatorSettings(**{"time_scale": 0.0, **settings}))  # type: ignore[arg-type]
    try:
        yield simulator, await simulator.start()
    finally:
        await simulator.close()


async def collect(
    engine: Engine, body: object, endpoint: Endpoint = Endpoint.COMPLETIONS, **fields: str
) -> list[Piece]:
    data = body if isinstance(body, bytes) else json.dumps(body).encode()
    pieces: list[Piece] = []
    await collect_into(pieces, engine, data, endpoint, **fields)
    return pieces


async def collect_into(
    pieces: list[Piece],
    engine: Engine,
    data: bytes,
    endpoint: Endpoint = Endpoint.COMPLETIONS,
    **fields: str,
) -> None:
    async for piece in engine.stream(work(endpoint, **fields), data):
        pieces.append(piece)


def text_of(pieces: list[Piece], index: int = 0) -> str:
    return "".join(choice.text for piece in pieces for choice in piece.choices if choice.index == index)


def finishes_of(pieces: list[Piece]) -> list[tuple[int, str]]:
    return [finish for piece in pieces for finish in piece.finish_reasons]


async def failure_of(behaviour: Behaviour, **timeouts: float) -> tuple[EngineFailure, str, int]:
    """Run against a bad engine; return the failure, the text that came before it, what stays open."""
    pieces: list[Piece] = []
    async with bad_engine(behaviour) as bad, engine_at(bad.url, **timeouts) as engine:
        with pytest.raises(EngineFailure) as caught:
            await collect_into(pieces, engine, json.dumps(PROMPT).encode())
        await wait_until(lambda: not bad.connections, "the connection to be closed")
    return caught.value, text_of(pieces), sum(piece.tokens for piece in pieces)


@pytest.mark.parametrize(
    ("behaviour", "cause", "status", "said"),
    [
        (Behaviour.ANSWERS_400, FailureCause.REFUSED, 400, "bad prompt"),
        (Behaviour.ANSWERS_429, FailureCause.OVERLOADED, 429, "later"),
        (Behaviour.ANSWERS_500, FailureCause.ENGINE_ERROR, 500, "xxx"),
        (Behaviour.HTML, FailureCause.PROTOCOL, 0, "text/html"),
        (Behaviour.WHOLE_EMPTY, FailureCause.PROTOCOL, 0, "without any"),
        (Behaviour.NOT_UTF8, FailureCause.PROTOCOL, 0, "after 0 tokens"),
        (Behaviour.ENDLESS_LINE, FailureCause.PROTOCOL, 0, "at most"),
        (Behaviour.NOT_HTTP, FailureCause.PROTOCOL, 0, "expected an HTTP answer"),
        (Behaviour.HANGS_UP, FailureCause.CONNECT, 0, "connection failed"),
    ],
)
async def test_an_unusable_answer_fails_before_any_text(
    behaviour: Behaviour, cause: FailureCause, status: int, said: str
) -> None:
    failure, text, _ = await failure_of(behaviour)
    assert (failure.cause, failure.http_status, text) == (cause, status, "")
    assert failure.reached, "the engine may have died of it"
    assert said in str(failure)
    assert len(str(failure)) < 700


@pytest.mark.parametrize(
    ("behaviour", "cause"),
    [
        (Behaviour.GARBAGE, FailureCause.PROTOCOL),
        (Behaviour.WRONG_TYPES, FailureCause.PROTOCOL),
        (Behaviour.WRONG_INDEX, FailureCause.PROTOCOL),
        (Behaviour.ENDS_EARLY, FailureCause.TRUNCATED),
        (Behaviour.DONE_EARLY, FailureCause.TRUNCATED),
        (Behaviour.HALF_CHARACTER, FailureCause.TRUNCATED),
        (Behaviour.DIES, FailureCause.ENGINE_ERROR),
        (Behaviour.DIES_FLAT, FailureCause.ENGINE_ERROR),
        (Behaviour.ABORTS, FailureCause.ENGINE_ERROR),
    ],
)
async def test_a_stream_that_goes_wrong_fails_after_what_it_gave(
    behaviour: Behaviour, cause: FailureCause
) -> None:
    failure, text, tokens = await failure_of(behaviour)
    assert (failure.cause, text, tokens) == (cause, " a b c", 3)
    assert "3 tokens" in str(failure) or "0 to 0" in str(failure) or "abort" in str(failure)
    assert ("EngineCore died" in str(failure)) is (behaviour in {Behaviour.DIES, Behaviour.DIES_FLAT})
    assert failure.http_status == 0


async def test_a_stream_cut_without_its_end_is_truncated() -> None:
    failure, _, _ = await failure_of(Behaviour.CUT)
    assert failure.cause is FailureCause.TRUNCATED


async def test_a_whole_answer_without_a_finish_reason_is_truncated() -> None:
    failure, _, _ = await failure_of(Behaviour.WHOLE_UNFINISHED)
    assert failure.cause is FailureCause.TRUNCATED


@pytest.mark.parametrize("behaviour", [Behaviour.SILENT, Behaviour.PINGS])
async def test_an_engine_that_never_begins_is_stalled_though_alive(behaviour: Behaviour) -> None:
    failure, _, tokens = await failure_of(behaviour, first_token_timeout_s=0.2)
    assert (failure.cause, tokens) == (FailureCause.STALLED, 0)
    async with bad_engine(behaviour) as bad, engine_at(bad.url) as engine:
        assert await engine.is_alive()


async def test_an_engine_that_falls_silent_is_stalled() -> None:
    failure, text, _ = await failure_of(Behaviour.STALLS, inter_token_timeout_s=0.2)
    assert (failure.cause, text) == (FailureCause.STALLED, " a b c")


async def test_what_came_while_this_process_stood_still_is_no_silence_of_the_engine() -> None:
    frozen = threading.Event()

    def freeze() -> None:
        frozen.set()
        time.sleep(1.3 * PATIENCE_S)  # the whole event loop, as on a machine without a free core

    def serve(listener: socket.socket) -> None:
        connection, _ = listener.accept()
        with connection:
            connection.recv(65_536)
            connection.sendall(
                b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nConnection: close\r\n\r\n"
            )
            connection.sendall(b'data: {"choices":[{"text":"a"}]}\n\n')
            frozen.wait(30)
            connection.sendall(b'data: {"choices":[{"text":"b","finish_reason":"stop"}]}\n\ndata: [DONE]\n\n')

    with socket.create_server(("127.0.0.1", 0)) as listener:
        server = threading.Thread(target=serve, args=(listener,), daemon=True)
        server.start()
        url = f"http://127.0.0.1:{listener.getsockname()[1]}"
        pieces: list[Piece] = []
        async with engine_at(url, inter_token_timeout_s=PATIENCE_S) as engine:
            async for piece in engine.stream(work(), json.dumps(PROMPT).encode()):
                if not pieces:
                    asyncio.get_running_loop().call_later(0.05, freeze)
                pieces.append(piece)
        server.join()
    assert (text_of(pieces), finishes_of(pieces)) == ("ab", [(0, "stop")])


async def test_a_slow_reader_does_not_make_the_engine_stalled() -> None:
    async with simulator() as (_, url), engine_at(url, inter_token_timeout_s=0.3) as engine:
        loop = asyncio.get_running_loop()
        tokens = 0
        async for piece in engine.stream(work(), json.dumps(PROMPT).encode()):
            tokens += piece.tokens
            until = loop.time() + (0.4 if tokens < 3 else 0)
            await wait_until(lambda until=until: loop.time() > until, "the reader to have been slow")  # type: ignore[misc]
        assert tokens == 6


@pytest.mark.parametrize("behaviour", [Behaviour.NO_DONE, Behaviour.LINGERS])
async def test_finish_reasons_make_an_answer_whole_however_it_closes(behaviour: Behaviour) -> None:
    async with bad_engine(behaviour) as bad, engine_at(bad.url) as engine:
        pieces = await collect(engine, PROMPT)
        await wait_until(lambda: not bad.connections, "the connection to be closed")
    assert text_of(pieces) == " a b c d"
    assert finishes_of(pieces) == [(0, "stop")]
    assert pieces[-1].usage == (
        Usage(prompt_tokens=5, completion_tokens=4) if behaviour is Behaviour.LINGERS else None
    )


async def test_what_is_not_text_is_kept_raw() -> None:
    async with bad_engine(Behaviour.RICH) as bad, engine_at(bad.url) as engine:
        pieces = await collect(engine, CHAT, Endpoint.CHAT)
    choices = [choice for piece in pieces for choice in piece.choices]
    assert [choice.text for choice in choices] == ["", "hé", ""]
    assert [bytes(delta) for choice in choices for delta in choice.deltas] == [
        b'{"reasoning_content":"so"}',
        b'{"logprobs":{"content":[{"token":"h","logprob":-0.10}]}}',
        b'{"tool_calls":[{"index":0,"function":{"arguments":"{\\"a\\": 1e2}"}}]}',
    ]
    assert [choice.token_ids for choice in choices] == [None, (7, 8), None]
    assert [piece.tokens for piece in pieces] == [1, 2, 1, 0, 0]
    assert finishes_of(pieces) == [(0, "tool_calls")]
    assert pieces[-1].usage == Usage(prompt_tokens=9, completion_tokens=6, cached_tokens=4)


async def test_an_engine_that_does_not_stream_gives_one_piece() -> None:
    async with bad_engine(Behaviour.WHOLE) as bad, engine_at(bad.url) as engine:
        pieces = await collect(engine, PROMPT)
    assert (text_of(pieces), pieces[0].tokens, finishes_of(pieces)) == (" a b", 2, [(0, "stop")])
    assert pieces[-1].usage == Usage(prompt_tokens=5, completion_tokens=2)
    async with bad_engine(Behaviour.WHOLE_CHAT) as bad, engine_at(bad.url) as engine:
        (piece,) = await collect(engine, CHAT, Endpoint.CHAT)
    assert b'"name":"f"' in bytes(piece.choices[0].deltas[0])
    assert piece.finish_reasons == ((0, "tool_calls"),)


async def test_the_request_is_streamed_and_otherwise_untouched() -> None:
    body = (
        b'{"model":"sim", "prompt":"\\u00e9", "temperature":1.0e0, "stream":false, '
        b'"stream_options":{"include_usage":false}, "odd":[1, 2]}'
    )
    traceparent = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"
    async with bad_engine(Behaviour.WHOLE) as bad, engine_at(bad.url + "/v1/") as engine:
        await collect(engine, body, id="né\r\nX-Evil: 1", traceparent=traceparent)
        await collect(engine, body, id="日本", traceparent="not\r\none")
    first, second = bad.received
    assert first.path == "/v1/completions"
    assert (first.headers["x-request-id"], first.headers["traceparent"]) == ("nX-Evil: 1", traceparent)
    assert (second.headers["x-request-id"], second.headers.get("traceparent")) == ("i-0-7", None)
    assert first.body == (
        b'{"model":"sim","prompt":"\\u00e9","temperature":1.0e0,"stream":true,'
        b'"stream_options":{"include_usage":true},"odd":[1, 2]}'
    )


@pytest.mark.parametrize(
    "body",
    [b"", b"[]", b"{", b"\xff", b'{"n":0}', b'{"n":"two"}', b'{"n":true}', b'{"prompt":["a",}', b"[" * 9_999],
)
async def test_a_body_that_is_none_is_refused_without_a_call(body: bytes) -> None:
    async with engine_at("http://127.0.0.1:9") as engine:
        with pytest.raises(EngineFailure, match="body: ") as caught:
            await collect(engine, body)
    assert caught.value.cause is FailureCause.REFUSED


@pytest.mark.parametrize(
    ("endpoint", "body", "choices"),
    [
        (Endpoint.COMPLETIONS, b'{"prompt":"a"}', 1),
        (Endpoint.COMPLETIONS, b'{"prompt":"[[a","n":null}', 1),
        (Endpoint.COMPLETIONS, b'{"prompt":[1,2,3],"n":2}', 2),
        (Endpoint.COMPLETIONS, b'{"prompt":["a","b"],"n":3}', 6),
        (Endpoint.COMPLETIONS, b'{"prompt": [ [1,2],\n [3]]}', 2),
        (Endpoint.COMPLETIONS, b'{"prompt":[]}', 1),
        (Endpoint.COMPLETIONS, b"{}", 1),
        (Endpoint.CHAT, b'{"prompt":["a","b"],"n":4}', 4),
        (Endpoint.CHAT, b'{"n":1000000000000}', 10**12),
    ],
)
def test_choices_are_prompts_times_n(endpoint: Endpoint, body: bytes, choices: int) -> None:
    assert streaming_body(endpoint, body, "m")[1] == choices


async def test_nobody_listening_is_a_failure_to_connect() -> None:
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))
        async with engine_at(f"http://127.0.0.1:{closed.getsockname()[1]}") as engine:
            with pytest.raises(EngineFailure) as caught:
                await collect(engine, PROMPT)
            assert (caught.value.cause, caught.value.reached) == (FailureCause.CONNECT, False)
            assert not await engine.is_alive()
            with pytest.raises(EngineFailure) as caught:
                await engine.models()
            assert caught.value.cause is FailureCause.CONNECT


@pytest.mark.parametrize(
    "address",
    [
        "",
        "localhost:80",
        "ftp://h",
        "http://",
        "http://:80",
        "http://h:99999",
        "http://[",
        "http://h?x=1",
        "http://a b",
    ],
)
def test_an_address_that_is_none_is_refused(address: str) -> None:
    with pytest.raises(SettingsError, match="expected http"):
        OpenAIEngine(address)


async def test_simulated_completion_is_whole_and_as_predicted() -> None:
    async with simulator() as (_, url), engine_at(url) as engine:
        assert await engine.is_alive()
        assert await engine.models() == ("sim",)
        pieces = await collect(engine, {**PROMPT, "return_token_ids": True})
    answer = Answer(tokenise("Once upon a time"))
    assert text_of(pieces) == answer.text(6)
    ids = tuple(answer.token_id(place) for place in range(6))
    assert sum((choice.token_ids or () for piece in pieces for choice in piece.choices), ()) == ids
    assert sum(piece.tokens for piece in pieces) == 6
    assert finishes_of(pieces) == [(0, "length")]
    assert pieces[-1].usage == Usage(prompt_tokens=4, completion_tokens=6)


async def test_simulated_chat_with_two_choices() -> None:
    async with simulator() as (_, url), engine_at(url) as engine:
        pieces = await collect(engine, {**CHAT, "n": 2}, Endpoint.CHAT)
    prompt = render_chat([Message(role="user", content="hello")])
    assert [text_of(pieces, index) for index in (0, 1)] == [
        Answer(tokenise(prompt), index).text(5) for index in (0, 1)
    ]
    assert sorted(finishes_of(pieces)) == [(0, "length"), (1, "length")]
    assert pieces[-1].usage == Usage(prompt_tokens=3, completion_tokens=10)


async def test_simulated_prompts_of_token_ids_and_their_cache() -> None:
    one, other = list(range(40)), list(range(40, 80))
    async with simulator() as (_, url), engine_at(url) as engine:
        single = await collect(engine, {**PROMPT, "prompt": one})
        both = await collect(engine, {**PROMPT, "prompt": [one, other], "n": 2})
    assert text_of(single) == text_of(both, 0) == Answer(one).text(6)
    assert [text_of(both, index) for index in (1, 2, 3)] == [
        Answer(one, 1).text(6),
        Answer(other).text(6),
        Answer(other, 1).text(6),
    ]
    assert single[-1].usage == Usage(prompt_tokens=40, completion_tokens=6)
    assert both[-1].usage == Usage(prompt_tokens=80, completion_tokens=24, cached_tokens=32)


async def test_closing_a_stream_frees_the_engine_at_once() -> None:
    profile = replace(PROFILES["test"], decode_sequence_s=3_599.0)
    async with simulator(profile=profile, time_scale=1.0) as (engine_side, url), engine_at(url) as engine:
        async with aclosing(engine.stream(work(), json.dumps(PROMPT).encode())) as stream:
            piece = await anext(stream)
            assert piece.tokens == 1
            assert engine_side.engine.running == 1
        await wait_until(lambda: engine_side.engine.running == 0, "the slot to be free")


async def test_cancelling_before_the_first_token_frees_the_engine() -> None:
    profile = replace(PROFILES["test"], prefill_token_s=1_000.0)
    async with simulator(profile=profile, time_scale=1.0) as (engine_side, url), engine_at(url) as engine:
        running = asyncio.create_task(collect(engine, PROMPT))
        await wait_until(lambda: engine_side.engine.running == 1, "the request to run")
        running.cancel()
        await asyncio.wait([running])
        await wait_until(lambda: engine_side.engine.running == 0, "the slot to be free")


async def test_connections_are_kept_between_requests() -> None:
    made: list[aiohttp.TraceConnectionCreateEndParams] = []

    async def note(_: object, __: object, params: aiohttp.TraceConnectionCreateEndParams) -> None:
        made.append(params)

    def session() -> aiohttp.ClientSession:
        trace = aiohttp.TraceConfig()
        trace.on_connection_create_end.append(note)
        return aiohttp.ClientSession(trace_configs=[trace])

    async with simulator() as (_, url):
        engine = OpenAIEngine(url, new_session=session)
        for _ in range(5):
            await collect(engine, PROMPT)
        await engine.close()
    assert len(made) == 1


async def test_a_large_body_arrives() -> None:
    prompt = "word " * 300_000
    profile = replace(PROFILES["test"], kv_blocks=40_000)
    async with simulator(profile=profile, max_model_tokens=1_000_000) as (_, url), engine_at(url) as engine:
        pieces = await collect(engine, {**PROMPT, "prompt": prompt})
    assert text_of(pieces) == Answer(tokenise(prompt)).text(6)


@pytest.mark.parametrize(
    ("body", "cause", "status"),
    [
        ({**PROMPT, "model": "other"}, FailureCause.REFUSED, 404),
        ({**PROMPT, "prompt": "x" * 10_000}, FailureCause.REFUSED, 400),
        ({**PROMPT, "prompt": ["a", 1]}, FailureCause.REFUSED, 400),
        ({**PROMPT, "max_tokens": 0}, FailureCause.REFUSED, 400),
        ({"model": "sim"}, FailureCause.REFUSED, 400),
        ({**PROMPT, "n": 9}, FailureCause.OVERLOADED, 429),
    ],
)
async def test_the_simulated_engine_refuses_as_a_real_one(
    body: dict[str, object], cause: FailureCause, status: int
) -> None:
    profile = replace(PROFILES["test"], max_running=4)
    async with simulator(profile=profile, max_waiting=4, max_model_tokens=2_000) as (_, url):
        async with engine_at(url) as engine:
            with pytest.raises(EngineFailure) as caught:
                await collect(engine, body)
            assert (caught.value.cause, caught.value.http_status) == (cause, status)
            assert text_of(await collect(engine, PROMPT)) == Answer(tokenise("Once upon a time")).text(6)


async def test_the_simulated_engine_without_stream_gives_the_same_answer() -> None:
    async with simulator() as (_, url), aiohttp.ClientSession() as session:
        async with session.post(url + "/v1/chat/completions", json={**CHAT, "n": 2}) as response:
            answer = await response.json()
        async with session.get(url + "/metrics") as response:
            metrics = await response.text()
    prompt = render_chat([Message(role="user", content="hello")])
    assert [choice["message"]["content"] for choice in answer["choices"]] == [
        Answer(tokenise(prompt)).text(5),
        Answer(tokenise(prompt), 1).text(5),
    ]
    assert answer["usage"]["completion_tokens"] == 10
    assert 'vllm:num_requests_running{engine="0",model_name="sim"} 0.0' in metrics
    assert 'vllm:num_requests_waiting{engine="0",model_name="sim"} 0.0' in metrics


async def test_faults_on_purpose_are_failures_and_repeat_with_the_seed() -> None:
    async def causes(seed: int) -> list[str]:
        seen = []
        async with simulator(faults=Faults(fail_rate=0.5, stall_rate=0.2), seed=seed) as (_, url):
            async with engine_at(url, inter_token_timeout_s=0.5) as engine:
                for _ in range(12):
                    try:
                        await collect(engine, PROMPT)
                        seen.append("whole")
                    except EngineFailure as failure:
                        seen.append(failure.cause.value)
        return seen

    first = await causes(1)
    assert first == await causes(1)
    assert set(first) == {"whole", "engine_error", "truncated", "stalled"}


@pytest.fixture
def taken_port() -> Iterator[int]:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        yield taken.getsockname()[1]


async def spawn(*arguments: str) -> asyncio.subprocess.Process:
    pipe = asyncio.subprocess.PIPE
    return await asyncio.create_subprocess_exec(
        sys.executable, "-m", "workers_agent.simulator", *arguments, stdout=pipe, stderr=pipe
    )


async def test_the_simulator_process_serves_and_ends_at_once_on_sigterm() -> None:
    process = await spawn("--model", "tiny", "--decode-step-ms-per-sequence", "3000000")
    try:
        assert process.stdout is not None
        ready = json.loads(await process.stdout.readline())
        assert ready["model"] == "tiny"
        async with engine_at(ready["url"]) as engine:
            body = json.dumps({**PROMPT, "model": "tiny"}).encode()
            async with aclosing(engine.stream(work(), body)) as stream:
                await anext(stream)
                process.send_signal(signal.SIGTERM)
                with pytest.raises(EngineFailure) as caught:
                    await anext(stream)
        assert caught.value.cause is FailureCause.TRUNCATED
        _, errors = await asyncio.wait_for(process.communicate(), 10)
        assert (process.returncode, errors) == (0, b"")
    finally:
        if process.returncode is None:
            process.kill()
            await process.wait()


async def test_the_simulator_process_says_that_its_port_is_taken(taken_port: int) -> None:
    process = await spawn("--port", str(taken_port))
    output, errors = await process.communicate()
    assert (process.returncode, output) == (2, b"")
    assert errors.decode().startswith(f"simulator: can't listen on 127.0.0.1:{taken_port}")
    assert len(errors.splitlines()) == 1


@pytest.mark.parametrize(
    "arguments",
    [
        ("--fail-rate", "2"),
        ("--max-running", "0"),
        ("--port", "70000"),
        ("--time-scale", "nan"),
        ("--seed", "x"),
    ],
)
async def test_the_simulator_process_refuses_a_wrong_argument(arguments: tuple[str, str]) -> None:
    process = await spawn(*arguments)
    _, errors = await process.communicate()
    assert process.returncode == 2
    assert arguments[0] in errors.decode()


def test_body_without_a_model_gets_the_requests() -> None:
    made, _ = streaming_body(Endpoint.COMPLETIONS, b'{"prompt": "x"}', "llama")
    assert b'"model":"llama"' in made
    made, _ = streaming_body(Endpoint.COMPLETIONS, b'{"prompt": "x", "model": "own"}', "llama")
    assert b'"model":"own"' in made
    assert b"llama" not in made
