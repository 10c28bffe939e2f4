"""The simulated engine as its clients see it: the OpenAI SDK, Prometheus, a subscriber to KV events."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import replace
from typing import Any

import aiohttp
import msgspec
import openai
import pytest
import zmq
import zmq.asyncio

from dispatcher.simulation.profiles import PROFILES
from dispatcher.simulation.tokens import Answer, tokenise
from tests.support.wait import wait_until
from workers_agent.simulator.faults import Faults
from workers_agent.simulator.server import Simulator, SimulatorSettings
from workers_agent.simulator.wire import Message, render_chat

MESSAGES = [{"role": "user", "content": "tell me something long enough for a few blocks of the cache"}]
TEXT = render_chat([Message(role="user", content=MESSAGES[0]["content"])])
SMALL = replace(PROFILES["test"], kv_blocks=64)


@asynccontextmanager
async def simulator(**settings: Any) -> AsyncIterator[tuple[Simulator, str]]:
    engine = Simulator(SimulatorSettings(**{"time_scale": 0.0, **settings}))
    try:
        yield engine, await engine.start()
    finally:
        await engine.close()


@asynccontextmanager
async def sdk(url: str) -> AsyncIterator[openai.AsyncOpenAI]:
    async with openai.AsyncOpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0) as client:
        yield client


async def test_the_openai_sdk_reads_answers_streams_and_errors() -> None:
    async with simulator() as (_, url), sdk(url) as client:
        assert [model.id async for model in client.models.list()] == ["sim"]
        whole = await client.chat.completions.create(model="sim", messages=MESSAGES, max_tokens=9)  # type: ignore[arg-type]
        text = Answer(tokenise(TEXT)).text(9)
        assert whole.choices[0].message.content == text
        assert whole.choices[0].finish_reason == "length"
        parts: list[str] = []
        usage = None
        stream = await client.chat.completions.create(  # type: ignore[call-overload]
            model="sim", messages=MESSAGES, max_tokens=9, stream=True, stream_options={"include_usage": True}
        )
        async for chunk in stream:
            parts += [choice.delta.content or "" for choice in chunk.choices]
            usage = chunk.usage or usage
        assert "".join(parts) == text
        assert usage is not None
        assert usage.prompt_tokens_details.cached_tokens == 16
        with pytest.raises(openai.NotFoundError):
            await client.completions.create(model="other", prompt="x")


async def test_its_metrics_have_vllms_names_and_tell_the_model() -> None:
    async with simulator(profile=SMALL) as (engine, url), sdk(url) as client:
        for _ in range(2):
            await client.completions.create(model="sim", prompt=list(range(1000, 1100)), max_tokens=5)
        async with aiohttp.ClientSession() as session, session.get(f"{url}/metrics") as response:
            lines = (await response.text()).splitlines()
        values = dict(line.rsplit(" ", 1) for line in lines if not line.startswith("#"))
    label = '{engine="0",model_name="sim"}'
    assert float(values[f"vllm:prefix_cache_queries_total{label}"]) == 200
    assert float(values[f"vllm:prefix_cache_hits_total{label}"]) == 96
    assert float(values[f"vllm:generation_tokens_total{label}"]) == 10
    assert float(values[f"vllm:kv_cache_usage_perc{label}"]) == 0
    assert float(values[f"flexlb_sim:busy_seconds_total{label}"]) == pytest.approx(engine.engine.busy_s)
    assert values['vllm:cache_config_info{block_size="16",engine="0",model_name="sim",num_gpu_blocks="64"}']
    finished = 'vllm:request_success_total{engine="0",finished_reason="length",model_name="sim"}'
    assert float(values[finished]) == 2


class Subscriber:
    """Follows one engine's events and keeps what they say is cached."""

    def __init__(self, encoding: str) -> None:
        self.context = zmq.asyncio.Context()
        self.socket = self.context.socket(zmq.SUB)
        self.socket.linger = 0
        self.socket.subscribe(b"")
        self.encoding = encoding
        self.sequences: list[int] = []
        self.cached: set[int] = set()

    async def follow(self) -> None:
        while True:
            _, sequence, batch = await self.socket.recv_multipart()
            self.take(sequence, batch)

    def take(self, sequence: bytes, batch: bytes) -> None:
        self.sequences.append(int.from_bytes(sequence, "big"))
        _, events, rank = msgspec.msgpack.decode(batch)
        assert rank == 0
        for event in events:
            if self.encoding == "array":
                kind, hashes = event[0], event[1] if len(event) > 1 else []
            else:
                kind, hashes = event["type"], event.get("block_hashes", [])
            if kind == "BlockStored":
                self.cached |= set(hashes)
            elif kind == "BlockRemoved":
                self.cached -= set(hashes)
            else:
                self.cached.clear()

    def close(self) -> None:
        self.socket.close()
        self.context.term()


