"""The fleet as the leader knows it: who is there, what each holds, how soon each could begin another.

What a node holds is counted from our own assignments and endings, which are exact and immediate; its
reports say what the engine does with them. A report covers the assignments up to the number that it names:
those beyond it are *unseen* and counted on top (reservations), so that nothing counts twice or not at all.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping
from dataclasses import dataclass, field

from dispatcher.protocol.assignment import Envelope
from dispatcher.protocol.node import NodeIdentity, NodeReport, Role, Wish
from dispatcher.scheduling.breaker import Breaker
from dispatcher.scheduling.predictor import AnswerLength, Predictor, PrefillShape
from dispatcher.scheduling.prompt_queue import Burst, PromptQueue

LOOKAHEAD_SHARE = 0.125
"""Requests bound beyond an engine's running slots, as a share of them; at least one."""
STALE_S = 1.5
"""Reports come at least every second: one that is this old may hide load."""
FIRST_SERVICE_S = 5.0
"""How long a request is taken to hold its slot before any was seen to end."""
KV_BYTES_PER_TOKEN = 131_072
"""Of a Llama-3-8B in bf16: 2 x 32 layers x 8 heads x 128 x 2 bytes."""
FULL = 0.99
"""KV use beyond which a node counts as full: the pressure term stays finite."""


@dataclass(slots=True)
class _Unseen:
    """An assignment that no report covers yet; `number` is 0 until the script has given it one."""

    uncached_tokens: int
    number: int
    bound_s: float


@dataclass(slots=True)
class Load:
    """What a node's state means to any request, as of its last change; what passes with time is left open.

    `room_tokens` is the KV cache that a request may take, -1 without a slot for it. Of the prompts to be
    computed, `prompts_s` counts down from `since_s` by `most_s` at most, and up again from `overdue_s` on;
    `unknown_tokens` are of prompts that others bound. `pressure` is k/(1-k) of the fullness k.
    """

    room_tokens: float
    slot_wait_s: float
    prompts_s: float
    since_s: float
    most_s: float
    overdue_s: float
    unknown_tokens: int
    decoding: int
    pressure: float
    burst: Burst
    is_prefill: bool


