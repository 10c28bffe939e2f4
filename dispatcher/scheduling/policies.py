"""The policies: pure functions of the scheduler's view, a request and what already waits, to a `Choice`.

`prefill_cost` is FlexLB's own: it minimises the predicted time to the first token, counting what each node
holds in its cache and what it has queued, and lets a request wait for a busy node while that is predicted to
beat every other. The others are what routers commonly do; they choose without asking whether the node has
room, and queue there. `cost_based_prefill` and `shortest_ttft` are the original FlexLB's, by its constants
(`cost_based_prefill`).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, NamedTuple

from dispatcher.protocol.assignment import Envelope
from dispatcher.protocol.explanation import Rule
from dispatcher.protocol.node import Role
from dispatcher.scheduling.choice import Choice, Planned, Prices
from dispatcher.scheduling.fleet import STALE_S, NodeState
from dispatcher.scheduling.prefix_index import Match
from dispatcher.scheduling.prompt_queue import BURST_S
from dispatcher.scheduling.stages import transfer_s

if TYPE_CHECKING:
    from dispatcher.scheduling.scheduler import Scheduler

QUEUED_BOUND = 10_000
"""Requests queued at one node by policies that don't ask for room."""


def prefill_cost(
    scheduler: Scheduler, envelope: Envelope, excluded: tuple[str, ...], planned: Planned
) -> Choice | None:
    """Least predicted time to the first token, and least harm to those who decode."""
    if not excluded and (known := scheduler.prepared(envelope, planned)) is not None:
        return known
    matches = scheduler.matches(envelope)
    nodes = scheduler.looked_at(envelope, excluded, matches)
    if not nodes:
        return None
    choice = choose_least(
        scheduler, envelope, nodes, totals_of(scheduler, envelope, nodes, planned, matches), planned
    )
    scheduler.note_choice(envelope, choice)
    return choice


class Totals(NamedTuple):
    """What each of some nodes would cost: in all, tokens cached, wait and own prefill."""

    totals_s: list[float]
    hits: list[int]
    waits_s: list[float]
    prefills_s: list[float]


def choose_least(
    scheduler: Scheduler, envelope: Envelope, nodes: Sequence[NodeState], priced: Totals, planned: Planned
) -> Choice:
    """The node that costs least; of those that cost about as much who has most cached, then any."""
    totals, hits, waits, prefills = priced
    most = min(totals) * (1 + scheduler.parameters.near_tie)
    rule = Rule.LEAST_COST
    near = [at for at, total in enumerate(totals) if total <= most]
    if len(near) > 1:
        rule = Rule.MOST_CACHED
        most_cached = max([hits[at] for at in near])
        near = [at for at in near if hits[at] == most_cached]
        if len(near) > 1:
            rule = Rule.CHANCE
            near = [near[scheduler.rng.randrange(len(near))]]
    at = near[0]
    node, hit, wait_s = nodes[at], hits[at], waits[at]
    room = node.has_space(envelope) and not planned.get(node.name) and wait_s <= scheduler.lookahead_s(node)
    return Choice(
        node=node,
        has_room=room,
        hit_tokens=hit,
        uncached_tokens=max(1, envelope.prompt_tokens - hit),
        wait_s=wait_s,
        prefill_s=prefills[at],
        looked_at=len(nodes),
        is_stale=scheduler.is_stale(node),
        rule=rule,
        candidates=nodes,
    )


def totals_of(
    scheduler: Scheduler,
    envelope: Envelope,
    nodes: Sequence[NodeState],
    planned: Planned,
    matches: Sequence[Match],
) -> Totals:
    """What each of `nodes` would cost, as `price` tells it.

    Written out: it is run for every candidate of every decision.
    """
    parameters = scheduler.parameters
    now_s, fresh_s = scheduler.now_s, scheduler.healthy_s - STALE_S
    work, stall_weight = 1 + parameters.work_weight, parameters.stall_weight
    burst_weight, pressure_s = parameters.burst_weight / BURST_S, parameters.pressure_s
    prompt = envelope.prompt_tokens
    moved_s = transfer_s(prompt) if scheduler.generators(envelope) else 0.0
    depths = scheduler.index.depths(matches, nodes)
    exp = math.exp
    answers, shape = None, None
    alone_s = token_s = answer_s = 0.0
    tokens = 0
    usual: int | None = None
    totals, hits, waits, prefills = [], [], [], []
    for node in nodes:
        load = node.load
        predictor = node.predictor
        if predictor.shape is not shape:
            shape = predictor.shape
            alone_s, token_s = shape.cost.seconds(prompt, 0), shape.cost.token_s
        if node.answers is not answers:
            answers = node.answers
            answer_s = parameters.tpot_slo_s * answers.typical(envelope.max_tokens)
            tokens = prompt + answers.expected(envelope.max_tokens)
        hit = 0
        if depths and (blocks := depths.get(node.name)):
            hit = scheduler.hit_tokens(node, envelope, blocks)
            prefill_s = scheduler.prefill_s(node, envelope, hit, blocks)
        else:
            prefill_s = predictor.scale * alone_s
        elapsed_s = now_s - load.since_s
        wait_s = load.prompts_s
        if elapsed_s > 0.0 and wait_s:
            wait_s -= elapsed_s if elapsed_s < load.most_s else load.most_s
            if wait_s < 0.0:
                wait_s = 0.0
            if elapsed_s > load.overdue_s:
                wait_s += elapsed_s - load.overdue_s
        if load.unknown_tokens:
            wait_s += load.unknown_tokens * token_s * predictor.scale
        if node.last_heard_s < fresh_s:
            if usual is None:
                usual = scheduler.fleet.stale_tokens(envelope.model, scheduler.healthy_s)
            wait_s = max(wait_s, (usual + node.unseen_tokens) * token_s * predictor.scale)
        if load.room_tokens < (prompt + 1 if load.is_prefill else tokens):
            wait_s += load.slot_wait_s
        total = wait_s + prefill_s * work + pressure_s * load.pressure
        if load.decoding:
            total += stall_weight * load.decoding * prefill_s * prefill_s / answer_s
        burst = load.burst
        if burst.squares:
            total += burst_weight * burst.squares * exp((burst.at_s - now_s) / BURST_S)
        if moved_s and load.is_prefill:
            total += moved_s
        if planned:
            total += planned.get(node.name, 0.0)
        totals.append(total)
        hits.append(hit)
        waits.append(wait_s)
        prefills.append(prefill_s)
    return Totals(totals, hits, waits, prefills)


def price(
    scheduler: Scheduler,
    envelope: Envelope,
    nodes: Sequence[NodeState],
    planned: Planned,
    matches: Sequence[Match],
) -> Prices:
    """What each of `nodes` would cost, in their order, part by part."""
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
