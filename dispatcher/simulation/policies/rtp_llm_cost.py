"""Alibaba FlexLB's CostBasedPrefill (rtp-llm 4b8d39cd5: `CostBasedPrefillStrategy`), unbatched, as it sees.

The decision is the live policy's own (`scheduling.cost_based_prefill`); the account is the original's:

    wait  = max(0, predicted prefills in flight - time since the last progress)

The original's predictor is a formula in its configuration, to be calibrated: here it is the profile's.
Caches are polled as full key sets each 50 to 3,000 ms; here events are as late as its first period, 100 ms.
When every queue is full the original answers with an error; here any node may be taken then.

The decode engine is chosen first (`rtp_llm_decode`).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from dispatcher.scheduling.cost_based_prefill import CostBased
from dispatcher.simulation.policies.base import Arrival, Policy, World
from dispatcher.simulation.policies.prefix_view import EventView
from dispatcher.simulation.policies.rtp_llm_decode import RTPLLMDecode


class RTPLLMCost(Policy):
    """Constants are those of `CostBased`."""

    name = "rtp_llm_cost"
    poll_s = 0.0
    wants_kv_events = True

    def __init__(self, *, kv_event_delay_s: float = 0.1, **constants: Any) -> None:
        self.kv_event_delay_s = kv_event_delay_s
        self._constants = CostBased(**constants)

    def start(self, world: World) -> None:
        """Begin with an idle fleet and empty caches."""
        self._world = world
        self._view = EventView(world.nodes)
        self._pending = [0] * world.nodes
        self._shut = [False] * world.nodes
        self._predicted_s = [0.0] * world.nodes
        self._progress_s = [0.0] * world.nodes
        self._begun: dict[int, float] = {}

    def choose(self, arrival: Arrival) -> int:
        """Return any of the nodes whose score is nearly the least."""
        world = self._world
        size, prompt = world.block_tokens, arrival.prompt_tokens
        hits = self._view.runs(arrival.blocks)
        now_s = world.now_s
        waits_s = [
            predicted_s - (now_s - progress_s) if predicted_s > now_s - progress_s else 0.0
            for predicted_s, progress_s in zip(self._predicted_s, self._progress_s, strict=True)
        ]
        nodes: Sequence[int] = range(world.nodes)
        if any(self._shut):
            nodes = [node for node in nodes if not self._shut[node]] or nodes
        prefill_s: dict[int, float] = {}
        for hit in set(hits):
            cached = hit * size if hit * size < prompt else max(0, prompt - size)
            prefill_s[hit] = world.prefill_s(prompt - cached, cached)
        place = self._constants.choose(
            [waits_s[node] for node in nodes],
            [self._pending[node] for node in nodes],
            [prefill_s[hits[node]] for node in nodes],
            world.rng,
        )
        node = nodes[place]
        self._book(arrival.number, node, prefill_s[hits[node]])
        return node

    def _book(self, number: int, node: int, predicted_s: float) -> None:
        if not self._predicted_s[node]:
            self._progress_s[node] = self._world.now_s
        self._predicted_s[node] += predicted_s
        self._begun[number] = predicted_s
        self._count(node, 1)

    def first_token(self, arrival: Arrival, node: int) -> None:
        """Take its prefill out of the wait: the node made progress."""
        left_s = self._predicted_s[node] - self._begun.pop(arrival.number, 0.0)
        self._predicted_s[node] = left_s if left_s > 1e-9 else 0.0
        self._progress_s[node] = self._world.now_s

    def finished(self, arrival: Arrival, node: int) -> None:
        """Count it no longer."""
        if arrival.number in self._begun:
            self.first_token(arrival, node)
        self._count(node, -1)

    def _count(self, node: int, change: int) -> None:
        self._pending[node] += change
        self._shut[node] = self._constants.is_shut(self._pending[node], was_shut=self._shut[node])

    def for_decode(self) -> Policy:
        """The original's strategy for decode engines."""
        return RTPLLMDecode()

    def stored(self, node: int, blocks: Sequence[int]) -> None:
        """Apply a KV event."""
        self._view.stored(node, blocks)

    def removed(self, node: int, blocks: Sequence[int]) -> None:
        """Apply a KV event."""
        self._view.removed(node, blocks)
