"""Alibaba FlexLB's CostBasedPrefill (rtp-llm 4b8d39cd5: `CostBasedPrefillStrategy`), unbatched.

    score = prefill(prompt, hit) + wait
    wait  = max(0, predicted prefills in flight - time since the last progress)

Nodes with `queue_limit` requests pending are out until they are back at `1 - hysteresis` of it. Of the rest
those are dropped that have more than `hotspot_multiplier` times the mean of pending requests, or
`imbalance_multiplier` times the mean wait; if that drops all, the least wait is kept. Any node within
max(10 %, 20 ms) of the least score is taken.

The original's predictor is a formula in its configuration, to be calibrated: here it is the profile's.
Caches are polled as full key sets each 50 to 3,000 ms; here events are as late as its first period, 100 ms.

The decode engine is chosen first (`rtp_llm_decode`).
"""

from __future__ import annotations

from collections.abc import Sequence

from dispatcher.simulation.policies.base import Arrival, Policy, World
from dispatcher.simulation.policies.picking import least_within
from dispatcher.simulation.policies.prefix_view import EventView
from dispatcher.simulation.policies.rtp_llm_decode import RTPLLMDecode


class RTPLLMCost(Policy):
    """Defaults are the original's; `tie_s` in seconds, `tie_share` of the least score."""

    name = "rtp_llm_cost"
    poll_s = 0.0
    wants_kv_events = True

    def __init__(
        self,
        *,
        tie_share: float = 0.1,
        tie_s: float = 0.02,
        hotspot_multiplier: float = 3.0,
        imbalance_multiplier: float = 3.0,
        queue_limit: int = 64,
        hysteresis: float = 0.15,
        kv_event_delay_s: float = 0.1,
    ) -> None:
        self.kv_event_delay_s = kv_event_delay_s
        self._tie_share = tie_share
        self._tie_s = tie_s
        self._hotspot = hotspot_multiplier
        self._imbalance = imbalance_multiplier
        self._queue_limit = queue_limit
        self._open_again = queue_limit * (1.0 - hysteresis)

    def start(self, world: World) -> None:
        """Begin with an idle fleet and empty caches."""
        self._world = world
        self._view = EventView(world.nodes)
        self._pending = [0] * world.nodes
        self._closed = [False] * world.nodes
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
        nodes = self.survivors(waits_s)
        prefill_s: dict[int, float] = {}
        for hit in set(hits):
            cached = hit * size if hit * size < prompt else max(0, prompt - size)
            prefill_s[hit] = world.prefill_s(prompt - cached, cached)
        scores = [waits_s[node] + prefill_s[hits[node]] for node in nodes]
        tolerance = max(min(scores) * self._tie_share, self._tie_s)
        node = nodes[least_within(scores, tolerance, world.rng)]
        self._book(arrival.number, node, prefill_s[hits[node]])
        return node

    def survivors(self, waits_s: Sequence[float]) -> Sequence[int]:
        """Return the nodes that pass the filters, given each node's wait; never none."""
        pending = self._pending
        nodes: Sequence[int] = range(self._world.nodes)
        if any(self._closed):
            nodes = [node for node in nodes if not self._closed[node]] or nodes
        most_pending = self._hotspot * sum([pending[node] for node in nodes]) / len(nodes)
        most_wait_s = self._imbalance * sum([waits_s[node] for node in nodes]) / len(nodes)
        kept = [node for node in nodes if pending[node] <= most_pending and waits_s[node] <= most_wait_s]
        return kept or [min(nodes, key=waits_s.__getitem__)]

    def _book(self, number: int, node: int, predicted_s: float) -> None:
        if not self._predicted_s[node]:
            self._progress_s[node] = self._world.now_s
        self._predicted_s[node] += predicted_s
        self._begun[number] = predicted_s
        self._pending[node] += 1
        if self._pending[node] >= self._queue_limit:
            self._closed[node] = True

    def first_token(self, arrival: Arrival, node: int) -> None:
        """Take its prefill out of the wait: the node made progress."""
        left_s = self._predicted_s[node] - self._begun.pop(arrival.number, 0.0)
        self._predicted_s[node] = left_s if left_s > 1e-9 else 0.0
        self._progress_s[node] = self._world.now_s

    def finished(self, arrival: Arrival, node: int) -> None:
        """Count it no longer."""
        if arrival.number in self._begun:
            self.first_token(arrival, node)
        self._pending[node] -= 1
        if self._pending[node] <= self._open_again:
            self._closed[node] = False

    def for_decode(self) -> Policy:
        """The original's strategy for decode engines."""
        return RTPLLMDecode()

    def stored(self, node: int, blocks: Sequence[int]) -> None:
        """Apply a KV event."""
        self._view.stored(node, blocks)

    def removed(self, node: int, blocks: Sequence[int]) -> None:
        """Apply a KV event."""
        self._view.removed(node, blocks)
