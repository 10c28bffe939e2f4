"""Least outstanding tokens: the node with the fewest prompt tokens in flight, whatever is cached where.

The token-weighted kin of least-request balancing; as llm-d's `token-load-scorer` alone (llm-d-router,
`pkg/epp/framework/plugins/scheduling/scorer/tokenload`) when tokens are released at the first token.
It has no mode with prefill and decode apart: decode nodes by the least KV use (`least_kv`).
"""

from __future__ import annotations

from typing import Literal

from dispatcher.simulation.policies.base import Arrival, Policy, World
from dispatcher.simulation.policies.least_kv import LeastKV
from dispatcher.simulation.policies.picking import least


class LeastOutstandingTokens(Policy):
    """`until` says when a request's tokens are released: at the end of its answer, or at its first token."""

    name = "least_outstanding_tokens"
    poll_s = 0.0
    wants_kv_events = False
    kv_event_delay_s = 0.0

    def __init__(self, *, until: Literal["finished", "first_token"] = "finished") -> None:
        self._until = until

    def start(self, world: World) -> None:
        """Begin with an idle fleet."""
        self._rng = world.rng
        self._tokens = [0] * world.nodes

    def choose(self, arrival: Arrival) -> int:
        """Return the node with the fewest tokens; among equals any."""
        node = least(self._tokens, self._rng)
        self._tokens[node] += arrival.prompt_tokens
        return node

    def first_token(self, arrival: Arrival, node: int) -> None:
        """Release the tokens, if they are held for the prefill."""
        if self._until == "first_token":
            self._tokens[node] -= arrival.prompt_tokens

    def finished(self, arrival: Arrival, node: int) -> None:
        """Release the tokens, if they are held for the whole answer."""
        if self._until == "finished":
            self._tokens[node] -= arrival.prompt_tokens

    def for_decode(self) -> Policy:
        """The least KV use."""
        return LeastKV()
