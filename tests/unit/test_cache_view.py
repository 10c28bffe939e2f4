"""The cache view: engine blocks to routing blocks, against a naive model, and against real hashes."""

from __future__ import annotations

import struct
from collections.abc import Iterable

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from dispatcher.protocol.node import BlockEventKind, Medium
from dispatcher.protocol.prefix_hash import block_hashes
from workers_agent.cache_view import CacheView, Change, Cleared, Removed, Stored

MODEL = "m"
ENGINE, ROUTING = 2, 4
GPU, CPU = Medium.GPU, Medium.CPU


def tokens_of(path: Iterable[int]) -> list[int]:
    """Two tokens for each engine block of a path."""
    return [number * 10 + place for number in path for place in range(ENGINE)]


def packed(path: Iterable[int]) -> bytes:
    ids = tokens_of(path)
    return struct.pack(f"<{len(ids)}I", *ids)


def key(path: tuple[int, ...]) -> int:
    """The engine's hash of the last block of a path."""
    return int("1" + "".join(map(str, path)))


def stored(
    path: tuple[int, ...], first: int = 0, medium: Medium = GPU, salt: str = "", lora: str = ""
) -> Stored:
    """The blocks of a path from `first` on."""
    return Stored(
        hashes=tuple(key(path[: end + 1]) for end in range(first, len(path))),
        parent=key(path[:first]) if first else None,
        tokens=packed(path[first:]),
        block_tokens=ENGINE,
        medium=medium,
        salt=salt if not first else "",
        lora=lora,
    )


def routing(path: tuple[int, ...], salt: str = "", lora: str = "") -> tuple[str, ...]:
    """What a client hashes for the same prompt."""
    return block_hashes(tokens_of(path), model=MODEL, block_size=ROUTING, cache_salt=salt, lora=lora)


def held(changes: list[Change]) -> dict[Medium, set[str]]:
    """What a follower of the changes believes."""
    believed: dict[Medium, set[str]] = {}
    follow(believed, changes)
    return {medium: found for medium, found in believed.items() if found}


def follow(believed: dict[Medium, set[str]], changes: list[Change]) -> None:
    for kind, medium, hashes in changes:
        tier = believed.setdefault(medium, set())
        if kind is BlockEventKind.STORED:
            assert not tier & set(hashes)
            tier |= set(hashes)
        else:
            assert tier >= set(hashes)
            tier -= set(hashes)


def test_its_hashes_are_those_that_clients_make() -> None:
    view = CacheView(MODEL, ROUTING)
    path = (1, 2, 3, 4, 5)
    view.apply(stored(path[:3]))
    view.apply(stored(path, first=3))
    assert held(view.take_changes()) == {GPU: set(routing(path))}
    view.apply(stored((7, 8), salt="blue", lora="sql"))
    view.apply(stored((7, 8, 9, 1), first=2, lora="sql"))
    assert held(view.take_changes()) == {GPU: set(routing((7, 8, 9, 1), salt="blue", lora="sql"))}
    assert not view.is_partial


def test_removing_a_block_hides_what_follows_and_storing_it_shows_it_again() -> None:
    view = CacheView(MODEL, ROUTING)
    path = (1, 2, 3, 4, 5, 6)
    view.apply(stored(path))
    view.take_changes()
    view.apply(Removed(hashes=(key(path[:3]),)))
    (change,) = view.take_changes()
    assert (change[0], set(change[2])) == (BlockEventKind.REMOVED, set(routing(path)[1:]))
    view.apply(stored(path[:3], first=2))
    assert held(view.take_changes()) == {GPU: set(routing(path)[1:])}
    assert held(view.snapshot()) == {GPU: set(routing(path))}


def test_a_block_whose_beginning_is_unknown_is_dropped_and_the_view_is_partial() -> None:
    view = CacheView(MODEL, ROUTING)
    view.apply(stored((1, 2, 3, 4), first=2))
    assert view.take_changes() == []
    assert view.is_partial
    assert view.orphans == 2
    view.apply(Cleared())
    assert not view.is_partial


def test_a_routing_block_counts_in_the_farthest_tier_it_needs() -> None:
    view = CacheView(MODEL, ROUTING)
    path = (1, 2, 3, 4)
    view.apply(stored(path))
    view.apply(stored(path, medium=CPU))
    assert held(view.take_changes()) == {GPU: set(routing(path))}
    view.apply(Removed(hashes=(key(path[:3]),)))
    believed = {GPU: set(routing(path))}
    follow(believed, view.take_changes())
    assert believed == {GPU: set(routing(path)[:1]), CPU: set(routing(path)[1:])}


