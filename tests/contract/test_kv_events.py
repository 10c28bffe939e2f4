"""An agent's view of a real simulated engine's cache, whatever its events go through on the way."""

from __future__ import annotations

import asyncio
import random
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import replace
from typing import Any

import msgspec
import openai
import pytest

from dispatcher.protocol.node import Medium
from dispatcher.protocol.prefix_hash import block_hashes
from dispatcher.simulation.profiles import PROFILES
from tests.support.wait import wait_until
from workers_agent.cache_view import CacheView, Cleared, Removed, Stored
from workers_agent.engines.kv_events import KVEventSource, UnreadableBatch, decode_batch
from workers_agent.simulator.server import Simulator, SimulatorSettings

MODEL, ROUTING = "sim", 64
SMALL = replace(PROFILES["test"], kv_blocks=200)


class Follower:
    """A view that follows an engine."""

    def __init__(self, endpoint: str, replay: str = "", quiet_s: float = 0.1) -> None:
        self.view = CacheView(MODEL, ROUTING)
        self.source = KVEventSource(
            endpoint,
            replay=replay,
            take=self.view.apply,
            forget=lambda missing: self.view.reset(partial=missing),
            moved=lambda: None,
            quiet_s=quiet_s,
        )

    @property
    def hashes(self) -> set[str]:
        return {one for _, _, some in self.view.snapshot() for one in some}


@asynccontextmanager
async def engine(**settings: Any) -> AsyncIterator[tuple[Simulator, str]]:
    """A simulated engine that publishes."""
    told = {"time_scale": 0.0, "profile": SMALL, "kv_events": "tcp://*:0", "kv_replay": "tcp://*:0"}
    simulator = Simulator(SimulatorSettings(**{**told, **settings}))
    try:
        yield simulator, await simulator.start()
    finally:
        await simulator.close()


@asynccontextmanager
async def following(follower: Follower) -> AsyncIterator[None]:
    task = asyncio.create_task(follower.source.run())
    try:
        yield
    finally:
        task.cancel()
        await asyncio.wait([task])


PROMPTS = [[1000 + (number * 13 + place) % 5000 for place in range(400)] for number in range(12)]


async def ask(url: str, rng: random.Random, count: int) -> None:
    """Prompts that share beginnings, more than the cache holds."""
    async with openai.AsyncOpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0) as client:
        for _ in range(count):
            first = rng.choice(PROMPTS)
            prompt = first[: rng.randrange(50, 400)] + [rng.randrange(1000, 9000) for _ in range(100)]
            await client.completions.create(model=MODEL, prompt=prompt, max_tokens=rng.randrange(1, 40))


