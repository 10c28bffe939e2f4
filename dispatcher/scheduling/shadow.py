"""A shadow's judgement: what another scheduler would have done with a request that a leader has just bound.

One step at a time: it decides on the world as the leader's decisions made it, never on what its own would
have led to. What both choices would have cost is told by the shadow's own model.
"""

from __future__ import annotations

from collections import Counter, deque
from dataclasses import dataclass, field
from enum import StrEnum

from msgspec import Struct

from dispatcher.protocol.assignment import Envelope
from dispatcher.scheduling.choice import Choice, Priced
from dispatcher.scheduling.fleet import NodeState
from dispatcher.scheduling.policies import price
from dispatcher.scheduling.scheduler import Scheduler, bar_of
from dispatcher.scheduling.stages import use_after

REMEMBERED = 10_000
"""Pairs of predictions that percentiles are told of: the last so many."""


class Verdict(StrEnum):
    """Whether both chose the same node, and if not, what the shadow's choice is better in.

    `near_tie`: both cost the same, but for what counts as equal. `not_looked_at`: the leader's costs no more,
    but the shadow did not look at it. `queue` to `hop`: the term of the cost in which the leader's node is
    worst beside the shadow's. `kv`: less of the KV cache in use. `rule`: its policy does not choose by cost.
    `barred`: the shadow holds the leader's node for one that can't be chosen; `unknown_node`: it does not
    know it. `no_node`: it knows none that could take the request. `refused`: it would not have let it in.
    """

    SAME = "same"
    NEAR_TIE = "near_tie"
    NOT_LOOKED_AT = "not_looked_at"
    QUEUE = "queue"
    SLOT = "slot"
    CACHE = "cache"
    STALL = "stall"
    BURST = "burst"
    FULL = "full"
    HOP = "hop"
    KV = "kv"
    RULE = "rule"
    BARRED = "barred"
    UNKNOWN_NODE = "unknown_node"
    NO_NODE = "no_node"
    REFUSED = "refused"


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """One request.

    Args:
        own, leader: the nodes chosen; '' for none.
        would_wait: the shadow would have had it wait for its node.
        own_ttft_s, leader_ttft_s: predicted time to the first token from the decision on; None where that is
            not what is decided (a decode stage) or not known.
        leader_prefill_s: of that, the request's own prefill at the leader's node.
    """

    verdict: Verdict
    own: str
    leader: str
    would_wait: bool = False
    own_ttft_s: float | None = None
    leader_ttft_s: float | None = None
    leader_prefill_s: float = 0.0


def compare(
    scheduler: Scheduler,
    envelope: Envelope,
    excluded: tuple[str, ...],
    leader: NodeState | None,
    *,
    is_suspect: bool = False,
    is_decode: bool = False,
) -> Comparison:
    """Decide about a request that a leader bound to `leader`, which is not counted there yet."""
    leader_name = leader.name if leader is not None else ""
    choice = scheduler.choose(envelope, excluded, {}, is_suspect=is_suspect, is_decode=is_decode)
    if leader is None:
        own = choice.node.name if choice is not None else ""
        return Comparison(verdict=Verdict.UNKNOWN_NODE, own=own, leader="")
    if is_decode:
        if choice is None:
            return Comparison(verdict=Verdict.NO_NODE, own="", leader=leader_name)
        return Comparison(
            verdict=_decode_verdict(scheduler, envelope, excluded, choice, leader),
            own=choice.node.name,
            leader=leader_name,
            would_wait=not choice.has_room,
        )
    nodes = [leader] if choice is None else [leader, choice.node]
    prices = price(scheduler, envelope, nodes, {}, scheduler.matches(envelope))
    theirs, ours = Priced._make(prices[0]), Priced._make(prices[-1])
    return Comparison(
        verdict=_verdict(scheduler, envelope, excluded, choice, ours, theirs),
        own=choice.node.name if choice is not None else "",
        leader=leader_name,
        would_wait=choice is not None and not choice.has_room,
        own_ttft_s=_ttft_s(ours) if choice is not None else None,
        leader_ttft_s=_ttft_s(theirs),
        leader_prefill_s=theirs.prefill_s,
    )


def _ttft_s(one: Priced) -> float:
    return one.wait_s + one.prefill_s + one.transfer_s


def _verdict(
    scheduler: Scheduler,
    envelope: Envelope,
    excluded: tuple[str, ...],
    choice: Choice | None,
    ours: Priced,
    theirs: Priced,
) -> Verdict:
    if choice is None:
        return Verdict.NO_NODE
    if ours.node is theirs.node:
        return Verdict.SAME
    if bar_of(theirs.node, envelope, excluded) is not None:
        return Verdict.BARRED
    if not choice.candidates:
        return Verdict.RULE
    if theirs.total_s <= ours.total_s * (1 + scheduler.parameters.near_tie):
        looked_at = any(node is theirs.node for node in choice.candidates)
        return Verdict.NEAR_TIE if looked_at else Verdict.NOT_LOOKED_AT
    worse = {
        Verdict.QUEUE: (theirs.wait_s - theirs.slot_s) - (ours.wait_s - ours.slot_s),
        Verdict.SLOT: theirs.slot_s - ours.slot_s,
        Verdict.CACHE: theirs.prefill_s + theirs.work_s - ours.prefill_s - ours.work_s,
        Verdict.STALL: theirs.stall_s - ours.stall_s,
        Verdict.BURST: theirs.burst_s - ours.burst_s,
        Verdict.FULL: theirs.pressure_s - ours.pressure_s,
        Verdict.HOP: theirs.transfer_s - ours.transfer_s,
    }
    return max(worse, key=worse.__getitem__)