def test_what_comes_and_goes_between_two_calls_is_not_told() -> None:
    view = CacheView(MODEL, ROUTING)
    path = (1, 2)
    view.apply(stored(path))
    view.apply(Removed(hashes=tuple(key(path[: n + 1]) for n in range(2))))
    assert view.take_changes() == []
    view.apply(stored(path))
    view.take_changes()
    view.apply(Removed(hashes=tuple(key(path[: n + 1]) for n in range(2))))
    view.apply(stored(path))
    assert view.take_changes() == []
    assert view.engine_blocks == 2


def test_an_engine_block_that_does_not_divide_the_routing_block_gives_no_view() -> None:
    view = CacheView(MODEL, 7)
    view.apply(stored((1, 2)))
    assert view.mismatched_tokens == ENGINE
    assert view.is_partial
    assert view.take_changes() == []


def test_images_and_too_many_blocks_make_a_view_partial() -> None:
    view = CacheView(MODEL, ROUTING, most_blocks=3)
    view.apply(Stored(hashes=(1,), parent=None, tokens=packed((1,)), block_tokens=ENGINE, is_opaque=True))
    assert view.is_partial
    assert view.engine_blocks == 0
    view = CacheView(MODEL, ROUTING, most_blocks=3)
    view.apply(stored((1, 2, 3)))
    view.apply(stored((4,)))
    assert (view.engine_blocks, view.is_partial) == (3, True)


paths = st.lists(st.integers(0, 2), min_size=1, max_size=8).map(tuple)
media = st.sampled_from([GPU, GPU, CPU])


class AgainstNaive(RuleBasedStateMachine):
    """Blocks come and go in any order; the view is what a set of paths says it is."""

    def __init__(self) -> None:
        super().__init__()
        self.view = CacheView(MODEL, ROUTING)
        self.present: dict[tuple[int, ...], set[Medium]] = {}
        self.known: set[tuple[int, ...]] = set()
        self.believed: dict[Medium, set[str]] = {}

    @rule(path=paths, medium=media)
    def store_from_the_start(self, path: tuple[int, ...], medium: Medium) -> None:
        self.view.apply(stored(path, medium=medium))
        for end in range(1, len(path) + 1):
            self.present.setdefault(path[:end], set()).add(medium)

    @rule(path=paths, medium=media)
    def store_the_last_block(self, path: tuple[int, ...], medium: Medium) -> None:
        parents = len(path) == 1 or path[:-1] in self.present or self._has_followers(path[:-1])
        self.view.apply(stored(path, first=len(path) - 1, medium=medium))
        if parents:
            self.present.setdefault(path, set()).add(medium)

    def _has_followers(self, path: tuple[int, ...]) -> bool:
        return any(other[: len(path)] == path for other in self.present)

    @rule(path=paths, medium=media)
    def remove(self, path: tuple[int, ...], medium: Medium) -> None:
        self.view.apply(Removed(hashes=(key(path),), medium=medium))
        tiers = self.present.get(path)
        if tiers is not None:
            tiers.discard(medium)
            if not tiers:
                del self.present[path]

    @rule()
    def clear(self) -> None:
        self.view.apply(Cleared())
        self.present.clear()

    @rule()
    def take(self) -> None:
        follow(self.believed, self.view.take_changes())

    @invariant()
    def the_view_is_the_naive_one(self) -> None:
        expected: dict[Medium, set[str]] = {}
        per = ROUTING // ENGINE
        for path in self.present:
            if len(path) % per or any(path[:end] not in self.present for end in range(1, len(path))):
                continue
            own = [path[: len(path) - n] for n in range(per)]
            tier = CPU if any(GPU not in self.present[block] for block in own) else GPU
            expected.setdefault(tier, set()).add(routing(path)[-1])
        changes = [*self.view.take_changes()]
        follow(self.believed, changes)
        assert {medium: found for medium, found in self.believed.items() if found} == expected
        assert self.view.blocks == sum(map(len, expected.values()))
        assert held(self.view.snapshot()) == expected


TestAgainstNaive = AgainstNaive.TestCase
TestAgainstNaive.settings = settings(max_examples=60, deadline=None)