def truly_cached(simulator: Simulator, prompts: list[list[int]]) -> set[str]:
    """Routing blocks of these prompts that the engine really has."""
    from dispatcher.simulation.kv_cache import block_hashes as engine_hashes

    held = simulator.engine.cache.cached
    found: set[str] = set()
    for prompt in prompts:
        own = engine_hashes(prompt, SMALL.block_tokens)
        depth = next((n for n, block in enumerate(own) if block not in held), len(own))
        routing = block_hashes(prompt, model=MODEL, block_size=ROUTING)
        found |= set(routing[: depth * SMALL.block_tokens // ROUTING])
    return found


@pytest.mark.parametrize("encoding", ["map", "array"])
async def test_a_view_agrees_with_the_engine_and_with_what_clients_hash(encoding: str) -> None:
    async with engine(kv_encoding=encoding) as (simulator, url):
        assert simulator.kv is not None
        follower = Follower(simulator.kv.endpoint, simulator.kv.replay)
        async with following(follower):
            await ask(url, random.Random(1), 60)
            await wait_until(
                lambda: follower.source.counts.batches == simulator.kv._sequence,  # type: ignore[union-attr]
                "every batch",
            )
            known = set().union(*(block_hashes(p, model=MODEL, block_size=ROUTING) for p in PROMPTS))
            assert follower.hashes & known == truly_cached(simulator, PROMPTS)
            assert truly_cached(simulator, PROMPTS)
            assert not follower.view.is_partial


@pytest.mark.parametrize("seed", range(3))
async def test_with_a_tenth_of_the_events_dropped_every_gap_is_found_and_healed(seed: int) -> None:
    async with engine(kv_drop_share=0.1, seed=seed) as (simulator, url):
        assert simulator.kv is not None
        follower = Follower(simulator.kv.endpoint, simulator.kv.replay)
        async with following(follower):
            await ask(url, random.Random(seed), 80)
            await wait_until(
                lambda: follower.source.counts.batches == simulator.kv._sequence,  # type: ignore[union-attr]
                "every batch",
            )
            assert simulator.kv.dropped >= 3
            assert follower.source.counts.replayed >= simulator.kv.dropped
            assert follower.source.counts.lost == 0
            assert not follower.view.is_partial
            whole = CacheView(MODEL, ROUTING)
            for _, batch in simulator.kv._kept:
                for event in decode_batch(batch):
                    whole.apply(event)
            assert follower.hashes == {one for _, _, some in whole.snapshot() for one in some}


async def test_without_replay_a_gap_empties_the_view_and_says_so() -> None:
    async with engine(kv_drop_share=0.3, kv_replay="", seed=1) as (simulator, url):
        assert simulator.kv is not None
        follower = Follower(simulator.kv.endpoint)
        async with following(follower):
            rng = random.Random(1)
            while not follower.source.counts.gaps:
                await ask(url, rng, 1)
            assert follower.view.is_partial
            assert follower.source.counts.lost >= 1


async def test_a_subscriber_that_comes_late_gets_what_was_told_before() -> None:
    async with engine() as (simulator, url):
        assert simulator.kv is not None
        await ask(url, random.Random(2), 10)
        follower = Follower(simulator.kv.endpoint, simulator.kv.replay)
        async with following(follower):
            await wait_until(
                lambda: follower.source.counts.batches == simulator.kv._sequence,  # type: ignore[union-attr]
                "the replay",
            )
            assert not follower.view.is_partial
            assert follower.hashes


async def test_another_life_of_the_engine_starts_an_empty_view() -> None:
    async with engine() as (first, url):
        assert first.kv is not None
        follower = Follower(first.kv.endpoint)
        async with following(follower):
            # Other prompts each time: what is cached makes no event, and the first may come too early.
            rng = random.Random(3)
            while not follower.source.counts.batches:
                await ask(url, rng, 1)
            port = first.kv.endpoint.rpartition(":")[2]
            await ask(url, random.Random(4), 80)
            before = set(follower.hashes)
            assert before
            await first.close()
            async with engine(kv_events=f"tcp://*:{port}", kv_replay="") as (second, other_url):
                assert second.kv is not None
                while not follower.source.counts.restarts:
                    await ask(other_url, rng, 1)
                # What continues a beginning that was missed is dropped: ask until one is heard whole.
                while not follower.hashes:
                    await ask(other_url, rng, 1)
                assert not follower.hashes >= before


async def test_an_engine_that_connects_is_heard_by_a_subscriber_that_binds(unused_tcp_port: int) -> None:
    follower = Follower(f"tcp://*:{unused_tcp_port}")
    async with following(follower):
        async with engine(kv_events=f"tcp://127.0.0.1:{unused_tcp_port}", kv_replay="") as (_, url):
            rng = random.Random(6)
            while not follower.source.counts.batches:
                await ask(url, rng, 1)


def test_old_and_new_encodings_and_both_kinds_of_hashes_are_read() -> None:
    new = {
        "type": "BlockStored",
        "block_hashes": [b"\x01" * 32],
        "parent_block_hash": None,
        "token_ids": [1, 2],
        "block_size": 2,
        "lora_id": None,
        "medium": "CPU_PINNED",
        "lora_name": "sql",
        "extra_keys": [["sql", "blue"]],
        "kv_cache_spec_kind": "full",
    }
    batch = [
        1.0,
        [
            new,
            ["BlockStored", [7], 3, [1, 2], 2, None],
            ["BlockRemoved", [7], "DISK"],
            ["BlockRemoved", [7]],
            {**new, "group_idx": 1},
            ["SomethingNew", 1, 2],
            ["AllBlocksCleared"],
            {"type": "AllBlocksCleared"},
        ],
    ]
    assert decode_batch(msgspec.msgpack.encode(batch)) == [
        Stored(
            hashes=(b"\x01" * 32,),
            parent=None,
            tokens=bytes([1, 0, 0, 0, 2, 0, 0, 0]),
            block_tokens=2,
            medium=Medium.CPU,
            lora="sql",
            salt="blue",
        ),
        Stored(hashes=(7,), parent=3, tokens=bytes([1, 0, 0, 0, 2, 0, 0, 0]), block_tokens=2),
        Removed(hashes=(7,), medium=Medium.DISK),
        Removed(hashes=(7,)),
        Cleared(),
        Cleared(),
    ]


def test_images_make_blocks_incomparable() -> None:
    raw = ["BlockStored", [7], None, [1, 2], 2, None, "GPU", None, [[["image-hash", 3]]]]
    (event,) = decode_batch(msgspec.msgpack.encode([1.0, [raw]]))
    assert isinstance(event, Stored)
    assert event.is_opaque


@pytest.mark.parametrize(
    "payload",
    [
        b"",
        b"junk",
        msgspec.msgpack.encode(5),
        msgspec.msgpack.encode([1.0]),
        msgspec.msgpack.encode([1.0, [5]]),
        msgspec.msgpack.encode([1.0, [["BlockStored", [1], None]]]),
        msgspec.msgpack.encode([1.0, [["BlockStored", [1], None, [1, 2, 3], 2, None]]]),
        msgspec.msgpack.encode([1.0, [["BlockStored", [1], None, [1, -2], 2, None]]]),
        msgspec.msgpack.encode([1.0, [{"block_hashes": [1]}]]),
    ],
)
def test_what_is_no_batch_is_refused(payload: bytes) -> None:
    with pytest.raises(UnreadableBatch):
        decode_batch(payload)
