"""Faults on a stack of real processes: frozen leaders and servers, kills, drains, and what they may cost."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Callable
from typing import Any

import aiohttp
import pytest

from dispatcher.audit import AuditResult, as_text, audit
from dispatcher.backends.connect import connect_redis
from dispatcher.client.client import Client
from dispatcher.client.reader import Ended, Restarted, TextAdded
from dispatcher.local.stack import LocalStack, Member, health
from dispatcher.protocol.outcome import OutcomeKind
from dispatcher.simulation.tokens import Answer, tokenise
from tests.e2e.test_cli import flexlb
from tests.support.wait import wait_until

pytestmark = [pytest.mark.kafka, pytest.mark.timeout(180)]

MakeStack = Callable[..., LocalStack]
FROZEN_S = 3.0
"""How long Redis stands still: longer than the heartbeat's TTL. The scenario itself, not a wait."""
BODY = {"prompt": "one two three", "max_tokens": 40}


async def submit_for(
    client: Client, seconds: float, *, per_s: float, ids: list[str] | None = None
) -> list[str]:
    """Submit small requests at a steady pace; their ids, also added to `ids` as they are sent."""
    until = time.monotonic() + seconds
    ids = [] if ids is None else ids
    while time.monotonic() < until:
        ids.append(await client.submit("sim", "/v1/completions", BODY))
        await asyncio.sleep(1 / per_s)
    return ids


async def all_completed(client: Client, ids: list[str]) -> None:
    """Every id gets its one outcome, and it is Completed."""
    async with asyncio.timeout(90):
        for id in ids:
            outcome = await client.outcome(id)
            assert outcome.kind is OutcomeKind.COMPLETED, outcome


async def clean_audit(stack: LocalStack) -> AuditResult:
    """The audit of everything finds nothing."""
    # Returns as soon as nothing is missing; a busy machine may have to run one again.
    found = await audit(stack.kafka, stack.settings.pool, settle_s=60)
    assert not found.findings, as_text(found)
    return found


def events(member: Member, event: str) -> list[dict[str, Any]]:
    """The log lines of one kind that a process has written."""
    lines = [line for line in member.log_path.read_text().splitlines() if line.startswith("{")]
    return [line for line in map(json.loads, lines) if line["event"] == event]


async def test_frozen_leader_writes_nothing_once_thawed(make_stack: MakeStack) -> None:
    async with make_stack(nodes=2) as stack, Client(stack.kafka, stack.settings.pool) as client:
        old = await stack.leader()
        assert old is not None
        before = await submit_for(client, 1.0, per_s=40)
        old.freeze()
        during = await submit_for(client, 5.0, per_s=40)

        async def another_leads() -> bool:
            return await stack.leader() not in {None, old}

        await wait_until(another_leads, "another dispatcher to lead")
        observer = connect_redis(stack.redis)
        epoch = await observer.get(stack.names.epoch)
        old.thaw()
        await wait_until(lambda: bool(events(old, "leadership ended")), "the old leader to step down")
        after = await submit_for(client, 1.0, per_s=40)
        await all_completed(client, [*before, *during, *after])
        assert await observer.get(stack.names.epoch) == epoch
        await observer.aclose()
        ended = events(old, "leadership ended")
        assert ended[0]["epoch"] < int(epoch.split(b":")[0])
        await clean_audit(stack)


async def test_sigterm_hands_over_at_once(make_stack: MakeStack) -> None:
    async with make_stack(nodes=1) as stack:
        old = await stack.leader()
        assert old is not None
        began = time.monotonic()
        stopping = asyncio.create_task(old.stop())

        async def another_leads() -> bool:
            return await stack.leader() not in {None, old}

        await wait_until(another_leads, "the standby to lead")
        took_s = time.monotonic() - began
        await stopping
        assert took_s < 2.5, "a resigned lease must not have to run out (3 s)"


