"""A fleet for routing policies that a test can set by hand, or let run by itself on a crude clock.

Nodes here prefill one request after another at a fixed rate and then decode it for a fixed time; an unbounded
cache tells its events. It is not a model of an engine: it makes loads and events differ, deterministically.
"""

import heapq
import random
from collections.abc import Iterator

from dispatcher.simulation.policies import Arrival, Policy, Signal

PREFILL_TOKENS_PER_S = 20_000.0
OUTPUT_TOKENS_PER_S = 100.0


class PolicyWorld:
    """A `World`. `signals` may be written to; `route` moves time on to an arrival and has it routed."""

    def __init__(self, nodes: int, seed: int = 0, block_tokens: int = 16) -> None:
        self.nodes = nodes
        self.block_tokens = block_tokens
        self.now_s = 0.0
        self.rng = random.Random(seed)
        self.signals = [Signal(0.0, 0, 0, 0, 0, 10_000) for _ in range(nodes)]
        self.policy: Policy | None = None
        self._due: list[tuple[float, int, str, Arrival, int]] = []
        self._busy_until = [0.0] * nodes

    def begin(self, policy: Policy) -> None:
        """Start a policy on this fleet."""
        self.policy = policy
        policy.start(self)

    def signal(self, node: int) -> Signal:
        """Return what was last written of the node."""
        return self.signals[node]

    def speed(self, node: int) -> float:
        return 1.0

    def prefill_s(self, uncached: int, cached: int) -> float:
        """Return the seconds to prefill: linear in the uncached tokens."""
        return uncached / PREFILL_TOKENS_PER_S

    def route(self, arrival: Arrival) -> int:
        """Deliver what happened until the arrival, then have it chosen for and run."""
        policy = self.policy
        assert policy is not None, "begin a policy first"
        self._deliver_until(arrival.at_s)
        node = policy.choose(arrival)
        signal = self.signals[node]
        signal.waiting += 1
        signal.waiting_tokens += arrival.prompt_tokens
        signal.active_blocks += len(arrival.blocks)
        begun = max(self.now_s, self._busy_until[node])
        first = begun + self.prefill_s(arrival.prompt_tokens, 0)
        self._busy_until[node] = first
        heapq.heappush(self._due, (first, arrival.number, "first", arrival, node))
        if policy.wants_kv_events:
            heapq.heappush(
                self._due, (first + policy.kv_event_delay_s, arrival.number, "stored", arrival, node)
            )
        ended = first + arrival.output_tokens / OUTPUT_TOKENS_PER_S
        heapq.heappush(self._due, (ended, arrival.number, "ended", arrival, node))
        return node

    def drain(self) -> None:
        """Let everything that was routed end."""
        while self._due:
            self._deliver_until(self._due[0][0])

    def _deliver_until(self, at_s: float) -> None:
        policy = self.policy
        assert policy is not None
        while self._due and self._due[0][0] <= at_s:
            self.now_s, _, what, arrival, node = heapq.heappop(self._due)
            signal = self.signals[node]
            if what == "first":
                signal.waiting -= 1
                signal.running += 1
                signal.waiting_tokens -= arrival.prompt_tokens
                policy.first_token(arrival, node)
            elif what == "stored":
                policy.stored(node, arrival.blocks)
            else:
                signal.running -= 1
                signal.active_blocks -= len(arrival.blocks)
                policy.finished(arrival, node)
            signal.at_s = self.now_s
        self.now_s = max(self.now_s, at_s)


def shared_prefix_arrivals(
    rng: random.Random, count: int, *, groups: int = 12, shared: int = 24, own: int = 16, gap_s: float = 0.02
) -> Iterator[Arrival]:
    """Yield requests of `groups` shared prefixes, each with blocks of its own; 16 tokens a block."""
    at_s = 0.0
    for number in range(count):
        at_s += rng.expovariate(1.0 / gap_s)
        group = rng.randrange(groups)
        length = shared + rng.randrange(own)
        blocks = tuple(
            (group << 40) + place if place < shared else (number << 60) + (1 << 59) + place
            for place in range(length)
        )
        yield Arrival(number, at_s, 16 * length + rng.randrange(16), rng.randrange(1, 200), blocks)
