"""Logins and TLS against real servers: Apache Kafka itself, and Valkey behind a TLS end of our own.

The Valkey of the tests is built without TLS, so a small proxy ends it; the client's side is the real one.
"""

from __future__ import annotations

import asyncio
import json
import os
import shutil
import sys
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest

from dispatcher.backends.access import KafkaAccess, RedisAccess, Tls
from dispatcher.backends.connect import connect_kafka, connect_redis
from dispatcher.backends.scripts import Redis
from dispatcher.backends.store_view import StoreView
from dispatcher.backends.topics import create_topics
from dispatcher.errors import LogUnavailable, SettingsError, StoreUnavailable
from dispatcher.local.apache_kafka import ApacheKafka
from dispatcher.local.valkey import ValkeyServer
from dispatcher.protocol.names import Names
from tests.support.certificates import Certificates, make_certificates
from tests.support.servers import give_up, why_no_kafka
from tests.support.tls_end import tls_end

USER, PASSWORD = "flexlb", "canary-of-a-password"

pytestmark = pytest.mark.skipif(shutil.which("openssl") is None, reason="no openssl to make certificates")


@pytest.fixture(scope="module")
def certificates(tmp_path_factory: pytest.TempPathFactory) -> Certificates:
    """Of the servers."""
    return make_certificates(tmp_path_factory.mktemp("tls") / "right")


@pytest.fixture(scope="module")
def others(tmp_path_factory: pytest.TempPathFactory) -> Certificates:
    """Of somebody else."""
    return make_certificates(tmp_path_factory.mktemp("tls") / "wrong")


async def ping(client: Redis) -> None:
    """One command, and goodbye."""
    try:
        await StoreView(client, Names("p")).ping()
    finally:
        await client.aclose()


def redis_tls(ca: Certificates, own: Certificates | None) -> RedisAccess:
    """A login over TLS."""
    tls = Tls(
        of="redis",
        ca_file=str(ca.ca),
        cert_file=str(own.cert) if own else "",
        key_file=str(own.key) if own else "",
    )
    return RedisAccess(user=USER, password=PASSWORD, tls=tls)


async def test_redis_over_tls_with_a_login(
    valkey: ValkeyServer, redis_client: Redis, certificates: Certificates, others: Certificates
) -> None:
    await redis_client.execute_command("ACL", "SETUSER", USER, "on", f">{PASSWORD}", "+ping", "+acl|whoami")
    async with tls_end(valkey.port, certificates) as port:
        url = f"rediss://127.0.0.1:{port}/0"
        client = connect_redis(url, access=redis_tls(certificates, certificates))
        assert await client.execute_command("ACL", "WHOAMI") == USER.encode()
        await ping(client)
        with pytest.raises(StoreUnavailable, match=r"is not trusted.*redis_ca_file"):
            await ping(connect_redis(url, access=redis_tls(others, certificates)))
        with pytest.raises(StoreUnavailable):
            await ping(connect_redis(url, access=redis_tls(certificates, None)))
    with pytest.raises(StoreUnavailable, match="did not answer"):
        await ping(
            connect_redis(f"rediss://127.0.0.1:{valkey.port}/0", access=redis_tls(certificates, certificates))
        )


async def test_wrong_password_of_redis_is_told_in_words(valkey: ValkeyServer, redis_client: Redis) -> None:
    await redis_client.execute_command("ACL", "SETUSER", USER, "on", ">right", "+ping")
    access = RedisAccess(user=USER, password=PASSWORD)
    with pytest.raises(StoreUnavailable, match=r"refused the login.*redis_password") as seen:
        await ping(connect_redis(valkey.url, access=access))
    assert PASSWORD not in str(seen.value)
    await ping(connect_redis(valkey.url.replace("redis://", f"redis://{USER}:right@"), access=access))


def test_files_that_can_t_be_used_are_refused_at_the_start(
    certificates: Certificates, tmp_path: Path
) -> None:
    missing = str(tmp_path / "none.pem")
    with pytest.raises(SettingsError, match=r"redis_ca_file.*none.pem"):
        connect_redis("rediss://h/0", access=RedisAccess(tls=Tls(of="redis", ca_file=missing)))
    with pytest.raises(SettingsError, match="rediss://"):
        connect_redis("redis://h/0", access=RedisAccess(tls=Tls(of="redis", ca_file=str(certificates.ca))))
    tls = Tls(of="kafka", ca_file=str(certificates.key))
    with pytest.raises(SettingsError, match="kafka_ca_file"):
        connect_kafka("h:1", KafkaAccess(protocol="SSL", tls=tls))