@dataclass(kw_only=True)
class NodeState:
    """One node. `held` maps refs to the tokens they cost here; `suspect` is one of them under which an
    engine died before. `chosen` and `is_shut` are marks of policies.

    It is bound to only once the leader has entered it into the shared sets (`admitted`): a new leader
    finds the work of exactly those.
    """

    identity: NodeIdentity
    report: NodeReport | None = None
    last_heard_s: float = 0.0
    available: bool = True
    admitted: bool = False
    cordoned: bool = False
    held: dict[str, int] = field(default_factory=dict)
    held_tokens: int = 0
    unseen: dict[str, _Unseen] = field(default_factory=dict)
    unseen_tokens: int = 0
    predictor: Predictor = field(default_factory=Predictor)
    answers: AnswerLength = field(default_factory=AnswerLength)
    breaker: Breaker = field(default_factory=Breaker)
    suspect: str = ""
    feedback_s: float = 0.02
    service_s: float = FIRST_SERVICE_S
    chosen: int = 0
    is_shut: bool = False
    _since: dict[str, float] = field(default_factory=dict)
    prompts: PromptQueue = field(default_factory=PromptQueue)
    burst: Burst = field(default_factory=Burst)
    known_load: Load | None = None

    def changed(self) -> None:
        """Note that something of its state was set: its load is measured anew."""
        self.known_load = None

    @property
    def load(self) -> Load:
        """What it has to do, as of its last change."""
        return self.known_load or self._measure()

    def _measure(self) -> Load:
        prompts_s, since_s, most_s, overdue_s = self.prompts.course(self.feedback_s)
        capacity = self.identity.kv_total_tokens
        room = math.inf
        if not self.has_slot:
            room = -1.0
        elif capacity and self.held:
            used = self.report.kv_used_tokens + self.unseen_tokens if self.report is not None else 0
            room = capacity - max(self.held_tokens, used)
        k = self.fullness
        load = self.known_load = Load(
            room_tokens=room,
            slot_wait_s=self.slot_wait_s,
            prompts_s=prompts_s,
            since_s=since_s,
            most_s=most_s,
            overdue_s=overdue_s,
            unknown_tokens=max(0, self.queued_tokens - self.prompts.tokens),
            decoding=self.decoding,
            pressure=k / (1 - k),
            burst=self.burst,
            is_prefill=self.identity.role is Role.PREFILL,
        )
        return load

    @property
    def name(self) -> str:
        """The node's name."""
        return self.identity.node

    @property
    def request_bound(self) -> int:
        """The most requests bound to it at once."""
        running = self.identity.max_running
        return max(1, running + max(1, math.floor(running * LOOKAHEAD_SHARE)))

    @property
    def is_eligible(self) -> bool:
        """Whether new work may go there at all."""
        if self.cordoned:
            return False
        if not self.available or not self.admitted or not self.breaker.admits:
            return False
        return self.report is None or (self.report.engine_ok and not self.report.draining)

    @property
    def decoding(self) -> int:
        """How many of its requests are past their prompts, as far as it told: a new prompt stalls them."""
        return max(0, len(self.held) - len(self.prompts))

    @property
    def pending(self) -> int:
        """Requests there: those bound to it, and what its engine has beside them, as far as it tells."""
        report = self.report
        if report is None:
            return len(self.held)
        return len(self.held) + max(0, report.engine_running + report.engine_waiting - report.running)

    @property
    def has_slot(self) -> bool:
        """Whether it may hold one more request."""
        return len(self.held) < self.request_bound

    def expected_tokens(self, envelope: Envelope) -> int:
        """KV that a request is expected to need: its prompt, and an answer as long as they are by experience.

        Clients allow far more than answers have; reserving that would leave most of the cache unused. When
        answers are longer than they were, the engine preempts.
        """
        if self.identity.role is Role.PREFILL:
            return envelope.prompt_tokens + 1
        return envelope.prompt_tokens + self.answers.expected(envelope.max_tokens)

    def fits(self, tokens: int) -> bool:
        """Whether its KV cache can hold one more. An idle node may always try what fits its context."""
        capacity = self.identity.kv_total_tokens
        if not capacity or not self.held:
            return True
        used = self.report.kv_used_tokens + self.unseen_tokens if self.report is not None else 0
        return max(self.held_tokens, used) + tokens <= capacity

    def has_space(self, envelope: Envelope) -> bool:
        """Whether it has a slot for a request, and KV cache as far as is expected."""
        return self.has_slot and self.fits(self.expected_tokens(envelope))

    @property
    def slot_wait_s(self) -> float:
        """Predicted seconds until one of its requests ends and gives its slot back."""
        return self.service_s / max(1, len(self.held))

    @property
    def queued_tokens(self) -> int:
        """Prompt tokens it has yet to compute, those of unseen assignments included."""
        reported = self.report.queued_uncached_tokens if self.report is not None else 0
        return reported + self.unseen_tokens

    def queued_s(self, now_s: float) -> float:
        """Predicted seconds until it has computed the prompts it has, less what the first had already.

        Tokens that it reports and we did not bind (a new leader knows no more of them) count by the token.
        """
        unknown = max(0, self.queued_tokens - self.prompts.tokens)
        return self.prompts.seconds(now_s, self.feedback_s) + unknown * self.predictor.cost.token_s

    @property
    def kv_share(self) -> float:
        """How much of its KV cache running requests use, from 0 to `FULL`; 0 when unknown."""
        report = self.report
        if report is not None and report.kv_total_tokens:
            unseen = self.unseen_tokens if report.kv_used_tokens else self.held_tokens
            return min(FULL, (report.kv_used_tokens + unseen) / report.kv_total_tokens)
        if self.identity.kv_total_tokens:
            return min(FULL, self.held_tokens / self.identity.kv_total_tokens)
        return 0.0

    @property
    def fullness(self) -> float:
        """How much of what it may hold it holds, in KV cache or requests, from 0 to `FULL`."""
        return max(self.kv_share, min(FULL, len(self.held) / self.request_bound))

    def longest_prompt(self) -> int:
        """The longest prompt it can hold, in tokens."""
        identity = self.identity
        if identity.kv_total_tokens:
            return min(identity.max_model_len, identity.kv_total_tokens)
        return identity.max_model_len

    def hear(self, report: NodeReport, healthy_s: float, now_s: float) -> None:
        """Take a report: it covers the assignments up to the number it names."""
        self.report = report
        self.last_heard_s = healthy_s
        for ref, one in list(self.unseen.items()):
            if one.number and one.number <= report.seen_seq:
                self.feedback_s += 0.1 * (max(0.0, now_s - one.bound_s) - self.feedback_s)
                self._see(ref)
        self.prompts.hear(report.seen_seq, report.queued_uncached_tokens, now_s)
        self.known_load = None

    def _see(self, ref: str) -> None:
        one = self.unseen.pop(ref, None)
        if one is not None:
            self.unseen_tokens -= one.uncached_tokens

    def empty(self) -> None:
        """Forget what an earlier leader's session counted."""
        self.held, self.held_tokens, self.admitted = {}, 0, False
        self.unseen, self.unseen_tokens, self._since = {}, 0, {}
        self.prompts = PromptQueue()
        self.breaker.probe = self.suspect = ""
        self.known_load = None

    def take_over(self, known: NodeState) -> None:
        """Continue what was counted and learned under an earlier incarnation."""
        self.held, self.held_tokens, self._since = known.held, known.held_tokens, known._since
        self.unseen, self.unseen_tokens = known.unseen, known.unseen_tokens
        self.prompts = known.prompts
        self.suspect, self.service_s = known.suspect, known.service_s
        if known.identity.models == self.identity.models:
            self.predictor = known.predictor
        self.breaker = known.breaker
        self.breaker.renewed()
        self.known_load = None

    def reserve(
        self,
        ref: str,
        cost_tokens: int,
        uncached_tokens: int,
        number: int,
        now_s: float,
        prefill_s: float = 0.0,
    ) -> None:
        """Count a request here."""
        if ref in self.held:
            return
        self.held[ref] = cost_tokens
        self.held_tokens += cost_tokens
        self._since[ref] = now_s
        self.known_load = None
        self.breaker.bound(ref)
        if uncached_tokens:
            self.unseen[ref] = _Unseen(uncached_tokens, number, now_s)
            self.unseen_tokens += uncached_tokens
            self.prompts.push(ref, uncached_tokens, number, prefill_s, now_s)
            self.burst.add(prefill_s, now_s)

    def release(self, ref: str, now_s: float) -> None:
        """Stop counting it."""
        if ref not in self.held:
            return
        self.known_load = None
        self.held_tokens -= self.held.pop(ref)
        self.service_s += 0.1 * (max(0.0, now_s - self._since.pop(ref)) - self.service_s)
        self.breaker.released(ref)
        if self.suspect == ref:
            self.suspect = ""
        self._see(ref)
        self.prompts.drop(ref, now_s)

    def hand_over(self, ref: str, now_s: float) -> None:
        """Note that a request which was bound earlier goes to it now: its way and its prefill begin."""
        if ref in self.unseen:
            self.unseen[ref].bound_s = now_s
        self.prompts.begin(ref, now_s)

    def note_number(self, ref: str, number: int) -> None:
        """Note an assignment's number, by which reports tell what they cover."""
        self.prompts.note_number(ref, number)
        self.known_load = None
        if ref not in self.unseen:
            return
        self.unseen[ref].number = number
        if not number or (self.report is not None and number <= self.report.seen_seq):
            self._see(ref)


