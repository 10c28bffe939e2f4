"""NVIDIA Dynamo's KV router (1.6.1; `lib/kv-router/src/scheduling/selector/default.rs`, `router-design.md`).

In blocks; lower is better; `raw` is fractional:

    raw    = (active_prefill_tokens + prompt_tokens) / block_tokens
    decay  = 1 / (1 + overlap_score_credit_decay * excess prefill blocks over the least / prompt's blocks)
    credit = overlap_score_credit * decay * cached blocks
    cost   = prefill_load_scale * max(0, raw - credit) + decode_blocks
             + decode_active_request_weight * active requests

`decode_blocks` are the distinct full blocks of the node's active sequences with this one's. All load is the
router's own: booked at the choice (prompt minus cached), prefill released at the first token, blocks at the
end; forgotten after 300 s, in sweeps each 60 s, also when still running, as the original does. Caches are
known from KV events. Temperature 0 takes any least cost; above it, a softmax over costs scaled to [0, 1] is
sampled. Decode workers are chosen without credit (`dynamo_decode`).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from dispatcher.simulation.policies.base import Arrival, Policy, World
from dispatcher.simulation.policies.dynamo_decode import EXPIRY_S, SWEEP_S, DynamoDecode
from dispatcher.simulation.policies.picking import least, sampled
from dispatcher.simulation.policies.prefix_view import EventView, run_lengths


class _Booked(NamedTuple):
    at_s: float
    node: int
    tokens: int
    blocks: tuple[int, ...]


class DynamoKV(Policy):
    """Weights as the original's defaults; `prefill_load_scale` is what was `overlap_weight` before 1.0."""

    name = "dynamo_kv"
    poll_s = 0.0
    wants_kv_events = True

    def __init__(
        self,
        *,
        overlap_score_credit: float = 1.0,
        overlap_score_credit_decay: float = 0.0,
        prefill_load_scale: float = 1.0,
        decode_active_request_weight: float = 0.0,
        temperature: float = 0.0,
        kv_event_delay_s: float = 0.005,
    ) -> None:
        self.kv_event_delay_s = kv_event_delay_s
        self._credit = overlap_score_credit
        self._decay = overlap_score_credit_decay
        self._scale = prefill_load_scale
        self._request_weight = decode_active_request_weight
        self._temperature = temperature

    def start(self, world: World) -> None:
        """Begin with idle nodes and empty caches."""
        self._world = world
        self._view = EventView(world.nodes)
        self._prefill = [0] * world.nodes
        self._requests = [0] * world.nodes
        self._active: list[dict[int, int]] = [{} for _ in range(world.nodes)]
        self._active_on: dict[int, int] = {}
        self._booked: dict[int, _Booked] = {}
        self._prefilling: dict[int, int] = {}
        self._sweep_at = SWEEP_S

    def choose(self, arrival: Arrival) -> int:
        """Return the node with the least cost, and book the request there."""
        world = self._world
        if world.now_s >= self._sweep_at:
            self._sweep()
        cached = self._view.runs(arrival.blocks)
        costs = self.costs(arrival, cached)
        if self._temperature > 0:
            node = sampled(costs, self._temperature, world.rng)
        else:
            node = least(costs, world.rng)
        self._book(arrival, node, cached[node])
        return node

    def costs(self, arrival: Arrival, cached: Sequence[int]) -> list[float]:
        """Return each node's cost in blocks, given the cached blocks on each."""
        size = self._world.block_tokens
        prompt, length = arrival.prompt_tokens, len(arrival.blocks)
        # A sequence's blocks are active from its first one on: those shared with it are a leading run.
        shared = run_lengths(self._active_on, arrival.blocks, self._world.nodes)
        least_prefill = min(self._prefill)
        request_blocks = max(1, -(-prompt // size))
        costs = []
        for prefill, requests, active, hit, run in zip(
            self._prefill, self._requests, self._active, cached, shared, strict=True
        ):
            credit = self._credit * hit
            if self._decay:
                credit /= 1.0 + self._decay * (prefill - least_prefill) / size / request_blocks
            adjusted = (prefill + prompt) / size - credit
            decode = len(active) + length - run
            costs.append(
                (self._scale * adjusted if adjusted > 0 else 0.0) + decode + self._request_weight * requests
            )
        return costs

    def _book(self, arrival: Arrival, node: int, cached: int) -> None:
        tokens = max(0, arrival.prompt_tokens - cached * self._world.block_tokens)
        self._prefill[node] += tokens
        self._requests[node] += 1
        self._prefilling[arrival.number] = node
        self._booked[arrival.number] = _Booked(self._world.now_s, node, tokens, arrival.blocks)
        active, bit = self._active[node], 1 << node
        for block in arrival.blocks:
            count = active.get(block)
            if count is None:
                active[block] = 1
                self._active_on[block] = self._active_on.get(block, 0) | bit
            else:
                active[block] = count + 1

    def first_token(self, arrival: Arrival, node: int) -> None:
        """Release the prefill."""
        if self._prefilling.pop(arrival.number, None) is not None:
            self._prefill[node] -= self._booked[arrival.number].tokens

    def finished(self, arrival: Arrival, node: int) -> None:
        """Release the blocks; nothing to do for a request that expired."""
        if arrival.number in self._booked:
            self._free(arrival.number)

    def _free(self, number: int) -> None:
        booked = self._booked.pop(number)
        node = booked.node
        if self._prefilling.pop(number, None) is not None:
            self._prefill[node] -= booked.tokens
        self._requests[node] -= 1
        active, bit = self._active[node], 1 << node
        for block in booked.blocks:
            count = active[block]
            if count > 1:
                active[block] = count - 1
                continue
            del active[block]
            left = self._active_on[block] & ~bit
            if left:
                self._active_on[block] = left
            else:
                del self._active_on[block]

    def _sweep(self) -> None:
        now_s = self._world.now_s
        self._sweep_at = now_s + SWEEP_S
        # Booked in the order of time: the expired ones come first.
        expired = []
        for number, booked in self._booked.items():
            if booked.at_s > now_s - EXPIRY_S:
                break
            expired.append(number)
        for number in expired:
            self._free(number)

    def for_decode(self) -> Policy:
        """The same router without credit for overlap."""
        return DynamoDecode(decode_active_request_weight=self._request_weight, temperature=self._temperature)

    def stored(self, node: int, blocks: Sequence[int]) -> None:
        """Apply a KV event."""
        self._view.stored(node, blocks)

    def removed(self, node: int, blocks: Sequence[int]) -> None:
        """Apply a KV event."""
        self._view.removed(node, blocks)
