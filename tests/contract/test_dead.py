"""`flexlb dead` on a real Kafka: what operators see of the dead, and what they do with them."""

from __future__ import annotations

import argparse
import itertools
import json
from collections.abc import AsyncIterator
from typing import Any

import pytest
from aiokafka import TopicPartition
from aiokafka.admin import RecordsToDelete

from dispatcher.backends.connect import KafkaClients
from dispatcher.dead.again import sent_again
from dispatcher.dead.command import configure_dead, run_dead
from dispatcher.errors import LogUnavailable, SettingsError
from dispatcher.local.valkey import ValkeyServer
from dispatcher.protocol import codec
from dispatcher.protocol.names import Lane, Ref
from dispatcher.protocol.outcome import FailureCause, OutcomeKind, Reason
from tests.support.pool import Pool, ScriptedNode, request
from tests.support.servers import KafkaAddress
from tests.support.wait import wait_until

SECRET = "a prompt that nobody may read"


class Operator:
    """Runs `flexlb dead` in this process: exit code, stdout, stderr."""

    def __init__(self, kafka: KafkaAddress, pool: str, capsys: pytest.CaptureFixture[str]) -> None:
        self._where = ("--kafka", kafka.bootstrap, "--pool", pool)
        self._capsys = capsys

    async def __call__(self, action: str, *arguments: str) -> tuple[int, str, str]:
        parser = argparse.ArgumentParser()
        configure_dead(parser)
        self._capsys.readouterr()
        code = await run_dead(parser.parse_args([action, *arguments, *self._where]))
        out, err = self._capsys.readouterr()
        return code, out, err

    async def read(self, action: str, *arguments: str) -> Any:
        """What it prints as JSON, for an exit code of 0."""
        code, out, err = await self(action, *arguments, "--json")
        assert code == 0, err
        return json.loads(out)


@pytest.fixture
def operator(kafka: KafkaAddress, pool: str, capsys: pytest.CaptureFixture[str]) -> Operator:
    """The command, pointed at the test's pool."""
    return Operator(kafka, pool, capsys)


@pytest.fixture
async def served(kafka_clients: KafkaClients, valkey: ValkeyServer, pool: str) -> AsyncIterator[Pool]:
    """A pool with a dispatcher and no node yet."""
    async with Pool(kafka_clients, valkey.url, pool) as one, one.running(one.dispatcher()):
        yield one


async def die(pool: Pool, id: str, **fields: Any) -> str:
    """Let a request be refused by its engine; returns its ref."""
    node = ScriptedNode(pool, f"for_{id}")
    node.holds = True
    async with pool.running(node):
        await pool.append(request(id, body={"prompt": SECRET, "max_tokens": 1}, **fields))
        await wait_until(lambda: bool(node.claimed), "the attempt")
        ending = node.failed(node.claimed.pop(), FailureCause.REFUSED, message="no \x1b[31msuch prompt")
        assert await node.store.complete(node.incarnation, [ending]) == ["ok"]
        ref = (await pool.outcome(id)).ref
        await wait_until(lambda: any(letter.ref == ref for letter in pool.dead), "its dead letter")
    return ref


