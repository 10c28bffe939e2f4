"""The backlog of one model's interactive lane: how much work waits, ahead of whom, and since when.

The window keeps one per model and tells it of every request that comes and goes; overload control reads it.
Work is counted in tokens (prompt and requested output). Requests that no eligible node could take (*stuck*)
hold up nobody, so they are no work ahead of others; those that were bound before are, but are never offered
to be shed.
"""

from __future__ import annotations

import heapq
from collections import OrderedDict
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

from dispatcher.protocol.assignment import Envelope


@dataclass(slots=True)
class _Share:
    """What waits of one tenant: tokens, by patience (deadline as a duration, told apart to 25 %)."""

    weight: float
    requests: int = 0
    by_patience: dict[int, int] = field(default_factory=dict)


@dataclass(slots=True)
class _Level:
    """What waits at one priority: by tenant, and those never bound before, by ref, in order of entering.

    `weights` is the sum of the tenants' weights.
    """

    requests: int = 0
    tokens: int = 0
    weights: float = 0.0
    shares: dict[str, _Share] = field(default_factory=dict)
    fresh: OrderedDict[str, Envelope] = field(default_factory=OrderedDict)


class Backlog:
    """What waits of one model.

    `requests` and `bytes` count everything, `tokens` what is not stuck. `bound_tokens`, `bound_requests` and
    `entered_tokens` (by priority) count what happened since `restart`; `was_empty` tells whether nothing
    waited at some moment since then, for then what was bound says nothing of capacity.

    Args:
        weight_of: a tenant's weight; tenants are served in its proportion (`fair_queue`).
        tenant_of: whose a request is.
    """

    def __init__(
        self,
        weight_of: Callable[[str], float] = lambda tenant: 1.0,
        tenant_of: Callable[[Envelope], str] = lambda envelope: envelope.tenant,
    ) -> None:
        self._weight_of = weight_of
        self._tenant_of = tenant_of
        self.requests = 0
        self.bytes = 0
        self.tokens = 0
        self.bound_tokens = 0
        self.bound_requests = 0
        self.entered_tokens: dict[int, int] = {}
        self.was_empty = True
        self._levels: dict[int, _Level] = {}
        self._stuck: set[str] = set()

    def restart(self) -> None:
        """Begin to count anew what happens."""
        self.bound_tokens = self.bound_requests = 0
        self.entered_tokens = {}
        self.was_empty = not self._levels

    def push(self, envelope: Envelope, bytes: int, *, is_fresh: bool) -> None:
        """Enter a request."""
        self.requests += 1
        self.bytes += bytes
        priority, tokens = envelope.priority, envelope.cost_tokens
        level = self._levels.get(priority)
        if level is None:
            level = self._levels[priority] = _Level()
        level.requests += 1
        level.tokens += tokens
        self.tokens += tokens
        tenant = self._tenant_of(envelope)
        share = level.shares.get(tenant)
        if share is None:
            share = level.shares[tenant] = _Share(self._weight_of(tenant))
            level.weights += share.weight
        share.requests += 1
        patience = _patience(envelope)
        share.by_patience[patience] = share.by_patience.get(patience, 0) + tokens
        self.entered_tokens[priority] = self.entered_tokens.get(priority, 0) + tokens
        if is_fresh:
            level.fresh[envelope.ref] = envelope

    def remove(self, envelope: Envelope, bytes: int, *, is_bound: bool) -> None:
        """Take out a request that was entered."""
        self.requests -= 1
        self.bytes -= bytes
        if is_bound:
            self.bound_requests += 1
            self.bound_tokens += envelope.cost_tokens
        if envelope.ref in self._stuck:
            self._stuck.discard(envelope.ref)
        else:
            self._leave(envelope)

    def stick(self, envelope: Envelope) -> None:
        """Count a request no more as work: no eligible node could take it."""
        if envelope.ref not in self._stuck:
            self._stuck.add(envelope.ref)
            self._leave(envelope)

    def _leave(self, envelope: Envelope) -> None:
        tokens = envelope.cost_tokens
        level = self._levels[envelope.priority]
        level.requests -= 1
        level.tokens -= tokens
        self.tokens -= tokens
        tenant = self._tenant_of(envelope)
        share = level.shares[tenant]
        share.requests -= 1
        patience = _patience(envelope)
        share.by_patience[patience] -= tokens
        if not share.by_patience[patience]:
            del share.by_patience[patience]
        if not share.requests:
            del level.shares[tenant]
            level.weights -= share.weight
        level.fresh.pop(envelope.ref, None)
        if not level.requests:
            del self._levels[envelope.priority]
            self.was_empty = self.was_empty or not self._levels

    def ahead_tokens(self, envelope: Envelope) -> int:
        """The work that goes before a request that arrives now: of higher priority, or of its own.

        Of its own tenant's, what has no later deadline is ahead; as it is older, that is what has no longer
        patience (deadline as a duration). While that and the request itself are served, the other tenants
        get as much by their weights, or all that they have.
        """
        level = self._levels.get(envelope.priority)
        mine = 0
        if level is not None:
            tenant = self._tenant_of(envelope)
            share = level.shares.get(tenant)
            if share is not None:
                patience = _patience(envelope)
                mine = sum(tokens for one, tokens in share.by_patience.items() if one <= patience)
            weight = share.weight if share is not None else self._weight_of(tenant)
            others = level.tokens - (sum(share.by_patience.values()) if share is not None else 0)
            if others:
                weights = level.weights - (weight if share is not None else 0.0)
                mine += min(others, int((mine + envelope.cost_tokens) * weights / weight))
        return mine + self.higher_tokens(envelope.priority)

    def higher_tokens(self, priority: int) -> int:
        """The work of all higher priorities."""
        return sum(level.tokens for one, level in self._levels.items() if one > priority)

    def oldest_ms(self) -> int | None:
        """Append time of the oldest request that could be shed; None when there is none."""
        firsts = (next(iter(level.fresh.values())) for level in self._levels.values() if level.fresh)
        return min((envelope.appended_ms for envelope in firsts), default=None)

    def appended_before(self, then_ms: int) -> Iterator[tuple[int, list[Envelope]]]:
        """By priority, lowest first: what was appended before then and may be shed, in binding order."""
        for priority in sorted(self._levels):
            late = []
            for envelope in self._levels[priority].fresh.values():
                if envelope.appended_ms >= then_ms:
                    break
                late.append(envelope)
            if late:
                yield priority, self._in_turn(late)

    def _in_turn(self, waiting: list[Envelope]) -> list[Envelope]:
        """What waits at one priority, in the order in which it is going to be bound."""
        by_tenant: dict[str, list[Envelope]] = {}
        for envelope in waiting:
            by_tenant.setdefault(self._tenant_of(envelope), []).append(envelope)
        for envelopes in by_tenant.values():
            envelopes.sort(key=lambda one: (one.deadline_at_ms, one.appended_ms), reverse=True)
        if len(by_tenant) == 1:
            return envelopes[::-1]
        turns = [(0.0, tenant) for tenant in sorted(by_tenant)]
        ordered = []
        while turns:
            served, tenant = turns[0]
            envelope = by_tenant[tenant].pop()
            ordered.append(envelope)
            if by_tenant[tenant]:
                served += envelope.cost_tokens / self._weight_of(tenant)
                heapq.heapreplace(turns, (served, tenant))
            else:
                heapq.heappop(turns)
        return ordered

    def newest_of_lowest(self) -> Envelope | None:
        """Of the lowest priority that could be shed, what came last."""
        lowest = min((one for one, level in self._levels.items() if level.fresh), default=None)
        return None if lowest is None else next(reversed(self._levels[lowest].fresh.values()))


def _patience(envelope: Envelope) -> int:
    """The class of a deadline as a duration: its octave, and which quarter of that."""
    duration_ms = max(4, envelope.deadline_at_ms - envelope.appended_ms)
    octave = duration_ms.bit_length()
    return (octave << 2) | ((duration_ms >> (octave - 3)) & 3)
