"""A foreign transaction left open on `outcomes`: the leader and the doctor tell of it, on a real Kafka."""

from __future__ import annotations

import pytest

from dispatcher.backends.connect import KafkaClients
from dispatcher.backends.stable_ends import StableEnd, stable_ends
from dispatcher.doctor.ask_kafka import ask_kafka
from dispatcher.doctor.facts import HeldUp, Needs, Status
from dispatcher.doctor.kafka_findings import kafka_findings
from dispatcher.local.valkey import ValkeyServer
from dispatcher.protocol.names import Lane, Names
from dispatcher.services import held_outcomes
from tests.support.pool import Pool, ScriptedNode, request
from tests.support.servers import KafkaAddress
from tests.support.wait import wait_until

pytestmark = pytest.mark.kafka


async def findings(kafka: KafkaAddress, names: Names) -> list[tuple[Status, str, str]]:
    """What the doctor says of open transactions."""
    facts = await ask_kafka(kafka.clients, names, bootstrap=kafka.bootstrap, probe=False)
    needs = Needs(
        pool=names.pool,
        longest_deadline_s=1.0,
        block_size=256,
        sizes={},
        keeps=frozenset(),
        lanes=tuple(map(names.requests, Lane)),
    )
    return [
        (one.status, one.found, one.fix)
        for one in kafka_findings(facts, needs)
        if one.check == "kafka open transactions"
    ]


async def test_an_open_transaction_is_told_with_its_offset_until_it_ends(
    kafka: KafkaAddress,
    kafka_clients: KafkaClients,
    valkey: ValkeyServer,
    pool: str,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.setattr(held_outcomes, "LOOK_S", 0.3)
    monkeypatch.setattr(held_outcomes, "HELD_S", 1.0)
    async with Pool(kafka_clients, valkey.url, pool) as one:
        async with one.running(one.dispatcher()) as leader, one.running(ScriptedNode(one, "n1")):
            gauge = leader.metrics.outcomes_held_s
            await one.append(request("before"))
            await one.outcome("before")
            assert [status for status, _, _ in await findings(kafka, one.names)] == [Status.OK]
            stranger = kafka_clients.producer(transactional_id=f"stranger-{pool}")
            await stranger.start()
            await stranger.begin_transaction()
            lies = await stranger.send_and_wait(one.names.outcomes, b"none of ours", partition=1)
            await wait_until(lambda: gauge.labels("1")._value.get() >= 1.0, "the leader to notice")
            assert gauge.labels("0")._value.get() == 0
            ends = await stable_ends(kafka_clients, one.names.outcomes)
            assert ends[1] == StableEnd(stable=lies.offset, end=lies.offset + 1)
            facts = await ask_kafka(kafka_clients, one.names, bootstrap=kafka.bootstrap, probe=False)
            assert facts.held_up == (
                HeldUp(partition=1, offset=lies.offset, behind=1, transactional_id=f"stranger-{pool}"),
            )
            ((status, found, fix),) = await findings(kafka, one.names)
            assert status is Status.FAIL
            assert f"{one.names.outcomes}[1]: a transaction of transactional id 'stranger-{pool}'" in found
            assert f"forceTerminateTransaction --transactionalId stranger-{pool}" in fix
            assert f"abort --topic {one.names.outcomes} --partition 1 --start-offset {lies.offset}" in fix
            await stranger.abort_transaction()
            await stranger.stop()
            await wait_until(lambda: gauge.labels("1")._value.get() == 0, "the leader to see it end")
            assert [status for status, _, _ in await findings(kafka, one.names)] == [Status.OK]
    assert not next(iter(leader.metrics.outcomes_held_s.collect())).samples, (
        "left for the next leader to tell"
    )
    told = [record for record in caplog.records if "holds up all readers" in record.message]
    assert len(told) == 1