@pytest.mark.kafka
async def test_a_dead_request_is_listed_shown_and_sent_again(served: Pool, operator: Operator) -> None:
    ref = await die(served, "r1", priority=70)
    code, out, _ = await operator("list")
    assert code == 0
    assert len(out.splitlines()) == 1
    assert all(word in out for word in (ref, "engine_refused", "1 attempts", "r1"))
    (listed,) = await operator.read("list")
    assert (listed["ref"], listed["attempts"][0]["cause"]) == (ref, "refused")

    code, out, _ = await operator("show", ref)
    assert code == 0
    assert all(word in out for word in (ref, "at for_r1: refused", "such prompt", "priority      70"))
    assert SECRET not in out
    assert "\x1b" not in out
    assert SECRET not in json.dumps(await operator.read("show", ref))
    assert SECRET in (await operator("show", ref, "--body"))[1]
    shown = await operator.read("show", ref, "--body")
    assert json.loads(shown["original"]["record"])["body"]["prompt"] == SECRET

    async with served.running(ScriptedNode(served, "n2")):
        (sent,) = await operator.read("requeue", ref)
        assert sent["id"] not in ("", "r1")
        assert sent["refused"] == ""
        outcome = await served.outcome(sent["id"])
        assert (outcome.kind, outcome.ref) == (OutcomeKind.COMPLETED, sent["new_ref"])
        code, out, _ = await operator("requeue", ref, "--id", "r1-again")
        assert code == 0
        outcome = await served.outcome("r1-again")
        assert (outcome.kind, outcome.ref) == (OutcomeKind.COMPLETED, out.split()[4].rstrip(","))
    record = await original(served, Ref.parse(outcome.ref))
    assert (record.requeued_from, record.priority) == (ref, 70)
    assert len(served.of("r1")) == 1


@pytest.mark.kafka
async def test_poison_is_told_by_its_crashes_and_is_not_sent_again_by_the_way(
    served: Pool, operator: Operator
) -> None:
    nodes = [ScriptedNode(served, name) for name in ("n1", "n2")]
    async with served.running(nodes[0]), served.running(nodes[1]):
        for number in itertools.count():
            await served.append(request(f"warm{number}"))
            await served.outcome(f"warm{number}")
            if all(node.works for node in nodes):
                break
        for node in nodes:
            node.holds = True
        await served.append(request("killer"))
        crashed = []
        for _ in nodes:
            await wait_until(lambda: any(node.claimed for node in nodes), "the attempt")
            (node,) = [node for node in nodes if node.claimed]
            ending = node.failed(node.claimed.pop(), FailureCause.TRUNCATED, "broke off", crash=True)
            assert await node.store.complete(node.incarnation, [ending]) == ["ok"]
            crashed.append(node.name)
        outcome = await served.outcome("killer")
    assert sorted(crashed) == ["n1", "n2"], "a suspect goes elsewhere"
    assert (outcome.kind, outcome.reason) == (OutcomeKind.FAILED, Reason.POISON)
    assert outcome.message == f"engines died while they ran it, at {', '.join(crashed)}: broke off"
    await wait_until(lambda: bool(served.dead), "its dead letter")
    _, out, _ = await operator("list")
    assert all(word in out for word in (" poison ", "2 attempts, 2 crashes", "killer"))
    _, out, _ = await operator("show", outcome.ref)
    marked = [line for line in out.splitlines() if "CRASH: the engine died" in line]
    assert [line.split()[3].rstrip(":") for line in marked] == crashed
    (letter,) = await operator.read("list")
    assert [attempt["crash"] for attempt in letter["attempts"]] == [True, True]
    code, out, err = await operator("requeue", outcome.ref)
    assert (code, out) == (1, "")
    assert "--poison" in err
    (sent,) = await operator.read("requeue", outcome.ref, "--poison")
    assert sent["new_ref"]


async def original(pool: Pool, ref: Ref) -> Any:
    """A request as it lies in its lane."""
    consumer = pool.clients.consumer(group_id=None)
    await consumer.start()
    try:
        tp = TopicPartition(pool.names.requests(ref.lane), ref.partition)
        consumer.assign([tp])
        consumer.seek(tp, ref.offset)
        return codec.requests.decode((await consumer.getone(tp)).value)
    finally:
        await consumer.stop()


