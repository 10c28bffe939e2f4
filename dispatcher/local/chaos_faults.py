"""How each kind of chaos is done to a local stack, and undone.

Called by `flexlb chaos`, one call per planned fault. A fault holds its victim until it is mended, so that
faults that overlap never meet on one process; what it broke is whole or back when the call returns.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import time
from collections import defaultdict
from collections.abc import AsyncIterator, Callable, Mapping

import aiohttp
from redis.asyncio import Redis
from redis.exceptions import RedisError

from dispatcher.backends.connect import connect_redis
from dispatcher.local.apache_kafka import ApacheKafka
from dispatcher.local.broker import Broker
from dispatcher.local.chaos_report import DoneFault
from dispatcher.local.chaos_schedule import FaultKind, PlannedFault
from dispatcher.local.redis_network import RedisNetwork
from dispatcher.local.sentinel import DOWN_AFTER_MS, attach, detach
from dispatcher.local.slow_disk import slow_disk
from dispatcher.local.stack import LocalStack, Member
from dispatcher.local.valkey import ValkeyServer

LEADER_WAIT_S = 10.0
DRAIN_GRACE_S = 40.0
CRASH_WAIT_S = 5.0
SLOW_DELAY_S = 0.1
"""Each way and piece, on a slow network: a round trip of 0.2 s."""
SLOW_KAFKA_DELAYS_S = (0.15, 0.5)
"""The same between everybody and Kafka, from and to, by the fault's draw: a round trip of 0.3 to 1 s."""
SLOW_STEPS = 20
POLL_S = 0.05
USUAL_CLIENTS = 10_000
"""Valkey's own `maxclients`."""
VOTE_AFTER_MS = DOWN_AFTER_MS
"""Silence after which Sentinels vote in a failover..."""
PATIENCE_MS = 60_000
"""...and in all other faults, which would be failovers too."""
MISSED_S = 0.5
"""For how long a replica is behind in every other failover, the first one too."""
SLOW_AOF_WRITES_S = (0.3, 1.5)
SLOW_AOF_SYNC_S = 2.5
"""Longer than the 2 s for which Valkey holds back its writes while a sync is under way."""
SLOW_SEGMENT_WRITES_S = (0.05, 0.2)
SLOW_SEGMENT_SYNC_S = 0.5
REDIS, KAFKA = "redis", "kafka"


