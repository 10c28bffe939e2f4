"""LMetric (OSDI'26, arXiv 2603.15202): uncached tokens times batch size; LPWL, the same without the batch.

As vllm-router 0.1.17's `kv_aware` does it (`src/policies/kv_aware.rs`):

    cost = (this prompt's uncached tokens + uncached tokens to prefill there) * (requests there + 1) ** e

e = 1 is LMetric; e = 0 is LPWL (gahow/agentic-kvc: `pending_prefill_tokens + max(0, input - hit)`). The
last token of a prompt is never cached. Ties go to the smaller batch, then to any. Tokens are released at
the first token, requests at their end, all by the router's own account; caches are known from KV events.

vllm-router takes the least occupied decode node, in rotation (`least_requests`); LPWL has no mode with
prefill and decode apart, and takes the least KV use (`least_kv`).
"""

from __future__ import annotations

from collections.abc import Sequence

from dispatcher.simulation.policies.accounting import InFlight
from dispatcher.simulation.policies.base import Arrival, Policy, World
from dispatcher.simulation.policies.least_kv import LeastKV
from dispatcher.simulation.policies.least_requests import LeastRequests
from dispatcher.simulation.policies.picking import least
from dispatcher.simulation.policies.prefix_view import EventView


class LMetric(Policy):
    """`batch_exponent` is e."""

    name = "lmetric"
    poll_s = 0.0
    wants_kv_events = True

    def __init__(self, *, batch_exponent: float = 1.0, kv_event_delay_s: float = 0.005) -> None:
        self.kv_event_delay_s = kv_event_delay_s
        self._exponent = batch_exponent

    def start(self, world: World) -> None:
        """Begin with an idle fleet and empty caches."""
        self._world = world
        self._view = EventView(world.nodes)
        self._load = InFlight(world.nodes)

    def choose(self, arrival: Arrival) -> int:
        """Return the node with the least cost."""
        size, prompt = self._world.block_tokens, arrival.prompt_tokens
        hits = self._view.runs(arrival.blocks[: (prompt - 1) // size])
        load = self._load
        exponent = self._exponent
        if exponent == 1.0:
            costs: list[float] = [
                (prompt - hit * size + prefill) * (requests + 1)
                for hit, prefill, requests in zip(hits, load.prefill, load.requests, strict=True)
            ]
        else:
            costs = [
                (prompt - hit * size + prefill) * (requests + 1) ** exponent
                for hit, prefill, requests in zip(hits, load.prefill, load.requests, strict=True)
            ]
        low = min(costs)
        node = costs.index(low)
        if costs.count(low) > 1:
            tied = [node for node, cost in enumerate(costs) if cost == low]
            node = tied[least([load.requests[node] for node in tied], self._world.rng)]
        load.begin(arrival.number, node, prompt - hits[node] * size)
        return node

    def first_token(self, arrival: Arrival, node: int) -> None:
        """Release the tokens."""
        self._load.prefilled(arrival.number, node)

    def finished(self, arrival: Arrival, node: int) -> None:
        """Release the request."""
        self._load.ended(arrival.number, node)

    def for_decode(self) -> Policy:
        """The least occupied, in rotation."""
        return LeastRequests(ties="rotation")

    def stored(self, node: int, blocks: Sequence[int]) -> None:
        """Apply a KV event."""
        self._view.stored(node, blocks)

    def removed(self, node: int, blocks: Sequence[int]) -> None:
        """Apply a KV event."""
        self._view.removed(node, blocks)


class LPWL(LMetric):
    """The batch doesn't count."""

    name = "lpwl"

    def __init__(self, *, kv_event_delay_s: float = 0.005) -> None:
        super().__init__(batch_exponent=0.0, kv_event_delay_s=kv_event_delay_s)

    def for_decode(self) -> Policy:
        """The least KV use."""
        return LeastKV()