async def replayed(url: str, first: int) -> list[tuple[bytes, bytes]]:
    """What the engine replays from a sequence on."""
    context = zmq.asyncio.Context()
    socket = context.socket(zmq.DEALER)
    socket.linger = 0
    try:
        socket.connect(url)
        await socket.send_multipart([b"", first.to_bytes(8, "big")])
        batches: list[tuple[bytes, bytes]] = []
        async with asyncio.timeout(10):
            while True:
                _, _, sequence, batch = await socket.recv_multipart()
                if int.from_bytes(sequence, "big", signed=True) == -1:
                    return batches
                batches.append((sequence, batch))
    finally:
        socket.close()
        context.term()


async def send(client: openai.AsyncOpenAI, numbers: range) -> None:
    for number in numbers:
        prompt = [1000 + (number * 37 + place) % 900 for place in range(100)]
        await client.completions.create(model="sim", prompt=prompt, max_tokens=3)


@pytest.mark.parametrize("encoding", ["map", "array"])
async def test_kv_events_tell_exactly_what_is_cached(encoding: str) -> None:
    subscriber = Subscriber(encoding)
    port = subscriber.socket.bind_to_random_port("tcp://127.0.0.1")
    following = asyncio.create_task(subscriber.follow())
    try:
        # As vLLM with tcp://host:port: the engine connects.
        address = f"tcp://127.0.0.1:{port}"
        async with simulator(profile=SMALL, kv_events=address, kv_encoding=encoding) as (engine, url):
            async with sdk(url) as client:
                number = 0
                while not subscriber.sequences:
                    await send(client, range(number, number + 1))
                    number += 1
                await send(client, range(number, number + 20))
                assert engine.kv is not None
                cached = engine.engine.cache.cached
                await wait_until(lambda: subscriber.cached >= cached, "the last event")
                early = set(subscriber.sequences) != set(range(subscriber.sequences[-1] + 1))
                assert early or subscriber.cached == cached
                assert subscriber.sequences == sorted(subscriber.sequences)
                async with aiohttp.ClientSession() as session:
                    async with session.post(f"{url}/reset_prefix_cache") as response:
                        assert response.status == 200
                await wait_until(lambda: not subscriber.cached, "the reset")
    finally:
        following.cancel()
        await asyncio.wait([following])
        subscriber.close()


async def test_dropped_events_can_be_replayed_and_then_tell_the_whole_cache() -> None:
    settings = {"kv_events": "tcp://*:0", "kv_replay": "tcp://*:0", "kv_drop_share": 0.5, "seed": 3}
    async with simulator(profile=SMALL, **settings) as (engine, url), sdk(url) as client:
        await send(client, range(20))
        assert engine.kv is not None
        assert engine.kv.dropped > 3
        subscriber = Subscriber("map")
        batches = await replayed(engine.kv.replay, 0)
        for sequence, batch in batches:
            subscriber.take(sequence, batch)
        subscriber.close()
        assert subscriber.sequences == list(range(len(batches)))
        assert subscriber.cached == engine.engine.cache.cached
        assert len(await replayed(engine.kv.replay, 5)) == len(batches) - 5


async def test_faults_change_while_it_runs() -> None:
    async with simulator() as (_, url), sdk(url) as client, aiohttp.ClientSession() as session:
        await client.completions.create(model="sim", prompt="x")
        async with session.post(f"{url}/sim/faults", json={"fail_rate": 1.0}) as response:
            assert (await response.json())["fail_rate"] == 1.0
        for _ in range(5):
            with pytest.raises(openai.OpenAIError):
                await client.completions.create(model="sim", prompt="x")
        async with session.post(f"{url}/sim/faults", json={"fail_rate": 2}) as response:
            assert response.status == 400
        async with session.post(f"{url}/sim/faults", json={}) as response:
            assert response.status == 200
        await client.completions.create(model="sim", prompt="x")


async def test_a_crash_on_purpose_is_a_crash() -> None:
    crashed = []
    engine = Simulator(
        SimulatorSettings(time_scale=0.0, faults=Faults(crash_rate=1.0)), crash=lambda: crashed.append(True)
    )
    try:
        url = await engine.start()
        async with sdk(url) as client:
            asked = asyncio.create_task(client.completions.create(model="sim", prompt="x"))
            await wait_until(lambda: bool(crashed), "the crash")
            asked.cancel()
            await asyncio.wait([asked])
    finally:
        await engine.close()


async def test_a_slow_request_is_late_by_modelled_time() -> None:
    faults = Faults(slow_rate=1.0, slow_factor=8.0)
    async with simulator(time_scale=0.1, faults=faults) as (_, url), sdk(url) as client:
        loop = asyncio.get_running_loop()
        began = loop.time()
        await client.completions.create(model="sim", prompt="x", max_tokens=20)
        assert loop.time() - began >= 15 * 0.05 * 0.1
