"""A fleet of engines and its router in virtual time: what each request got, and how the load lay.

One heap of events, ordered by time and then by who came first, so that a seed says everything. A router is
told of arrivals, tokens and block events, and sends each request to an engine, now or later: routing
policies of the field bind at once (`PolicyRouter`), ours is the live code (`live_router`).

Where prefill and decode are apart, a request sent to a prefill node only computes its prompt and one token,
which is dropped; its router then names the decode node (`hand_over`), which reads the prompt from there
(`handover`) and makes the answer, first token included. A request sent to a decode node is all made there.
"""

from __future__ import annotations

import heapq
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from math import inf
from random import Random
from typing import Protocol

from dispatcher.simulation.conditions import Conditions
from dispatcher.simulation.fleet_workload import FleetWorkload, Turn
from dispatcher.simulation.handover import LEASE_S, Handover
from dispatcher.simulation.jumping_engine import JumpingEngine
from dispatcher.simulation.policies.base import Arrival
from dispatcher.simulation.profile import Profile


@dataclass(frozen=True, kw_only=True)
class FleetResult:
    """One run. Lists are by request in the order of arrival.

    `ttft_s` is seconds to the first token, infinite when no answer came; `tpot_s` those per token after it,
    0 of one token. Arrivals lie within the first `arrivals_s`, everything within `span_s`.
    """

    ttft_s: Sequence[float]
    tpot_s: Sequence[float]
    prompt_tokens: Sequence[int]
    cached_tokens: int
    busy_s: Sequence[float]
    preemptions: int
    arrivals_s: float
    span_s: float
    wall_s: float