def _decode_verdict(
    scheduler: Scheduler, envelope: Envelope, excluded: tuple[str, ...], choice: Choice, leader: NodeState
) -> Verdict:
    own = choice.node
    if own is leader:
        return Verdict.SAME
    if bar_of(leader, envelope, excluded) is not None:
        return Verdict.BARRED
    tokens = own.expected_tokens(envelope)
    if use_after(own, tokens) == use_after(leader, tokens) and len(own.held) == len(leader.held):
        return Verdict.NEAR_TIE
    return Verdict.KV if scheduler.decode_policy == "least_kv" else Verdict.RULE


class Times(Struct, frozen=True, kw_only=True):
    """Milliseconds: the mean of all, percentiles of the last `REMEMBERED`."""

    count: int
    mean_ms: float
    p50_ms: float
    p90_ms: float
    p99_ms: float


class Summary(Struct, frozen=True, kw_only=True):
    """What a shadow found.

    Args:
        compared: decisions; `agreement` is the share that was the same or a near tie, 0 for none.
        unseen: requests that began and ended between two looks, and are not compared.
        verdicts: how many of each; `decode_verdicts` of those the decode stages.
        would_wait: of the decisions, those that the shadow would have put off for its node to have room.
        own_ttft, leader_ttft: predicted by the shadow's model, from the decision on.
        own_ttft_apart, leader_ttft_apart: the same where they chose differently.
        predicted, measured: what was predicted of the leader's choices that have ended, and what it was:
            whether the model can be believed.
    """

    policy: str
    decode_policy: str
    compared: int
    agreement: float
    unseen: int
    verdicts: dict[str, int]
    decode_verdicts: dict[str, int]
    would_wait: int
    own_ttft: Times
    leader_ttft: Times
    own_ttft_apart: Times
    leader_ttft_apart: Times
    predicted: Times
    measured: Times


@dataclass
class _Sample:
    """A mean of all, and the last ones."""

    count: int = 0
    total_s: float = 0.0
    last: deque[float] = field(default_factory=lambda: deque(maxlen=REMEMBERED))

    def add(self, seconds: float) -> None:
        """Take one in."""
        self.count += 1
        self.total_s += seconds
        self.last.append(seconds)

    def times(self) -> Times:
        """What is told of them; zeros when there is none."""
        ordered = sorted(self.last) or [0.0]

        def percentile(share: float) -> float:
            return round(1000 * ordered[min(len(ordered) - 1, int(share * len(ordered)))], 3)

        mean_ms = round(1000 * self.total_s / self.count, 3) if self.count else 0.0
        return Times(
            count=self.count,
            mean_ms=mean_ms,
            p50_ms=percentile(0.5),
            p90_ms=percentile(0.9),
            p99_ms=percentile(0.99),
        )


class Tally:
    """Counts comparisons."""

    def __init__(self, policy: str, decode_policy: str) -> None:
        self._policy, self._decode_policy = policy, decode_policy
        self.verdicts: Counter[Verdict] = Counter()
        self._decode: Counter[Verdict] = Counter()
        self._would_wait = 0
        self.unseen = 0
        self._own, self._leader = _Sample(), _Sample()
        self._own_apart, self._leader_apart = _Sample(), _Sample()
        self._predicted, self._measured = _Sample(), _Sample()

    @property
    def compared(self) -> int:
        """Decisions compared."""
        return self.verdicts.total()

    def add(self, one: Comparison, *, is_decode: bool) -> None:
        """Count a comparison."""
        self.verdicts[one.verdict] += 1
        if is_decode:
            self._decode[one.verdict] += 1
        self._would_wait += one.would_wait
        if one.own_ttft_s is None or one.leader_ttft_s is None:
            return
        self._own.add(one.own_ttft_s)
        self._leader.add(one.leader_ttft_s)
        if one.own != one.leader:
            self._own_apart.add(one.own_ttft_s)
            self._leader_apart.add(one.leader_ttft_s)

    def measure(self, predicted_s: float, measured_s: float) -> None:
        """Hold a prediction of a leader's choice against what it came to."""
        self._predicted.add(predicted_s)
        self._measured.add(measured_s)

    def summary(self) -> Summary:
        """What was found so far."""
        agreed = self.verdicts[Verdict.SAME] + self.verdicts[Verdict.NEAR_TIE]
        return Summary(
            policy=self._policy,
            decode_policy=self._decode_policy,
            compared=self.compared,
            agreement=round(agreed / self.compared, 4) if self.compared else 0.0,
            unseen=self.unseen,
            verdicts={verdict.value: count for verdict, count in self.verdicts.most_common()},
            decode_verdicts={verdict.value: count for verdict, count in self._decode.most_common()},
            would_wait=self._would_wait,
            own_ttft=self._own.times(),
            leader_ttft=self._leader.times(),
            own_ttft_apart=self._own_apart.times(),
            leader_ttft_apart=self._leader_apart.times(),
            predicted=self._predicted.times(),
            measured=self._measured.times(),
        )
