"""A whole cluster in virtual time: dispatchers, agents, their engines, Redis, Kafka, clients, operators.

Everything but the engines and the servers is production code, the Lua included. A seed decides the
workload, the network and the faults. `tests/support/invariants.py` watches every effect at the servers.
"""

from __future__ import annotations

import asyncio
import functools
import gc
import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from prometheus_client import CollectorRegistry
from prometheus_client.metrics import MetricWrapperBase
from prometheus_client.registry import Collector

from dispatcher.app import Dispatcher
from dispatcher.client.reader import ReplyReader
from dispatcher.protocol import codec
from dispatcher.protocol.names import Lane, Names
from dispatcher.protocol.node import Role
from dispatcher.protocol.outcome import OutcomeKind
from dispatcher.scheduling.admission import AdmissionLimits
from dispatcher.settings import DispatcherSettings
from dispatcher.telemetry.logging import Log
from tests.support.faults import Faults
from tests.support.invariants import Expectations, Invariants, ObservedRedis
from tests.support.leasing import LeasingClients
from tests.support.scripted_engine import MOST_TOKENS, PROMPT_IDS, ScriptedEngine, answer_of
from tests.support.sim.kafka import SimKafka
from tests.support.sim.loop import current, run
from tests.support.sim.network import CALM, ROUGH, Network, Process
from tests.support.workload import MODEL, Workload
from workers_agent.app import Agent
from workers_agent.metrics import AgentMetrics
from workers_agent.settings import AgentSettings

POOL = "sim"
DISPATCHERS = ("d1", "d2", "d3")
NODES = ("n1", "n2", "n3", "n4")
SETTLE_S = 60.0
PARTITIONS = 2
LEASING_SHARE = 0.4
"""Of the clusters that have clients with leases: their answers take the longest."""

DISPATCHER = DispatcherSettings(
    pool=POOL,
    leader_ttl_s=1.0,
    heartbeat_ttl_s=2.0,
    claim_lease_s=4.0,
    unknown_model_grace_s=3.0,
    default_deadline_s=300,
)


class _Unlisted(CollectorRegistry):
    """Lists no metrics: nobody scrapes a simulated process, and each start of one makes a hundred."""

    def register(self, collector: Collector) -> None:
        """Forget it."""


def _count(metric: MetricWrapperBase) -> int:
    """What a counter, or its child, has come to."""
    return sum(int(s.value) for m in metric.collect() for s in m.samples if s.name.endswith("_total"))


@functools.cache
def _agent_settings(node: str, role: Role = Role.FUSED) -> AgentSettings:
    return AgentSettings(
        pool=POOL,
        node=node,
        models=MODEL,
        role=role,
        max_running=4,
        heartbeat_ttl_s=2.0,
        claim_lease_s=4.0,
        drain_grace_s=3.0,
        engine_url="http://simulated",
    )


@dataclass
class Outcome:
    """What became of one seed."""

    seed: int
    violations: list[str] = field(default_factory=list)
    log: list[str] = field(default_factory=list)
    outcomes: int = 0
    resumed_tokens: int = 0
    handed_over: int = 0
    clients_gone: int = 0
    virtual_s: float = 0.0

    def explain(self) -> str:
        """The violations, and the command that replays them."""
        return "\n".join(
            [
                *self.violations[:5],
                f"replay: uv run python -m tests.simulation {self.seed}",
            ]
        )


class _Silent(Log):
    """Says nothing."""

    def debug(self, event: str, **fields: object) -> None:
        """Say nothing."""

    info = warning = error = debug


