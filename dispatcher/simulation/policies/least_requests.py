"""The node with the fewest requests in flight, by the router's own account.

For decode nodes: vllm-router 0.1.17 takes the least occupied, in rotation; llm-d's `active-request-scorer`
(llm-d-router 0.10, for what is decode-bound) with the max-score picker any of the equals. llm-d chooses the
decode node first, and `prefix-based-pd-decider` then lets it compute the prompt too when that leaves fewer
than `non_cached_tokens` to do there, by the approximate view of own routing; 0 asks a prefill node always.
"""

from __future__ import annotations

from typing import Literal

from dispatcher.simulation.policies.base import Arrival, Policy, World
from dispatcher.simulation.policies.llmd_weighted import matchable, routed_view
from dispatcher.simulation.policies.picking import least


class LeastRequests(Policy):
    """`ties` says which of equals: the next in turn after the last choice, or any."""

    name = "least_requests"
    poll_s = 0.0
    wants_kv_events = False
    kv_event_delay_s = 0.0

    def __init__(self, *, ties: Literal["rotation", "random"] = "random", non_cached_tokens: int = 0) -> None:
        self._ties = ties
        self._non_cached_tokens = non_cached_tokens

    def start(self, world: World) -> None:
        """Begin with an idle fleet."""
        self._rng = world.rng
        self._requests = [0] * world.nodes
        self._last = -1
        self._world = world
        self._view = routed_view(world) if self._non_cached_tokens else None
        self._uncached_tokens = 0

    def choose(self, arrival: Arrival) -> int:
        """Return a node with the fewest requests."""
        requests = self._requests
        if self._ties == "random":
            node = least(requests, self._rng)
        else:
            after = range(self._last + 1, self._last + 1 + len(requests))
            node = min((place % len(requests) for place in after), key=requests.__getitem__)
            self._last = node
        requests[node] += 1
        if self._view is not None:
            blocks = matchable(arrival, self._world.block_tokens)
            self._uncached_tokens = (
                arrival.prompt_tokens - self._view.runs(blocks)[node] * self._world.block_tokens
            )
            self._view.routed(node, blocks)
        return node

    def wants_prefill(self, arrival: Arrival, node: int) -> bool:
        """As the decider has it: enough is left to compute."""
        return self._uncached_tokens >= self._non_cached_tokens

    def finished(self, arrival: Arrival, node: int) -> None:
        """Count it no longer."""
        self._requests[node] -= 1

    def for_decode(self) -> Policy:
        """The same."""
        return LeastRequests(ties=self._ties, non_cached_tokens=self._non_cached_tokens)
