"""Clients of one simulated cluster that hold leases: one that stays, one that dies, one that says goodbye.

Each gives its signs of life by production code, from a process of its own. The requests of those that leave
would generate for longer than a run lasts, so that only a cancel can answer them in time.
"""

from __future__ import annotations

import asyncio
import random
from typing import Any

from aiokafka.errors import KafkaError

from dispatcher.client.lease import LeaseKeeper
from dispatcher.errors import LogUnavailable
from dispatcher.protocol import codec
from dispatcher.protocol.names import Lane, Names
from dispatcher.protocol.outcome import Outcome, OutcomeKind, Reason
from tests.support.scripted_engine import MOST_TOKENS
from tests.support.sim.kafka import SimKafka
from tests.support.sim.network import Network, Process
from tests.support.workload import MODEL, Workload

TTL_S = 3.0
STAYS, DIES, LEAVES = "stays", "dies", "leaves"
PACE_S = {STAYS: 4.5 / MOST_TOKENS, DIES: 200.0 / MOST_TOKENS, LEAVES: 200.0 / MOST_TOKENS}
"""Between two tokens of an answer of `MOST_TOKENS`."""


class LeasingClients:
    """The clients of one cluster that hold leases."""

    def __init__(
        self, names: Names, kafka: SimKafka, network: Network, workload: Workload, seed: int
    ) -> None:
        self._names = names
        self._kafka = kafka
        self._network = network
        self._workload = workload
        self._rng = random.Random(seed)
        self.processes: list[Process] = []

    async def run(self) -> None:
        """Start them, and kill the one that dies."""
        for name in (STAYS, DIES, LEAVES):
            process = self._network.process(name)
            self.processes.append(process)
            process.spawn(self._live(process, name), name=name)
            if name == DIES:
                dying = process
        await asyncio.sleep(self._rng.uniform(0.5, 4.0))
        self._workload.note(f"kill {DIES}")
        dying.kill()

    async def _live(self, process: Process, name: str) -> None:
        producer = await self._producer(process)

        async def append(value: bytes) -> None:
            try:
                await producer.send_and_wait(self._names.cancels, value, partition=0)
            except (KafkaError, OSError) as error:
                raise LogUnavailable(repr(error)) from error

        keeper = LeaseKeeper(append, f"lease-{name}", "", TTL_S)
        while True:
            try:
                await keeper.begin()
                break
            except LogUnavailable:
                continue
        living = asyncio.create_task(keeper.run())
        for number in range(2):
            await asyncio.sleep(self._rng.uniform(0.0, 1.0))
            self._submit(name, number, PACE_S[name], {})
        self._submit(name, 2, 3.0 / MOST_TOKENS, {"detached": True})
        if name == LEAVES:
            await asyncio.sleep(self._rng.uniform(0.0, 4.0))
            living.cancel()
            await keeper.end()
            return
        await living

    async def _producer(self, process: Process) -> Any:
        while True:
            producer = self._kafka.clients(process).producer(acks="all", enable_idempotence=True)
            try:
                await producer.start()
            except (KafkaError, OSError):
                await asyncio.sleep(0.5)
                continue
            return producer

    def _submit(self, name: str, number: int, pace_s: float, fields: dict[str, object]) -> None:
        body = {"prompt": "x", "max_tokens": MOST_TOKENS, "pace_s": pace_s}
        request = {"id": f"{name}{number}", "model": MODEL, "endpoint": "/v1/completions", "body": body}
        self._workload.append({**request, "lease": f"lease-{name}", **fields}, lane=Lane.INTERACTIVE)

    def violations(self) -> tuple[list[str], int]:
        """Who was cancelled wrongly, and how many were rightly."""
        found, gone = [], 0
        for record in self._kafka.committed(self._names.outcomes):
            outcome = codec.outcomes.decode(record.value or b"")
            request = self._workload.expectations.requests[outcome.ref]
            may_go = (
                request.get("lease") in {f"lease-{DIES}", f"lease-{LEAVES}"} and "detached" not in request
            )
            if outcome.reason is Reason.CLIENT_GONE:
                gone += 1
                if not may_go or outcome.kind is not OutcomeKind.CANCELLED:
                    found.append(f"{outcome.ref} ({outcome.id}) was cancelled though its client is not gone")
            elif may_go and not _may_end_otherwise(outcome):
                found.append(f"{outcome.ref} ({outcome.id}) of a client that is gone came to {outcome.kind}")
        return found, gone


def _may_end_otherwise(outcome: Outcome) -> bool:
    """Whether an orphan may come to this: a clock may jump, the pool be overloaded."""
    return outcome.kind in {OutcomeKind.FAILED, OutcomeKind.EVICTED} or outcome.reason is Reason.OVERLOADED
