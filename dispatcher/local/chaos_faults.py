"""How each kind of chaos is done to a local stack, and undone.

Called by `flexlb chaos`, one call per planned fault. A fault holds its victim until it is mended, so that
faults that overlap never meet on one process; what it broke is whole or back when the call returns.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections import defaultdict
from collections.abc import AsyncIterator, Callable, Mapping

import aiohttp
from redis.asyncio import Redis
from redis.exceptions import RedisError

from dispatcher.backends.connect import connect_redis
from dispatcher.local.broker import Broker
from dispatcher.local.chaos_report import DoneFault
from dispatcher.local.chaos_schedule import FaultKind, PlannedFault
from dispatcher.local.stack import LocalStack, Member
from dispatcher.local.tcp_proxy import TcpProxy
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
REDIS, KAFKA = "redis", "kafka"


class Chaos:
    """Breaks one stack.

    Args:
        proxies: by member's name, the proxy through which it reaches Redis.
        tell: takes a line for people per fault.
        struck: takes each fault as it strikes.
    """

    def __init__(
        self,
        stack: LocalStack,
        proxies: Mapping[str, TcpProxy],
        *,
        tell: Callable[[str], None],
        struck: Callable[[DoneFault], None],
    ) -> None:
        assert stack.valkey is not None
        assert stack.broker is not None
        self._stack = stack
        self._valkey: ValkeyServer = stack.valkey
        self._broker: Broker = stack.broker
        self._proxies = proxies
        self._tell = tell
        self._struck = struck
        self._held: defaultdict[str, asyncio.Lock] = defaultdict(asyncio.Lock)

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
        valkey = self._valkey
        async with self._held[REDIS]:
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
                    await self._refuse_redis(fault.lasts_s)

    async def _refuse_redis(self, lasts_s: float) -> None:
        """Close every connection and answer new ones with an error: the server has one client, us."""
        client = connect_redis(self._valkey.url, timeout_s=30.0, max_connections=1)
        try:
            await client.config_set("maxclients", 1)
            await client.execute_command("CLIENT", "KILL", "TYPE", "normal", "SKIPME", "yes")
            await asyncio.sleep(lasts_s)
        finally:
            await _let_everybody_in(client)
            await client.aclose()

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
                least_s, most_s = SLOW_KAFKA_DELAYS_S
                proxy.delay_s = least_s + fault.draw * (most_s - least_s)
            try:
                await asyncio.sleep(fault.lasts_s)
            finally:
                proxy.heal()

    async def _disturb(self, fault: PlannedFault, *, is_cut: bool) -> None:
        async with self._victim(fault) as member:
            proxy = self._proxies[member.name]
            self._strike(fault, member.name)
            if is_cut:
                proxy.cut()
            else:
                proxy.delay_s = SLOW_DELAY_S
            try:
                await asyncio.sleep(fault.lasts_s)
            finally:
                proxy.heal()


async def _let_everybody_in(client: Redis) -> None:
    """Undo a refusal; a server that is gone comes back without it."""
    with contextlib.suppress(RedisError, OSError):
        await client.config_set("maxclients", USUAL_CLIENTS)


async def _set_faults(engine: Member, faults: Mapping[str, float]) -> None:
    timeout = aiohttp.ClientTimeout(total=30)
    async with aiohttp.ClientSession(timeout=timeout) as session:
        async with session.post(f"{engine.url}/sim/faults", json=dict(faults)) as response:
            response.raise_for_status()