@pytest.mark.kafka
async def test_what_can_not_be_sent_again_says_why_and_the_rest_is_sent(
    served: Pool, operator: Operator
) -> None:
    await served.append(b"{poison", key=b"poison")
    await served.append(request("typed", priority="high"))
    await wait_until(lambda: len(served.dead) == 2, "both in the dead letters")
    refused = {letter.id: letter.ref for letter in served.dead}
    gone = await die(served, "gone")
    kept = await die(served, "kept")
    lost = Ref.parse(gone)
    admin = served.clients.admin()
    await admin.start()
    try:
        tp = TopicPartition(served.names.requests(Lane.INTERACTIVE), lost.partition)
        await admin.delete_records({tp: RecordsToDelete(before_offset=lost.offset + 1)})
    finally:
        await admin.close()

    code, out, err = await operator("requeue", *refused.values(), gone, "i0_999999", kept)
    assert code == 1
    assert [line.split(":")[0] for line in out.splitlines()] == [kept]
    why = {line.split(": ")[1]: line for line in err.splitlines()}
    assert "would be refused again" in why[refused["poison"]]
    assert "$.priority" in why[refused["typed"]]
    assert "retention has taken it" in why[gone]
    assert "expected a dead letter of i0_999999, seen none" in why["i0_999999"]
    assert served.names.requests(Lane.INTERACTIVE) in (await operator("show", gone))[1]
    assert "retention has taken it" in (await operator.read("show", gone))["original"]["gone"]
    code, _, err = await operator("show", "b1_5")
    assert (code, "seen none" in err) == (1, True)
    with pytest.raises(SettingsError, match="expected one REF"):
        await operator("requeue", gone, kept, "--id", "x")


@pytest.mark.kafka
async def test_purging_deletes_what_it_is_told_and_no_more(served: Pool, operator: Operator) -> None:
    for number in range(6):
        await served.append(b"{", key=str(number).encode())
    await wait_until(lambda: len(served.dead) == 6, "the dead letters")
    letters = await operator.read("list")
    assert len(letters) == 6
    assert [one["offset"] for one in await operator.read("list", "--limit", "2")] == [
        one["offset"] for one in letters[-2:]
    ]
    bound = letters[3]
    code, out, _ = await operator("purge", f"{bound['partition']}:{bound['offset']}")
    assert code == 0
    assert f"begins at {bound['offset']}" in out
    left = [
        one for one in letters if one["partition"] != bound["partition"] or one["offset"] >= bound["offset"]
    ]
    assert await operator.read("list") == left
    for wrong, words in (
        (("9:1",), "a partition from 0 to 1, seen 9"),
        (("0:100000",), "the end of partition 0"),
        ((), "or --all"),
        (("0:1", "--all"), "or --all"),
    ):
        with pytest.raises(SettingsError, match=words):
            await operator("purge", *wrong)
    assert await operator.read("list") == left
    purged = await operator.read("purge", "--all")
    assert {one["partition"]: one["begins"] > one["began"] for one in purged} == {
        number: any(one["partition"] == number for one in left) for number in (0, 1)
    }
    assert await operator.read("list") == []
    assert (await operator("list"))[1] == "no dead letters\n"
    assert "nothing deleted" in (await operator("purge", "--all"))[1]


@pytest.mark.kafka
async def test_a_pool_without_topics_is_an_error_that_says_so(operator: Operator) -> None:
    for action in (("list",), ("show", "i0_0"), ("requeue", "i0_0"), ("purge", "--all")):
        with pytest.raises(LogUnavailable, match="flexlb init"):
            await operator(*action)


def test_a_record_sent_again_keeps_its_body_to_the_byte() -> None:
    body = b'{"prompt": "x",  "n": 1.50, "z": 1e2}'
    record = (
        b'{"id":"r1","model":"m","endpoint":"/v1/completions","new_field":[1],"body":'
        + body
        + b',"reply_to":{"partition":3}}'
    )
    again = sent_again(record, ref="i0_7", id="r2")
    assert body in again
    assert b'"new_field":[1]' in again
    assert b"reply_to" not in again
    decoded = codec.requests.decode(again)
    assert (decoded.id, decoded.requeued_from) == ("r2", "i0_7")
    assert b'"reply_to":{"partition":3}' in sent_again(record, ref="i0_7", id="r1")
    with pytest.raises(codec.MalformedRecord, match="refused again"):
        sent_again(b'{"id":5}', ref="i0_7", id="r2")
