"""Redis behind Sentinels, all reached by TLS with certificates on both sides, through a failover.

Valkey and its Sentinels are real. They are built without TLS, so that each stands behind an end of its own;
the servers announce the ports of those, by which they find each other in plain text.
"""

from __future__ import annotations

import contextlib
import shutil
from collections.abc import AsyncIterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from dispatcher.backends.access import RedisAccess, Tls
from dispatcher.backends.connect import connect_redis
from dispatcher.backends.redis_connection import sentinels_of
from dispatcher.backends.scripts import Redis
from dispatcher.backends.store_view import StoreView
from dispatcher.doctor.sentinels import ask_sentinels
from dispatcher.errors import StoreUnavailable
from dispatcher.local.processes import HOST
from dispatcher.local.sentinel import SERVICE, command, is_in_sync, until
from dispatcher.local.valkey import ValkeyServer
from dispatcher.protocol.names import Names
from tests.support.certificates import Certificates, make_certificates
from tests.support.tls_end import tls_end
from tests.support.wait import wait_until

pytestmark = pytest.mark.skipif(shutil.which("openssl") is None, reason="no openssl to make certificates")


@dataclass(frozen=True, kw_only=True)
class Secured:
    """A primary, its replica and a Sentinel, with the ports of their TLS ends."""

    sentinel: ValkeyServer
    url: str
    primary_port: int
    replica_port: int


@pytest.fixture(scope="module")
def certificates(tmp_path_factory: pytest.TempPathFactory) -> Certificates:
    """Of the servers."""
    return make_certificates(tmp_path_factory.mktemp("tls") / "right")


@pytest.fixture(scope="module")
def others(tmp_path_factory: pytest.TempPathFactory) -> Certificates:
    """Of somebody else."""
    return make_certificates(tmp_path_factory.mktemp("tls") / "wrong")


@pytest.fixture
async def secured(tmp_path: Path, certificates: Certificates) -> AsyncIterator[Secured]:
    """All of them, and the replica in sync."""
    async with contextlib.AsyncExitStack() as stack:
        primary, replica = [
            await stack.enter_async_context(
                ValkeyServer(tmp_path / name, options={"repl-diskless-sync-delay": "0"})
            )
            for name in ("a", "b")
        ]
        primary_port, replica_port = [
            await stack.enter_async_context(tls_end(server.port, certificates, also_plain=True))
            for server in (primary, replica)
        ]
        for server, port in ((primary, primary_port), (replica, replica_port)):
            await command(server, "CONFIG", "SET", "replica-announce-port", port)
        await command(replica, "REPLICAOF", HOST, primary_port)
        await until(lambda: is_in_sync(replica), "the replica to be in sync")
        sentinel = ValkeyServer(tmp_path / "sentinel", options={}, is_sentinel=True)
        sentinel.reserve()
        sentinel.configure(
            [
                f"sentinel monitor {SERVICE} {HOST} {primary_port} 1",
                f"sentinel known-replica {SERVICE} {HOST} {replica_port}",
                f"sentinel failover-timeout {SERVICE} 3000",
            ]
        )
        await stack.enter_async_context(sentinel)
        port = await stack.enter_async_context(tls_end(sentinel.port, certificates))
        yield Secured(
            sentinel=sentinel,
            url=f"rediss+sentinel://{HOST}:{port}/{SERVICE}/0",
            primary_port=primary_port,
            replica_port=replica_port,
        )


def access(ca: Certificates, own: Certificates | None) -> RedisAccess:
    """The files of a TLS client."""
    tls = Tls(
        of="redis",
        ca_file=str(ca.ca),
        cert_file=str(own.cert) if own else "",
        key_file=str(own.key) if own else "",
    )
    return RedisAccess(tls=tls)


@contextlib.asynccontextmanager
async def connected(url: str, login: RedisAccess) -> AsyncIterator[Redis]:
    """A client, closed at the end."""
    client = connect_redis(url, access=login)
    try:
        yield client
    finally:
        await client.aclose()


async def test_sentinels_and_primary_are_reached_by_tls_through_a_failover(
    secured: Secured, certificates: Certificates
) -> None:
    async with connected(secured.url, access(certificates, certificates)) as client:
        await client.set("k", "before")
        assert client.connection_pool.master_address == (HOST, secured.primary_port)
        (facts,) = await ask_sentinels(client)
        assert (facts.error, facts.primary) == ("", f"{HOST}:{secured.primary_port}")

        async def knows_the_replica() -> bool:
            _, ((_, sentinel),) = sentinels_of(client)
            state = (await sentinel.sentinel_masters())[SERVICE]
            return int(state["num-slaves"]) == 1

        await wait_until(knows_the_replica, "the Sentinel to know the replica")
        await command(secured.sentinel, "SENTINEL", "FAILOVER", SERVICE)

        async def is_at_the_next() -> bool:
            with contextlib.suppress(StoreUnavailable):
                await StoreView(client, Names("p")).ping()
            return bool(client.connection_pool.master_address == (HOST, secured.replica_port))

        await wait_until(is_at_the_next, "the client to be at the new primary")
        assert await client.get("k") == b"before"


async def test_who_is_not_trusted_is_told_and_who_speaks_plainly_gets_nothing(
    secured: Secured, certificates: Certificates, others: Certificates
) -> None:
    async def ping(url: str, login: RedisAccess) -> None:
        async with connected(url, login) as client:
            await StoreView(client, Names("p")).ping()

    await ping(secured.url, access(certificates, certificates))
    with pytest.raises(StoreUnavailable, match=r"CERTIFICATE_VERIFY_FAILED|is not trusted"):
        await ping(secured.url, access(others, certificates))
    with pytest.raises(StoreUnavailable):
        await ping(secured.url, access(certificates, None))
    with pytest.raises(StoreUnavailable):
        await ping(secured.url, access(certificates, others))
    with pytest.raises(StoreUnavailable):
        await ping(secured.url.replace("rediss", "redis"), RedisAccess())
