"""What a decision was made of, as `flexlb explain` tells it: pure, from what the scheduler saw when it chose.

It must be made before the choice is reserved: the request's own weight would show otherwise. What it looks
at is bounded, however large the fleet is.
"""

from __future__ import annotations

import heapq
from collections import Counter
from collections.abc import Iterable, Sequence

from dispatcher.protocol.assignment import Envelope
from dispatcher.protocol.explanation import Bar, BarredNode, Candidate, Doubt, Explanation
from dispatcher.protocol.handoff import Stage
from dispatcher.protocol.names import Attempt
from dispatcher.protocol.node import Role
from dispatcher.scheduling.choice import Choice, Planned, Priced
from dispatcher.scheduling.fleet import NodeState
from dispatcher.scheduling.policies import price
from dispatcher.scheduling.scheduler import Scheduler, bar_of
from dispatcher.scheduling.stages import use_after
from dispatcher.scheduling.window import Waiting, Waits

MOST_CANDIDATES = 8
"""The best so many are told, and the chosen one."""
MOST_ASKED = 64
"""About so many nodes are asked why they can't be chosen, or priced where the policy had no prices."""
MOST_NAMED = 8
"""Of nodes that can't be chosen, and of those excluded."""
DIGITS = 3
"""Of a millisecond."""


def explain(
    scheduler: Scheduler,
    waiting: Waiting,
    choice: Choice,
    planned: Planned,
    *,
    waits: Waits,
    attempt: Attempt,
    now_ms: int,
) -> Explanation:
    """Tell why `choice` was made for `waiting`."""
    envelope = waiting.envelope
    serving = scheduler.fleet.serving(envelope.model)
    is_decode = choice.stage is Stage.DECODE
    candidates = (
        _by_kv(scheduler, envelope, choice)
        if is_decode
        else _by_price(scheduler, envelope, waiting.excluded, choice, planned)
    )
    asked, barred = _barred(scheduler, waiting, serving, choice)
    return Explanation(
        ref=envelope.ref,
        id=envelope.id,
        tenant=envelope.tenant,
        model=envelope.model,
        node=choice.node.name,
        epoch=attempt.epoch,
        n=attempt.n,
        at_ms=now_ms,
        policy=scheduler.decode_policy if is_decode else scheduler.policy,
        rule=choice.rule,
        stage=choice.stage,
        is_priced=bool(choice.candidates),
        near_tie=scheduler.parameters.near_tie if choice.candidates else 0.0,
        prompt_tokens=envelope.prompt_tokens,
        max_tokens=envelope.max_tokens,
        blocks=len(envelope.block_hashes),
        block_size=envelope.block_size,
        priority=envelope.priority,
        waited_ms=max(0, now_ms - envelope.appended_ms),
        read_ms=max(0, waiting.entered_ms - envelope.appended_ms) if waiting.entered_ms else 0,
        put_off_ms=waits.put_off_ms,
        busy_rounds=waits.busy,
        busy_node=waits.busy_node,
        unplaced_rounds=waits.unplaced,
        failures=waiting.failures,
        excluded=waiting.excluded[-MOST_NAMED:],
        serving=len(serving),
        looked_at=choice.looked_at,
        candidates=candidates,
        asked=asked,
        barred={why.value: count for why, count in Counter(one.why for one in barred).items()},
        barred_nodes=tuple(barred[:MOST_NAMED]),
        doubts=tuple(_doubts(scheduler, envelope, choice)),
    )