class Fleet:
    """All nodes, with what the leader has bound to them. `version` counts changes of who is there."""

    def __init__(self) -> None:
        self.nodes: dict[str, NodeState] = {}
        self._by_model: dict[str, list[NodeState]] = {}
        self._split: set[str] = set()
        self._longest: dict[str, int] = {}
        self._shapes: dict[tuple[str, ...], PrefillShape] = {}
        self._answers: dict[tuple[str, ...], AnswerLength] = {}
        self.version = 0
        self.cordons: dict[str, Wish] = {}

    def admit(self, identity: NodeIdentity, now_s: float) -> NodeState:
        """Enter a node, or replace its incarnation; what it holds is kept for the leader to move."""
        known = self.nodes.get(identity.node)
        shape = self._shapes.setdefault(identity.models, PrefillShape())
        node = NodeState(
            identity=identity,
            last_heard_s=now_s,
            cordoned=identity.node in self.cordons,
            predictor=Predictor(shape),
            answers=self._answers.setdefault(identity.models, AnswerLength()),
        )
        if known is not None:
            node.take_over(known)
        self.nodes[identity.node] = node
        self._index()
        return node

    def cordon(self, cordons: Mapping[str, Wish]) -> None:
        """Take over what an operator wishes, by node; also of nodes that are yet to come (back)."""
        self.cordons = dict(cordons)
        for node in self.nodes.values():
            node.cordoned = node.name in cordons

    def forget(self, name: str) -> None:
        """Remove a node for good."""
        if self.nodes.pop(name, None) is not None:
            self._index()

    def _index(self) -> None:
        self.version += 1
        self._by_model, self._split, self._longest = {}, set(), {}
        served = {node.identity.models for node in self.nodes.values()}
        for learned in (self._shapes, self._answers):
            for models in learned.keys() - served:
                del learned[models]
        for node in self.nodes.values():
            for model in node.identity.models:
                self._by_model.setdefault(model, []).append(node)
                if node.identity.role is Role.PREFILL:
                    self._split.add(model)

    def serving(self, model: str) -> list[NodeState]:
        """Nodes that serve `model`, whatever their state."""
        return self._by_model.get(model, [])

    def is_split(self, model: str) -> bool:
        """Whether nodes that only compute prompts serve `model`."""
        return model in self._split

    def longest_prompt(self, model: str) -> int:
        """The longest prompt that any node of `model` can hold, in tokens; 0 when nobody serves it."""
        longest = self._longest.get(model)
        if longest is None:
            longest = max((node.longest_prompt() for node in self.serving(model)), default=0)
            if model in self._by_model:
                self._longest[model] = longest
        return longest

    def reserve(
        self,
        name: str,
        ref: str,
        cost_tokens: int,
        *,
        uncached_tokens: int = 0,
        prefill_s: float = 0.0,
        number: int = 0,
        now_s: float = 0.0,
        is_suspect: bool = False,
    ) -> None:
        """Count a request on a node: selecting and reserving are one step.

        Args:
            uncached_tokens: prompt tokens it has to compute there, until a report covers it; 0 when one did.
            prefill_s: what that is predicted to take.
            number: its assignment number, 0 while it has none.
            is_suspect: no other suspect is bound there until it is released.
        """
        node = self.nodes.get(name)
        if node is not None:
            node.reserve(ref, cost_tokens, uncached_tokens, number, now_s, prefill_s)
            if is_suspect:
                node.suspect = ref

    def hand_over(self, name: str, ref: str, now_s: float) -> None:
        """Note that a reserved request goes to its node now, not when it was reserved."""
        node = self.nodes.get(name)
        if node is not None:
            node.hand_over(ref, now_s)

    def note_number(self, name: str, ref: str, number: int) -> None:
        """Note an assignment's number once the script has given it one."""
        node = self.nodes.get(name)
        if node is not None:
            node.note_number(ref, number)

    def release(self, name: str, ref: str, now_s: float = 0.0) -> None:
        """Stop counting a request."""
        node = self.nodes.get(name)
        if node is not None:
            node.release(ref, now_s)

    def stale_tokens(self, model: str, healthy_s: float) -> int:
        """What a node of `model` that merely stopped reporting is taken to have queued: its peers' median."""
        fresh = [
            node.report.queued_uncached_tokens
            for node in self.serving(model)
            if node.report is not None and healthy_s - node.last_heard_s <= STALE_S
        ]
        return int(statistics.median(fresh)) if fresh else 0
