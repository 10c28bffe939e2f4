"""What no leader has written on the topic `outcomes`: a new leader, clients and the audit read on past it."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import pytest

from dispatcher.audit import audit
from dispatcher.backends.connect import KafkaClients
from dispatcher.client.client import Client
from dispatcher.local.valkey import ValkeyServer
from dispatcher.protocol.outcome import OutcomeKind
from dispatcher.protocol.request import Endpoint
from tests.contract.test_hostile_entries import nasty
from tests.support.header_names import Name, append_batch
from tests.support.pool import MODEL, Pool, ScriptedNode, request
from tests.support.servers import KafkaAddress
from tests.support.wait import wait_until

pytestmark = pytest.mark.kafka

KEYS = (None, b"", b"\xff\x00", b"after")
ENDING = {"id": "x", "ref": "i0_999999", "kind": "Completed", "reason": "finished"}
ALMOST: list[dict[str, Any]] = [
    {**ENDING, "ref": "somewhere"},
    {**ENDING, "ref": f"i0_{10**400}"},
    {**ENDING, "ref": "i0_-1"},
    {**ENDING, "ref": 7},
    {**ENDING, "id": ""},
    {**ENDING, "id": "x" * 300},
    {**ENDING, "fingerprint": "a|b|c"},
    {**ENDING, "tenant": "t" * 5000},
    {**ENDING, "kind": None},
    {**ENDING, "v": "1"},
    {**ENDING, "v": 99, "ref": []},
]
"""Records that look like a leader's, and are none."""


async def litter(one: Pool, proof: Path) -> int:
    """Write what is no outcome to each partition; returns how many records."""
    values: list[bytes | None] = [None, *nasty(proof), *(json.dumps(record).encode() for record in ALMOST)]
    producer, written = one.clients.producer(acks="all", enable_idempotence=False), 0
    await producer.start()
    try:
        for value in values:
            for key in KEYS if value is not None else KEYS[1:]:
                headers = [("traceparent", None), ("", b"\xff")]
                for partition in (0, 1):
                    await producer.send(
                        one.names.outcomes, value, key=key, headers=headers, partition=partition
                    )
                    written += 1
        await producer.flush()
        odd = [(b"x", [(Name("x"), b"1")])]
        await append_batch(producer, one.names.outcomes, odd)  # type: ignore[arg-type]
        return written + len(odd)
    finally:
        await producer.stop()


@pytest.mark.parametrize("is_lost", [False, True], ids=["Redis intact", "Redis lost"])
async def test_a_new_leader_reads_on_past_what_is_no_outcome(
    kafka: KafkaAddress,
    kafka_clients: KafkaClients,
    valkey: ValkeyServer,
    pool: str,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    is_lost: bool,
) -> None:
    proof = tmp_path / "proof"
    async with Pool(kafka_clients, valkey.url, pool, leader_ttl_s=10) as one:
        async with one.running(one.dispatcher()), one.running(ScriptedNode(one, "n1")):
            for number in range(3):
                await one.append(request(f"before-{number}"))
            for number in range(3):
                await one.outcome(f"before-{number}")
        written = await litter(one, proof)
        if is_lost:
            await one.redis.flushall()
        caplog.clear()
        caplog.set_level(logging.INFO, "flexlb")
        async with (
            one.running(one.dispatcher()) as dispatcher,
            one.running(ScriptedNode(one, "n2")),
            Client(kafka.bootstrap, pool) as client,
        ):
            foreign = dispatcher.metrics.foreign._value
            await wait_until(lambda: foreign.get() >= written, "the new leader to have read them")
            await litter(one, proof)
            id = await client.submit(
                MODEL, Endpoint.COMPLETIONS, {"prompt": "x", "max_tokens": 1}, id="after"
            )
            await litter(one, proof)
            assert (await client.outcome(id)).kind is OutcomeKind.COMPLETED
            assert (await one.outcome("after")).kind is OutcomeKind.COMPLETED
            assert dispatcher.metrics.elections._value.get() == 1, "the leader went on"
            assert foreign.get() == written, "each counts once"
            (told,) = [line for line in caplog.records if "outcomes can't be read" in line.getMessage()]
            assert len(str(told.fields)) < 4000  # type: ignore[attr-defined]
        assert all(len(one.of(f"before-{number}")) == 1 for number in range(3))
    found = await audit(kafka.bootstrap, pool, settle_s=20)
    assert (found.lost, found.duplicated) == ([], [])
    assert found.outcomes == {"Completed": 4}
    assert not proof.exists()
