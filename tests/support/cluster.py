"""A whole cluster in virtual time: two dispatchers, two agents, their engines, Redis, Kafka, clients.

Everything but the engines and the servers is production code, the Lua included. A seed decides the
workload, the network and the faults. `tests/support/invariants.py` watches every effect at the servers.
"""

from __future__ import annotations

import asyncio
import json
import random
from collections.abc import AsyncGenerator, Callable, Sequence
from dataclasses import dataclass, field

import msgspec
from prometheus_client import CollectorRegistry

from dispatcher.app import Dispatcher
from dispatcher.client.reader import ReplyReader
from dispatcher.protocol import codec
from dispatcher.protocol.assignment import Work
from dispatcher.protocol.chunk import ChoiceDelta
from dispatcher.protocol.names import Lane, Names
from dispatcher.protocol.outcome import FailureCause, OutcomeKind, Usage
from dispatcher.settings import DispatcherSettings
from dispatcher.telemetry.logging import Log
from tests.support.invariants import Expectations, Invariants, ObservedRedis
from tests.support.sim.kafka import SimKafka
from tests.support.sim.loop import current, run
from tests.support.sim.network import CALM, ROUGH, Network, Process
from workers_agent.app import Agent
from workers_agent.engines.engine import EngineFailure, Piece
from workers_agent.engines.engine_load import EngineLoad
from workers_agent.settings import AgentSettings

POOL = "sim"
MODEL = "m"
NODES = ("n1", "n2")
REQUESTS = 30
APPEND_WINDOW_S = 6.0
FAULT_WINDOW_S = 10.0
SETTLE_S = 60.0
PARTITIONS = 2

DISPATCHER = DispatcherSettings(
    pool=POOL,
    leader_ttl_s=1.0,
    heartbeat_ttl_s=2.0,
    claim_lease_s=4.0,
    unknown_model_grace_s=3.0,
    default_deadline_s=300,
)

PROMPT_IDS = (1_000_001,) * 8
MOST_TOKENS = 40

_body = msgspec.json.Decoder(dict[str, msgspec.Raw])


def answer_of(request_id: str, tokens: int) -> str:
    """The text that the simulated engines generate for a request."""
    return "".join(f"{request_id}.{number} " for number in range(tokens))


class ScriptedEngine:
    """Generates `answer_of` the request, at a seeded pace, and fails now and then."""

    def __init__(self, rng: random.Random, *, failure_share: float) -> None:
        self._rng = rng
        self._failure_share = failure_share
        self.runs: list[str] = []

    async def stream(self, work: Work, body: bytes) -> AsyncGenerator[Piece, None]:
        """Run one request."""
        rng = self._rng
        self.runs.append(work.ref)
        asked = json.loads(body)
        first, prompt = 0, asked["prompt"]
        if isinstance(prompt, list):
            assert prompt == [*PROMPT_IDS, *range(len(prompt) - len(PROMPT_IDS))], (
                "what was generated, in order"
            )
            first = len(prompt) - len(PROMPT_IDS)
        tokens = first + int(asked["max_tokens"])
        fails_at = rng.randrange(first, tokens + 1) if rng.random() < self._failure_share else -1
        await asyncio.sleep(rng.uniform(0.005, 0.2))
        step_s = rng.choice([0.002, 0.01, 0.05])
        for number in range(first, tokens):
            if number == fails_at:
                causes = [FailureCause.ENGINE_ERROR, FailureCause.TRUNCATED, FailureCause.CONNECT]
                raise EngineFailure(rng.choice(causes), "the simulated engine failed")
            await asyncio.sleep(step_s)
            delta = ChoiceDelta(text=f"{work.id}.{number} ", token_ids=(number,))
            yield Piece(choices=(delta,), tokens=1)
        usage = Usage(prompt_tokens=len(PROMPT_IDS) + first, completion_tokens=tokens - first)
        yield Piece(finish_reasons=((0, "length"),), usage=usage)

    async def prompt_ids(self, work: Work, body: bytes) -> tuple[int, ...] | None:
        """The same for every prompt."""
        return PROMPT_IDS

    async def text_of(self, work: Work, token_ids: Sequence[int]) -> str | None:
        """A token's id is its place in the answer."""
        return "".join(f"{work.id}.{number} " for number in token_ids)

    async def is_alive(self) -> bool:
        """Whether it answers."""
        return True

    async def load(self) -> EngineLoad | None:
        """It tells nothing of itself."""
        return EngineLoad()

    async def probe(self, model: str) -> bool:
        """Whether a token comes through."""
        return True

    async def close(self) -> None:
        """Nothing to close."""


