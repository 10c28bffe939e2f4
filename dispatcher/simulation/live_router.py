"""The live dispatcher's decisions in a simulated fleet: its own ledger, window, scheduler and index.

Only what surrounds them is modelled: how long records, assignments, reports and block events travel
(`LiveTiming`), and an agent's side of a node: it claims while it has slots, reports what it holds at once but
no faster than its interval, and measures prefills from first tokens. Nothing is shed, nothing fails.

Where prefill and decode are apart a computed prompt's request comes back to the window with its hand-off, and
is bound to a decode node then; the scheduler may also have a decode node make all of a request.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import msgspec
from prometheus_client import CollectorRegistry

from dispatcher.backends.clock import Clock
from dispatcher.protocol.assignment import Envelope
from dispatcher.protocol.explanation import Explanation
from dispatcher.protocol.handoff import KV_LEASE_MS, Handoff, Stage
from dispatcher.protocol.names import Attempt, JobId, Lane, Names, Ref
from dispatcher.protocol.node import Medium, NodeIdentity, NodeReport, Role
from dispatcher.scheduling.batches import Batches
from dispatcher.scheduling.choice import SchedulingParameters
from dispatcher.scheduling.explanation import explain
from dispatcher.scheduling.fleet import Fleet, NodeState
from dispatcher.scheduling.prefix_index import PrefixIndex
from dispatcher.scheduling.scheduler import Scheduler
from dispatcher.scheduling.window import Waiting
from dispatcher.services.state import Bound, LeaderState
from dispatcher.simulation.fleet import FleetSimulation
from dispatcher.simulation.policies.base import Arrival
from dispatcher.telemetry.logging import Log
from dispatcher.telemetry.metrics import DispatcherMetrics

MODEL = "sim"
DEADLINE_MS = 600_000
HELD = msgspec.Raw(b"{}")
"""Parameters of an engine that holds a prompt: what they say is nobody's business but the other engine's."""
SAME_STEP_S = 0.001
"""First tokens this close came from one step: nothing can be told of their prefills (the agent's rule)."""

KNOWN_AFTER = 1_000
"""Prefills that a node is taken to have shown whose speed is told: more change little."""


@dataclass(frozen=True, kw_only=True)
class LiveTiming:
    """How long things travel in the live system, seconds: `docs/measurements.md`, idle servers, rounded up.

    `intake_s` from a client to the window, `assign_s` from a choice to the agent's hands, `report_s` from an
    agent to the leader's fleet, `blocks_s` from a cache's change to the index, `outcome_s` from an answer's
    end to the leader's ledger, `handoff_s` from a computed prompt back to the window. An agent reports no
    faster than each `report_interval_s` (for a large fleet nodes / 5,000 s), and each `heartbeat_s` while it
    holds something; KV use is `heartbeat_s` old at most. Rounds of choices are `round_s` apart at least.
    """

    intake_s: float = 0.004
    assign_s: float = 0.003
    report_s: float = 0.002
    report_interval_s: float = 0.02
    blocks_s: float = 0.022
    outcome_s: float = 0.008
    handoff_s: float = 0.005
    heartbeat_s: float = 1.0
    round_s: float = 0.001
    batch: int = 128


@dataclass(kw_only=True)
class _Held:
    """An attempt in an agent's hands."""

    queued_tokens: int
    cost_tokens: int
    submitted_s: float
    stage: Stage
    prefill_s: float = 0.0
    cached_tokens: int = 0


@dataclass(kw_only=True)
class _Agent:
    """One node's agent."""

    state: NodeState
    max_running: int
    queue: deque[tuple[Arrival, int, int, int, Stage]] = field(default_factory=deque)
    held: dict[int, _Held] = field(default_factory=dict)
    assigned: int = 0
    seen: int = 0
    reports: int = 0
    reported_s: float = float("-inf")
    is_due: bool = False
    kv_used_tokens: int = 0
    looked_s: float = float("-inf")
    last_token_s: float = float("-inf")
    last_token: _Held | None = None


class LiveRouter:
    """The leader and the agents of one simulated pool.

    Args:
        policy: one of the live scheduler's.
        knows_speeds: every node's predictor is told how slow its node is beside the others, and keeps to it:
            no dispatcher knows that, it shows what learning it costs.
    """

    wants_blocks = True

    def __init__(
        self,
        policy: str = "prefill_cost",
        *,
        parameters: SchedulingParameters | None = None,
        timing: LiveTiming | None = None,
        knows_speeds: bool = False,
    ) -> None:
        self.explanations: list[Explanation] = []
        self._explained: int | None = None
        self._knows_speeds = knows_speeds
        self._policy = policy
        self._parameters = parameters
        self._timing = timing if timing is not None else LiveTiming()
        self._round_due = False
        self._rounded_s = float("-inf")
        self._next_batch_s: float | None = None

    def start(self, fleet: FleetSimulation) -> None:
        """Make the leader's ledger, and register the nodes."""
        self._sim = fleet
        block = fleet.block_tokens
        clock = Clock(monotonic=lambda: fleet.now_s, epoch_s=lambda: fleet.now_s)
        self.state = LeaderState(
            names=Names(),
            fleet=Fleet(),
            index=PrefixIndex(),
            clock=clock,
            rng=fleet.rng,
            metrics=DispatcherMetrics(CollectorRegistry()),
            log=Log(),
        )
        parameters = replace(
            self._parameters if self._parameters is not None else SchedulingParameters(), block_size=block
        )
        self._batches: Batches[tuple[Envelope, int, int, Stage]] = Batches(
            wait_s=parameters.batch_wait_s, size=parameters.batch_size
        )
        self._scheduler = Scheduler(
            self.state.fleet,
            self.state.index,
            policy=self._policy,
            parameters=parameters,
            rng=fleet.rng,
            now_s=clock.monotonic,
            batches=self._batches,
        )
        self.state.window.longer_ms = self._scheduler.longer_ms
        outputs = sorted(turn.output_tokens for session in fleet.workload.sessions for turn in session)
        # What clients allow: no router knows how long an answer will be.
        self._max_tokens = outputs[int(0.99 * (len(outputs) - 1))]
        profile = fleet.profile
        self._interval_s = max(self._timing.report_interval_s, len(fleet.engines) / 5_000)
        self._agents = []
        for number in range(len(fleet.engines)):
            identity = NodeIdentity(
                node=f"n{number}",
                incarnation="1",
                role=_role(fleet, number),
                models=(MODEL,),
                max_running=profile.max_running,
                max_model_len=profile.kv_tokens,
                kv_total_tokens=profile.kv_tokens,
                engine_block_size=profile.block_tokens,
                routing_block_size=block,
            )
            node = self.state.fleet.admit(identity, 0.0)
            node.admitted = True
            self._agents.append(_Agent(state=node, max_running=profile.max_running))
        # Beside the mean: scales and shape are determined only together.
        mean = sum(1 / speed for speed in fleet.speeds) / len(fleet.speeds)
        self._scales = [1 / speed / mean for speed in fleet.speeds]
        if self._knows_speeds:
            for agent, scale in zip(self._agents, self._scales, strict=True):
                agent.state.predictor.scale = scale
                # A node's first prefills would be taken for its scale, and the shape learn nothing of them.
                agent.state.predictor.observations = KNOWN_AFTER
        self._numbers = {agent.state.name: number for number, agent in enumerate(self._agents)}
        self._arrivals: dict[str, Arrival] = {}

    # The leader

    def explain(self, number: int) -> None:
        """Keep what the decisions about one request were made of, in `explanations`."""
        self._explained = number

    def arrive(self, arrival: Arrival) -> None:
        """Append a record."""
        self._sim.call_at(self._sim.now_s + self._timing.intake_s, self._enter, arrival)

    def _enter(self, arrival: Arrival) -> None:
        ref = Ref(Lane.INTERACTIVE, 0, arrival.number)
        appended_ms = int(arrival.at_s * 1000)
        envelope = Envelope(
            ref=str(ref),
            id=str(arrival.number),
            model=MODEL,
            tenant=arrival.tenant,
            priority=arrival.priority,
            prompt_tokens=arrival.prompt_tokens,
            max_tokens=self._max_tokens,
            tokens_exact=True,
            block_size=self._sim.block_tokens,
            block_hashes=tuple([format(block, "016x") for block in arrival.blocks]),
            appended_ms=appended_ms,
            deadline_at_ms=appended_ms
            + (DEADLINE_MS if arrival.deadline_s is None else int(1000 * arrival.deadline_s)),
        )
        self._arrivals[envelope.ref] = arrival
        self.state.enter(Waiting(ref=ref, envelope=envelope, entered_ms=self.state.clock.now_ms()))
        self._wake()

    def _wake(self) -> None:
        if not self._round_due and len(self.state.window):
            self._round_due = True
            self._sim.call_at(max(self._sim.now_s, self._rounded_s + self._timing.round_s), self._round)

    def _round(self) -> None:
        """Bind what can be bound now, as the dispatch service does."""
        self._round_due = False
        self._rounded_s = self._sim.now_s
        state = self.state
        bound = 0
        round = state.window.begin_round()
        while bound < self._timing.batch:
            found = state.window.choose(self._scheduler, round, state.clock.now_ms())
            if found is None:
                break
            waiting, choice = found
            name = choice.node.name
            is_decode = choice.stage is Stage.DECODE
            job = JobId(state.names.pool, name, waiting.ref, Attempt(1, 2 if is_decode else 1))
            if waiting.ref.offset == self._explained:
                self.explanations.append(
                    explain(
                        self._scheduler,
                        waiting,
                        choice,
                        round.planned,
                        waits=round.waits_of(waiting.envelope),
                        attempt=job.attempt,
                        now_ms=state.clock.now_ms(),
                    )
                )
            state.bind(
                waiting.envelope.ref,
                Bound(
                    envelope=waiting.envelope,
                    job=job,
                    failures=0,
                    excluded=(),
                    hit_tokens=choice.hit_tokens,
                    stage=choice.stage,
                    handoff=waiting.handoff if is_decode else None,
                ),
                uncached_tokens=choice.uncached_tokens,
                prefill_s=choice.prefill_s,
            )
            one = (waiting.envelope, self._numbers[name], choice.uncached_tokens, choice.stage)
            self._batches.add(name, one, self._sim.now_s, is_alone=is_decode)
            bound += 1
        state.window.end_round(round)
        self._hand_over()
        if bound:
            self._wake()

    def _hand_over(self) -> None:
        """Send the batches that are due on their way, and come again for the next."""
        sim, batches = self._sim, self._batches
        for batch in batches.take_due(sim.now_s, most=len(batches)):
            sent = []
            for envelope, node, uncached_tokens, stage in batch:
                agent = self._agents[node]
                if batches.is_on:
                    self.state.fleet.hand_over(agent.state.name, envelope.ref, sim.now_s)
                agent.assigned += 1
                sent.append((envelope, agent.assigned, uncached_tokens, stage))
            sim.call_at(sim.now_s + self._timing.assign_s, self._assigned, node, sent)
        at_s = batches.next_at_s
        if at_s is not None and at_s != self._next_batch_s:
            self._next_batch_s = at_s
            sim.call_at(at_s, self._hand_over)

    # The agents

    def _assigned(self, node: int, sent: Sequence[tuple[Envelope, int, int, Stage]]) -> None:
        agent = self._agents[node]
        for envelope, number, uncached_tokens, stage in sent:
            self.state.fleet.note_number(agent.state.name, envelope.ref, number)
            arrival = self._arrivals[envelope.ref]
            agent.queue.append((arrival, number, uncached_tokens, envelope.cost_tokens, stage))
        self._claim(node)

    def _claim(self, node: int) -> None:
        agent = self._agents[node]
        while agent.queue and len(agent.held) < agent.max_running:
            arrival, number, uncached_tokens, cost_tokens, stage = agent.queue.popleft()
            agent.held[arrival.number] = _Held(
                queued_tokens=uncached_tokens,
                cost_tokens=cost_tokens,
                submitted_s=self._sim.now_s,
                stage=stage,
            )
            agent.seen = max(agent.seen, number)
            self._changed(node)
            if stage is Stage.DECODE:
                self._sim.hand_over(arrival, node)
            else:
                # What is handed over together is admitted together, as a batch of the original's is.
                is_followed = bool(agent.queue) and len(agent.held) < agent.max_running
                self._sim.send(
                    arrival, node, is_followed=is_followed and agent.queue[0][4] is not Stage.DECODE
                )

    def _changed(self, node: int) -> None:
        agent = self._agents[node]
        if not agent.is_due:
            agent.is_due = True
            self._sim.call_at(max(self._sim.now_s, agent.reported_s + self._interval_s), self._report, node)

    def _beat(self, node: int, reports: int) -> None:
        agent = self._agents[node]
        if agent.reports == reports and not agent.is_due:
            self._report(node)

    def _report(self, node: int) -> None:
        agent, now_s = self._agents[node], self._sim.now_s
        agent.is_due = False
        agent.reported_s = now_s
        agent.reports += 1
        profile = self._sim.profile
        engine = self._sim.engines[node]
        if now_s - agent.looked_s >= self._timing.heartbeat_s:
            agent.looked_s = now_s
            agent.kv_used_tokens = engine.cache.used * profile.block_tokens
        held = agent.held.values()
        report = NodeReport(
            node=agent.state.name,
            incarnation="1",
            sequence=agent.reports,
            running=len(held),
            waiting=sum(1 for one in held if one.queued_tokens),
            held_tokens=sum(one.cost_tokens for one in held),
            queued_uncached_tokens=sum(one.queued_tokens for one in held),
            kv_used_tokens=agent.kv_used_tokens,
            kv_total_tokens=profile.kv_tokens,
            seen_seq=agent.seen,
        )
        delay_s = self._timing.report_s + self._sim.conditions.report_delay_s
        self._sim.call_at(now_s + delay_s, self._hear, agent.state, report)
        if held:
            self._sim.call_at(now_s + self._timing.heartbeat_s, self._beat, node, agent.reports)

    def _hear(self, node: NodeState, report: NodeReport) -> None:
        # Nobody falls silent here: healthy time stands still, and idle nodes need no heartbeats.
        node.hear(report, 0.0, self._sim.now_s)
        self._wake()

    def prefilled(self, arrival: Arrival, node: int, cached_tokens: int) -> None:
        """Measure the prefill, give the slot back, and let the leader bind the request to a decode node."""
        self._measure(arrival, node, cached_tokens)
        agent = self._agents[node]
        held = agent.held.pop(arrival.number)
        self._changed(node)
        self._claim(node)
        handoff = Handoff(
            node=agent.state.name,
            kv_transfer_params=HELD,
            expires_ms=self.state.clock.now_ms() + KV_LEASE_MS,
            prompt_tokens=arrival.prompt_tokens,
            cached_tokens=cached_tokens,
        )
        self._sim.call_at(
            self._sim.now_s + self._timing.handoff_s, self._handed_off, arrival, node, held, handoff
        )

    def _handed_off(self, arrival: Arrival, node: int, held: _Held, handoff: Handoff) -> None:
        ref = Ref(Lane.INTERACTIVE, 0, arrival.number)
        bound = self.state.unbind(str(ref))
        assert bound is not None, "a prompt was computed where its request was bound"
        self._learn(arrival, node, held)
        self.state.enter(
            Waiting(
                ref=ref,
                envelope=bound.envelope,
                from_pending=True,
                handoff=handoff,
                entered_ms=self.state.clock.now_ms(),
            )
        )
        self._wake()

    def first_token(self, arrival: Arrival, node: int, cached_tokens: int) -> None:
        """Measure the prefill as the agent does, and report."""
        self._measure(arrival, node, cached_tokens)
        self._changed(node)

    def _measure(self, arrival: Arrival, node: int, cached_tokens: int) -> None:
        agent, now_s = self._agents[node], self._sim.now_s
        held = agent.held[arrival.number]
        held.queued_tokens, held.cached_tokens = 0, cached_tokens
        if now_s - agent.last_token_s < SAME_STEP_S:
            if agent.last_token is not None:
                agent.last_token.prefill_s = 0.0
        elif held.stage is not Stage.DECODE:
            held.prefill_s = now_s - max(held.submitted_s, agent.last_token_s)
        agent.last_token_s, agent.last_token = now_s, held

    def finished(self, arrival: Arrival, node: int) -> None:
        """Give the slot back; the leader hears of it with the outcome."""
        agent = self._agents[node]
        held = agent.held.pop(arrival.number)
        self._changed(node)
        self._claim(node)
        self._sim.call_at(self._sim.now_s + self._timing.outcome_s, self._ended, arrival, node, held)

    def _ended(self, arrival: Arrival, node: int, held: _Held) -> None:
        ref = str(Ref(Lane.INTERACTIVE, 0, arrival.number))
        self.state.unbind(ref, answered=True)
        self.state.forget(ref)
        del self._arrivals[ref]
        self._agents[node].state.answers.observe(arrival.output_tokens)
        self._learn(arrival, node, held)
        self._wake()

    def _learn(self, arrival: Arrival, node: int, held: _Held) -> None:
        if held.prefill_s:
            predictor = self._agents[node].state.predictor
            predictor.observe(arrival.prompt_tokens - held.cached_tokens, held.cached_tokens, held.prefill_s)
            if self._knows_speeds:
                predictor.scale = self._scales[node]

    # Cache views

    def before_change(self, node: int) -> None:
        """Nobody asks."""

    def blocks_changed(self, node: int, stored: Sequence[int], removed: Sequence[int]) -> None:
        """Publish a change of a node's view."""
        self._sim.call_at(
            self._sim.now_s + self._timing.blocks_s,
            self._follow,
            self._agents[node].state.name,
            [block.to_bytes(8, "big") for block in stored],
            [block.to_bytes(8, "big") for block in removed],
        )

    def _follow(self, name: str, stored: list[bytes], removed: list[bytes]) -> None:
        if stored:
            self.state.index.store(name, Medium.GPU, stored)
        if removed:
            self.state.index.remove(name, Medium.GPU, removed)


def _role(fleet: FleetSimulation, node: int) -> Role:
    if node in fleet.prefill_nodes:
        return Role.PREFILL
    return Role.DECODE if node in fleet.decode_nodes else Role.FUSED
