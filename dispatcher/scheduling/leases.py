"""Whose client is gone: leases of clients, and the unfinished requests that name them. Pure.

A lease that nobody has told of is taken for one that was heard just now and runs for the longest time
there is: whatever is forgotten here only makes a dead client's requests run on a little longer, so that
what is remembered can be bounded. Time is healthy time (`silence`): that in which everything appended
was provably read.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from dispatcher.protocol.request import MAX_LEASE_TTL_MS

LeaseKey = tuple[str, str]
"""Tenant and lease."""
LONGEST_TTL_S = MAX_LEASE_TTL_MS / 1000
SHORTEST_TTL_S = 3.0
"""Shorter ones run for as long: a proof may take half of it."""
MOST_IDLE = 10_000


@dataclass(slots=True)
class _Lease:
    """`heard_s`: the first proof after it was heard last, None before that. `refs`: as they came."""

    ttl_s: float = LONGEST_TTL_S
    heard_s: float | None = None
    refs: dict[str, None] = field(default_factory=dict)


class Leases:
    """The leases of one pool, as its leader knows them.

    Args:
        most_idle: leases without unfinished requests, and ended ones, that are remembered.
    """

    def __init__(self, *, most_idle: int = MOST_IDLE) -> None:
        self._most_idle = most_idle
        self._leases: dict[LeaseKey, _Lease] = {}
        self._idle: dict[LeaseKey, None] = {}
        self._ended: dict[LeaseKey, None] = {}
        self._keys_of: dict[str, tuple[LeaseKey, ...]] = {}
        self.orphans: dict[str, None] = {}
        """Unfinished requests whose clients are all gone."""

    def __len__(self) -> int:
        return len(self._leases)

    @property
    def are_held(self) -> bool:
        """Whether any unfinished request depends on a lease."""
        return len(self._leases) > len(self._idle)

    def hold(self, ref: str, key: LeaseKey) -> None:
        """Note an unfinished request that names a lease."""
        if key in self._ended:
            self.orphans[ref] = None
            return
        self._keys_of[ref] = (key,)
        self._lease(key).refs[ref] = None
        self._idle.pop(key, None)

    def share(self, ref: str, key: LeaseKey | None) -> None:
        """Note a repeat of a request: it is for this client too. None: it is for one without a lease."""
        keys = self._keys_of.get(ref)
        if keys is None or key in keys or key in self._ended:
            return
        if key is None:
            self.drop(ref)
            return
        self._keys_of[ref] = (*keys, key)
        self._lease(key).refs[ref] = None
        self._idle.pop(key, None)

    def drop(self, ref: str) -> None:
        """Note that a request ended, or depends on no lease any more."""
        self.orphans.pop(ref, None)
        for key in self._keys_of.pop(ref, ()):
            lease = self._leases[key]
            lease.refs.pop(ref, None)
            if not lease.refs:
                self._rest(key)

    def hear(self, key: LeaseKey, ttl_ms: int) -> None:
        """Note a client's sign of life, or with `ttl_ms` 0 the end of its lease."""
        self._ended.pop(key, None)
        if ttl_ms == 0:
            self._end(key)
            self._ended[key] = None
            if len(self._ended) > self._most_idle:
                del self._ended[next(iter(self._ended))]
            return
        lease = self._lease(key)
        lease.ttl_s, lease.heard_s = max(SHORTEST_TTL_S, ttl_ms / 1000), None
        if not lease.refs:
            self._rest(key)

    def restart(self) -> None:
        """Let the silence of all begin anew: nobody could write, and who lives needs time to come back."""
        for lease in self._leases.values():
            lease.heard_s = None

    def prove(self, now_s: float) -> list[tuple[LeaseKey, int]]:
        """End the leases that ran out: whatever was appended until healthy time `now_s` has been heard.

        Returns:
            Those that unfinished requests named, and how many.
        """
        lapsed = []
        for key, lease in self._leases.items():
            if lease.heard_s is None:
                lease.heard_s = now_s
            elif now_s - lease.heard_s >= lease.ttl_s:
                lapsed.append(key)
        found = [(key, len(self._leases[key].refs)) for key in lapsed if self._leases[key].refs]
        for key in lapsed:
            self._end(key)
        return found

    def _lease(self, key: LeaseKey) -> _Lease:
        return self._leases.setdefault(key, _Lease())

    def _rest(self, key: LeaseKey) -> None:
        self._idle.pop(key, None)
        self._idle[key] = None
        if len(self._idle) > self._most_idle:
            oldest = next(iter(self._idle))
            del self._idle[oldest], self._leases[oldest]

    def _end(self, key: LeaseKey) -> None:
        self._idle.pop(key, None)
        lease = self._leases.pop(key, None)
        for ref in lease.refs if lease is not None else ():
            left = tuple(other for other in self._keys_of[ref] if other != key)
            if left:
                self._keys_of[ref] = left
            else:
                del self._keys_of[ref]
                self.orphans[ref] = None
