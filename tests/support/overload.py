"""A pool under any load in virtual time: the real window, scheduler and overload control, and engine models.

No services and no servers: arrivals, engine steps and ticks are events of one queue, so that minutes of
overload cost seconds. What a leader does between choices (reserve, release, reports) is done here likewise.
"""

from __future__ import annotations

import heapq
import itertools
import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace

from dispatcher.protocol.assignment import Envelope
from dispatcher.protocol.names import Lane, Ref
from dispatcher.protocol.node import NodeIdentity, NodeReport
from dispatcher.protocol.outcome import Reason
from dispatcher.scheduling.fleet import Fleet
from dispatcher.scheduling.overload import Overload, OverloadParameters, Shed
from dispatcher.scheduling.prefix_index import PrefixIndex
from dispatcher.scheduling.scheduler import Scheduler
from dispatcher.scheduling.window import Waiting, Window
from dispatcher.simulation.engine import EngineModel
from dispatcher.simulation.profiles import PROFILES

EPOCH_MS = 1_790_000_000_000
TICK_S = 0.1
MODEL = "m"


@dataclass(kw_only=True)
class Request:
    """One request and what became of it; times are seconds since the beginning."""

    envelope: Envelope
    output_tokens: int
    arrived_s: float
    bound_s: float | None = None
    ended_s: float | None = None
    shed_s: float | None = None
    shed: Shed | None = None

    @property
    def waited_s(self) -> float:
        """From its arrival until it was bound."""
        assert self.bound_s is not None
        return self.bound_s - self.arrived_s


