"""What a fleet simulator and a routing policy see of each other: arrivals, polled loads, KV events, choices.

The policies beside this module are the field's, each after its original. They bind at once: `choose` names
the node at the moment of arrival. A policy sees only what its original would: loads as old as its poll, KV
events as late as they travel, and otherwise its own accounting of what it routed. Ours (late binding) isn't
one of these.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol


@dataclass(frozen=True, slots=True)
class Arrival:
    """One request as a router sees it.

    `blocks` holds the hash of each full block of `world.block_tokens` prompt tokens, chained: equal hash,
    equal prefix. `output_tokens` is the length of the answer, which no router knows: only for oracles.
    `deadline_s` and `ttft_slo_s` are durations from `at_s`.
    """

    number: int
    at_s: float
    prompt_tokens: int
    output_tokens: int
    blocks: tuple[int, ...]
    session: str = ""
    priority: int = 50
    deadline_s: float | None = None
    ttft_slo_s: float | None = None
    tenant: str = ""


@dataclass(slots=True)
class Signal:
    """One node's load as last polled by this policy: up to `poll_s` old.

    `waiting_tokens` are uncached prompt tokens queued or being prefilled, `active_blocks` the KV blocks held
    by running sequences.
    """

    at_s: float
    running: int
    waiting: int
    waiting_tokens: int
    active_blocks: int
    total_blocks: int


class World(Protocol):
    """What a policy may ask the simulator. `rng` is the policy's only source of chance."""

    nodes: int
    block_tokens: int
    now_s: float
    rng: random.Random

    def signal(self, node: int) -> Signal:
        """Return the node's load as of the last poll."""

    def speed(self, node: int) -> float:
        """Return the node's speed (1: the profile's), for policies whose originals have one for each node."""

    def prefill_s(self, uncached: int, cached: int) -> float:
        """Return the profile's seconds to prefill, for policies whose originals have a fitted model."""


class Policy(Protocol):
    """A router. Subclasses override what their original listens to; the rest does nothing.

    `poll_s` is the age that signals may have, 0 for a policy that never polls. KV events are delivered
    `kv_event_delay_s` after they happened, and only when `wants_kv_events`.

    Where prefill and decode are apart there is one for each, and each sees its own nodes only: the one for
    prefill learns of a first token and of the end when the prompt is computed. The one for decode chooses at
    the arrival, before the other, or with `binds_late` when the prompt is computed.
    """

    name: str
    poll_s: float
    wants_kv_events: bool
    kv_event_delay_s: float
    binds_late: bool = False

    def start(self, world: World) -> None:
        """Begin with nothing known, for a fleet of `world.nodes`; called once, before all else."""

    def choose(self, arrival: Arrival) -> int:
        """Return the index of the node that gets the request; account for it at once."""

    def for_decode(self) -> Policy:
        """Return what the same router chooses decode nodes by; nothing has begun."""
        ...

    def wants_prefill(self, arrival: Arrival, node: int) -> bool:
        """Tell of the request last sent to a decode node whether a prefill node computes its prompt."""
        return True

    def first_token(self, arrival: Arrival, node: int) -> None:
        """Learn that the request's prefill ended."""
        return

    def finished(self, arrival: Arrival, node: int) -> None:
        """Learn that the request's answer ended; `first_token` came before."""
        return

    def stored(self, node: int, blocks: Sequence[int]) -> None:
        """Learn that the node's cache holds these blocks."""
        return

    def removed(self, node: int, blocks: Sequence[int]) -> None:
        """Learn that the node's cache evicted these blocks."""
        return
