"""NVIDIA Dynamo's choice of a decode worker (1.6.1): the KV router without credit for overlap.

Its prefill router sends the prompt first; when that is done the decode router chooses with
`overlap_score_credit=0`, `assume_kv_reuse=false` and `track_prefill_tokens=false`, which leaves of its cost

    cost = decode_blocks + decode_active_request_weight * active requests

with the full blocks of active sequences and of this one, each counted for itself. Booked at the choice, freed
at the end, and forgotten after 300 s in sweeps each 60 s, as in `dynamo_kv`. Its conditional disaggregation
(short prompts are prefilled by the decode worker) is experimental and off by default: left out.
"""

from __future__ import annotations

from typing import NamedTuple

from dispatcher.simulation.policies.base import Arrival, Policy, World
from dispatcher.simulation.policies.picking import least, sampled

EXPIRY_S = 300.0
SWEEP_S = 60.0


class _Booked(NamedTuple):
    at_s: float
    node: int
    blocks: int


class DynamoDecode(Policy):
    """Weights as the original's defaults."""

    name = "dynamo_decode"
    poll_s = 0.0
    wants_kv_events = False
    kv_event_delay_s = 0.0
    binds_late = True

    def __init__(self, *, decode_active_request_weight: float = 0.0, temperature: float = 0.0) -> None:
        self._request_weight = decode_active_request_weight
        self._temperature = temperature

    def start(self, world: World) -> None:
        """Begin with idle nodes."""
        self._world = world
        self._blocks = [0] * world.nodes
        self._requests = [0] * world.nodes
        self._booked: dict[int, _Booked] = {}
        self._sweep_at = SWEEP_S

    def choose(self, arrival: Arrival) -> int:
        """Return the node with the least cost, and book the request there."""
        world = self._world
        if world.now_s >= self._sweep_at:
            self._sweep()
        own = len(arrival.blocks)
        costs = [
            blocks + own + self._request_weight * requests
            for blocks, requests in zip(self._blocks, self._requests, strict=True)
        ]
        if self._temperature > 0:
            node = sampled(costs, self._temperature, world.rng)
        else:
            node = least(costs, world.rng)
        self._blocks[node] += own
        self._requests[node] += 1
        self._booked[arrival.number] = _Booked(world.now_s, node, own)
        return node

    def finished(self, arrival: Arrival, node: int) -> None:
        """Release the blocks; nothing to do for a request that expired."""
        if arrival.number in self._booked:
            self._free(arrival.number)

    def _free(self, number: int) -> None:
        booked = self._booked.pop(number)
        self._blocks[booked.node] -= booked.blocks
        self._requests[booked.node] -= 1

    def _sweep(self) -> None:
        now_s = self._world.now_s
        self._sweep_at = now_s + SWEEP_S
        for number in [number for number, one in self._booked.items() if one.at_s <= now_s - EXPIRY_S]:
            self._free(number)

    def for_decode(self) -> Policy:
        """The same."""
        return DynamoDecode(decode_active_request_weight=self._request_weight, temperature=self._temperature)
