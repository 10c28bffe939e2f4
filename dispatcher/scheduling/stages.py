"""Where an answer is generated whose prompt another node computed.

A decode node is bound late: when the prompt is computed, by what the nodes hold then. Nobody waits for the
node with the most room while another can take the request: the prompt's blocks are only lent.
"""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from dispatcher.protocol.assignment import Envelope
from dispatcher.protocol.explanation import Rule
from dispatcher.protocol.handoff import Stage
from dispatcher.scheduling.choice import Choice
from dispatcher.scheduling.decode_policies import BY_NAME, DecodePolicy, kv_total, kv_used
from dispatcher.scheduling.fleet import KV_BYTES_PER_TOKEN, NodeState

if TYPE_CHECKING:
    from dispatcher.scheduling.scheduler import Scheduler

HOP_S = 0.01
"""From a computed prompt to its request at the next engine: two scripts and their ways."""
LINK_BYTES_PER_S = 25e9
"""What KV transfers reach between two hosts: half of a 400 Gbit/s link (NIXL over UCX)."""

TRANSFER_TOKEN_S = KV_BYTES_PER_TOKEN / LINK_BYTES_PER_S


def transfer_s(prompt_tokens: int) -> float:
    """Seconds from a computed prompt until another engine can go on from it."""
    return HOP_S + prompt_tokens * TRANSFER_TOKEN_S


def use_after(node: NodeState, tokens: int) -> float:
    """Share of a node's KV cache used with `tokens` more; of its requests, where it tells none."""
    total = kv_total(node)
    if total:
        return (kv_used(node) + tokens) / total
    return (len(node.held) + 1) / node.request_bound


def least_kv(nodes: Sequence[NodeState], tokens: int, rng: random.Random) -> NodeState | None:
    """The least KV use by capacity after it, of nodes that can hold it; then fewest requests, then chance."""
    roomy = [node for node in nodes if node.fits(tokens)]
    if not roomy:
        return None
    order = [(use_after(node, tokens), len(node.held), node) for node in roomy]
    best = min(order, key=lambda one: one[:2])[:2]
    tied = [node for use, held, node in order if (use, held) == best]
    return tied[0] if len(tied) == 1 else tied[rng.randrange(len(tied))]


DECODE_POLICIES: Mapping[str, DecodePolicy] = {"least_kv": least_kv, **BY_NAME}


def choose_decode(
    scheduler: Scheduler, envelope: Envelope, excluded: tuple[str, ...], policy: DecodePolicy
) -> Choice | None:
    """The node that generates the answer; when none can hold it, the least used one that has a slot."""
    nodes = scheduler.generators(envelope)
    nodes = [node for node in nodes if node.name not in excluded] or nodes
    if not nodes:
        return None
    with_slot = [node for node in nodes if node.has_slot]
    tokens = nodes[0].expected_tokens(envelope)
    node = policy(with_slot, tokens, scheduler.rng)
    rule = Rule.DECODE_POLICY
    if node is None:
        rule = Rule.LEAST_FULL
        node = min(with_slot or nodes, key=lambda node: use_after(node, tokens))
    return Choice(
        node=node,
        has_room=bool(with_slot),
        hit_tokens=max(0, envelope.prompt_tokens - 1),
        uncached_tokens=1,
        wait_s=0.0,
        prefill_s=0.0,
        looked_at=len(nodes),
        is_stale=scheduler.is_stale(node),
        stage=Stage.DECODE,
        rule=rule,
    )
