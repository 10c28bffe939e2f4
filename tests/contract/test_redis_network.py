"""A member's network to Redis: through it alone a primary is reached, and the next one; it is cut as one."""

from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path

import pytest
from redis.exceptions import RedisError

from dispatcher.backends.addresses import sentinel_address
from dispatcher.backends.connect import connect_redis
from dispatcher.backends.scripts import Redis
from dispatcher.errors import ServerError
from dispatcher.local.redis_network import RedisNetwork, renamed_port
from dispatcher.local.sentinel import ReplicatedValkey, attach, command, detach, is_in_sync
from dispatcher.local.valkey import ValkeyServer
from tests.support.wait import wait_until


@pytest.fixture
async def replicated(tmp_path: Path) -> AsyncIterator[ReplicatedValkey]:
    """A primary, a replica and three Sentinels."""
    async with ReplicatedValkey(tmp_path / "redis") as servers:
        yield servers


async def answers(client: Redis) -> bool:
    """Whether Redis does what it is asked."""
    try:
        await client.set("k", "v")
    except (RedisError, OSError):
        return False
    return True


async def is_reached_by(client: Redis, server: ValkeyServer) -> bool:
    """Whether a client talks to that server."""
    try:
        return int((await client.config_get("port"))["port"]) == server.port
    except (RedisError, OSError):
        return False


async def test_a_member_follows_a_failover_behind_its_network(replicated: ReplicatedValkey) -> None:
    async with RedisNetwork(replicated) as network:
        known = sentinel_address(network.url)
        assert known is not None
        own = {server.port for server in (*replicated.servers, *replicated.sentinels)}
        assert own.isdisjoint(port for _, port in known.sentinels)
        client = connect_redis(network.url, timeout_s=0.5)
        try:
            assert await is_reached_by(client, await replicated.primary())
            await replicated.failover()
            primary = await replicated.primary()
            await wait_until(lambda: is_reached_by(client, primary), "the client to be at the new primary")
            network.cut()
            assert not await answers(client), "not to a server, nor to a Sentinel, is there another way"
            network.heal()
            await wait_until(lambda: answers(client), "an answer")
        finally:
            await client.aclose()


async def test_a_network_to_one_server_is_cut_and_healed(valkey: ValkeyServer) -> None:
    async with RedisNetwork(valkey) as network:
        client = connect_redis(network.url, timeout_s=0.3)
        try:
            assert await answers(client)
            network.cut()
            assert not await answers(client)
            network.heal()
            await wait_until(lambda: answers(client), "an answer")
        finally:
            await client.aclose()


def test_a_port_of_another_length_is_refused_with_what_to_do() -> None:
    assert renamed_port(34567, 45678) == {b"34567": b"45678"}
    with pytest.raises(ServerError, match="ip_local_port_range"):
        renamed_port(9999, 10000)


async def test_a_replica_that_was_detached_follows_again(replicated: ReplicatedValkey) -> None:
    primary, replica = await replicated.primary(), await replicated.replica()
    await detach(replica)
    await command(primary, "SET", "k", "missed")
    assert await command(replica, "GET", "k") is None
    await attach(replica)
    await wait_until(lambda: is_in_sync(replica), "the replica to follow")
    assert await command(replica, "GET", "k") == b"missed"


async def test_sentinels_wait_as_long_as_they_are_told(replicated: ReplicatedValkey) -> None:
    await replicated.wait_before_vote(60_000)
    primary = await replicated.primary()
    primary.freeze()
    try:
        for sentinel in replicated.sentinels:
            told = await command(sentinel, "SENTINEL", "MASTER", "flexlb")
            assert dict(zip(told[::2], told[1::2], strict=True))[b"down-after-milliseconds"] == b"60000"
        assert await replicated.primary() is primary
        await replicated.wait_before_vote(500)
        assert await replicated.until_promoted(primary) is not primary
    finally:
        primary.thaw()