class Chaos:
    """Breaks one stack.

    Args:
        networks: by member's name, the network through which it reaches Redis.
        tell: takes a line for people per fault.
        struck: takes each fault as it strikes.
    """

    def __init__(
        self,
        stack: LocalStack,
        networks: Mapping[str, RedisNetwork],
        *,
        tell: Callable[[str], None],
        struck: Callable[[DoneFault], None],
    ) -> None:
        assert stack.broker is not None
        self._stack = stack
        self._broker: Broker = stack.broker
        self._networks = networks
        self._tell = tell
        self._struck = struck
        self._held: defaultdict[str, asyncio.Lock] = defaultdict(asyncio.Lock)
        self._failovers = itertools.count()

    async def do(self, fault: PlannedFault) -> None:
        """Do one fault, and undo it."""
        match fault.kind:
            case (
                FaultKind.KILL_LEADER | FaultKind.KILL_STANDBY | FaultKind.KILL_AGENT | FaultKind.KILL_ENGINE
            ):
                await self._kill(fault)
            case (
                FaultKind.FREEZE_LEADER
                | FaultKind.FREEZE_STANDBY
                | FaultKind.FREEZE_AGENT
                | FaultKind.FREEZE_ENGINE
            ):
                await self._freeze(fault)
            case FaultKind.RESTART_DISPATCHER | FaultKind.RESTART_AGENT:
                await self._restart(fault)
            case FaultKind.STALL_ENGINE:
                await self._spoil(fault, {"stall_rate": 1.0})
            case FaultKind.FAIL_ENGINE:
                await self._spoil(fault, {"fail_rate": 1.0})
            case FaultKind.SLOW_ENGINE:
                await self._spoil(fault, {"step_factor": SLOW_STEPS})
            case FaultKind.CRASH_ENGINE:
                await self._crash(fault)
            case (
                FaultKind.KILL_REDIS | FaultKind.LOSE_REDIS | FaultKind.FREEZE_REDIS | FaultKind.REFUSE_REDIS
            ):
                await self._break_redis(fault)
            case FaultKind.FAILOVER_REDIS:
                await self._fail_over(fault)
            case FaultKind.SLOW_DISK_REDIS:
                await self._slow_aof(fault)
            case FaultKind.SLOW_DISK_KAFKA:
                await self._slow_segments(fault)
            case FaultKind.CUT_KAFKA | FaultKind.SLOW_KAFKA:
                await self._disturb_kafka(fault)
            case FaultKind.KILL_KAFKA | FaultKind.FREEZE_KAFKA:
                await self._break_kafka(fault)
            case FaultKind.CUT_AGENT | FaultKind.CUT_DISPATCHER:
                await self._disturb(fault, is_cut=True)
            case FaultKind.SLOW_AGENT | FaultKind.SLOW_DISPATCHER:
                await self._disturb(fault, is_cut=False)

    def _strike(self, fault: PlannedFault, victim: str) -> None:
        self._struck(DoneFault(kind=fault.kind, victim=victim, began_s=time.monotonic()))
        self._tell(f"{fault.kind}: {victim}, {fault.lasts_s:.1f} s")

    @contextlib.asynccontextmanager
    async def _victim(self, fault: PlannedFault) -> AsyncIterator[Member]:
        """The member that the fault is for, held."""
        member = await self._choose(fault)
        while self._held[member.name].locked():
            async with self._held[member.name]:
                pass
            member = await self._choose(fault)
        async with self._held[member.name]:
            yield member

    async def _choose(self, fault: PlannedFault) -> Member:
        stack = self._stack
        match fault.kind:
            case FaultKind.KILL_LEADER | FaultKind.FREEZE_LEADER:
                return await self._leader() or stack.dispatchers[fault.victim(len(stack.dispatchers))]
            case FaultKind.KILL_STANDBY | FaultKind.FREEZE_STANDBY:
                leader = await self._leader()
                standbys = [member for member in stack.dispatchers if member is not leader]
                return standbys[fault.victim(len(standbys))]
            case FaultKind.RESTART_DISPATCHER | FaultKind.CUT_DISPATCHER | FaultKind.SLOW_DISPATCHER:
                return stack.dispatchers[fault.victim(len(stack.dispatchers))]
            case (
                FaultKind.KILL_AGENT
                | FaultKind.FREEZE_AGENT
                | FaultKind.RESTART_AGENT
                | FaultKind.CUT_AGENT
                | FaultKind.SLOW_AGENT
            ):
                return stack.agents[fault.victim(len(stack.agents))]
            case _:
                return stack.engines[fault.victim(len(stack.engines))]

    async def _leader(self) -> Member | None:
        """Who leads, waited for a while."""
        until_s = time.monotonic() + LEADER_WAIT_S
        while (  # noqa: ASYNC110 - other processes are asked, no event tells
            leader := await self._stack.leader()
        ) is None and time.monotonic() < until_s:
            await asyncio.sleep(POLL_S)
        return leader

    async def _kill(self, fault: PlannedFault) -> None:
        async with self._victim(fault) as member:
            self._strike(fault, member.name)
            await member.kill()
            await asyncio.sleep(fault.lasts_s)
            await self._stack.start_member(member)

    async def _freeze(self, fault: PlannedFault) -> None:
        async with self._victim(fault) as member:
            self._strike(fault, member.name)
            member.freeze()
            try:
                await asyncio.sleep(fault.lasts_s)
            finally:
                member.thaw()

    async def _restart(self, fault: PlannedFault) -> None:
        async with self._victim(fault) as member:
            self._strike(fault, member.name)
            await member.stop(DRAIN_GRACE_S)
            await asyncio.sleep(fault.lasts_s)
            await self._stack.start_member(member)

    async def _spoil(self, fault: PlannedFault, faults: Mapping[str, float]) -> None:
        async with self._victim(fault) as engine:
            self._strike(fault, engine.name)
            await _set_faults(engine, faults)
            await asyncio.sleep(fault.lasts_s)
            await _set_faults(engine, {})

    async def _crash(self, fault: PlannedFault) -> None:
        """The next request kills the engine half-way through its answer."""
        async with self._victim(fault) as engine:
            self._strike(fault, engine.name)
            await _set_faults(engine, {"crash_after": 0})
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(CRASH_WAIT_S):
                    while engine.is_running:  # noqa: ASYNC110 - a process of its own, no event tells
                        await asyncio.sleep(POLL_S)
            if engine.is_running:
                self._tell(f"{engine.name} had no request to die of; killed")
                await engine.kill()
            await asyncio.sleep(fault.lasts_s)
            await self._stack.start_member(engine)

    async def _break_redis(self, fault: PlannedFault) -> None:
        async with self._held[REDIS]:
            valkey = await self._primary()
            self._strike(fault, REDIS)
            match fault.kind:
                case FaultKind.KILL_REDIS:
                    valkey.kill()
                    await asyncio.sleep(fault.lasts_s)
                    await valkey.start()
                case FaultKind.LOSE_REDIS:
                    await valkey.wipe()
                    await asyncio.sleep(fault.lasts_s)
                    await valkey.start()
                case FaultKind.FREEZE_REDIS:
                    valkey.freeze()
                    try:
                        await asyncio.sleep(fault.lasts_s)
                    finally:
                        valkey.thaw()
                case _:
                    await _refuse_redis(valkey, fault.lasts_s)

    async def _primary(self) -> ValkeyServer:
        servers = self._stack.servers
        if servers.replicated is not None:
            return await servers.replicated.primary()
        assert servers.valkey is not None
        return servers.valkey

    async def _fail_over(self, fault: PlannedFault) -> None:
        """Kill the primary; once its replica took over, start it again: Sentinels make a replica of it."""
        redis = self._stack.servers.replicated
        assert redis is not None
        async with self._held[REDIS]:
            await redis.until_healthy()
            primary, replica = await redis.primary(), await redis.replica()
            is_behind = next(self._failovers) % 2 == 0
            if is_behind:
                await detach(replica)
                await asyncio.sleep(MISSED_S)
            await redis.wait_before_vote(VOTE_AFTER_MS)
            self._strike(fault, f"{REDIS}, whose replica is {'behind' if is_behind else 'in sync'}")
            primary.kill()
            await redis.until_promoted(primary)
            await redis.wait_before_vote(PATIENCE_MS)
            if is_behind:
                await attach(replica)
            await asyncio.sleep(fault.lasts_s)
            await primary.start()
            await redis.until_healthy()

    async def _slow_aof(self, fault: PlannedFault) -> None:
        async with self._held[REDIS]:
            valkey = await self._primary()
            write_s = _between(SLOW_AOF_WRITES_S, fault.draw)
            slow = slow_disk(valkey.pid, valkey.files, write_s=write_s, sync_s=SLOW_AOF_SYNC_S)
            async with slow:
                self._strike(fault, f"{REDIS}, {write_s * 1000:.0f} ms a write")
                await asyncio.sleep(fault.lasts_s)

    async def _slow_segments(self, fault: PlannedFault) -> None:
        broker = self._broker
        assert isinstance(broker, ApacheKafka)
        async with self._held[KAFKA]:
            write_s = _between(SLOW_SEGMENT_WRITES_S, fault.draw)
            slow = slow_disk(broker.pid, broker.files, write_s=write_s, sync_s=SLOW_SEGMENT_SYNC_S)
            async with slow:
                self._strike(fault, f"{KAFKA}, {write_s * 1000:.0f} ms a write")
                await asyncio.sleep(fault.lasts_s)

    async def _break_kafka(self, fault: PlannedFault) -> None:
        broker = self._broker
        async with self._held[KAFKA]:
            self._strike(fault, KAFKA)
            if fault.kind is FaultKind.FREEZE_KAFKA:
                broker.freeze()
                try:
                    await asyncio.sleep(fault.lasts_s)
                finally:
                    broker.thaw()
            else:
                broker.kill()
                await asyncio.sleep(fault.lasts_s)
                await broker.start()

    async def _disturb_kafka(self, fault: PlannedFault) -> None:
        proxy = self._stack.servers.kafka_proxy
        assert proxy is not None
        async with self._held[KAFKA]:
            self._strike(fault, KAFKA)
            if fault.kind is FaultKind.CUT_KAFKA:
                proxy.cut()
            else:
                proxy.delay_s = _between(SLOW_KAFKA_DELAYS_S, fault.draw)
            try:
                await asyncio.sleep(fault.lasts_s)
            finally:
                proxy.heal()

    async def _disturb(self, fault: PlannedFault, *, is_cut: bool) -> None:
        async with self._victim(fault) as member:
            network = self._networks[member.name]
            self._strike(fault, member.name)
            if is_cut:
                network.cut()
            else:
                network.slow(SLOW_DELAY_S)
            try:
                await asyncio.sleep(fault.lasts_s)
            finally:
                network.heal()


def _between(bounds: tuple[float, float], draw: float) -> float:
    least, most = bounds
    return least + draw * (most - least)


async def _refuse_redis(valkey: ValkeyServer, lasts_s: float) -> None:
    """Close every connection and answer new ones with an error: the server has one client, us."""
    client = connect_redis(valkey.url, timeout_s=30.0, max_connections=1)
    try:
        await client.config_set("maxclients", 1)
        await client.execute_command("CLIENT", "KILL", "TYPE", "normal", "SKIPME", "yes")
        await asyncio.sleep(lasts_s)
    finally:
        await _let_everybody_in(client)
        await client.aclose()


async def _let_everybody_in(client: Redis) -> None:
    """Undo a refusal; a server that is gone comes back without it."""
    with contextlib.suppress(RedisError, OSError):
        await client.config_set("maxclients", USUAL_CLIENTS)


async def _set_faults(engine: Member, faults: Mapping[str, float]) -> None:
    timeout = aiohttp.ClientTimeout(total=30)
    async with aiohttp.ClientSession(timeout=timeout) as session:
        async with session.post(f"{engine.url}/sim/faults", json=dict(faults)) as response:
            response.raise_for_status()
