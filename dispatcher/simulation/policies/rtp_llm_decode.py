"""RTP-LLM's decode engine (4b8d39cd5, `CostBasedDecodeStrategy`), chosen before the prefill engine.

    expected = prompt + 1,000      the original: the client's limit up to 1,000; here nobody names one
    used     = reported use + expected of reservations that no report has confirmed
    free     = reported free - prompts of those

An engine is out when `free` is less than the prompt, when it has more than `hotspot_multiplier` times the
mean of requests, or `used` is more than `imbalance_multiplier` times the mean. Of the rest one is drawn by

    weight = exp(-decay * (used - least used))      in absolute tokens

When all are out the original answers with an error, here the least used is taken. Status is polled each
20 ms; a reservation counts as confirmed with the first token.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from dispatcher.simulation.policies.base import Arrival, Policy, World

EXPECTED_ANSWER_TOKENS = 1_000


class RTPLLMDecode(Policy):
    """Defaults are the original's; `decay` for each token."""

    name = "rtp_llm_decode"
    poll_s = 0.02
    wants_kv_events = False
    kv_event_delay_s = 0.0

    def __init__(
        self, *, hotspot_multiplier: float = 3.0, imbalance_multiplier: float = 3.0, decay: float = 0.001
    ) -> None:
        self._hotspot = hotspot_multiplier
        self._imbalance = imbalance_multiplier
        self._decay = decay

    def start(self, world: World) -> None:
        """Begin with an idle fleet."""
        self._world = world
        self._requests = [0] * world.nodes
        # Per node, of reservations that aren't confirmed: their number and their prompts' tokens.
        self._reserved = [0] * world.nodes
        self._prompts = [0] * world.nodes
        self._unconfirmed: set[int] = set()

    def choose(self, arrival: Arrival) -> int:
        """Return an engine, and reserve there."""
        used, free = self.tokens()
        nodes = self.survivors(used, free, arrival.prompt_tokens)
        least = min(used[node] for node in nodes)
        weights = [math.exp(-self._decay * (used[node] - least)) for node in nodes]
        node = self._world.rng.choices(nodes, weights)[0]
        self._requests[node] += 1
        self._reserved[node] += 1
        self._prompts[node] += arrival.prompt_tokens
        self._unconfirmed.add(arrival.number)
        return node

    def tokens(self) -> tuple[list[int], list[int]]:
        """Return each node's used and free KV tokens, reservations counted."""
        size = self._world.block_tokens
        used, free = [], []
        for node in range(self._world.nodes):
            signal = self._world.signal(node)
            reported = signal.active_blocks * size
            used.append(reported + self._prompts[node] + EXPECTED_ANSWER_TOKENS * self._reserved[node])
            free.append(signal.total_blocks * size - reported - self._prompts[node])
        return used, free

    def survivors(self, used: Sequence[int], free: Sequence[int], prompt_tokens: int) -> Sequence[int]:
        """Return the nodes that pass the filters; never none."""
        most_requests = self._hotspot * sum(self._requests) / len(used)
        most_used = self._imbalance * sum(used) / len(used)
        kept = [
            node
            for node in range(len(used))
            if free[node] >= prompt_tokens
            and self._requests[node] <= most_requests
            and used[node] <= most_used
        ]
        return kept or [min(range(len(used)), key=used.__getitem__)]

    def first_token(self, arrival: Arrival, node: int) -> None:
        """Confirm the reservation: from now on the report has it."""
        if arrival.number in self._unconfirmed:
            self._unconfirmed.discard(arrival.number)
            self._reserved[node] -= 1
            self._prompts[node] -= arrival.prompt_tokens

    def finished(self, arrival: Arrival, node: int) -> None:
        """Count it no longer."""
        self.first_token(arrival, node)
        self._requests[node] -= 1

    def for_decode(self) -> Policy:
        """The same."""
        return RTPLLMDecode(
            hotspot_multiplier=self._hotspot, imbalance_multiplier=self._imbalance, decay=self._decay
        )
