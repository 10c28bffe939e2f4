"""How to reach Redis and Kafka: addresses, timeouts, and the client classes.

`KafkaClients` holds aiokafka's classes as constructor arguments of the backends, so that the
simulation can hand in a log of its own with the same semantics.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import redis.asyncio
from aiokafka import AIOKafkaConsumer, AIOKafkaProducer
from aiokafka.admin import AIOKafkaAdminClient
from aiokafka.errors import KafkaConnectionError, KafkaError
from redis.asyncio.retry import Retry
from redis.backoff import NoBackoff

from dispatcher.backends.access import KafkaAccess, RedisAccess
from dispatcher.backends.addresses import (
    KAFKA_SERVERS,
    REDIS_URL,
    is_kafka_servers,
    is_redis_url,
    masked,
    sentinel_address,
)
from dispatcher.backends.lenient_records import read_leniently
from dispatcher.backends.redis_connection import make_pool, make_sentinel_pool
from dispatcher.backends.scripts import Redis
from dispatcher.errors import LogUnavailable, SettingsError
from dispatcher.tasks import to_the_end

REDIS_TIMEOUT_S = 2.0
"""A command without an answer for this long counts as unanswered."""
CLOSE_TIMEOUT_S = 5.0
DROP_TIMEOUT_S = 1.0
LOGIN = "kafka_user, kafka_password and kafka_mechanism"
"""The Kafka client tells a refused login in its log alone."""
NO_LOGIN = RedisAccess()
PLAINTEXT = KafkaAccess()


def connect_redis(
    url: str,
    *,
    access: RedisAccess = NO_LOGIN,
    timeout_s: float = REDIS_TIMEOUT_S,
    max_connections: int = 64,
) -> Redis:
    """Make a client; it connects on first use and reconnects by itself.

    With an address of Sentinels each connection first asks them where the primary is.

    Raises:
        SettingsError: `url` is none, or a TLS file can't be used; never shows a password.
    """
    wrong = f"redis: expected {REDIS_URL.expected}, seen {masked(url)!r}"
    if not is_redis_url(url):
        raise SettingsError(wrong)
    tls, sentinels = access.tls, sentinel_address(url)
    common: dict[str, Any] = {
        "protocol": 2,
        "socket_timeout": timeout_s,
        "socket_connect_timeout": timeout_s,
        "retry": Retry(NoBackoff(), 1),
        "retry_on_error": [],
    }
    if url.startswith(("rediss:", "rediss+")):
        tls.context()  # a file that can't be used is told at the start, not at each connection
        common["ssl_ca_certs"] = tls.ca_file or None
        if tls.cert_file:
            common |= {"ssl_certfile": tls.cert_file, "ssl_keyfile": tls.key_file or None}
    elif tls.is_set:
        raise SettingsError(f"redis: expected rediss:// with a CA or certificate file, seen {masked(url)!r}")
    login = {"username": access.user or None, "password": access.password or None}
    try:
        if sentinels is None:
            pool = make_pool(url, **login, **common, max_connections=max_connections)
        else:
            asking = {"username": access.sentinel_user or None, "password": access.sentinel_password or None}
            pool = make_sentinel_pool(
                sentinels, login=login, asking=asking, common=common, max_connections=max_connections
            )
    except ValueError as error:
        raise SettingsError(f"{wrong}: {error}") from None
    return redis.asyncio.Redis.from_pool(pool)


async def close_kafka_client(client: Any) -> None:
    """Close a producer or consumer; one that can't say goodbye is dropped, to time out at the broker.

    Being cancelled meanwhile does not cut it off: what is half closed would never be closed.
    """
    await to_the_end(_stop(client))


async def _stop(client: Any) -> None:
    try:
        async with asyncio.timeout(CLOSE_TIMEOUT_S):
            await client.stop()
    except (KafkaError, OSError, TimeoutError, RuntimeError, AssertionError):
        await _drop(client)


async def _drop(client: Any) -> None:
    """Close the connections of a client whose own goodbye was cut off before it came to them.

    A second `stop` would do nothing, and they would stay open until they are collected, whenever that is.
    """
    if isinstance(client, AIOKafkaConsumer):
        connections, worker = client._client, getattr(client._fetcher, "_fetch_task", None)
    elif isinstance(client, AIOKafkaProducer):
        connections, worker = client.client, getattr(client._sender, "_sender_task", None)
    else:
        return
    if worker is not None:
        worker.cancel()
    with contextlib.suppress(KafkaError, OSError, TimeoutError):
        async with asyncio.timeout(DROP_TIMEOUT_S):
            await connections.close()


@dataclass(frozen=True, kw_only=True)
class KafkaClients:
    """Constructors of Kafka clients, each already pointed at the brokers; `bootstrap` is for messages."""

    consumer: Callable[..., Any]
    producer: Callable[..., Any]
    admin: Callable[..., Any]
    bootstrap: str = ""
    protocol: str = "PLAINTEXT"

    def unanswered(self, doing: str, error: BaseException) -> LogUnavailable:
        """What whoever starts is told when the brokers did not do it."""
        if isinstance(error, KafkaConnectionError | OSError):
            return LogUnavailable(
                f"{doing}: Kafka at {self.bootstrap} did not answer: start it, or set kafka (--kafka, "
                f"FLEXLB_KAFKA) to its bootstrap servers; if it runs, its listener may speak another "
                f"kafka_protocol than {self.protocol}"
                + (", or not be signed by kafka_ca_file" if self.protocol.endswith("SSL") else "")
                + (f", or refuse the login: see {LOGIN}" if self.protocol.startswith("SASL_") else "")
            )
        return LogUnavailable(f"{doing}: {error!r}")


def connect_kafka(bootstrap: str, access: KafkaAccess = PLAINTEXT) -> KafkaClients:
    """aiokafka's own clients for `bootstrap` (`host:port[,host:port]`).

    Raises:
        SettingsError: `bootstrap` is no such list, or a TLS file can't be used.
    """
    if not is_kafka_servers(bootstrap):
        raise SettingsError(f"kafka: expected {KAFKA_SERVERS.expected}, seen {bootstrap!r}")
    secured: dict[str, Any] = access.options
    read_leniently()

    def consumer(*topics: str, **options: Any) -> AIOKafkaConsumer:
        return AIOKafkaConsumer(
            *topics, bootstrap_servers=bootstrap, enable_auto_commit=False, **secured, **options
        )

    def producer(**options: Any) -> AIOKafkaProducer:
        return AIOKafkaProducer(bootstrap_servers=bootstrap, **secured, **options)

    def admin(**options: Any) -> AIOKafkaAdminClient:
        return AIOKafkaAdminClient(bootstrap_servers=bootstrap, **secured, **options)

    return KafkaClients(
        consumer=consumer, producer=producer, admin=admin, bootstrap=bootstrap, protocol=access.protocol
    )