def coarse(profile: Profile, block_tokens: int) -> Profile:
    """The profile with another block size and about as large a cache."""
    return replace(profile, block_tokens=block_tokens, kv_blocks=max(1, profile.kv_tokens // block_tokens))


class Router(Protocol):
    """Decides where requests go, by `FleetSimulation.send` and `hand_over`."""

    def start(self, fleet: FleetSimulation) -> None:
        """Begin, before all else."""

    def arrive(self, arrival: Arrival) -> None:
        """Take a request."""

    def prefilled(self, arrival: Arrival, node: int, cached_tokens: int) -> None:
        """A prefill node has a request's prompt computed: hand it over to a decode node, now or later."""

    def first_token(self, arrival: Arrival, node: int, cached_tokens: int) -> None:
        """A request's first token was made where its answer is."""

    def finished(self, arrival: Arrival, node: int) -> None:
        """A request's answer ended."""

    def before_change(self, node: int) -> None:
        """A node's load is about to change."""

    def blocks_changed(self, node: int, stored: Sequence[int], removed: Sequence[int]) -> None:
        """A node's cache changed."""

    @property
    def wants_blocks(self) -> bool:
        """Whether `blocks_changed` is to be called."""


class FleetSimulation:
    """`nodes` engines, one router, one workload at `rate` times its own pace.

    Args:
        decode: so many of the nodes, the last ones, are decode nodes and all others prefill nodes; 0 where
            every node does both.
    Raises:
        ValueError: as many decode nodes as nodes.
        profile: of a nominal node, with blocks of the workload's size (`coarse`); what routers may know.
        conditions: what is amiss, nothing when absent.
    """

    def __init__(
        self,
        workload: FleetWorkload,
        router: Router,
        *,
        nodes: int,
        profile: Profile,
        rate: float,
        seed: int,
        decode: int = 0,
        conditions: Conditions | None = None,
    ) -> None:
        if not 0 <= decode < nodes:
            raise ValueError(f"decode: expected 0 to {nodes - 1} of {nodes} nodes, seen {decode}")
        self.profile = profile
        self.prefill_nodes = range(nodes - decode) if decode else range(0)
        self.decode_nodes = range(nodes - decode, nodes) if decode else range(0)
        self._handover = Handover(nodes, profile.kv_token_bytes)
        self._handed: set[int] = set()
        self.conditions = conditions if conditions is not None else Conditions()
        self.block_tokens = workload.block_tokens
        self.speeds = self.conditions.speeds(nodes, seed)
        engine = self.conditions.engine(profile, seed)
        self.engines = [JumpingEngine(engine.at_speed(speed)) for speed in self.speeds]
        self.now_s = 0.0
        self.rng = Random(seed)
        self._losses = self.conditions.losses(seed)
        self.unfinished = workload.requests
        self.workload = workload
        self._router = router
        self._rate = rate
        self._events: list[tuple[float, int, Callable[..., None], tuple[object, ...]]] = []
        self._numbers = 0
        self._at: dict[int, tuple[Arrival, int]] = {}
        self._turns: dict[int, tuple[Sequence[Turn], int]] = {}
        self._woken: list[float | None] = [None] * nodes
        self._arrived = self._sessions = 0
        self._last_arrival_s = 0.0
        self._ttft: list[float] = [inf] * self.unfinished
        self._tpot: list[float] = [0.0] * self.unfinished
        self._first: dict[int, float] = {}
        self._prompts = [0] * self.unfinished
        self._cached = 0

    def call_at(self, at_s: float, call: Callable[..., None], *arguments: object) -> None:
        """Call at a time; at equal times who asked first is called first."""
        self._numbers += 1
        heapq.heappush(self._events, (at_s, self._numbers, call, arguments))

    def send(self, arrival: Arrival, node: int, *, after_s: float = 0.0, is_followed: bool = False) -> None:
        """Send a request to a node, now or in `after_s` seconds.

        Args:
            is_followed: another is sent there at the same time; the engine sees both at once.
        """
        after_s += self.profile.request_s
        if after_s > 0:
            self.call_at(self.now_s + after_s, self._submit, arrival, node, is_followed)
        else:
            self._submit(arrival, node, is_followed)

    def hand_over(self, arrival: Arrival, node: int, *, after_s: float = 0.0) -> None:
        """Send a request whose prompt a prefill node holds to a decode node, now or in `after_s` seconds."""
        after_s += self.profile.request_s
        if after_s > 0:
            self.call_at(self.now_s + after_s, self._receive, arrival, node)
        else:
            self._receive(arrival, node)

    def refuse(self, arrival: Arrival) -> None:
        """End a request without an answer; the turns that would have followed never come."""
        session, place = self._turns.pop(arrival.number)
        self.unfinished -= len(session) - place

    def run(self) -> FleetResult:
        """Run until every request has its end, or nothing is left to happen."""
        began_s = time.perf_counter()
        self._router.start(self)
        self._open(iter(sorted(self.workload.sessions, key=lambda session: session[0].pause_s)))
        events = self._events
        while self.unfinished and events:
            self.now_s, _, call, arguments = heapq.heappop(events)
            call(*arguments)
        return FleetResult(
            ttft_s=self._ttft,
            tpot_s=self._tpot,
            prompt_tokens=self._prompts,
            cached_tokens=self._cached,
            busy_s=[engine.busy_s for engine in self.engines],
            preemptions=sum(engine.preemptions for engine in self.engines),
            arrivals_s=self._last_arrival_s,
            span_s=self.now_s,
            wall_s=time.perf_counter() - began_s,
        )

    # Arrivals

    def _open(self, following: Iterator[Sequence[Turn]]) -> None:
        session = next(following, None)
        if session is not None:
            at_s = max(self.now_s, session[0].pause_s / self._rate)
            self.call_at(at_s, self._begin, session, following)

    def _begin(self, session: Sequence[Turn], following: Iterator[Sequence[Turn]]) -> None:
        self._sessions += 1
        self._arrive(session, 0, f"s{self._sessions}" if len(session) > 1 else "")
        self._open(following)

    def _arrive(self, session: Sequence[Turn], place: int, name: str) -> None:
        number = self._arrived
        self._arrived += 1
        turn = session[place]
        self._last_arrival_s = self.now_s
        self._prompts[number] = turn.prompt_tokens
        arrival = Arrival(
            number,
            self.now_s,
            turn.prompt_tokens,
            turn.output_tokens,
            turn.blocks,
            session=name,
            priority=turn.priority,
            deadline_s=turn.deadline_s,
            tenant=turn.tenant,
        )
        self._turns[number] = (session, place)
        self._router.arrive(arrival)

    # Engines

    def _submit(self, arrival: Arrival, node: int, is_followed: bool = False) -> None:
        engine = self.engines[node]
        if arrival.number in self._handed:
            # It begins anew: what was held of it is held for nobody.
            self._release(arrival.number, self._handover.give_up(arrival.number))
        self._at[arrival.number] = (arrival, node)
        self._router.before_change(node)
        is_prefill = node in self.prefill_nodes
        engine.submit(
            arrival.number,
            arrival.prompt_tokens,
            1 if is_prefill else arrival.output_tokens,
            arrival.blocks,
            self.now_s,
            keeps=is_prefill,
            is_followed=is_followed,
        )
        self._wake(node)

    def _prefilled(self, arrival: Arrival, node: int, cached_tokens: int) -> None:
        del self._at[arrival.number]
        if arrival.number not in self._handed:
            self._handed.add(arrival.number)
            self._cached += cached_tokens
        self._handover.hold(arrival.number, node, self.now_s)
        self.call_at(self.now_s + LEASE_S, self._expire, arrival.number, self.now_s)
        self._router.prefilled(arrival, node, cached_tokens)

    def _expire(self, number: int, since_s: float) -> None:
        self._release(number, self._handover.expire(number, since_s))

    def _receive(self, arrival: Arrival, node: int) -> None:
        if not self._handover.claim(arrival.number):
            # The lease ended on the way: the decode node computes the prompt itself.
            self._submit(arrival, node)
            return
        self._at[arrival.number] = (arrival, node)
        self._router.before_change(node)
        self.engines[node].submit(
            arrival.number,
            arrival.prompt_tokens,
            arrival.output_tokens,
            arrival.blocks,
            self.now_s,
            is_remote=True,
        )
        self._wake(node)

    def _read(self, number: int, node: int) -> None:
        """A prompt has come to a decode node."""
        self._router.before_change(node)
        self.engines[node].pulled(number, self.now_s)
        self._wake(node)
        self._release(number, self._handover.give_up(number))

    def _release(self, number: int, source: int | None) -> None:
        if source is None:
            return
        self._router.before_change(source)
        self.engines[source].release(number, self.now_s)
        self._wake(source)

    def _wake(self, node: int) -> None:
        engine = self.engines[node]
        if engine.pulls:
            for number, tokens in engine.take_pulls():
                self.call_at(self._handover.read(number, node, tokens, self.now_s), self._read, number, node)
        due = engine.due
        if due is not None and due != self._woken[node]:
            self._woken[node] = due
            self.call_at(due, self._advance, node)

    def _advance(self, node: int) -> None:
        engine = self.engines[node]
        if engine.due != self.now_s:
            # A jump that was cut short since.
            return
        self._woken[node] = None
        router = self._router
        router.before_change(node)
        made = engine.advance()
        if router.wants_blocks:
            stored, removed = self._left(engine.take_stored()), self._left(engine.take_removed())
            if stored or removed:
                router.blocks_changed(node, stored, removed)
        elif engine.stored or engine.cache.events:
            engine.stored.clear()
            engine.cache.events.clear()
        for key, is_first, is_last, cached_tokens in made:
            arrival, _ = self._at[key]
            if node in self.prefill_nodes:
                self._prefilled(arrival, node, cached_tokens)
                continue
            if is_first:
                self._first[key] = self.now_s
                self._ttft[key] = self.now_s - arrival.at_s
                if key in self._handed:
                    # What was cached counted where its prompt was computed.
                    self._handed.discard(key)
                else:
                    self._cached += cached_tokens
                router.first_token(arrival, node, cached_tokens)
            if is_last:
                self._finish(arrival, node)
        self._wake(node)

    def _left(self, event: list[int]) -> list[int]:
        """A block event's blocks, or none when it is lost."""
        share = self.conditions.dropped_kv_events
        return [] if event and share and self._losses.random() < share else event

    def _finish(self, arrival: Arrival, node: int) -> None:
        number = arrival.number
        del self._at[number]
        first_s = self._first.pop(number)
        if arrival.output_tokens > 1:
            self._tpot[number] = (self.now_s - first_s) / (arrival.output_tokens - 1)
        self.unfinished -= 1
        self._router.finished(arrival, node)
        session, place = self._turns.pop(number)
        if place + 1 < len(session):
            pause_s = session[place + 1].pause_s / self._rate
            self.call_at(self.now_s + pause_s, self._arrive, session, place + 1, arrival.session)
