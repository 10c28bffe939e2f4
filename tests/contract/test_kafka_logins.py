"""Every kind of login on a real Apache Kafka, and what is said when one is wrong."""

from __future__ import annotations

import asyncio
import shutil
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Literal

import pytest

from dispatcher.backends.access import KafkaAccess, Tls
from dispatcher.backends.connect import connect_kafka
from dispatcher.backends.topics import create_topics
from dispatcher.errors import LogUnavailable
from dispatcher.local.apache_kafka import ApacheKafka
from dispatcher.protocol.names import Names
from tests.support.certificates import Certificates, make_certificates
from tests.support.scram import format_with_scram
from tests.support.servers import give_up, why_no_kafka

pytestmark = pytest.mark.kafka

USER, PASSWORD = "flexlb", "canary-of-a-password"
Scram = Literal["SCRAM-SHA-256", "SCRAM-SHA-512"]
MECHANISMS: tuple[Scram, ...] = ("SCRAM-SHA-256", "SCRAM-SHA-512")
PACKAGE = "org.apache.kafka.common.security"


@pytest.fixture
async def scram(tmp_path: Path) -> AsyncIterator[ApacheKafka]:
    """A broker whose users log in by SCRAM; itself it logs in by PLAIN."""
    if (reason := why_no_kafka()) is not None:
        give_up(reason)
    listener = "listener.name.sasl_plaintext"
    plain = f'{PACKAGE}.plain.PlainLoginModule required username="broker" password="b" user_broker="b";'
    options = {
        "sasl.enabled.mechanisms": ",".join(("PLAIN", *MECHANISMS)),
        "sasl.mechanism.inter.broker.protocol": "PLAIN",
        f"{listener}.plain.sasl.jaas.config": plain,
        **{
            f"{listener}.{mechanism.lower()}.sasl.jaas.config": f"{PACKAGE}.scram.ScramLoginModule required;"
            for mechanism in MECHANISMS
        },
    }
    folder = tmp_path / "kafka"
    await asyncio.to_thread(format_with_scram, folder, dict.fromkeys(MECHANISMS, (USER, PASSWORD)))
    async with ApacheKafka(folder, protocol="SASL_PLAINTEXT", options=options) as broker:
        yield broker


async def use(broker: ApacheKafka, access: KafkaAccess, names: Names) -> None:
    """What a leader does with Kafka: make topics, write in a transaction."""
    kafka = connect_kafka(broker.bootstrap, access)
    await create_topics(kafka, names, partitions=1, replication_factor=1)
    producer = kafka.producer(transactional_id=names.transactional_id)
    await producer.start()
    try:
        async with producer.transaction():
            await producer.send_and_wait(names.dead, b"x")
    finally:
        await producer.stop()


async def test_scram_logs_in_and_a_wrong_password_is_told_in_words(scram: ApacheKafka, pool: str) -> None:
    names = Names(pool)
    for mechanism in MECHANISMS:

        def login(password: str, user: str = USER, mechanism: Scram = mechanism) -> KafkaAccess:
            return KafkaAccess(protocol="SASL_PLAINTEXT", mechanism=mechanism, user=user, password=password)

        await use(scram, login(PASSWORD), names)
        for wrong in (login("wrong"), login(PASSWORD, user="nobody")):
            with pytest.raises(LogUnavailable, match=r"refuse the login.*kafka_password") as seen:
                await use(scram, wrong, names)
            assert PASSWORD not in str(seen.value)


@pytest.mark.skipif(shutil.which("openssl") is None, reason="no openssl to make certificates")
async def test_tls_alone_with_a_client_s_certificate(tmp_path: Path, pool: str) -> None:
    if (reason := why_no_kafka()) is not None:
        give_up(reason)
    right, wrong = (make_certificates(tmp_path / name) for name in ("right", "wrong"))
    options = {
        "ssl.keystore.type": "PEM",
        "ssl.keystore.location": str(right.both),
        "ssl.truststore.type": "PEM",
        "ssl.truststore.location": str(right.ca),
        "ssl.client.auth": "required",
    }

    def access(ca: Certificates, own: Certificates | None) -> KafkaAccess:
        cert, key = (str(own.cert), str(own.key)) if own else ("", "")
        return KafkaAccess(
            protocol="SSL", tls=Tls(of="kafka", ca_file=str(ca.ca), cert_file=cert, key_file=key)
        )

    names = Names(pool)
    async with ApacheKafka(tmp_path / "kafka", protocol="SSL", options=options) as broker:
        await use(broker, access(right, right), names)
        for stranger in (access(wrong, right), access(right, None), access(right, wrong)):
            with pytest.raises(LogUnavailable, match=r"kafka_ca_file|kafka_cert_file"):
                await use(broker, stranger, names)