async def test_frozen_redis_fences_nobody_and_runs_nothing_twice(make_stack: MakeStack) -> None:
    async with make_stack(nodes=3) as stack, Client(stack.kafka, stack.settings.pool) as client:
        assert stack.valkey is not None
        sent: list[str] = []
        load = asyncio.create_task(submit_for(client, 7.0, per_s=40, ids=sent))
        await wait_until(lambda: len(sent) > 40, "some load")
        stack.valkey.freeze()
        await asyncio.sleep(FROZEN_S)
        stack.valkey.thaw()
        await all_completed(client, await load)
        found = await clean_audit(stack)
        assert found.reexecuted == []
        assert [fence for member in stack.dispatchers for fence in events(member, "node fenced")] == []


async def busiest(agents: list[Member]) -> Member:
    """The agent that runs the most requests now."""
    async with aiohttp.ClientSession() as session:
        states = [await health(session, agent.url) or {} for agent in agents]
    running = [int(state.get("running", 0)) for state in states]
    assert max(running), "expected some agent to run something"
    return agents[running.index(max(running))]


async def test_killed_agent_costs_a_retry_only(make_stack: MakeStack) -> None:
    async with make_stack(nodes=2, engine_flags=("--decode-step-ms", "20")) as stack:
        async with Client(stack.kafka, stack.settings.pool) as client:
            ids = await submit_for(client, 2.0, per_s=20)
            victim = await busiest(stack.agents)
            await victim.kill()
            await all_completed(client, ids)
            await stack.start_member(victim)
            await all_completed(client, await submit_for(client, 0.5, per_s=20))
        found = await clean_audit(stack)
        assert found.reexecuted, "the killed agent was running requests"


async def test_killed_engine_costs_a_retry_only(make_stack: MakeStack) -> None:
    async with make_stack(nodes=2, engine_flags=("--decode-step-ms", "20")) as stack:
        async with Client(stack.kafka, stack.settings.pool) as client:
            ids = await submit_for(client, 2.0, per_s=20)
            await stack.engines[stack.agents.index(await busiest(stack.agents))].kill()
            await all_completed(client, ids)
        found = await clean_audit(stack)
        assert found.reexecuted, "the killed engine was running requests"


async def test_drained_agent_finishes_and_loses_nothing(make_stack: MakeStack) -> None:
    async with make_stack(nodes=2, engine_flags=("--decode-step-ms", "20")) as stack:
        async with Client(stack.kafka, stack.settings.pool) as client:
            sent: list[str] = []
            load = asyncio.create_task(submit_for(client, 4.0, per_s=20, ids=sent))
            await wait_until(lambda: len(sent) > 20, "some load")
            await stack.agents[0].stop(grace_s=40)
            assert events(stack.agents[0], "agent stopped")
            await all_completed(client, await load)
        found = await clean_audit(stack)
        assert found.reexecuted == []


async def test_drained_node_gives_back_its_queue_and_loses_nothing(make_stack: MakeStack) -> None:
    async with make_stack(nodes=2, engine_flags=("--decode-step-ms", "20")) as stack:
        async with Client(stack.kafka, stack.settings.pool) as client:
            sent: list[str] = []
            enough = asyncio.Event()

            async def submit_on() -> None:
                while not enough.is_set():
                    await submit_for(client, 0.5, per_s=20, ids=sent)

            load = asyncio.create_task(submit_on())
            await wait_until(lambda: len(sent) > 30, "some load")
            where = ("--redis", stack.redis, "--pool", stack.settings.pool)
            code, out, err = await flexlb("nodes", *where, "--json")
            assert code == 0, err
            node = json.loads(out)[0]["node"]
            assert (await flexlb("drain", node, *where))[0] == 0
            observer = connect_redis(stack.redis)
            names = stack.names
            keys = (names.queue_key(node), names.intermediate(node), names.claimed(node))

            async def is_empty() -> bool:
                return not await observer.exists(*keys)

            await wait_until(is_empty, "the drained node to be empty")
            seq = await observer.hget(names.node(node), "seq")
            ran_empty_at = len(sent)
            await wait_until(lambda: len(sent) > ran_empty_at + 20, "some load on the other node")
            enough.set()
            await load
            await all_completed(client, sent)
            assert await observer.hget(names.node(node), "seq") == seq, "nothing was bound to it"
            assert (await flexlb("uncordon", node, *where))[0] == 0
            await all_completed(client, await submit_for(client, 1.0, per_s=40))
            assert await observer.hget(names.node(node), "seq") != seq
            await observer.aclose()
        found = await clean_audit(stack)
        assert found.reexecuted == []


