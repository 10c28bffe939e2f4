"""The fleet as the leader knows it: who is there, what each holds, who can take more.

What a node holds is counted from our own assignments and endings, which are exact and immediate;
its reports say what the engine does with them. A node's queue is bounded: beyond what its engine
runs at once it gets a small lookahead, everything else waits in the leader (late binding).
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, field

from dispatcher.protocol.assignment import Envelope
from dispatcher.protocol.node import NodeIdentity, NodeReport

LOOKAHEAD_SHARE = 0.125
"""Requests bound beyond an engine's running slots, as a share of them; at least one."""


@dataclass(kw_only=True)
class NodeState:
    """One node. `held` maps refs to the tokens they cost here.

    It is bound to only once the leader has entered it into the shared sets (`admitted`): a new leader
    finds the work of exactly those.
    """

    identity: NodeIdentity
    report: NodeReport | None = None
    last_heard_s: float = 0.0
    available: bool = True
    admitted: bool = False
    held: dict[str, int] = field(default_factory=dict)
    held_tokens: int = 0

    @property
    def name(self) -> str:
        """The node's name."""
        return self.identity.node

    @property
    def request_bound(self) -> int:
        """The most requests bound to it at once."""
        running = self.identity.max_running
        return running + max(1, math.floor(running * LOOKAHEAD_SHARE))

    @property
    def is_eligible(self) -> bool:
        """Whether new work may go there at all."""
        if not self.available or not self.admitted:
            return False
        return self.report is None or (self.report.engine_ok and not self.report.draining)

    def can_take(self, cost_tokens: int) -> bool:
        """Whether it has room now. An idle node may always try a request that fits its context."""
        if len(self.held) >= self.request_bound:
            return False
        capacity = self.identity.kv_total_tokens
        return not capacity or not self.held or self.held_tokens + cost_tokens <= capacity

    def longest_prompt(self) -> int:
        """The longest prompt it can hold, in tokens."""
        identity = self.identity
        if identity.kv_total_tokens:
            return min(identity.max_model_len, identity.kv_total_tokens)
        return identity.max_model_len


class Fleet:
    """All nodes, with what the leader has bound to them. `version` counts changes of who is there."""

    def __init__(self) -> None:
        self.nodes: dict[str, NodeState] = {}
        self._by_model: dict[str, list[NodeState]] = {}
        self.version = 0

    def admit(self, identity: NodeIdentity, now_s: float) -> NodeState:
        """Enter a node, or replace its incarnation; what it holds is kept for the leader to move."""
        known = self.nodes.get(identity.node)
        node = NodeState(identity=identity, last_heard_s=now_s)
        if known is not None:
            node.held, node.held_tokens = known.held, known.held_tokens
        self.nodes[identity.node] = node
        self._index()
        return node

    def forget(self, name: str) -> None:
        """Remove a node for good."""
        if self.nodes.pop(name, None) is not None:
            self._index()

    def _index(self) -> None:
        self.version += 1
        self._by_model = {}
        for node in self.nodes.values():
            for model in node.identity.models:
                self._by_model.setdefault(model, []).append(node)

    def serving(self, model: str) -> list[NodeState]:
        """Nodes that serve `model`, whatever their state."""
        return self._by_model.get(model, [])

    def longest_prompt(self, model: str) -> int:
        """The longest prompt that any node of `model` can hold, in tokens; 0 when nobody serves it."""
        return max((node.longest_prompt() for node in self.serving(model)), default=0)

    def reserve(self, name: str, ref: str, cost_tokens: int) -> None:
        """Count a request on a node: selecting and reserving are one step."""
        node = self.nodes.get(name)
        if node is not None and ref not in node.held:
            node.held[ref] = cost_tokens
            node.held_tokens += cost_tokens

    def release(self, name: str, ref: str) -> None:
        """Stop counting it."""
        node = self.nodes.get(name)
        if node is not None:
            node.held_tokens -= node.held.pop(ref, 0)

    def has_room(self, model: str) -> bool:
        """Whether any eligible node of `model` can take one more small request."""
        return any(node.is_eligible and node.can_take(0) for node in self.serving(model))


def candidates(nodes: Iterable[NodeState], envelope: Envelope, excluded: tuple[str, ...]) -> list[NodeState]:
    """The nodes that may take `envelope` now.

    An excluded node (one that already failed this request) is used only when no other eligible
    node serves the model.
    """
    eligible = [
        node
        for node in nodes
        if node.is_eligible
        and envelope.prompt_tokens <= node.longest_prompt()
        and (not envelope.lora or envelope.lora in node.identity.loras)
    ]
    if excluded:
        eligible = [node for node in eligible if node.name not in excluded] or eligible
    return [node for node in eligible if node.can_take(envelope.cost_tokens)]
