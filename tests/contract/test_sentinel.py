"""Redis behind Sentinels: the client finds the primary, and finds the next one, on real servers."""

from __future__ import annotations

import asyncio
import math
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
from redis.asyncio import Redis as Client
from redis.exceptions import ConnectionError, RedisError

from dispatcher.backends.access import RedisAccess
from dispatcher.backends.connect import connect_redis
from dispatcher.backends.leader_lock import LeaderLock, Lease
from dispatcher.backends.redis_connection import sentinels_of
from dispatcher.backends.scripts import Redis, ScriptRunner
from dispatcher.doctor.command import examine, exit_code
from dispatcher.doctor.facts import Finding, Status
from dispatcher.errors import StoreUnavailable
from dispatcher.local.processes import HOST, free_port
from dispatcher.local.sentinel import SERVICE, ReplicatedValkey, command
from dispatcher.local.valkey import ValkeyServer
from dispatcher.protocol.names import Names
from tests.contract.test_doctor import settings, statuses, told
from tests.support.pool import CLOCK
from tests.support.servers import KafkaAddress
from tests.support.wait import wait_until


@pytest.fixture
async def replicated(tmp_path: Path) -> AsyncIterator[ReplicatedValkey]:
    """A primary, a replica and three Sentinels."""
    async with ReplicatedValkey(tmp_path / "redis") as servers:
        yield servers


async def port_of(client: Redis) -> int:
    """Where a client is connected to."""
    return int((await client.config_get("port"))["port"])


async def written(client: Redis, value: str) -> None:
    """Write until somebody takes it; raises anything but the lack of an answer."""

    async def takes() -> bool:
        try:
            await client.set("k", value)
        except (ConnectionError, TimeoutError, OSError):
            return False
        return True

    await wait_until(takes, f"a primary to take {value}")


async def test_client_follows_a_failover(replicated: ReplicatedValkey) -> None:
    before = await replicated.primary()
    client = connect_redis(replicated.url)
    try:
        await client.set("k", "before")
        assert await port_of(client) == before.port
        await replicated.failover()

        async def is_there() -> bool:
            # The old primary goes on for a moment after the new one began.
            await written(client, "meanwhile")
            return await port_of(client) == (await replicated.primary()).port != before.port

        await wait_until(is_there, "the client to be at the new primary")
        await written(client, "after")  # what was written before may be lost with the old one
        assert await client.get("k") == b"after"
    finally:
        await client.aclose()


async def test_client_finds_the_next_primary_when_one_dies_and_a_sentinel_is_gone(
    replicated: ReplicatedValkey,
) -> None:
    before = await replicated.primary()
    client = connect_redis(replicated.url)
    try:
        await client.set("k", "before")
        replicated.sentinels[0].kill()
        before.kill()
        await written(client, "after")
        assert await port_of(client) != before.port
    finally:
        await client.aclose()


async def test_client_goes_on_while_no_sentinel_answers(replicated: ReplicatedValkey) -> None:
    client = connect_redis(replicated.url)
    try:
        await client.set("k", "before")
        connection = await client.client_id()
        for sentinel in replicated.sentinels:
            sentinel.kill()
        pool = client.connection_pool
        pool._looked_s = -math.inf
        assert await client.get("k") == b"before"
        await asyncio.wait([pool._looking])
        assert pool._looking.exception() is None
        assert await client.client_id() == connection
    finally:
        await client.aclose()


async def test_sentinels_asked_by_many_at_once_are_all_kept(replicated: ReplicatedValkey) -> None:
    """Who finds the first one dead moves the next to its place; at the end all of them are closed."""
    client = connect_redis(replicated.url)
    try:
        await client.set("k", "before")
        before = sentinels_of(client)
        replicated.sentinels[0].kill()
        manager = client.connection_pool.sentinel_manager
        await asyncio.gather(*(manager.discover_master(SERVICE) for _ in range(5)))
        assert sentinels_of(client) == before
    finally:
        await client.aclose()


async def test_blocked_reader_goes_on_at_the_next_primary(replicated: ReplicatedValkey) -> None:
    client, writer = connect_redis(replicated.url), connect_redis(replicated.url)

    async def read() -> bytes:
        while True:
            try:
                if (found := await client.blpop(["q"], timeout=1)) is not None:
                    return bytes(found[1])
            except RedisError:
                await asyncio.sleep(0.05)

    reading = asyncio.create_task(read())
    try:
        before = await replicated.primary()

        async def is_blocked() -> bool:
            return int((await command(before, "INFO"))["blocked_clients"]) > 0

        await wait_until(is_blocked, "the reader to block")
        await replicated.failover()
        await written(writer, "x")
        await writer.rpush("q", "work")
        assert await reading == b"work"
    finally:
        reading.cancel()
        await asyncio.wait([reading])
        await client.aclose()
        await writer.aclose()


async def test_server_that_is_no_primary_is_not_used(tmp_path: Path, valkey: ValkeyServer) -> None:
    """A Sentinel that is late: it names a server which is a replica by now."""
    sentinel = ValkeyServer(tmp_path / "late", is_sentinel=True)
    sentinel.reserve()
    sentinel.configure(
        [
            f"sentinel monitor {SERVICE} {HOST} {valkey.port} 1",
            f"sentinel down-after-milliseconds {SERVICE} 600000",
        ]
    )
    async with sentinel:
        client = connect_redis(f"redis+sentinel://{HOST}:{sentinel.port}/{SERVICE}")
        try:
            await client.set("k", "primary")
            await command(valkey, "REPLICAOF", HOST, free_port())
            await client.connection_pool.disconnect()
            with pytest.raises(ConnectionError, match=r"seen a server whose role is b'(slave|replica)'"):
                await client.get("k")
            await command(valkey, "REPLICAOF", "NO", "ONE")
            assert await client.get("k") == b"primary"
        finally:
            await client.aclose()