@pytest.mark.parametrize("loses_data", [False, True], ids=["restart", "all data lost"])
async def test_killed_redis_loses_nothing(make_stack: MakeStack, loses_data: bool) -> None:
    async with make_stack(nodes=2) as stack, Client(stack.kafka, stack.settings.pool) as client:
        assert stack.valkey is not None
        sent: list[str] = []
        load = asyncio.create_task(submit_for(client, 5.0, per_s=40, ids=sent))
        await wait_until(lambda: len(sent) > 40, "some load")
        if loses_data:
            await stack.valkey.wipe()
        else:
            stack.valkey.kill()
        await stack.valkey.start()
        await all_completed(client, await load)
        await clean_audit(stack)


async def test_killed_broker_loses_nothing(make_stack: MakeStack) -> None:
    async with make_stack(nodes=2) as stack, Client(stack.kafka, stack.settings.pool) as client:
        assert stack.broker is not None
        ids = await submit_for(client, 2.0, per_s=20)
        stack.broker.kill()
        await stack.broker.start()
        await all_completed(client, [*ids, *await submit_for(client, 1.0, per_s=20)])
        await clean_audit(stack)


async def test_agents_and_dispatchers_may_start_before_their_servers(make_stack: MakeStack) -> None:
    async with make_stack(nodes=1) as stack, Client(stack.kafka, stack.settings.pool) as client:
        assert stack.valkey is not None
        await asyncio.gather(*(member.kill() for member in (*stack.dispatchers, *stack.agents)))
        await stack.valkey.stop()
        starting = [
            asyncio.create_task(stack.start_member(member)) for member in (*stack.dispatchers, *stack.agents)
        ]
        await asyncio.gather(*starting)
        id = await client.submit("sim", "/v1/completions", BODY)
        await wait_until(
            lambda: any(
                events(member, "redis does not answer, trying again") for member in stack.dispatchers
            ),
            "a dispatcher to say that Redis is away",
        )
        await stack.valkey.start()
        await all_completed(client, [id])


async def number_of_the_busy_node(stack: LocalStack) -> int:
    """Which node has claimed the only request."""
    redis = connect_redis(stack.redis)
    try:
        claimed = [await redis.zcard(stack.names.claimed(f"node-{number}")) for number in (1, 2)]
    finally:
        await redis.aclose()
    assert sorted(claimed) == [0, 1]
    return claimed.index(1) + 1


@pytest.mark.parametrize("dies", ["engine", "agent"])
async def test_a_stream_goes_on_where_it_was_when_its_node_dies(make_stack: MakeStack, dies: str) -> None:
    body = {"prompt": "a stream that is cut in its middle", "max_tokens": 120}
    async with (
        make_stack(nodes=2, engine_flags=("--decode-step-ms", "60")) as stack,
        Client(stack.kafka, stack.settings.pool) as client,
    ):
        id = await client.submit("sim", "/v1/completions", body)
        text, killed = "", 0
        async for event in client.stream(id):
            match event:
                case TextAdded():
                    text += event.text
                case Restarted():
                    pytest.fail(f"the stream started over after {text!r}")
                case Ended():
                    break
            if not killed and text.count(" ") > 60:
                killed = await number_of_the_busy_node(stack)
                await (stack.engines if dies == "engine" else stack.agents)[killed - 1].kill()
        outcome = await client.outcome(id)
        assert (outcome.kind, outcome.usage.completion_tokens) == (OutcomeKind.COMPLETED, 120)
        assert (
            text
            == outcome.choices[0].text
            == Answer(tokenise("a stream that is cut in its middle")).text(120)
        )
        assert outcome.node == f"node-{3 - killed}"
        await clean_audit(stack)
