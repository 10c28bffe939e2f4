"""Leading with election off, and stopping, on a real Kafka and a real Valkey."""

from __future__ import annotations

import asyncio
import contextlib
import signal
import sys
import time
from collections.abc import AsyncIterator

import pytest

from dispatcher.backends.clock import Clock
from dispatcher.backends.connect import KafkaClients
from dispatcher.backends.leader_lock import LeaderLock, Lease, epoch_of
from dispatcher.backends.scripts import ScriptRunner
from dispatcher.errors import Superseded
from dispatcher.local.valkey import ValkeyServer
from dispatcher.protocol.outcome import OutcomeKind, Reason
from tests.support.pool import CLOCK, Pool, ScriptedNode, request
from tests.support.servers import KafkaAddress
from tests.support.wait import wait_until

pytestmark = pytest.mark.kafka


async def test_without_election_it_leads_at_once_though_another_s_lease_runs(
    kafka_clients: KafkaClients, valkey: ValkeyServer, pool: str
) -> None:
    async with Pool(kafka_clients, valkey.url, pool, election=False) as one:
        gone = await LeaderLock(
            ScriptRunner(one.redis), one.names, ttl_s=3600, clock=CLOCK.monotonic
        ).acquire("gone")
        assert isinstance(gone, Lease)
        async with one.running(one.dispatcher()), one.running(ScriptedNode(one, "n1")):
            await one.append(request("r1"))
            assert (await one.outcome("r1")).kind is OutcomeKind.COMPLETED
            token = (await one.redis.get(one.names.leader)).decode()
            assert epoch_of(token) > gone.epoch
            assert (await one.redis.get(one.names.epoch)).decode() == token


@pytest.mark.parametrize("ahead_s", [3600.0, -3600.0])
async def test_a_dispatcher_with_a_wrong_clock_ends_requests_neither_early_nor_late(
    kafka_clients: KafkaClients,
    valkey: ValkeyServer,
    pool: str,
    ahead_s: float,
    caplog: pytest.LogCaptureFixture,
) -> None:
    wrong = Clock(epoch_s=lambda: time.time() + ahead_s)
    async with Pool(kafka_clients, valkey.url, pool) as one:
        dispatcher = one.dispatcher(wrong)
        async with one.running(dispatcher), one.running(ScriptedNode(one, "n1")) as node:
            node.hears.clear()
            await one.append(request("late", deadline_ms=3000))
            assert (await one.outcome("late")).reason is Reason.DEADLINE_EXCEEDED
            node.hears.set()
            await one.append(request("early"))
            outcome = await one.outcome("early")
            assert outcome.kind is OutcomeKind.COMPLETED
            ended_ms = (await one.outcome("late")).timing.ended
            assert abs(ended_ms - CLOCK.now_ms()) < 60_000, "by Redis's clock too"
        assert abs(dispatcher.metrics.clock_ahead_s._value.get() - ahead_s) < 1
    told = [record.message for record in caplog.records if "clock differs" in record.message]
    assert len(told) == 1


async def test_without_election_the_first_of_two_ends_and_the_second_serves(
    kafka_clients: KafkaClients, valkey: ValkeyServer, pool: str
) -> None:
    async with Pool(kafka_clients, valkey.url, pool, election=False) as one:
        first = one.dispatcher()
        ended = asyncio.create_task(first.run())
        await wait_until(lambda: first.state is not None, "the first to lead")
        async with one.running(one.dispatcher()) as second, one.running(ScriptedNode(one, "n1")):
            await asyncio.wait([ended], timeout=20)
            error = ended.exception()
            assert isinstance(error, BaseExceptionGroup)
            superseded, others = error.split(Superseded)
            assert superseded is not None
            assert others is None
            assert second.election.leading
            await one.append(request("r1"))
            assert (await one.outcome("r1")).kind is OutcomeKind.COMPLETED
            assert second.metrics.elections._value.get() == 1


async def test_without_election_it_leads_again_after_redis_was_away_or_lost_everything(
    kafka_clients: KafkaClients, valkey: ValkeyServer, pool: str
) -> None:
    async with Pool(kafka_clients, valkey.url, pool, election=False) as one:
        dispatcher = one.dispatcher()

        def leads_anew(sessions: int) -> bool:
            return dispatcher.metrics.elections._value.get() > sessions and dispatcher.state is not None

        async with one.running(dispatcher):
            await wait_until(lambda: leads_anew(0), "the first session")
            valkey.freeze()
            await wait_until(lambda: not dispatcher.election.leading, "the lease to run out")
            valkey.thaw()
            await wait_until(lambda: leads_anew(1), "a session after the pause")
            sessions = dispatcher.metrics.elections._value.get()
            await one.redis.flushall()
            await wait_until(lambda: leads_anew(sessions), "a session after the loss")


@contextlib.asynccontextmanager
async def a_process(kafka: KafkaAddress, one: Pool, *flags: str) -> AsyncIterator[asyncio.subprocess.Process]:
    """`flexlb dispatcher`, leading."""
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "dispatcher", "dispatcher", f"--pool={one.names.pool}", *flags),
        *(f"--kafka={kafka.bootstrap}", f"--redis={one.redis_url}", "--leader-ttl-s=1"),
        stderr=asyncio.subprocess.PIPE,
    )
    try:
        await wait_until(lambda: one.redis.exists(one.names.generation), "the process to lead")
        yield process
    finally:
        if process.returncode is None:
            process.kill()
            await process.wait()


async def test_a_process_told_to_stop_twice_says_goodbye_to_its_end(
    kafka: KafkaAddress, valkey: ValkeyServer, pool: str
) -> None:
    async with Pool(kafka.clients, valkey.url, pool) as one, a_process(kafka, one) as process:
        assert process.stderr is not None
        valkey.freeze()  # giving the lease back takes its longest
        process.send_signal(signal.SIGTERM)
        async with asyncio.timeout(20):
            while b"leadership ended" not in await process.stderr.readline():
                pass
            process.send_signal(signal.SIGINT)
            rest = (await process.stderr.read()).decode()
            assert await process.wait() == 0
        valkey.thaw()
        assert "lease not given back" in rest
        assert "dispatcher stopped" in rest
        assert "Unclosed" not in rest


async def test_without_election_a_superseded_process_says_so_and_exits_with_an_error(
    kafka: KafkaAddress, valkey: ValkeyServer, pool: str
) -> None:
    async with (
        Pool(kafka.clients, valkey.url, pool) as one,
        a_process(kafka, one, "--election=false") as process,
    ):
        token = (await one.redis.get(one.names.leader)).decode()
        lock = LeaderLock(ScriptRunner(one.redis), one.names, ttl_s=60, clock=CLOCK.monotonic)
        taken = await lock.acquire("another", depose=token)
        assert isinstance(taken, Lease)
        async with asyncio.timeout(20):
            _, err = await process.communicate()
        assert process.returncode == 2
        last = err.decode().splitlines()[-1]
        assert last.startswith("flexlb dispatcher: election is off and expects one dispatcher, seen another")
        assert taken.token in last
        assert "Traceback" not in err.decode()
        assert (await one.redis.get(one.names.leader)).decode() == taken.token
