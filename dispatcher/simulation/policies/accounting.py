"""What a router itself knows of its load: requests until they end, prompt tokens until their prefill does.

Bounded by the requests in flight.
"""

from __future__ import annotations


class InFlight:
    """Per node: `requests` that have not ended, and `prefill` tokens of those without a first token."""

    def __init__(self, nodes: int) -> None:
        self.requests = [0] * nodes
        self.prefill = [0] * nodes
        self._tokens: dict[int, int] = {}

    def begin(self, number: int, node: int, tokens: int) -> None:
        """Account for a request that was sent to a node, to prefill `tokens` there."""
        self.requests[node] += 1
        self.prefill[node] += tokens
        self._tokens[number] = tokens

    def prefilled(self, number: int, node: int) -> None:
        """Release its prefill tokens."""
        self.prefill[node] -= self._tokens.pop(number, 0)

    def ended(self, number: int, node: int) -> None:
        """Release all of it."""
        self.prefilled(number, node)
        self.requests[node] -= 1