@dataclass(kw_only=True)
class Bench:
    """The pool. `log` has every request in order of arrival."""

    seed: int
    parameters: OverloadParameters
    nodes: int = 3
    max_running: int = 8
    healthy: bool = True
    silent: str = ""
    now_s: float = 0.0
    log: list[Request] = field(default_factory=list)
    overloaded: list[tuple[float, bool]] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.rng = random.Random(self.seed)
        self.window = Window()
        self.overload = Overload(self.parameters)
        self.fleet = Fleet()
        self.scheduler = Scheduler(
            self.fleet, PrefixIndex(), rng=random.Random(self.seed + 1), healthy_s=lambda: self._healthy_s
        )
        self._engines: dict[str, EngineModel] = {}
        self._assigned = 0
        self._events: list[tuple[float, int, Callable[[], None]]] = []
        self._order = itertools.count()
        self._at: dict[int, tuple[Request, str]] = {}
        self._unstarted: dict[str, dict[int, int]] = {}
        self._stepping: set[tuple[str, float]] = set()
        self._healthy_s = 0.0
        profile = replace(PROFILES["test"], max_running=self.max_running)
        for n in range(self.nodes):
            name = f"n{n}"
            identity = NodeIdentity(node=name, incarnation="x", models=(MODEL,), max_running=self.max_running)
            node = self.fleet.admit(identity, 0.0)
            node.admitted = True
            self._engines[name] = EngineModel(profile)
            self._unstarted[name] = {}
            self._report(name, 0)
        self.at(TICK_S, self._tick)

    def at(self, when_s: float, act: Callable[[], None]) -> None:
        """Let something happen."""
        heapq.heappush(self._events, (when_s, next(self._order), act))

    def run(self, until_s: float) -> None:
        """Let time pass."""
        while self._events and self._events[0][0] <= until_s:
            when_s, _, act = heapq.heappop(self._events)
            self.now_s = when_s
            act()
        self.now_s = until_s

    @property
    def now_ms(self) -> int:
        """Epoch time."""
        return EPOCH_MS + round(1000 * self.now_s)

    def offer(
        self,
        rate: Callable[[float], float],
        until_s: float,
        priorities: dict[int, float],
        deadline_s: float = 600.0,
    ) -> None:
        """Let requests arrive by a Poisson process, whose rate per second is a function of time."""

        def arrive() -> None:
            self.arrive(priority=self._pick(priorities), deadline_s=deadline_s)
            follow()

        def follow() -> None:
            when_s = self.now_s + self.rng.expovariate(rate(self.now_s))
            if when_s < until_s:
                self.at(when_s, arrive)

        follow()

    def _pick(self, priorities: dict[int, float]) -> int:
        return self.rng.choices(list(priorities), list(priorities.values()))[0]

    def arrive(
        self, *, priority: int = 50, deadline_s: float = 600.0, lane: Lane = Lane.INTERACTIVE
    ) -> Request:
        """A request is read."""
        n = len(self.log)
        ref = Ref(lane, 0, n)
        prompt, output = self.rng.randrange(200, 2000), self.rng.randrange(20, 200)
        envelope = Envelope(
            ref=str(ref),
            id=f"r{n}",
            model=MODEL,
            priority=priority,
            prompt_tokens=prompt,
            # Producers ask for more than they get.
            max_tokens=2 * output,
            tokens_exact=True,
            appended_ms=self.now_ms,
            deadline_at_ms=self.now_ms + round(1000 * deadline_s),
        )
        request = Request(envelope=envelope, output_tokens=output, arrived_s=self.now_s)
        self.log.append(request)
        shed = None
        if lane is Lane.INTERACTIVE:
            backlog = self.window.backlogs.get(MODEL)
            shed = self.overload.admit(envelope, backlog, now_ms=self.now_ms, now_s=self.now_s)
        if shed is not None:
            self._shed(shed)
        if shed is None or shed.envelope is not envelope:
            self.window.push(Waiting(ref=ref, envelope=envelope))
            self._dispatch()
        return request

    def _shed(self, shed: Shed) -> None:
        request = self.log[Ref.parse(shed.envelope.ref).offset]
        assert request.bound_s is None, "what was bound is never shed"
        self.window.remove(shed.envelope.ref)
        request.shed, request.shed_s = shed, self.now_s

    def _tick(self) -> None:
        if self.healthy:
            self._healthy_s = self.now_s
        for shed in self.overload.tick(
            self.window.backlogs,
            self.scheduler.capacity,
            now_ms=self.now_ms,
            now_s=self.now_s,
            healthy_s=self._healthy_s,
            any_served=any(node.is_eligible for node in self.fleet.nodes.values()),
        ):
            self._shed(shed)
        is_overloaded = MODEL in self.overload.overloaded()
        if not self.overloaded or self.overloaded[-1][1] != is_overloaded:
            self.overloaded.append((self.now_s, is_overloaded))
        self._dispatch()
        self.at(self.now_s + TICK_S, self._tick)

    def _dispatch(self) -> None:
        if not self.healthy:
            return
        round = self.window.begin_round()
        while (found := self.window.choose(self.scheduler, round, self.now_ms)) is not None:
            waiting, choice = found
            name = choice.node.name
            request = self.log[waiting.ref.offset]
            request.bound_s = self.now_s
            number = self._assigned = self._assigned + 1
            self.fleet.reserve(
                name,
                waiting.envelope.ref,
                waiting.envelope.cost_tokens,
                uncached_tokens=choice.uncached_tokens,
                number=number,
                now_s=self.now_s,
            )
            self._at[waiting.ref.offset] = (request, name)
            self._unstarted[name][waiting.ref.offset] = waiting.envelope.prompt_tokens
            first_token = 4096 * waiting.ref.offset
            tokens = range(first_token, first_token + waiting.envelope.prompt_tokens)
            self._engines[name].submit(
                waiting.ref.offset, tokens, request.output_tokens, output=lambda place: place
            )
            self._report(name, number)
            if self._engines[name].due is None:
                self._engines[name].step(self.now_s)
                self._follow(name)
        self.window.end_round(round)

    def _report(self, name: str, number: int) -> None:
        node = self.fleet.nodes[name]
        report = NodeReport(
            node=name,
            incarnation="x",
            sequence=number,
            seen_seq=number,
            queued_uncached_tokens=sum(self._unstarted[name].values()),
        )
        if name == self.silent:
            node.report = None
        else:
            node.hear(report, self._healthy_s, self.now_s)

    def _follow(self, name: str) -> None:
        due = self._engines[name].due
        if due is not None and (name, due) not in self._stepping:
            self._stepping.add((name, due))
            self.at(due, lambda: self._step(name, due))

    def _step(self, name: str, due: float) -> None:
        self._stepping.discard((name, due))
        ended = False
        for made in self._engines[name].step(self.now_s):
            self._unstarted[name].pop(made.key, None)
            if made.is_last:
                request, _ = self._at.pop(made.key)
                request.ended_s = self.now_s
                self.fleet.release(name, request.envelope.ref, self.now_s)
                ended = True
        self._report(name, self._assigned)
        self._follow(name)
        if ended:
            self._dispatch()

    # What became of it

    def within(self, first_s: float, last_s: float, priority: int | None = None) -> Iterator[Request]:
        """Requests that arrived in a stretch of time."""
        for request in self.log:
            if first_s <= request.arrived_s < last_s and priority in (None, request.envelope.priority):
                yield request

    def served(self, first_s: float, last_s: float) -> float:
        """Requests ended per second in a stretch of time."""
        ended = sum(one.ended_s is not None and first_s <= one.ended_s < last_s for one in self.log)
        return ended / (last_s - first_s)

    def shed_of(self, reason: Reason) -> list[Request]:
        """What was turned away for a reason."""
        return [one for one in self.log if one.shed is not None and one.shed.reason is reason]


def capacity(seed: int, *, nodes: int = 3, max_running: int = 8) -> float:
    """Requests per second that the pool of this seed serves when there is always more."""
    bench = Bench(seed=seed, parameters=OverloadParameters(target_s=0), nodes=nodes, max_running=max_running)
    for _ in range(100):
        bench.arrive()
    bench.offer(lambda _: 60.0, 60.0, {50: 1.0})
    bench.run(60.0)
    assert len(bench.window), "the pool was never saturated"
    return bench.served(10.0, 60.0)
