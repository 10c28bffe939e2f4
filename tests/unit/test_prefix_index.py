"""The prefix index against a naive model of it."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from dispatcher.protocol.node import Medium
from dispatcher.scheduling.prefix_index import PrefixIndex


def chain(*path: int) -> tuple[bytes, ...]:
    """Blocks of a prompt: each names the whole path to it, as chained hashes do."""
    return tuple(bytes(path[: depth + 1]).ljust(8, b".") for depth in range(len(path)))


def depths(index: PrefixIndex, blocks: tuple[bytes, ...]) -> dict[str, int]:
    return {name: match.blocks for match in index.match(blocks) for name in index.nodes(match.nodes)}


def test_each_holder_is_found_with_its_depth() -> None:
    index = PrefixIndex()
    prompt = chain(1, 2, 3, 4, 5)
    index.store("a", Medium.GPU, prompt)
    index.store("b", Medium.GPU, prompt[:2])
    index.store("c", Medium.GPU, chain(1, 9))
    index.store("d", Medium.GPU, chain(7))
    assert depths(index, prompt) == {"a": 5, "b": 2, "c": 1}
    assert depths(index, chain(1, 9, 9)) == {"c": 2, "a": 1, "b": 1}
    assert index.match(()) == []


def test_an_assignment_counts_at_once_and_until_it_is_settled() -> None:
    index = PrefixIndex()
    index.expect("a", "r1", chain(1, 2))
    index.expect("a", "r2", chain(1, 2, 3))
    assert depths(index, chain(1, 2, 3)) == {"a": 3}
    index.settle("r2", 0.0, linger_s=0)
    assert depths(index, chain(1, 2, 3)) == {"a": 2}
    index.settle("r1", 0.0, linger_s=0)
    assert depths(index, chain(1, 2, 3)) == {}


def test_what_no_view_tells_lingers_for_its_time() -> None:
    index = PrefixIndex()
    index.expect("a", "r1", chain(1, 2))
    index.settle("r1", 5.0, linger_s=10)
    index.expire(14.9)
    assert depths(index, chain(1)) == {"a": 1}
    index.expire(15.0)
    assert depths(index, chain(1)) == {}


def test_lingering_assignments_are_bounded() -> None:
    index = PrefixIndex(most_lingering=2)
    for number in range(4):
        index.expect("a", f"r{number}", chain(number))
        index.settle(f"r{number}", 0.0, linger_s=1000)
    assert [bool(index.match(chain(number))) for number in range(4)] == [False, False, True, True]


def test_a_new_leader_begins_without_the_old_ones_assignments() -> None:
    index = PrefixIndex()
    index.store("a", Medium.GPU, chain(1))
    index.expect("a", "r1", chain(1, 2))
    index.expect("a", "r2", chain(1, 3))
    index.settle("r2", 0.0, linger_s=100)
    index.forget_assignments()
    assert depths(index, chain(1, 2)) == {"a": 1}
    index.settle("r1", 0.0, linger_s=100)
    index.expire(1000.0)
    assert depths(index, chain(1, 3)) == {"a": 1}


def test_a_forgotten_node_leaves_nothing_and_its_number_is_used_again() -> None:
    index = PrefixIndex()
    index.store("a", Medium.CPU, chain(1, 2))
    index.expect("a", "r", chain(3))
    number = index.number("a")
    index.forget("a")
    index.settle("r", 0.0, linger_s=1000)
    assert index.number("b") == number
    assert depths(index, chain(1, 2)) == depths(index, chain(3)) == {}
    assert index.blocks == 0


def test_a_block_in_two_tiers_is_held_until_both_drop_it() -> None:
    index = PrefixIndex()
    index.store("a", Medium.GPU, chain(1))
    index.store("a", Medium.CPU, chain(1))
    index.remove("a", Medium.GPU, chain(1))
    assert depths(index, chain(1)) == {"a": 1}
    assert index.slower_blocks("a", chain(1, 2)) == {Medium.CPU: 1}
    index.remove("a", Medium.CPU, chain(1))
    assert depths(index, chain(1)) == {}
    assert index.slower_blocks("a", chain(1)) == {}


paths = st.lists(st.integers(0, 2), min_size=1, max_size=6).map(lambda path: chain(*path))
names = st.sampled_from(["a", "b", "c", "d"])


class AgainstNaive(RuleBasedStateMachine):
    """Views and assignments in any order, each prefix-closed, as agents and the leader keep them."""

    def __init__(self) -> None:
        super().__init__()
        self.index = PrefixIndex()
        self.views: dict[str, set[bytes]] = {}
        self.bound: dict[str, tuple[str, tuple[bytes, ...]]] = {}
        self.prompts: set[tuple[bytes, ...]] = set()
        self.count = 0

    @rule(name=names, path=paths)
    def store(self, name: str, path: tuple[bytes, ...]) -> None:
        self.index.store(name, Medium.GPU, path)
        self.views.setdefault(name, set()).update(path)
        self.prompts.add(path)

    @rule(name=names, path=paths)
    def evict_a_subtree(self, name: str, path: tuple[bytes, ...]) -> None:
        stem = path[-1].rstrip(b".")
        gone = {block for block in self.views.get(name, set()) if block.rstrip(b".").startswith(stem)}
        self.index.remove(name, Medium.GPU, gone)
        self.views.get(name, set()).difference_update(gone)

    @rule(name=names)
    def clear(self, name: str) -> None:
        self.index.clear(name)
        self.views.pop(name, None)

    @rule(name=names)
    def forget(self, name: str) -> None:
        self.index.forget(name)
        self.views.pop(name, None)
        self.bound = {ref: one for ref, one in self.bound.items() if one[0] != name}

    @rule(name=names, path=paths)
    def bind(self, name: str, path: tuple[bytes, ...]) -> None:
        self.count += 1
        self.index.expect(name, f"r{self.count}", path)
        self.bound[f"r{self.count}"] = (name, path)
        self.prompts.add(path)

    @rule(data=st.data())
    def settle(self, data: st.DataObject) -> None:
        if self.bound:
            ref = data.draw(st.sampled_from(sorted(self.bound)))
            self.index.settle(ref, 0.0, linger_s=0)
            del self.bound[ref]

    @invariant()
    def depths_agree(self) -> None:
        for prompt in self.prompts:
            expected: dict[str, int] = {}
            for name in "abcd":
                held = self.views.get(name, set()).union(
                    *(path for owner, path in self.bound.values() if owner == name)
                )
                depth = next((n for n, block in enumerate(prompt) if block not in held), len(prompt))
                if depth:
                    expected[name] = depth
            assert depths(self.index, prompt) == expected


TestAgainstNaive = AgainstNaive.TestCase


@given(st.lists(st.tuples(names, paths), max_size=20), paths)
def test_matches_come_deepest_first_and_name_each_node_once(
    stored: list[tuple[str, tuple[bytes, ...]]], prompt: tuple[bytes, ...]
) -> None:
    index = PrefixIndex()
    for name, path in stored:
        index.store(name, Medium.GPU, path)
    matches = index.match(prompt)
    assert [match.blocks for match in matches] == sorted({m.blocks for m in matches}, reverse=True)
    seen = 0
    for match in matches:
        assert not seen & match.nodes
        seen |= match.nodes
