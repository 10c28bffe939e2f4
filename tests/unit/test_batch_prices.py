"""Prices of many requests at once, and those written out, against prices told part by part."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Iterable

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dispatcher.protocol.assignment import Envelope
from dispatcher.protocol.names import Lane, Ref
from dispatcher.protocol.node import Medium, NodeIdentity, NodeReport, Role
from dispatcher.scheduling.choice import Choice, SchedulingParameters
from dispatcher.scheduling.fleet import Fleet
from dispatcher.scheduling.policies import price, totals_of
from dispatcher.scheduling.predictor import Predictor, PrefillShape
from dispatcher.scheduling.prefix_index import PrefixIndex
from dispatcher.scheduling.scheduler import ALL_LOOKED_AT, Scheduler, blocks_of
from dispatcher.scheduling.window import Waiting, Window

BLOCK = 256


class Scene:
    """A fleet in the state that chance left it in."""

    def __init__(self, seed: int, count: int = 60, *, prefill: int = 0) -> None:
        self.rng = random.Random(seed)
        self.now_s, self.healthy_s = 100.0, 100.0
        self.fleet, self.index = Fleet(), PrefixIndex()
        self.number = 0
        for n in range(count):
            role = Role.FUSED if not prefill else Role.PREFILL if n < prefill else Role.DECODE
            identity = NodeIdentity(
                node=f"n{n}",
                incarnation="x",
                models=("m",),
                role=role,
                max_running=self.rng.choice([4, 16]),
                max_model_len=200_000,
                kv_total_tokens=self.rng.choice([0, 60_000, 300_000]),
                engine_block_size=self.rng.choice([0, 16]),
                loras=("sql",) if n % 2 else (),
            )
            self.fleet.admit(identity, 100.0).admitted = True
        self.chains = [[self.rng.randbytes(8) for _ in range(24)] for _ in range(6)]
        for chain in self.chains[1:]:
            chain[:4] = self.chains[0][:4]
        self.scheduler = Scheduler(
            self.fleet,
            self.index,
            parameters=SchedulingParameters(),
            rng=self.rng,
            healthy_s=lambda: self.healthy_s,
            now_s=lambda: self.now_s,
        )
        for _ in range(6 * count):
            self.disturb()

    def request(
        self, *, chain: int | None = None, length: int | None = None, more: int | None = None
    ) -> Envelope:
        """A prompt that begins as some others do."""
        self.number += 1
        blocks = self.chains[self.rng.randrange(6) if chain is None else chain]
        length = self.rng.randrange(25) if length is None else length
        return Envelope(
            ref=f"i0_{self.number}",
            id=f"r{self.number}",
            model="m",
            prompt_tokens=length * BLOCK + (self.rng.randrange(1, 4_000) if more is None else more),
            max_tokens=self.rng.randrange(1, 500),
            block_size=BLOCK,
            block_hashes=tuple(block.hex() for block in blocks[:length]),
            tokens_exact=True,
            appended_ms=0,
            deadline_at_ms=600_000,
        )

    def disturb(self) -> None:
        """Let something happen to a node."""
        rng = self.rng
        self.now_s += rng.random() * 0.01
        self.healthy_s += rng.random() * 0.01
        node = self.fleet.nodes[f"n{rng.randrange(len(self.fleet.nodes))}"]
        kind = rng.randrange(9)
        if kind < 3:
            tokens = rng.randrange(5_000)
            self.number += 1
            self.fleet.reserve(
                node.name,
                f"i0_{self.number}",
                tokens + 100,
                uncached_tokens=tokens,
                prefill_s=tokens * 1e-5,
                number=self.number if rng.random() < 0.8 else 0,
                now_s=self.now_s,
            )
        elif kind == 3 and node.held:
            node.release(rng.choice(list(node.held)), self.now_s)
        elif kind == 4:
            report = NodeReport(
                node=node.name,
                incarnation="x",
                sequence=self.number,
                seen_seq=rng.randrange(self.number + 1),
                queued_uncached_tokens=rng.randrange(3_000),
                kv_used_tokens=rng.randrange(50_000),
                kv_total_tokens=node.identity.kv_total_tokens,
                engine_ok=rng.random() < 0.95,
            )
            node.hear(report, self.healthy_s, self.now_s)
        elif kind == 5:
            node.predictor.observe(rng.randrange(1, 8_000), rng.randrange(2_000), rng.random() * 0.3 + 0.001)
        elif kind == 6:
            node.answers.observe(rng.randrange(1, 400))
        elif kind == 7:
            chain = rng.choice(self.chains)
            self.index.store(node.name, Medium.GPU, chain[: rng.randrange(1, 25)])
        elif node.held:
            node.note_number(rng.choice(list(node.held)), rng.randrange(self.number + 1))

    def check(self, envelope: Envelope, choice: Choice) -> None:
        """The choice is the best of its candidates, by prices told part by part, and what it says is so."""
        nodes = list(choice.candidates)
        prices = price(self.scheduler, envelope, nodes, {}, self.scheduler.matches(envelope))
        by_node = {one[4].name: one for one in prices if one[4].is_eligible}
        total, hit, wait_s, prefill_s, node, *_ = by_node[choice.node.name]
        least = min(one[0] for one in by_node.values())
        assert total <= least * (1 + self.scheduler.parameters.near_tie) * (1 + 1e-9)
        near = [one for one in by_node.values() if one[0] <= least * (1.05 - 1e-9)]
        assert hit >= max((one[1] for one in near), default=0)
        assert (choice.hit_tokens, choice.uncached_tokens) == (hit, max(1, envelope.prompt_tokens - hit))
        assert choice.wait_s == pytest.approx(wait_s, abs=1e-9)
        assert choice.prefill_s == pytest.approx(prefill_s)
        assert choice.has_room == (
            node.has_space(envelope) and choice.wait_s <= self.scheduler.lookahead_s(node)
        )
        assert choice.is_stale == self.scheduler.is_stale(node)


seeds = st.integers(min_value=0, max_value=1 << 30)


@given(seed=seeds, prefill=st.sampled_from([0, 20]))
def test_prices_written_out_are_those_told_part_by_part(seed: int, prefill: int) -> None:
    scene = Scene(seed, 12, prefill=prefill // 5)
    for _ in range(30):
        scene.disturb()
        envelope = scene.request()
        nodes, matches = list(scene.fleet.nodes.values()), scene.scheduler.matches(envelope)
        planned = {"n3": 0.25, "n5": 1.5} if scene.rng.random() < 0.3 else {}
        written = totals_of(scene.scheduler, envelope, nodes, planned, matches)
        told = price(scene.scheduler, envelope, nodes, planned, matches)
        assert written.totals_s == pytest.approx([one[0] for one in told])
        assert written.hits == [one[1] for one in told]
        assert written.waits_s == pytest.approx([one[2] for one in told])
        assert written.prefills_s == pytest.approx([one[3] for one in told])


@given(seed=seeds, prefill=st.sampled_from([0, 20]))
def test_a_request_that_is_priced_with_others_gets_the_best_of_its_candidates(
    seed: int, prefill: int
) -> None:
    scene = Scene(seed, prefill=prefill)
    envelopes = [scene.request() for _ in range(20)]
    for envelope in envelopes:
        scene.scheduler.begin_round()
        scene.scheduler.prepare(envelopes)
        choice = scene.scheduler.prepared(envelope, {})
        assert choice is not None
        assert len(choice.candidates) >= 16
        scene.check(envelope, choice)


@given(seed=seeds)
def test_what_is_bound_in_a_round_counts_for_those_after_it(seed: int) -> None:
    scene = Scene(seed)
    envelopes = [scene.request() for _ in range(30)]
    scene.scheduler.prepare(envelopes)
    for envelope in envelopes:
        choice = scene.scheduler.choose(envelope, (), {})
        assert choice is not None
        # Blocks that were bound since are no news to it, unless by more than any node had.
        if choice.has_room:
            name = choice.node.name
            scene.fleet.reserve(
                name,
                envelope.ref,
                envelope.cost_tokens,
                uncached_tokens=choice.uncached_tokens,
                prefill_s=choice.prefill_s,
                now_s=scene.now_s,
            )
    again = scene.request()
    choice = scene.scheduler.choose(again, (), {})
    assert choice is not None
    scene.check(again, choice)


def quiet(count: int = 60) -> Scene:
    """A fleet to which nothing happened."""
    scene = Scene(1, 0)
    for n in range(count):
        scene.fleet.admit(NodeIdentity(node=f"n{n}", incarnation="x", models=("m",)), 100.0).admitted = True
    return scene


def bind_all(scene: Scene, envelopes: Iterable[Envelope]) -> dict[str, str]:
    """Bind what can be bound in one round; nodes by ref."""
    window, bound = Window(), {}
    for envelope in envelopes:
        window.push(Waiting(ref=Ref.parse(envelope.ref), envelope=envelope))
    round = window.begin_round()
    while (found := window.choose(scene.scheduler, round, 0)) is not None:
        waiting, choice = found
        ref, name = waiting.envelope.ref, choice.node.name
        scene.fleet.reserve(
            name,
            ref,
            waiting.envelope.cost_tokens,
            uncached_tokens=choice.uncached_tokens,
            prefill_s=choice.prefill_s,
            now_s=scene.now_s,
        )
        scene.index.expect(name, ref, blocks_of(waiting.envelope.block_hashes))
        bound[ref] = name
    window.end_round(round)
    return bound


def test_siblings_of_one_round_wait_for_the_one_node_that_will_have_their_prompt() -> None:
    scene = quiet()
    siblings = [scene.request(chain=2, length=24, more=100) for _ in range(3)]
    others = [scene.request(length=0) for _ in range(5)]
    bound = bind_all(scene, [*siblings, *others])
    assert [one.ref in bound for one in siblings] == [True, False, False]
    assert all(one.ref in bound for one in others)
    choice = scene.scheduler.choose(siblings[1], (), {})
    assert choice is not None
    assert (choice.node.name, choice.has_room) == (bound[siblings[0].ref], False)


def test_a_round_spreads_what_has_no_prefix_in_common() -> None:
    scene = quiet()
    bound = bind_all(scene, [scene.request(length=0) for _ in range(60)])
    assert len(bound) == 60
    assert len(set(bound.values())) >= 40


def test_random_candidates_are_drawn_from_all_of_the_fleet_beside_holders() -> None:
    scene = quiet(256)
    for n in range(0, 256, 16):
        scene.index.store(f"n{n}", Medium.GPU, scene.chains[0])
    seen: Counter[int] = Counter()
    for _ in range(40):
        envelopes = [scene.request(chain=0, length=8) for _ in range(10)]
        scene.scheduler.begin_round()
        scene.scheduler.prepare(envelopes)
        choice = scene.scheduler.prepared(envelopes[0], {})
        assert choice is not None
        numbers = {int(node.name[1:]) for node in choice.candidates}
        assert numbers >= set(range(0, 256, 16))
        seen.update(number // 32 for number in numbers if number % 16)
    assert sum(seen.values()) > 500
    assert min(seen[part] for part in range(8)) > 0.7 * sum(seen.values()) / 8


def test_a_round_over_a_disturbed_fleet_keeps_every_bound() -> None:
    scene = Scene(3, 80)
    before = {name: len(node.held) for name, node in scene.fleet.nodes.items()}
    bound = bind_all(scene, [scene.request() for _ in range(300)])
    assert len(bound) > 40
    for name, node in scene.fleet.nodes.items():
        if len(node.held) > before[name]:
            assert node.is_eligible
            assert len(node.held) <= node.request_bound


def test_nodes_that_may_take_nothing_are_not_chosen() -> None:
    scene = quiet()
    kept = {"n3", "n17", "n40"}
    for name, node in scene.fleet.nodes.items():
        node.available = name in kept
    envelopes = [scene.request() for _ in range(20)]
    assert set(bind_all(scene, envelopes).values()) <= kept
    for node in scene.fleet.nodes.values():
        node.available = True
    scene.scheduler.prepare(envelopes)
    for node in scene.fleet.nodes.values():
        node.cordoned = node.name not in kept
    for envelope in envelopes:
        choice = scene.scheduler.choose(envelope, (), {})
        assert choice is None or choice.node.name in kept


def test_too_long_a_prompt_for_any_is_left_to_be_told_alone() -> None:
    scene = quiet()
    long = [scene.request(length=0) for _ in range(4)]
    too_long = Envelope(ref="i9_9", id="x", model="m", prompt_tokens=10_000_000, tokens_exact=True)
    scene.scheduler.prepare([*long, too_long])
    assert scene.scheduler.prepared(too_long, {}) is None
    assert scene.scheduler.choose(too_long, (), {}) is None


def test_what_is_priced_alone_is_priced_alone() -> None:
    scene = quiet()
    envelopes = [scene.request() for _ in range(8)]
    scene.scheduler.prepare(envelopes[:2])
    assert not any(scene.scheduler.is_prepared(one.ref) for one in envelopes)
    with_lora = Envelope(ref="i9_8", id="y", model="m", prompt_tokens=10, lora="sql")
    scene.scheduler.prepare([*envelopes, with_lora])
    assert scene.scheduler.is_prepared(envelopes[0].ref)
    assert not scene.scheduler.is_prepared(with_lora.ref)
    scene.scheduler.begin_round()
    assert not any(scene.scheduler.is_prepared(one.ref) for one in envelopes)
    scene.fleet.nodes["n5"].predictor = Predictor(PrefillShape())
    scene.fleet.admit(NodeIdentity(node="new", incarnation="x", models=("m",)), 100.0)
    scene.scheduler.prepare(envelopes)
    assert not any(scene.scheduler.is_prepared(one.ref) for one in envelopes)


def test_choices_outside_of_rounds_leave_nothing_behind() -> None:
    scene = quiet()
    for _ in range(50):
        assert scene.scheduler.choose(scene.request(length=20), (), {}) is not None
    assert scene.scheduler._batch._fresh == set()


def test_small_fleets_and_caches_on_slower_tiers_are_looked_at_one_by_one() -> None:
    assert not quiet(ALL_LOOKED_AT).scheduler.wants_batch("m")
    scene = quiet(ALL_LOOKED_AT + 1)
    assert scene.scheduler.wants_batch("m")
    scene.index.store("n1", Medium.CPU, scene.chains[0])
    assert not scene.scheduler.wants_batch("m")


def test_batch_lane_and_interactive_lane_are_both_priced() -> None:
    scene = quiet()
    window = Window()
    for n in range(40):
        one = scene.request()
        lane = Lane.BATCH if n % 2 else Lane.INTERACTIVE
        window.push(Waiting(ref=Ref(lane, 0, n), envelope=one))
    round = window.begin_round()
    assert window.choose(scene.scheduler, round, 0) is not None
    assert {lane for lane, *_ in round.prepared} == {Lane.INTERACTIVE}
