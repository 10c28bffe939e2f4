"""SMG 1.13.0's cache_aware policy: expected wait, and a spill of the one overloaded holder.

After `model_gateway/src/policies/{cache_aware,least_load}.rs` and `worker/expected_wait.rs`, with its token
tree (gRPC workers without KV events). For the tenants of the deepest match of more than `cache_threshold`:

    swing = max(4, ceil(2 * sqrt(mean)))
    over  = L > balance_rel_threshold * mean  and  L > mean + min(balance_abs_threshold, swing)
    W     = (queued + (running + unaccounted) * p + dispatched since the report) / throughput
            + kv_pressure_weight * k / (1 - k)

The holder with the least W that is not over; when all are, the least W of the nodes that aren't over, which
becomes a tenant too. A miss goes to the least W of all. Of a pool above 32 nodes only the holders and 16
others are read.

Decode nodes are chosen by the same policy, with counts and a tree of their own (no `--decode-policy`).
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Iterable

from dispatcher.scheduling.cost_based_prefill import least_within
from dispatcher.simulation.policies.base import Arrival, Policy, World
from dispatcher.simulation.policies.radix_tenants import RadixTenants

SAMPLE = 16
MIN_MARGIN = 4.0
TIE_S = 1e-6
DISPATCHES_KEPT = 8_192


class SMGExpectedWait(Policy):
    """Defaults are the original's; `throughput` is what it assumes of a node that reports none (tokens/s),
    here times the node's speed.

    A node with `overload_waiting` requests queued, or more than `overload_usage` of its KV cache held, is not
    eligible while another is.
    """

    name = "smg_expected_wait"
    wants_kv_events = False
    kv_event_delay_s = 0.0

    def __init__(
        self,
        *,
        cache_threshold: float = 0.3,
        balance_abs_threshold: float = 64.0,
        balance_rel_threshold: float = 1.5,
        kv_pressure_weight_s: float = 0.15,
        mean_prefill_tokens: int = 1024,
        throughput: float = 2000.0,
        overload_waiting: int = 8,
        overload_usage: float = 0.8,
        max_tree_tokens: int = 67_108_864,
        eviction_interval_s: float = 120.0,
        poll_s: float = 10.0,
    ) -> None:
        self.poll_s = poll_s
        self._cache_threshold = cache_threshold
        self._balance_abs = balance_abs_threshold
        self._balance_rel = balance_rel_threshold
        self._weight_s = kv_pressure_weight_s
        self._mean_prefill = mean_prefill_tokens
        self._throughput = throughput
        self._overload_waiting = overload_waiting
        self._overload_usage = overload_usage
        self._max_tree_tokens = max_tree_tokens
        self._eviction_interval_s = eviction_interval_s

    def start(self, world: World) -> None:
        """Begin with an idle fleet and an empty tree."""
        self._world = world
        self._throughputs = [self._throughput * world.speed(node) for node in range(world.nodes)]
        self._load = [0] * world.nodes
        self._total_load = 0
        # Per node, what the last report has not seen: (dispatched at, tokens), and their sum.
        self._since: list[deque[tuple[float, int]]] = [
            deque(maxlen=DISPATCHES_KEPT) for _ in range(world.nodes)
        ]
        self._since_tokens = [0] * world.nodes
        self._tree = RadixTenants(
            world.nodes,
            limit=self._max_tree_tokens // world.block_tokens,
            shared_limit=True,
            interval_s=self._eviction_interval_s,
        )

    def choose(self, arrival: Arrival) -> int:
        """Return a holder that is not over the gate, else the node with the least expected wait."""
        world = self._world
        length, tenants = self._tree.match(arrival.blocks, world.now_s)
        if length * world.block_tokens <= self._cache_threshold * arrival.prompt_tokens:
            tenants = ()
        eligible = self._eligible(tenants)
        mean = self._total_load / world.nodes
        gate = max(
            self._balance_rel * mean,
            mean + min(self._balance_abs, max(MIN_MARGIN, math.ceil(2 * math.sqrt(mean)))),
        )
        load = self._load
        holders = [node for node in tenants if node in eligible]
        if holders:
            calm = [node for node in holders if load[node] <= gate]
            node = self._least_wait(calm or [node for node in eligible if load[node] <= gate] or eligible)
        else:
            node = self._least_wait(eligible)
        self._tree.insert(arrival.blocks, node, world.now_s)
        self._account(node, arrival.prompt_tokens)
        return node

    def expected_wait_s(self, node: int) -> float:
        """Return W of a node."""
        signal = self._world.signal(node)
        since = self._since[node]
        while since and since[0][0] <= signal.at_s:
            self._since_tokens[node] -= since.popleft()[1]
        queued = signal.waiting_tokens or signal.waiting * self._mean_prefill
        unaccounted = max(0, self._load[node] - signal.running - signal.waiting - len(since))
        tokens = queued + (signal.running + unaccounted) * self._mean_prefill + self._since_tokens[node]
        k = min(0.999, signal.active_blocks / signal.total_blocks)
        return tokens / self._throughputs[node] + self._weight_s * k / (1.0 - k)

    def _eligible(self, holders: Iterable[int]) -> list[int]:
        world = self._world
        nodes: Iterable[int] = range(world.nodes)
        if world.nodes > 2 * SAMPLE:
            sample = {int(world.rng.random() * world.nodes) for _ in range(SAMPLE)}
            nodes = sorted(sample.union(holders))
        calm = []
        for node in nodes:
            signal = world.signal(node)
            if (
                signal.waiting < self._overload_waiting
                and signal.active_blocks < self._overload_usage * signal.total_blocks
            ):
                calm.append(node)
        return calm or list(nodes)

    def _least_wait(self, nodes: list[int]) -> int:
        waits = [self.expected_wait_s(node) for node in nodes]
        return nodes[least_within(waits, TIE_S, self._world.rng)]

    def _account(self, node: int, tokens: int) -> None:
        since = self._since[node]
        if len(since) == DISPATCHES_KEPT:
            self._since_tokens[node] -= since[0][1]
        since.append((self._world.now_s, tokens))
        self._since_tokens[node] += tokens
        self._load[node] += 1
        self._total_load += 1

    def finished(self, arrival: Arrival, node: int) -> None:
        """Count it no longer."""
        self._load[node] -= 1
        self._total_load -= 1

    def for_decode(self) -> Policy:
        """The same, with nothing in it."""
        return SMGExpectedWait(
            cache_threshold=self._cache_threshold,
            balance_abs_threshold=self._balance_abs,
            balance_rel_threshold=self._balance_rel,
            kv_pressure_weight_s=self._weight_s,
            mean_prefill_tokens=self._mean_prefill,
            throughput=self._throughput,
            overload_waiting=self._overload_waiting,
            overload_usage=self._overload_usage,
            max_tree_tokens=self._max_tree_tokens,
            eviction_interval_s=self._eviction_interval_s,
            poll_s=self.poll_s,
        )
