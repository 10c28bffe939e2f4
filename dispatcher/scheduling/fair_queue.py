"""Requests of one queue in the order of their turns, fair among tenants.

Higher priorities first; at the same priority the tenant that was served least by its weight; of one tenant,
what is due first. What is counted is service, in tokens: a tenant that sends ten thousand requests at once
waits for them itself (the virtual token counter of Sheng et al., "Fairness in Serving Large Language Models",
OSDI 2024). Who had nothing waiting begins at the virtual time, which is what each tenant that waits would
have been given of all that was served had it been divided exactly (weighted fair queueing, Demers et al.,
SIGCOMM 1989): idle time saves nothing up, and new tenants do not starve those who were here. With one
tenant it is a heap.
"""

from __future__ import annotations

import heapq
from collections.abc import Callable, Container

Order = tuple[int, int, int, int, int, str]
"""(urgent first, -priority, deadline put off for its prefill, append time, sequence, ref)"""
_Class = tuple[int, str]
"""(-priority, tenant): what a tenant is given is counted at each priority by itself."""
_Entry = tuple[int, int, float, int, int, int, str]
"""(urgent first, -priority, service, deadline put off, order's sequence, entry's sequence, tenant)"""
FEWEST_KEPT = 64
"""Services of tenants are swept through once there are so many of them, and twice as many as before."""
MOST_KEPT = 10_000
"""Services of tenants that have nothing waiting; beyond, all of those are forgotten."""


class FairQueue:
    """Orders of requests by tenant.

    Args:
        waiting: refs that still wait: the others are dropped as they come up.
        weight_of: a tenant's weight, above 0.
    """

    def __init__(self, waiting: Container[str], weight_of: Callable[[str], float]) -> None:
        self._waiting = waiting
        self._weight_of = weight_of
        self._orders: dict[_Class, list[Order]] = {}
        self._served: dict[_Class, float] = {}
        self._passed: dict[_Class, float] = {}
        self._looked_past: list[tuple[Order, str]] = []
        self._virtual: dict[int, float] = {}
        self._weights: dict[int, float] = {}
        self._entries: list[_Entry] = []
        self._current: dict[_Class, _Entry] = {}
        self._sequence = 0
        self._most_kept = FEWEST_KEPT

    def __len__(self) -> int:
        """Orders kept, those of requests that are gone included."""
        return sum(map(len, self._orders.values())) + len(self._looked_past)

    def push(self, order: Order, tenant: str) -> None:
        """Enter a request."""
        one = (order[1], tenant)
        orders = self._orders.get(one)
        if orders is None:
            orders = self._orders[one] = []
            self._served[one] = self._service(one)
            self._weights[one[0]] = self._weights.get(one[0], 0.0) + self._weight_of(tenant)
        heapq.heappush(orders, order)
        if orders[0] is order:
            self._enter(one)

    def head(self) -> Order | None:
        """Whose turn it is; None when nothing waits that was not looked past."""
        while self._entries:
            entry = self._entries[0]
            one = (entry[1], entry[6])
            if self._current.get(one) is not entry:
                heapq.heappop(self._entries)
                continue
            orders = self._orders[one]
            if orders[0][5] in self._waiting:
                return orders[0]
            heapq.heappop(orders)
            self._enter(one)
        return None

    def upcoming(self, most: int) -> list[str]:
        """About the next refs in turn, as far as can be told: those of each tenant, in its order."""
        entries = sorted(self._current.values())[:most]
        share = -(-most // len(entries)) if entries else 0
        refs: list[str] = []
        for entry in entries:
            refs += [order[5] for order in _least(self._orders[entry[1], entry[6]], share)]
        return [ref for ref in refs if ref in self._waiting][:most]

    def pop(self) -> tuple[Order, str]:
        """Take out the head, as `head` told it, and name its tenant; one of the next three is to follow."""
        entry = self._entries[0]
        return heapq.heappop(self._orders[entry[1], entry[6]]), entry[6]

    def serve(self, order: Order, tenant: str, tokens: float) -> None:
        """Count what a tenant was given for the request that was taken out."""
        priority = order[1]
        one, weight = (priority, tenant), self._weight_of(tenant)
        virtual = self._virtual.get(priority, 0.0)
        self._virtual[priority] = virtual + tokens / self._weights[priority]
        self._served[one] = self._served.get(one, virtual) + tokens / weight
        self._enter(one)
        if len(self._served) > self._most_kept:
            self._forget()

    def look_past(self, order: Order, tenant: str, tokens: float) -> None:
        """Put the one that was taken out aside until `end_round`; it counts until then: others get turns."""
        one = (order[1], tenant)
        self._looked_past.append((order, tenant))
        self._passed[one] = self._passed.get(one, 0.0) + tokens / self._weight_of(tenant)
        self._enter(one)

    def part(self, order: Order, tenant: str) -> None:
        """Let go of the one that was taken out."""
        self._enter((order[1], tenant))

    def end_round(self) -> None:
        """Take back what was looked past."""
        looked_past, self._looked_past = self._looked_past, []
        passed, self._passed = self._passed, {}
        for order, tenant in looked_past:
            self.push(order, tenant)
        for one in passed:
            self._enter(one)

    def sweep(self) -> None:
        """Drop what is gone."""
        for one in list(self._orders):
            self._orders[one] = [order for order in self._orders[one] if order[5] in self._waiting]
            heapq.heapify(self._orders[one])
            self._enter(one)
        self._entries = list(self._current.values())
        heapq.heapify(self._entries)

    def _service(self, one: _Class) -> float:
        """What counts as given to a tenant that comes: what it was given, or the virtual time."""
        return max(self._served.get(one, 0.0), self._virtual.get(one[0], 0.0))

    def _forget(self) -> None:
        """Forget the service of those who would begin where the others are anyway."""
        gone = [one for one in self._served if one not in self._orders]
        for one in gone:
            if len(gone) > MOST_KEPT or self._served[one] <= self._virtual.get(one[0], 0.0):
                del self._served[one]
        self._most_kept = max(FEWEST_KEPT, 2 * len(self._served))

    def _enter(self, one: _Class) -> None:
        """Let a tenant stand where its first request and its service put it now, if it has any."""
        orders = self._orders[one]
        if not orders:
            del self._orders[one]
            del self._current[one]
            self._weights[one[0]] -= self._weight_of(one[1])
            return
        urgent, priority, due_ms, _, sequence, _ = orders[0]
        served = self._served[one]
        if self._passed:
            served += self._passed.get(one, 0.0)
        self._sequence += 1
        entry = (urgent, priority, served, due_ms, sequence, self._sequence, one[1])
        self._current[one] = entry
        if self._entries and self._entries[0][6] == one[1] and self._entries[0][1] == one[0]:
            heapq.heapreplace(self._entries, entry)
        else:
            heapq.heappush(self._entries, entry)


def _least(heap: list[Order], most: int) -> list[Order]:
    """The least of a heap, in their order."""
    if len(heap) <= 2 * most:
        return sorted(heap)[:most]
    found: list[Order] = []
    frontier = [(heap[0], 0)]
    while len(found) < most:
        order, at = heapq.heappop(frontier)
        found.append(order)
        for child in (2 * at + 1, 2 * at + 2):
            if child < len(heap):
                heapq.heappush(frontier, (heap[child], child))
    return found