class Cluster:
    """One seed's cluster.

    Args:
        nodes: their names; as the seed decides by default.
        faults: only these kinds; all when empty.
        is_split: every other node computes prompts only, the rest goes on from them.
        settings: of every dispatcher, beside the cluster's own.
    """

    def __init__(
        self,
        seed: int,
        *,
        nodes: Sequence[str] = (),
        scripts: dict[str, str] | None = None,
        trace: Callable[[str], None] | None = None,
        logs: bool = False,
        hostile_records: int = 0,
        faults: tuple[str, ...] = (),
        is_split: bool = False,
        settings: Mapping[str, object] | None = None,
    ) -> None:
        self._is_split = is_split
        self._logs = logs
        self._faults = faults
        self._hostile_records = hostile_records
        self.rng = random.Random(seed)
        self.result = Outcome(seed=seed)
        self.names = Names(POOL)
        self.dispatchers: Sequence[str] = DISPATCHERS[: self.rng.choice([2, 2, 3])]
        self.nodes: Sequence[str] = nodes or NODES[: self.rng.choice([2, 2, 3, 4])]
        self.settings = DISPATCHER.model_copy(update=dict(settings or {}))
        self._scripts = scripts or {}
        loop = current()
        profile = CALM if self.rng.random() < 0.3 else ROUGH
        self.network = Network(random.Random(seed + 1), loop, profile, trace=trace)
        self.kafka = SimKafka(self.network)
        self.expectations = Expectations()
        self.redis = ObservedRedis(self.network)
        self.invariants = Invariants(
            self.names,
            self.nodes,
            self.redis,
            self.kafka,
            self.expectations,
            self.result.violations,
            scripts=self._scripts,
        )
        self.workload = Workload(self.names, self.kafka, self.expectations, self.rng, self.note)
        self.leasing = LeasingClients(self.names, self.kafka, self.network, self.workload, seed + 2)
        self.redis.observer = self.invariants.after_effect
        self._trace = trace
        self._agents: list[AgentMetrics] = []
        self._ids = 0
        self.processes: dict[str, Process] = {}
        self.running: dict[str, Dispatcher] = {}
        self.engines: dict[str, ScriptedEngine] = {}
        self._dispatching: dict[str, asyncio.Task[None]] = {}
        self._stops: dict[str, asyncio.Event] = {}
        self._loop = loop
        loop.set_exception_handler(self._note_failure)

    def _note_failure(self, _: asyncio.AbstractEventLoop, context: dict[str, Any]) -> None:
        """A callback raised: none may. What a killed process's tasks died of tells nothing."""
        if "handle" in context:
            self.result.violations.append(f"{context['message']}: {context.get('exception')!r}")

    def note(self, text: str) -> None:
        """Write a line of the trace."""
        if self._trace is not None:
            self._trace(f"{self._loop.time():.6f} -- {text}")

    def _new_id(self) -> str:
        self._ids += 1
        return f"id{self._ids}"

    def _log(self, name: str) -> Log:
        return Log(process=name) if self._logs else _Silent()

    def start_dispatcher(self, name: str) -> None:
        """Start a dispatcher process."""
        process = self.network.process(name)
        self.processes[name] = process
        dispatcher = Dispatcher(
            self.settings,
            redis=lambda: self.redis.client(process),
            kafka=self.kafka.clients(process),
            clock=process.clock,
            new_id=self._new_id,
            rng=random.Random(self.rng.random()),
            registry=_Unlisted(),
            log=self._log(name),
            scripts=self._scripts,
        )
        self.running[name] = dispatcher
        self._dispatching[name] = process.spawn(dispatcher.run(), name=name)

    def stop_dispatcher(self, name: str) -> None:
        """SIGTERM to a dispatcher: its work is cancelled."""
        self._dispatching[name].cancel()

    def stop_agent(self, node: str) -> None:
        """SIGTERM to an agent: it drains."""
        self._stops[node].set()

    def engine_of(self, node: str) -> ScriptedEngine:
        """A new engine for a node's agent."""
        return ScriptedEngine(random.Random(self.rng.random()), failure_share=0.1)

    def _role_of(self, node: str) -> Role:
        if not self._is_split:
            return Role.FUSED
        return Role.DECODE if list(self.nodes).index(node) % 2 else Role.PREFILL

    def start_agent(self, node: str) -> None:
        """Start an agent process with its engine."""
        process = self.network.process(f"agent-{node}")
        self.processes[node] = process
        engine = self.engines[node] = self.engine_of(node)
        self._stops[node] = asyncio.Event()
        agent = Agent(
            _agent_settings(node, self._role_of(node)),
            redis=lambda: self.redis.client(process),
            kafka=self.kafka.clients(process),
            engine=engine,
            clock=process.clock,
            new_id=self._new_id,
            registry=_Unlisted(),
            log=self._log(node),
            scripts=self._scripts,
        )
        self._agents.append(agent.metrics)
        process.spawn(agent.run(self._stops[node]), name=node)

    def _limits(self) -> AdmissionLimits:
        return AdmissionLimits(
            max_record_bytes=DISPATCHER.max_record_bytes,
            default_deadline_ms=int(DISPATCHER.default_deadline_s * 1000),
            max_deadline_ms=int(DISPATCHER.max_deadline_s * 1000),
            request_topic=self.names.requests(Lane.INTERACTIVE),
            bodies_topic=self.names.bodies,
            reply_topics={self.names.replies: PARTITIONS},
        )

    # The run

    def _check_streams(self) -> None:
        """What readers of the reply topic show begins the one right answer; the outcome is all of it."""
        readers: dict[str, ReplyReader] = {}
        for partition in self.kafka.broker.topics[self.names.replies].partitions:
            for entry in partition.entries:
                chunk = codec.chunks.decode(entry.value or b"")
                reader = readers.setdefault(chunk.ref, ReplyReader())
                reader.read(chunk)
                if not answer_of(chunk.id, MOST_TOKENS).startswith(reader.text):
                    self.result.violations.append(f"{chunk.ref} showed {reader.text!r}")
        for record in self.kafka.committed(self.names.outcomes):
            outcome = codec.outcomes.decode(record.value or b"")
            if outcome.kind is not OutcomeKind.COMPLETED:
                continue
            tokens = outcome.usage.completion_tokens
            if (outcome.choices[0].text, outcome.usage.prompt_tokens) != (
                answer_of(outcome.id, tokens),
                len(PROMPT_IDS),
            ):
                self.result.violations.append(f"{outcome.ref} came to {outcome}")

    async def break_things(self) -> None:
        """The seed's faults."""
        await Faults(self, self.rng, kinds=self._faults).run()

    async def run(self) -> Outcome:
        """Run the seed to its end."""
        for topic in self.names.topics:
            self.kafka.create_topic(topic, PARTITIONS)
        for name in self.dispatchers:
            self.start_dispatcher(name)
        for node in self.nodes:
            self.start_agent(node)
        async with asyncio.TaskGroup() as group:
            group.create_task(self.workload.submit_all())
            if self.rng.random() < LEASING_SHARE:
                group.create_task(self.leasing.run())
            if self._hostile_records:
                group.create_task(self.workload.submit_hostile(self._hostile_records, self._limits()))
            group.create_task(self.break_things())
        until = self._loop.time() + SETTLE_S
        while self._loop.time() < until and not self.result.violations and self.invariants.unanswered():  # noqa: ASYNC110 - virtual time
            await asyncio.sleep(0.25)
        self.invariants.check_end()
        self._check_streams()
        found, self.result.clients_gone = self.leasing.violations()
        self.result.violations += found
        self.result.resumed_tokens = sum(_count(agent.resumed_tokens) for agent in self._agents)
        self.result.handed_over = sum(
            _count(agent.endings.labels("handoff", "prefilled")) for agent in self._agents
        )
        for process in (*self.processes.values(), *self.leasing.processes):
            for failure in process.failures:
                self.result.violations.append(f"{process.name} ended by {failure!r}")
        self.result.outcomes = len(self.kafka.committed(self.names.outcomes))
        self.result.virtual_s = self._loop.time()
        for process in (*self.processes.values(), *self.leasing.processes):
            if process.is_alive:
                process.kill()
        return self.result


def simulate(
    seed: int,
    *,
    scripts: dict[str, str] | None = None,
    trace: Callable[[str], None] | None = None,
    logs: bool = False,
    hostile_records: int = 0,
    faults: tuple[str, ...] = (),
    is_split: bool = False,
    settings: Mapping[str, object] | None = None,
) -> Outcome:
    """Run one seed in virtual time; `logs` lets the processes' own logs through.

    Args:
        faults: only these kinds, by the names of `Faults`' methods; all when empty.
        hostile_records: so many records of arbitrary bytes are appended beside the clients' requests.
        is_split: every other node computes prompts only, the rest goes on from them.
        settings: of every dispatcher, beside the cluster's own.
    """

    async def main() -> Outcome:
        cluster = Cluster(
            seed,
            scripts=scripts,
            trace=trace,
            logs=logs,
            hostile_records=hostile_records,
            faults=faults,
            is_split=is_split,
            settings=settings,
        )
        return await cluster.run()

    # A run makes little garbage that only the collector finds, and much for it to look through.
    collects = gc.isenabled()
    gc.disable()
    try:
        return run(main())
    finally:
        if collects:
            gc.enable()
