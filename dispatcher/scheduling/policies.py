"""The policies: pure functions of the scheduler's view, a request and what already waits, to a `Choice`.

`prefill_cost` is FlexLB's own: it minimises the predicted time to the first token, counting what each node
holds in its cache and what it has queued, and lets a request wait for a busy node while that is predicted to
beat every other. The others are what routers commonly do; they choose without asking whether the node has
room, and queue there. `cost_based_prefill` and `shortest_ttft` are the original FlexLB's, by its constants
(`cost_based_prefill`).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from operator import itemgetter
from typing import TYPE_CHECKING

from dispatcher.protocol.assignment import Envelope
from dispatcher.protocol.explanation import Rule
from dispatcher.protocol.node import Role
from dispatcher.scheduling.choice import Choice, Planned, Prices
from dispatcher.scheduling.fleet import NodeState
from dispatcher.scheduling.prefix_index import Match
from dispatcher.scheduling.stages import transfer_s

if TYPE_CHECKING:
    from dispatcher.scheduling.scheduler import Scheduler

QUEUED_BOUND = 10_000
"""Requests queued at one node by policies that don't ask for room."""
_TOTAL, _HIT = itemgetter(0), itemgetter(1)
"""Of a price."""


def prefill_cost(
    scheduler: Scheduler, envelope: Envelope, excluded: tuple[str, ...], planned: Planned
) -> Choice | None:
    """Least predicted time to the first token, and least harm to those who decode."""
    matches = scheduler.matches(envelope)
    nodes = scheduler.looked_at(envelope, excluded, matches)
    if not nodes:
        return None
    prices = price(scheduler, envelope, nodes, planned, matches)
    best = min(map(_TOTAL, prices))
    near = [one for one in prices if one[0] <= best * (1 + scheduler.parameters.near_tie)]
    rule = Rule.LEAST_COST
    if len(near) > 1:
        rule = Rule.MOST_CACHED
        most_cached = max(map(_HIT, near))
        near = [one for one in near if one[1] == most_cached]
        if len(near) > 1:
            rule = Rule.CHANCE
            near = [near[scheduler.rng.randrange(len(near))]]
    _, hit, wait_s, prefill_s, node, *_ = near[0]
    room = node.has_space(envelope) and not planned.get(node.name) and wait_s <= scheduler.lookahead_s(node)
    return Choice(
        node=node,
        has_room=room,
        hit_tokens=hit,
        uncached_tokens=max(1, envelope.prompt_tokens - hit),
        wait_s=wait_s,
        prefill_s=prefill_s,
        looked_at=len(nodes),
        is_stale=scheduler.is_stale(node),
        rule=rule,
        prices=prices,
    )


def price(
    scheduler: Scheduler,
    envelope: Envelope,
    nodes: Sequence[NodeState],
    planned: Planned,
    matches: Sequence[Match],
) -> Prices:
    """What each of `nodes` would cost, in their order."""
    parameters = scheduler.parameters
    now_s = scheduler.now_s
    work_weight, stall_weight = parameters.work_weight, parameters.stall_weight
    burst_weight, pressure_weight = parameters.burst_weight, parameters.pressure_s
    depth = scheduler.index.depth
    moved_s = transfer_s(envelope.prompt_tokens) if scheduler.generators(envelope) else 0.0
    prices = []
    for node in nodes:
        name = node.name
        blocks = depth(matches, name) if matches else 0
        hit = scheduler.hit_tokens(node, envelope, blocks) if blocks else 0
        prefill_s = scheduler.prefill_s(node, envelope, hit, blocks)
        slot_s = 0.0 if node.has_space(envelope) else node.slot_wait_s
        wait_s = scheduler.queued_s(node, envelope.model) + slot_s
        planned_s = planned.get(name, 0.0)
        work_s = prefill_s * work_weight
        answer_s = parameters.tpot_slo_s * node.answers.typical(envelope.max_tokens)
        stall_s = stall_weight * node.decoding * prefill_s * prefill_s / answer_s
        burst_s = burst_weight * node.burst.seconds(now_s)
        k = node.fullness
        pressure_s = pressure_weight * k / (1 - k)
        hop_s = moved_s if moved_s and node.identity.role is Role.PREFILL else 0.0
        total = wait_s + planned_s + (prefill_s + work_s) + stall_s + burst_s + pressure_s + hop_s
        prices.append(
            (
                total,
                hit,
                wait_s,
                prefill_s,
                node,
                blocks,
                slot_s,
                planned_s,
                work_s,
                stall_s,
                burst_s,
                pressure_s,
                hop_s,
            )
        )
    return prices


def least_outstanding_tokens(
    scheduler: Scheduler, envelope: Envelope, excluded: tuple[str, ...], planned: Planned
) -> Choice | None:
    """The fewest tokens bound per running slot, among nodes with room; caches are not looked at."""
    nodes = scheduler.eligible(envelope, excluded)
    if not nodes:
        return None
    roomy = [node for node in nodes if node.has_space(envelope)]
    loads = [node.held_tokens / node.identity.max_running for node in roomy or nodes]
    least = min(loads)
    tied = [node for node, load in zip(roomy or nodes, loads, strict=True) if load <= least]
    node = tied[0] if len(tied) == 1 else tied[scheduler.rng.randrange(len(tied))]
    rule = Rule.FEWEST_TOKENS if len(tied) == 1 else Rule.CHANCE
    return scheduler.choice(node, envelope, has_room=bool(roomy), looked_at=len(nodes), rule=rule)


