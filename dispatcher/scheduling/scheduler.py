"""The scheduler: which node gets a request, and whether now or later.

It holds what a policy looks at: the nodes worth a prediction, what each holds of the prompt, and how long it
is predicted to take there. Which of them is best, a policy says (`policies`).
"""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from dispatcher.protocol.assignment import Envelope
from dispatcher.protocol.explanation import Bar, Rule
from dispatcher.protocol.handoff import Stage
from dispatcher.protocol.node import Medium, Role
from dispatcher.scheduling.batch_prices import FEWEST, BatchPrices
from dispatcher.scheduling.batches import Batches
from dispatcher.scheduling.choice import (
    MOST_HOLDERS,
    STEP_TOKENS,
    Capacity,
    Choice,
    Planned,
    SchedulingParameters,
)
from dispatcher.scheduling.fleet import FULL, KV_BYTES_PER_TOKEN, STALE_S, Fleet, NodeState
from dispatcher.scheduling.policies import ASKS_FOR_ROOM, POLICIES, prefill_cost
from dispatcher.scheduling.prefix_index import Match, PrefixIndex
from dispatcher.scheduling.stages import DECODE_POLICIES, choose_decode

ALL_LOOKED_AT = 32
"""Fleets up to this size are looked at whole."""
MOST_SAMPLED = 64
"""About so many nodes are asked whether they are busy."""
LOAD_S_PER_TOKEN: Mapping[Medium, float] = {
    Medium.CPU: KV_BYTES_PER_TOKEN / 20e9,
    Medium.DISK: KV_BYTES_PER_TOKEN / 5e9,
    Medium.EXTERNAL: KV_BYTES_PER_TOKEN / 3e9,
}
"""By 16 lanes of PCIe 4 (20 GB/s in practice), one NVMe (5 GB/s), a 25 Gbit/s network (3 GB/s)."""


KEPT_BLOCKS = 1_000_000
"""Blocks of envelopes kept decoded: about 120 MB at most, whatever the length of each prompt."""


class _Decoded:
    """The routing blocks of the envelopes looked at last, bounded by blocks: one prompt may have 65,536."""

    def __init__(self) -> None:
        self._kept: dict[tuple[str, ...], tuple[bytes, ...]] = {}
        self._blocks = 0

    def __call__(self, hashes: tuple[str, ...]) -> tuple[bytes, ...]:
        """The routing blocks of an envelope, as the index keeps them."""
        blocks = self._kept.pop(hashes, None)
        if blocks is None:
            blocks = tuple(map(bytes.fromhex, hashes))
            self._blocks += len(blocks)
        self._kept[hashes] = blocks
        while self._blocks > KEPT_BLOCKS:
            self._blocks -= len(self._kept.pop(next(iter(self._kept))))
        return blocks


blocks_of = _Decoded()