def _by_price(
    scheduler: Scheduler,
    envelope: Envelope,
    excluded: tuple[str, ...],
    choice: Choice,
    planned: Planned,
) -> tuple[Candidate, ...]:
    nodes = choice.candidates
    if not nodes:
        others = [node for node in scheduler.eligible(envelope, excluded) if node is not choice.node]
        nodes = [choice.node, *others[:: 1 + len(others) // MOST_ASKED]]
    prices = price(scheduler, envelope, nodes, planned, scheduler.matches(envelope))
    best = heapq.nsmallest(MOST_CANDIDATES, prices, key=lambda one: one[0])
    if not any(one[4] is choice.node for one in best):
        best[-1:] = [one for one in prices if one[4] is choice.node]
    tied_s = best[0][0] * (1 + scheduler.parameters.near_tie) if choice.candidates else float("-inf")
    return tuple(_candidate(scheduler, envelope, Priced._make(one), tied_s) for one in best)


def _candidate(scheduler: Scheduler, envelope: Envelope, one: Priced, tied_s: float) -> Candidate:
    node = one.node
    return Candidate(
        node=node.name,
        cost_ms=_ms(one.total_s),
        matched_blocks=one.blocks,
        cached_tokens=one.hit_tokens,
        compute_tokens=max(1, envelope.prompt_tokens - one.hit_tokens),
        queue_ms=_ms(one.wait_s - one.slot_s),
        slot_ms=_ms(one.slot_s),
        planned_ms=_ms(one.planned_s),
        prefill_ms=_ms(one.prefill_s),
        work_ms=_ms(one.work_s),
        stall_ms=_ms(one.stall_s),
        burst_ms=_ms(one.burst_s),
        pressure_ms=_ms(one.pressure_s),
        transfer_ms=_ms(one.transfer_s),
        queued_tokens=node.queued_tokens,
        held=len(node.held),
        most=node.request_bound,
        kv_use=round(node.kv_share, DIGITS),
        is_tied=one.total_s <= tied_s,
        has_room=not (one.slot_s or one.planned_s) and one.wait_s <= scheduler.lookahead_s(node),
        is_stale=scheduler.is_stale(node),
    )


def _by_kv(scheduler: Scheduler, envelope: Envelope, choice: Choice) -> tuple[Candidate, ...]:
    nodes = [node for node in scheduler.generators(envelope) if node is not choice.node]
    nodes = [choice.node, *nodes[:: 1 + len(nodes) // MOST_ASKED]]
    tokens = choice.node.expected_tokens(envelope)
    uses = [(use_after(node, tokens), node) for node in nodes]
    best = heapq.nsmallest(MOST_CANDIDATES, uses, key=lambda one: one[0])
    if not any(node is choice.node for _, node in best):
        best[-1:] = uses[:1]
    return tuple(
        Candidate(
            node=node.name,
            held=len(node.held),
            most=node.request_bound,
            kv_use=round(use, DIGITS),
            is_tied=use == best[0][0],
            has_room=node.has_slot and node.fits(tokens),
            is_stale=scheduler.is_stale(node),
        )
        for use, node in best
    )


def _barred(
    scheduler: Scheduler, waiting: Waiting, serving: Sequence[NodeState], choice: Choice
) -> tuple[int, list[BarredNode]]:
    """How many of the nodes that serve the model were asked, and those that can't be chosen."""
    asked = serving[:: 1 + len(serving) // MOST_ASKED]
    found = []
    for node in asked:
        why = bar_of(node, waiting.envelope, waiting.excluded)
        if why is None and waiting.crashed and node.suspect:
            why = Bar.SUSPECT
        if why is None and choice.stage is Stage.DECODE and node.identity.role is Role.PREFILL:
            why = Bar.ROLE
        if why is not None and node is not choice.node:
            found.append(BarredNode(node=node.name, why=why))
    return len(asked), found


def _doubts(scheduler: Scheduler, envelope: Envelope, choice: Choice) -> Iterable[Doubt]:
    if choice.is_stale:
        yield Doubt.STALE_LOAD
    if not envelope.tokens_exact:
        yield Doubt.ESTIMATED_LENGTH
    if not envelope.block_hashes:
        yield Doubt.NO_BLOCKS
    elif envelope.text_hashed:
        yield Doubt.TEXT_ONLY
    elif envelope.block_size != scheduler.parameters.block_size:
        yield Doubt.OTHER_BLOCKS
    if not scheduler.index.blocks:
        yield Doubt.EMPTY_REGISTRY


def _ms(seconds: float) -> float:
    return round(1000 * seconds, DIGITS)