@dataclass
class Outcome:
    """What became of one seed."""

    seed: int
    violations: list[str] = field(default_factory=list)
    log: list[str] = field(default_factory=list)
    outcomes: int = 0
    resumed_tokens: int = 0
    virtual_s: float = 0.0

    def explain(self) -> str:
        """The violations, and the command that replays them."""
        return "\n".join(
            [
                *self.violations[:5],
                f"replay: uv run python -m tests.simulation {self.seed}",
            ]
        )


class Cluster:
    """One seed's cluster."""

    def __init__(
        self, seed: int, *, scripts: dict[str, str] | None = None, trace: Callable[[str], None] | None = None
    ) -> None:
        self.rng = random.Random(seed)
        self.result = Outcome(seed=seed)
        self.names = Names(POOL)
        self._scripts = scripts or {}
        loop = current()
        profile = CALM if self.rng.random() < 0.3 else ROUGH
        self.network = Network(random.Random(seed + 1), loop, profile, trace=trace)
        self.kafka = SimKafka(self.network)
        self.expectations = Expectations()
        self.redis = ObservedRedis(self.network)
        self.invariants = Invariants(
            self.names,
            NODES,
            self.redis,
            self.kafka,
            self.expectations,
            self.result.violations,
            scripts=self._scripts,
        )
        self.redis.observer = self.invariants.after_effect
        self._trace = trace
        self._agents: list[CollectorRegistry] = []
        self._ids = 0
        self.processes: dict[str, Process] = {}
        self._loop = loop

    def note(self, text: str) -> None:
        """Write a line of the trace."""
        if self._trace is not None:
            self._trace(f"{self._loop.time():.6f} -- {text}")

    def _new_id(self) -> str:
        self._ids += 1
        return f"id{self._ids}"

    def _log(self, name: str) -> Log:
        return Log(process=name)

    def start_dispatcher(self, name: str) -> None:
        """Start a dispatcher process."""
        process = self.network.process(name)
        self.processes[name] = process
        dispatcher = Dispatcher(
            DISPATCHER,
            redis=lambda: self.redis.client(process),
            kafka=self.kafka.clients(process),
            clock=process.clock,
            new_id=self._new_id,
            rng=random.Random(self.rng.random()),
            registry=CollectorRegistry(),
            log=self._log(name),
            scripts=self._scripts,
        )
        process.spawn(dispatcher.run(), name=name)

    def _registry(self) -> CollectorRegistry:
        registry = CollectorRegistry()
        self._agents.append(registry)
        return registry

    def start_agent(self, node: str) -> None:
        """Start an agent process with its engine."""
        process = self.network.process(f"agent-{node}")
        self.processes[node] = process
        agent = Agent(
            AgentSettings(
                pool=POOL,
                node=node,
                models=MODEL,
                max_running=4,
                heartbeat_ttl_s=2.0,
                claim_lease_s=4.0,
                engine_url="http://simulated",
            ),
            redis=lambda: self.redis.client(process),
            kafka=self.kafka.clients(process),
            engine=ScriptedEngine(random.Random(self.rng.random()), failure_share=0.1),
            clock=process.clock,
            new_id=self._new_id,
            registry=self._registry(),
            log=self._log(node),
            scripts=self._scripts,
        )
        process.spawn(agent.run(asyncio.Event()), name=node)

    # The workload

    def append(self, request: dict[str, object], *, lane: Lane = Lane.INTERACTIVE) -> None:
        """Append one request and expect what it should come to."""
        value = json.dumps(request).encode()
        tp = self.kafka.append(self.names.requests(lane), value, str(request.get("id", "")).encode())
        offset = self.kafka.ends(tp.topic)[tp.partition] - 1
        self.expectations.add(f"{lane.value}{tp.partition}_{offset}", request)
        self.note(f"append {lane.value}{tp.partition}_{offset} {request.get('id')}")

    async def submit_all(self) -> None:
        """The clients' work over the append window."""
        rng = self.rng
        for number in range(REQUESTS):
            await asyncio.sleep(rng.expovariate(REQUESTS / APPEND_WINDOW_S))
            request: dict[str, object] = {
                "id": f"r{number}",
                "model": MODEL,
                "endpoint": "/v1/completions",
                "priority": rng.randrange(1, 101),
                "body": {
                    "prompt": "x" * rng.randrange(1, 400),
                    "max_tokens": rng.choice([1, 3, 10, MOST_TOKENS]),
                },
            }
            lane = Lane.BATCH if rng.random() < 0.15 else Lane.INTERACTIVE
            kind = rng.random()
            if kind < 0.06:
                request["model"] = "nobody-serves-this"
            elif kind < 0.10:
                request["deadline_ms"] = rng.choice([1, 200, 1500])
            elif kind < 0.13:
                request["priority"] = "high"
            self.append(request, lane=lane)
            after = rng.random()
            if after < 0.10 and kind >= 0.13:
                self.append(request, lane=lane)
            elif after < 0.16 and kind >= 0.13:
                self.append({**request, "body": {"prompt": "other", "max_tokens": 2}}, lane=lane)
            elif after < 0.22:
                cancel = json.dumps({"id": request["id"]}).encode()
                self.kafka.append(self.names.cancels, cancel, str(request["id"]).encode())
            elif after < 0.24:
                self.kafka.append(self.names.cancels, json.dumps({"id": f"r{number + 1}"}).encode(), b"x")

    # Faults

    async def break_things(self) -> None:
        """The seed's faults, one after the other over the fault window."""
        rng = self.rng
        faults: Sequence[Callable[[], None]] = (
            self._kill_dispatcher,
            self._freeze_dispatcher,
            self._kill_agent,
            self._freeze_agent,
            self._restart_redis,
            self._freeze_redis,
            self._lose_redis,
            self._rewind_redis,
            self._break_kafka,
        )
        for _ in range(rng.randrange(1, 6)):
            await asyncio.sleep(rng.uniform(0.1, FAULT_WINDOW_S / 4))
            rng.choice(faults)()
            self.invariants.check_places("after a fault")

    def _kill_dispatcher(self) -> None:
        self._kill(self.rng.choice(["d1", "d2"]), self.start_dispatcher)

    def _kill_agent(self) -> None:
        self._kill(self.rng.choice(NODES), self.start_agent)

    def _kill(self, name: str, start: Callable[[str], None]) -> None:
        self.note(f"kill {name}")
        self.processes[name].kill()
        self._loop.call_later(self.rng.choice([0.1, 1.0, 5.0]), start, name)

    def _freeze_dispatcher(self) -> None:
        self._freeze(self.rng.choice(["d1", "d2"]))

    def _freeze_agent(self) -> None:
        self._freeze(self.rng.choice(NODES))

    def _freeze(self, name: str) -> None:
        seconds = self.rng.choice([0.3, 1.5, 3.0, 6.0])
        process = self.processes[name]
        if process.is_alive and not process.is_frozen:
            self.note(f"freeze {name} for {seconds}")
            process.freeze(seconds)

    def _restart_redis(self) -> None:
        self.note("restart redis")
        self.redis.restart(down_s=self.rng.choice([0.1, 1.0, 3.0]))

    def _freeze_redis(self) -> None:
        self.note("freeze redis")
        self.redis.freeze(self.rng.choice([0.5, 3.0]))

    def _lose_redis(self) -> None:
        self.note("lose redis")
        self.redis.restart(keep_data=False, down_s=self.rng.choice([0.1, 1.0]))

    def _rewind_redis(self) -> None:
        self.note("rewind redis")
        self.redis.restart(lose_last_s=self.rng.choice([0.2, 1.0]), down_s=0.2)

    def _break_kafka(self) -> None:
        self.note("kafka down")
        self.kafka.down(self.rng.choice([0.2, 2.0]))

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

    async def run(self) -> Outcome:
        """Run the seed to its end."""
        for topic in self.names.topics:
            self.kafka.create_topic(topic, PARTITIONS)
        for name in ("d1", "d2"):
            self.start_dispatcher(name)
        for node in NODES:
            self.start_agent(node)
        async with asyncio.TaskGroup() as group:
            group.create_task(self.submit_all())
            group.create_task(self.break_things())
        until = self._loop.time() + SETTLE_S
        while self._loop.time() < until and self.invariants.unanswered():  # noqa: ASYNC110 - virtual time
            await asyncio.sleep(0.25)
        self.invariants.check_end()
        self._check_streams()
        self.result.resumed_tokens = sum(
            int(registry.get_sample_value("flexlb_agent_resumed_tokens_total") or 0)
            for registry in self._agents
        )
        for process in self.processes.values():
            for failure in process.failures:
                self.result.violations.append(f"{process.name} ended by {failure!r}")
        self.result.outcomes = len(self.kafka.committed(self.names.outcomes))
        self.result.virtual_s = self._loop.time()
        for process in self.processes.values():
            if process.is_alive:
                process.kill()
        return self.result


def simulate(
    seed: int, *, scripts: dict[str, str] | None = None, trace: Callable[[str], None] | None = None
) -> Outcome:
    """Run one seed in virtual time."""

    async def main() -> Outcome:
        return await Cluster(seed, scripts=scripts, trace=trace).run()

    return run(main())