async def test_demoted_primary_counts_as_no_answer_and_is_left(valkey: ValkeyServer) -> None:
    """Without Sentinels, as behind a proxy: the connection is not used again."""
    client = connect_redis(valkey.url)
    lock = LeaderLock(ScriptRunner(client), Names("p"), ttl_s=5, clock=CLOCK.monotonic)
    try:
        assert isinstance(await lock.acquire("a"), Lease)
        connection = await client.client_id()
        await command(valkey, "REPLICAOF", HOST, free_port())
        with pytest.raises(StoreUnavailable, match="no primary any more"):
            await lock.acquire("a")
        assert await client.client_id() > connection
        await command(valkey, "REPLICAOF", "NO", "ONE")
        assert isinstance(await lock.acquire("a"), Lease)
    finally:
        await client.aclose()


async def test_primary_without_its_replicas_counts_as_no_answer(valkey: ValkeyServer) -> None:
    client = connect_redis(valkey.url)
    lock = LeaderLock(ScriptRunner(client), Names("p"), ttl_s=5, clock=CLOCK.monotonic)
    try:
        assert isinstance(await lock.acquire("a"), Lease)
        await command(valkey, "CONFIG", "SET", "min-replicas-to-write", "1")
        with pytest.raises(StoreUnavailable, match="NOREPLICAS"):
            await lock.acquire("a")
    finally:
        await client.aclose()


async def test_logins_at_sentinels_and_at_the_primary_are_two(tmp_path: Path) -> None:
    async with ValkeyServer(tmp_path / "valkey") as valkey:
        await command(valkey, "CONFIG", "SET", "requirepass", "at-primary")
        sentinel = ValkeyServer(tmp_path / "sentinel", is_sentinel=True)
        sentinel.reserve()
        sentinel.configure(
            [
                "requirepass at-sentinel",
                f"sentinel monitor {SERVICE} {HOST} {valkey.port} 1",
                f"sentinel auth-pass {SERVICE} at-primary",
            ]
        )
        await sentinel.start(is_ready=lambda: asks(sentinel, "at-sentinel"))
        try:
            hosts = f"{HOST}:{free_port()},{HOST}:{sentinel.port}"
            url = f"redis+sentinel://:at-primary@{hosts}/{SERVICE}/2"
            client = connect_redis(url, access=RedisAccess(sentinel_password="at-sentinel"))
            await client.set("k", "v")
            assert (await client.client_info())["db"] == 2
            await client.aclose()
            client = connect_redis(url, access=RedisAccess(sentinel_password="wrong"))
            with pytest.raises(
                StoreUnavailable, match=r"seen .*refused the login.*: set redis_sentinel_password"
            ):
                await ScriptRunner(client).run("resign", ["x"], ["y"])
            await client.aclose()
        finally:
            await sentinel.stop()


async def asks(sentinel: ValkeyServer, password: str) -> bool:
    client = Client(host=HOST, port=sentinel.port, password=password, protocol=2)
    try:
        return bool(await client.ping())
    except (RedisError, OSError):
        return False
    finally:
        await client.aclose()


@pytest.mark.kafka
async def test_doctor_judges_sentinels(kafka: KafkaAddress, replicated: ReplicatedValkey, pool: str) -> None:
    async def all_agree() -> bool:
        found, is_reached = await examine(settings(kafka, replicated.url, pool), probe=False)
        return is_reached and statuses(found, "redis sentinels") == {Status.OK}

    # On a busy machine a Sentinel may be late to know the primary.
    await wait_until(all_agree, "all Sentinels to name the primary")
    findings, _ = await examine(settings(kafka, replicated.url, pool), probe=False)
    assert statuses(findings, "redis mode") == {Status.OK}
    assert statuses(findings, "redis min-replicas-to-write") == {Status.WARN}
    await command(await replicated.primary(), "CONFIG", "SET", "min-replicas-to-write", "1")
    replicated.sentinels[0].kill()
    findings, is_reached = await examine(settings(kafka, replicated.url, pool), probe=False)
    assert is_reached
    assert statuses(findings, "redis sentinels") == {Status.WARN}
    assert f"1 of 3 can't tell where the primary is: {HOST}:" in told(findings, "redis sentinels")
    assert statuses(findings, "redis min-replicas-to-write") == {Status.OK}


@pytest.mark.kafka
async def test_doctor_tells_of_a_wrong_name(
    kafka: KafkaAddress, replicated: ReplicatedValkey, pool: str
) -> None:
    url = replicated.url.replace(f"/{SERVICE}/", "/other/")
    findings, is_reached = await examine(settings(kafka, url, pool), probe=False)
    assert not is_reached
    assert exit_code(findings, is_reached=is_reached) == 2
    assert statuses(findings, "redis sentinels") == {Status.FAIL}
    assert "it watches nobody called 'other'" in told(findings, "redis sentinels")
    found: list[Finding] = [one for one in findings if one.check == "redis"]
    assert "expected Sentinels to name the primary of 'other', seen 127.0.0.1:" in found[0].found