def choose_random(
    scheduler: Scheduler, envelope: Envelope, excluded: tuple[str, ...], planned: Planned
) -> Choice | None:
    """Any eligible node, uniformly."""
    nodes = _unfilled(scheduler, envelope, excluded)
    if not nodes:
        return None
    node = nodes[scheduler.rng.randrange(len(nodes))]
    return scheduler.choice(node, envelope, has_room=True, looked_at=len(nodes), rule=Rule.CHANCE)


def round_robin(
    scheduler: Scheduler, envelope: Envelope, excluded: tuple[str, ...], planned: Planned
) -> Choice | None:
    """One after the other."""
    nodes = _unfilled(scheduler, envelope, excluded)
    if not nodes:
        return None
    node = nodes[scheduler.next_turn() % len(nodes)]
    return scheduler.choice(node, envelope, has_room=True, looked_at=len(nodes), rule=Rule.TURN)


def round_robin_lowest_concurrency(
    scheduler: Scheduler, envelope: Envelope, excluded: tuple[str, ...], planned: Planned
) -> Choice | None:
    """One after the other, among those that hold the fewest requests."""
    nodes = _unfilled(scheduler, envelope, excluded)
    if not nodes:
        return None
    fewest = min(len(node.held) for node in nodes)
    lowest = [node for node in nodes if len(node.held) == fewest]
    node = lowest[scheduler.next_turn() % len(lowest)]
    rule = Rule.FEWEST_REQUESTS if len(lowest) == 1 else Rule.TURN
    return scheduler.choice(node, envelope, has_room=True, looked_at=len(nodes), rule=rule)


def shortest_ttft(
    scheduler: Scheduler, envelope: Envelope, excluded: tuple[str, ...], planned: Planned
) -> Choice | None:
    """Of the best share by predicted queue and prefill, the one chosen longest ago (RTP-LLM's FlexLB)."""
    nodes = _unfilled(scheduler, envelope, excluded)
    if not nodes:
        return None
    matches = scheduler.matches(envelope)

    def ttft_s(node: NodeState) -> float:
        blocks = scheduler.index.depth(matches, node.name)
        hit = scheduler.hit_tokens(node, envelope, blocks)
        return scheduler.queued_s(node, envelope.model) + scheduler.prefill_s(node, envelope, hit, blocks)

    ranked = sorted(nodes, key=lambda node: (ttft_s(node), node.chosen))
    pool = ranked[: scheduler.parameters.ttft_pool.of(len(ranked))]
    node = min(pool, key=lambda node: node.chosen)
    node.chosen = scheduler.next_turn()
    rule = Rule.LEAST_COST if len(pool) == 1 else Rule.LONGEST_UNCHOSEN
    return scheduler.choice(node, envelope, has_room=True, looked_at=len(nodes), rule=rule)


def cost_based_prefill(
    scheduler: Scheduler, envelope: Envelope, excluded: tuple[str, ...], planned: Planned
) -> Choice | None:
    """Any of the nodes with nearly the least wait and prefill (RTP-LLM's FlexLB, `COST_BASED_PREFILL`).

    While every node's queue is full the request waits here; the original answers with an error then.
    """
    nodes = scheduler.eligible(envelope, excluded)
    if not nodes:
        return None
    constants = scheduler.parameters.cost_based
    for node in nodes:
        node.is_shut = constants.is_shut(node.pending, was_shut=node.is_shut)
    unshut = [node for node in nodes if not node.is_shut]
    if not unshut:
        return scheduler.choice(
            min(nodes, key=lambda node: node.pending),
            envelope,
            has_room=False,
            looked_at=len(nodes),
            rule=Rule.FEWEST_REQUESTS,
        )
    matches = scheduler.matches(envelope)
    waits_s, prefills_s = [], []
    for node in unshut:
        blocks = scheduler.index.depth(matches, node.name)
        hit = scheduler.hit_tokens(node, envelope, blocks)
        waits_s.append(scheduler.queued_s(node, envelope.model) + scheduler.batch_wait_s(node))
        prefills_s.append(scheduler.prefill_s(node, envelope, hit, blocks))
    place = constants.choose(waits_s, [node.pending for node in unshut], prefills_s, scheduler.rng)
    return scheduler.choice(
        unshut[place], envelope, has_room=True, looked_at=len(nodes), rule=Rule.NEARLY_LEAST_WAIT
    )


def _unfilled(scheduler: Scheduler, envelope: Envelope, excluded: tuple[str, ...]) -> list[NodeState]:
    return [node for node in scheduler.eligible(envelope, excluded) if len(node.held) < QUEUED_BOUND]


Policy = Callable[["Scheduler", Envelope, tuple[str, ...], Planned], Choice | None]

POLICIES: Mapping[str, Policy] = {
    "prefill_cost": prefill_cost,
    "least_outstanding_tokens": least_outstanding_tokens,
    "random": choose_random,
    "round_robin": round_robin,
    "round_robin_lowest_concurrency": round_robin_lowest_concurrency,
    "shortest_ttft": shortest_ttft,
    "cost_based_prefill": cost_based_prefill,
}
ASKS_FOR_ROOM = frozenset({"prefill_cost", "least_outstanding_tokens"})
"""Policies that bind late; the others queue at the node."""