class Scheduler:
    """Chooses nodes for one pool.

    Args:
        healthy_s: the leader's healthy time, by which a report's age counts.
        batches: what waits to be handed over together, where anything does.
    """

    def __init__(
        self,
        fleet: Fleet,
        index: PrefixIndex,
        *,
        policy: str = "prefill_cost",
        decode_policy: str = "least_kv",
        parameters: SchedulingParameters | None = None,
        rng: random.Random,
        healthy_s: Callable[[], float] = lambda: 0.0,
        now_s: Callable[[], float] = lambda: 0.0,
        batches: Batches[Any] | None = None,
    ) -> None:
        self.fleet = fleet
        self.index = index
        self.parameters = parameters if parameters is not None else SchedulingParameters()
        self.policy, self.decode_policy = policy, decode_policy
        self._policy = POLICIES[policy]
        self._decode_policy = DECODE_POLICIES[decode_policy]
        self._asks_for_room = policy in ASKS_FOR_ROOM
        self._rng = rng
        self._healthy_s = healthy_s
        self._now_s = now_s
        self._batches = batches
        self._turn = 0
        self._chooses_for_suspect = False
        self._batch = BatchPrices(self, rng)

    def begin_round(self) -> None:
        """Begin a round of choices: what was priced for the last one counts no more."""
        self._batch.clear()

    def is_prepared(self, ref: str) -> bool:
        """Whether a request's prices are known."""
        return ref in self._batch

    def wants_batch(self, model: str) -> bool:
        """Whether many requests of `model` had better be priced together."""
        return (
            self._policy is prefill_cost
            and len(self.fleet.serving(model)) > ALL_LOOKED_AT
            and not self.index.has_slower
        )

    def prepare(self, envelopes: Sequence[Envelope]) -> None:
        """Price the requests whose turns come next together, those of one model that may go anywhere."""
        plain = [one for one in envelopes if not one.lora]
        if len(plain) >= FEWEST:
            self._batch.prepare(plain, [blocks_of(one.block_hashes) for one in plain])

    def prepared(self, envelope: Envelope, planned: Planned) -> Choice | None:
        """The choice for a request that was priced with others, while it holds."""
        return self._batch.take(envelope, planned)

    def note_choice(self, envelope: Envelope, choice: Choice) -> None:
        """Note a choice that was priced alone: others that were priced may share its prompt's beginning."""
        if choice.has_room:
            self._batch.note(blocks_of(envelope.block_hashes))

    def choose(
        self,
        envelope: Envelope,
        excluded: tuple[str, ...],
        planned: Planned,
        *,
        is_suspect: bool = False,
        is_decode: bool = False,
    ) -> Choice | None:
        """The best node for `envelope`; None when no eligible node could ever take it.

        An excluded node (one that already failed this request) is used only when no other is eligible. A
        suspect gets a node without another suspect or none, so that a second crash convicts one request.

        Args:
            is_decode: its prompt is computed elsewhere and can be had from there.
        """
        self._chooses_for_suspect = is_suspect
        if is_decode:
            return choose_decode(self, envelope, excluded, self._decode_policy)
        choice = self._policy(self, envelope, excluded, planned)
        if choice is None or choice.node.identity.role is not Role.PREFILL:
            return choice
        return choice._replace(stage=Stage.PREFILL) if self.generators(envelope) else choice

    def generators(self, envelope: Envelope) -> list[NodeState]:
        """Nodes that may answer a prompt that another computed: decode nodes, else fused ones."""
        if not self.fleet.is_split(envelope.model):
            return []
        nodes = [node for node in self.fleet.serving(envelope.model) if _may_take(node, envelope)]
        if self._chooses_for_suspect:
            nodes = [node for node in nodes if not node.suspect]
        decode = [node for node in nodes if node.identity.role is Role.DECODE]
        return decode or [node for node in nodes if node.identity.role is Role.FUSED]

    def longer_ms(self, envelope: Envelope) -> int:
        """How much later than its age a request's turn comes, for the prefill that it takes: milliseconds."""
        weight = self.parameters.size_weight
        serving = self.fleet.serving(envelope.model)
        if not weight or not serving:
            return 0
        node, blocks = serving[self._rng.randrange(len(serving))], 0
        # Any of those that hold the most will do: nothing is decided by it but the turn.
        for match in self.index.match(blocks_of(envelope.block_hashes), most_levels=1):
            name = self.index.name((match.nodes & -match.nodes).bit_length() - 1)
            if name in self.fleet.nodes:
                node, blocks = self.fleet.nodes[name], match.blocks
        seconds = self.prefill_s(node, envelope, self.hit_tokens(node, envelope, blocks), blocks)
        return int(1000 * weight * seconds)

    def has_room(self, model: str, *, is_decode: bool = False) -> bool:
        """Whether any node of `model` might be bound to now."""
        nodes = self.fleet.serving(model)
        if is_decode:
            return any(node.is_eligible and node.has_slot for node in nodes)
        if not self._asks_for_room:
            return any(node.is_eligible for node in nodes)
        if self._policy is not prefill_cost or len(nodes) > ALL_LOOKED_AT:
            return any(node.is_eligible and node.has_slot for node in nodes)
        now_s = self._now_s()
        return any(
            node.is_eligible and node.has_slot and node.queued_s(now_s) <= self.lookahead_s(node)
            for node in nodes
        )

    def capacity(self, model: str) -> Capacity:
        """The nodes of `model` that take work, and the share of them that are busy (of many, sampled)."""
        nodes = [node for node in self.fleet.serving(model) if node.is_eligible]
        looked_at = nodes[:: 1 + len(nodes) // MOST_SAMPLED]
        busy = sum(map(self._is_busy, looked_at)) / len(looked_at) if looked_at else 0.0
        return Capacity(nodes=len(nodes), busy=busy)

    def _is_busy(self, node: NodeState) -> bool:
        """Whether a node is known to have all that it may hold; one that told nothing is not."""
        if node.report is None:
            return False
        queued_s = node.queued_s(self._now_s())
        return not node.has_slot or queued_s > self.lookahead_s(node) or node.kv_share >= FULL

    # What policies are made of

    def matches(self, envelope: Envelope) -> list[Match]:
        """Who holds how much of the prompt."""
        return self.index.match(blocks_of(envelope.block_hashes))

    def hit_tokens(self, node: NodeState, envelope: Envelope, blocks: int) -> int:
        """Prompt tokens that `blocks` held blocks save: an engine always computes the last token."""
        if not blocks:
            return 0
        block = envelope.block_size or self.parameters.block_size
        engine_block = node.identity.engine_block_size or 1
        most = max(0, envelope.prompt_tokens - 1) // engine_block * engine_block
        return min(blocks * block, most)

    def queued_s(self, node: NodeState, model: str) -> float:
        """Predicted seconds of the prefill work that a node has before a new request."""
        seconds = node.queued_s(self._now_s())
        if self.is_stale(node):
            tokens = self.fleet.stale_tokens(model, self._healthy_s()) + node.unseen_tokens
            seconds = max(seconds, tokens * node.predictor.cost.token_s)
        return seconds

    def batch_wait_s(self, node: NodeState) -> float:
        """Seconds that a new assignment would wait for the others of its batch."""
        return self._batches.wait_s(node.name, self._now_s()) if self._batches is not None else 0.0

    def is_stale(self, node: NodeState) -> bool:
        """Whether a node's last report is too old to be believed alone."""
        return self._healthy_s() - node.last_heard_s > STALE_S

    def lookahead_s(self, node: NodeState) -> float:
        """The predicted work that a node's queue may hold: one engine step and the feedback's way."""
        parameters = self.parameters
        step_s = STEP_TOKENS * node.predictor.cost.token_s
        return min(max(step_s + 2 * node.feedback_s, parameters.lookahead_min_s), parameters.lookahead_max_s)

    def prefill_s(self, node: NodeState, envelope: Envelope, hit_tokens: int, blocks: int) -> float:
        """Predicted seconds of the request's own prefill, loading from slower tiers included."""
        cost = node.predictor.cost
        seconds = cost.seconds(envelope.prompt_tokens - hit_tokens, hit_tokens)
        if hit_tokens and blocks and self.index.has_slower:
            held = blocks_of(envelope.block_hashes)[:blocks]
            block = envelope.block_size or self.parameters.block_size
            for medium, count in self.index.slower_blocks(node.name, held).items():
                seconds += count * block * min(LOAD_S_PER_TOKEN[medium], cost.token_s)
        return seconds

    def eligible(self, envelope: Envelope, excluded: tuple[str, ...]) -> list[NodeState]:
        """Every node that may take `envelope`, with room or without."""
        serving = self.fleet.serving(envelope.model)
        nodes = [node for node in serving if _may_take(node, envelope)]
        if not nodes and not envelope.tokens_exact:
            # By its estimated length it fits nowhere: the engine counts, and says so if it is true.
            nodes = [node for node in serving if _serves(node, envelope)]
        if self._chooses_for_suspect:
            nodes = [node for node in nodes if not node.suspect]
        if excluded:
            nodes = [node for node in nodes if node.name not in excluded] or nodes
        if self._policy is not prefill_cost and self.fleet.is_split(envelope.model):
            # Only what predicts can tell when a decode node had better compute a prompt itself.
            return [node for node in nodes if node.identity.role is not Role.DECODE] or nodes
        return nodes

    def looked_at(
        self, envelope: Envelope, excluded: tuple[str, ...], matches: Sequence[Match]
    ) -> list[NodeState]:
        """The nodes worth a prediction: all of a small fleet; of a large one holders and random others."""
        serving = self.fleet.serving(envelope.model)
        if len(serving) <= ALL_LOOKED_AT or self._chooses_for_suspect:
            return self.eligible(envelope, excluded)
        chosen: dict[str, NodeState] = {}
        for name in self.index.holders(matches, MOST_HOLDERS, self._rng):
            node = self.fleet.nodes.get(name)
            if node is not None and name not in excluded and _may_take(node, envelope):
                chosen[name] = node
        sampled = 0
        draw, count = self._rng.random, len(serving)
        for _ in range(4 * self.parameters.sampled):
            node = serving[int(draw() * count)]
            if node.name not in chosen and node.name not in excluded and _may_take(node, envelope):
                chosen[node.name] = node
                sampled += 1
                if sampled == self.parameters.sampled:
                    break
        return list(chosen.values()) or self.eligible(envelope, excluded)

    def choice(
        self, node: NodeState, envelope: Envelope, *, has_room: bool, looked_at: int, rule: Rule
    ) -> Choice:
        """The choice of `node` by a policy that predicts nothing; its hits are told all the same."""
        blocks = self.index.depth(self.matches(envelope), node.name)
        hit = self.hit_tokens(node, envelope, blocks)
        return Choice(
            node=node,
            has_room=has_room,
            hit_tokens=hit,
            uncached_tokens=max(1, envelope.prompt_tokens - hit),
            wait_s=self.queued_s(node, envelope.model),
            prefill_s=self.prefill_s(node, envelope, hit, blocks),
            looked_at=looked_at,
            is_stale=self.is_stale(node),
            rule=rule,
        )

    def next_turn(self) -> int:
        """A counter for policies that take turns."""
        self._turn += 1
        return self._turn

    @property
    def healthy_s(self) -> float:
        """The leader's healthy time, by which a report's age counts."""
        return self._healthy_s()

    @property
    def now_s(self) -> float:
        """Monotonic seconds, by which what nodes have to compute counts down."""
        return self._now_s()

    @property
    def rng(self) -> random.Random:
        """Chance."""
        return self._rng


def bar_of(node: NodeState, envelope: Envelope, excluded: tuple[str, ...] = ()) -> Bar | None:
    """Why `envelope` can't go to a node that serves its model; None when it can."""
    report = node.report
    if node.cordoned:
        return Bar.CORDONED
    if not node.available:
        return Bar.GONE
    if not node.admitted:
        return Bar.NOT_ADMITTED
    if not node.breaker.admits:
        return Bar.ON_PROBATION
    if report is not None and not report.engine_ok:
        return Bar.ENGINE_DOWN
    if report is not None and report.draining:
        return Bar.DRAINING
    if node.identity.role is Role.VIT:
        return Bar.ROLE
    if envelope.lora and envelope.lora not in node.identity.loras:
        return Bar.LORA
    if envelope.prompt_tokens > node.longest_prompt():
        return Bar.TOO_LONG
    return Bar.EXCLUDED if node.name in excluded else None


def _may_take(node: NodeState, envelope: Envelope) -> bool:
    return _serves(node, envelope) and envelope.prompt_tokens <= node.longest_prompt()


def _serves(node: NodeState, envelope: Envelope) -> bool:
    return (
        node.is_eligible
        and node.identity.role is not Role.VIT
        and envelope.model in node.identity.models
        and (not envelope.lora or envelope.lora in node.identity.loras)
    )