@pytest.fixture
async def secured(tmp_path: Path, certificates: Certificates) -> AsyncIterator[ApacheKafka]:
    """A broker that wants TLS and a login."""
    if (reason := why_no_kafka()) is not None:
        give_up(reason)
    module = "org.apache.kafka.common.security.plain.PlainLoginModule"
    login = f'{module} required username="broker" password="b" user_broker="b" user_{USER}="{PASSWORD}";'
    options = {
        "sasl.enabled.mechanisms": "PLAIN",
        "sasl.mechanism.inter.broker.protocol": "PLAIN",
        "listener.name.sasl_ssl.plain.sasl.jaas.config": login,
        "ssl.keystore.type": "PEM",
        "ssl.keystore.location": str(certificates.both),
        "ssl.truststore.type": "PEM",
        "ssl.truststore.location": str(certificates.ca),
    }
    async with ApacheKafka(tmp_path / "kafka", protocol="SASL_SSL", options=options) as broker:
        yield broker


def kafka_tls(ca: Certificates, **changed: Any) -> KafkaAccess:
    """A login over TLS."""
    fields: dict[str, Any] = {"protocol": "SASL_SSL", "user": USER, "password": PASSWORD, **changed}
    return KafkaAccess(tls=Tls(of="kafka", ca_file=str(ca.ca)), **fields)


@pytest.mark.kafka
async def test_kafka_over_tls_with_a_login(
    secured: ApacheKafka, certificates: Certificates, others: Certificates, pool: str
) -> None:
    kafka = connect_kafka(secured.bootstrap, kafka_tls(certificates))
    names = Names(pool)
    assert await create_topics(kafka, names, partitions=1, replication_factor=1) == list(names.topics)
    producer = kafka.producer(transactional_id=names.transactional_id)
    await producer.start()
    async with producer.transaction():
        await producer.send_and_wait(names.dead, b"x")
    await producer.stop()
    for access, words in (
        (kafka_tls(certificates, password="wrong"), "refuse the login.*kafka_password"),
        (kafka_tls(certificates, mechanism="SCRAM-SHA-512"), "refuse the login.*kafka_mechanism"),
        (kafka_tls(others), "kafka_ca_file"),
        (KafkaAccess(), "another kafka_protocol than PLAINTEXT"),
    ):
        with pytest.raises(LogUnavailable, match=words) as seen:
            await create_topics(
                connect_kafka(secured.bootstrap, access), names, partitions=1, replication_factor=1
            )
        assert PASSWORD not in str(seen.value)
    # A process of ours, told by the environment and a file.
    secret = secured.folder / "secret"
    secret.write_text(f"{PASSWORD}\n")
    environment = {
        "FLEXLB_KAFKA": secured.bootstrap,
        "FLEXLB_KAFKA_PROTOCOL": "SASL_SSL",
        "FLEXLB_KAFKA_USER": USER,
        "FLEXLB_KAFKA_PASSWORD_FILE": str(secret),
        "FLEXLB_KAFKA_CA_FILE": str(certificates.ca),
    }
    code, out = await flexlb("init", "--pool", pool, environment=environment)
    assert code == 0, out
    assert f"{names.dead}: exists" in out
    assert PASSWORD not in out


async def flexlb(*words: str, environment: dict[str, str]) -> tuple[int, str]:
    """Run a command; its exit code and all that it said."""
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "dispatcher", *words),
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.STDOUT,
        env={**os.environ, **environment},
    )
    async with asyncio.timeout(60):
        out, _ = await process.communicate()
    return process.returncode or 0, out.decode()


async def test_config_masks_passwords_of_every_process() -> None:
    environment = {
        "FLEXLB_REDIS_PASSWORD": PASSWORD,
        "FLEXLB_KAFKA_PASSWORD": PASSWORD,
        "FLEXLB_REDIS": f"rediss://{USER}:{PASSWORD}@h:1/0",
    }
    code, out = await flexlb("config", "--json", environment=environment)
    assert code == 0, out
    assert PASSWORD not in out
    for table in json.loads(out).values():
        values = {row["setting"]: row["value"] for row in table["settings"]}
        assert values["kafka_password"] == values["redis_password"] == "***"
