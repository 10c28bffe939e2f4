"""What is told of a decision is what the decision was made of."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from typing import Any

import msgspec
import pytest
from msgspec.structs import replace as renamed

from dispatcher.explain.text import BARS, DOUBTS, RULES, as_data, as_text
from dispatcher.protocol import codec
from dispatcher.protocol.assignment import Envelope
from dispatcher.protocol.explanation import Bar, BarredNode, Candidate, Doubt, Explanation, Rule
from dispatcher.protocol.handoff import Handoff, Stage
from dispatcher.protocol.names import Attempt, Ref
from dispatcher.protocol.node import Medium, Role
from dispatcher.scheduling.breaker import FAILURES
from dispatcher.scheduling.choice import Choice, Planned
from dispatcher.scheduling.explanation import MOST_CANDIDATES, MOST_NAMED, explain
from dispatcher.scheduling.fleet import NodeState
from dispatcher.scheduling.policies import POLICIES
from dispatcher.scheduling.scheduler import bar_of
from dispatcher.scheduling.window import Waiting, Waits, Window
from tests.unit.test_scheduler import Scene, blocks, request

TERMS = ("queue", "slot", "planned", "prefill", "work", "stall", "burst", "pressure", "transfer")
EVERYTHING: dict[str, Any] = {
    "work_weight": 0.5,
    "stall_weight": 2.0,
    "burst_weight": 1.0,
    "pressure_s": 0.15,
    "near_tie": 0.05,
}


def waiting(envelope: Envelope, **fields: Any) -> Waiting:
    """A request in the window."""
    return Waiting(ref=Ref.parse(envelope.ref), envelope=envelope, **fields)


def told(
    scene: Scene,
    envelope: Envelope,
    *,
    planned: Planned | None = None,
    waits: Waits | None = None,
    now_ms: int = 0,
    **fields: Any,
) -> tuple[Choice, Explanation]:
    """A choice, and what is told of it."""
    one = waiting(envelope, **fields)
    planned = {} if planned is None else planned
    choice = scene.scheduler.choose(
        envelope,
        one.excluded,
        planned,
        is_suspect=bool(one.crashed),
        is_decode=one.handoff is not None,
    )
    assert choice is not None
    explanation = explain(
        scene.scheduler,
        one,
        choice,
        planned,
        waits=waits if waits is not None else Waits(put_off_ms=0),
        attempt=Attempt(7, 2),
        now_ms=now_ms,
    )
    assert explanation == codec.explanations.decode(codec.encode(explanation))
    return choice, explanation


def busy_scene(seed: int, count: int) -> tuple[Scene, random.Random, Planned]:
    """A fleet of which every node has something of everything."""
    rng = random.Random(seed)
    scene = Scene(count, "prefill_cost", **EVERYTHING)
    for number, node in enumerate(list(scene.fleet.nodes.values())):
        for held in range(rng.randrange(10)):
            tokens = rng.randrange(1, 9000)
            scene.fleet.reserve(
                node.name,
                f"b{number}_{held}",
                tokens,
                uncached_tokens=tokens * rng.randrange(2),
                prefill_s=tokens * 1e-4,
            )
        if rng.random() < 0.6:
            scene.report(
                node.name, queued_uncached_tokens=rng.randrange(5000), kv_used_tokens=9, kv_total_tokens=99
            )
        scene.index.store(node.name, Medium.GPU, blocks(*range(1, 1 + rng.randrange(6))))
    planned = {f"n{number}": rng.random() for number in range(count) if rng.random() < 0.2}
    return scene, rng, planned


def candidate(told: Explanation, node: str) -> Candidate:
    """A candidate by its name."""
    (found,) = [one for one in told.candidates if one.node == node]
    return found


@pytest.mark.parametrize("seed", range(25))
def test_the_terms_of_a_candidate_add_up_to_its_cost_and_the_chosen_has_the_least(seed: int) -> None:
    scene, _, planned = busy_scene(seed, 12)
    choice, explanation = told(scene, request(1, 2, 3, 4), planned=planned)
    assert explanation.is_priced
    for one in explanation.candidates:
        total = sum(getattr(one, f"{term}_ms") for term in TERMS)
        assert total == pytest.approx(one.cost_ms, abs=0.01)
        assert one.cached_tokens + one.compute_tokens == 4 * 256 + 100
    least = min(one.cost_ms for one in explanation.candidates)
    chosen = candidate(explanation, choice.node.name)
    assert chosen.is_tied
    assert chosen.cost_ms <= least * 1.05 + 0.001
    assert {one.is_tied for one in explanation.candidates if one.cost_ms > least * 1.05 + 0.01} <= {False}
    assert chosen.has_room == choice.has_room
    assert chosen.cached_tokens == choice.hit_tokens
    assert chosen.prefill_ms == pytest.approx(1000 * choice.prefill_s, abs=0.001)
    assert chosen.queue_ms + chosen.slot_ms == pytest.approx(1000 * choice.wait_s, abs=0.002)
    assert chosen.planned_ms == pytest.approx(1000 * planned.get(choice.node.name, 0.0), abs=0.001)


@pytest.mark.parametrize("policy", sorted(POLICIES))
def test_explaining_changes_no_decision(policy: str) -> None:
    def decisions(look: Callable[[Scene, Waiting, Choice], object]) -> Iterator[str]:
        scene = Scene(40, policy, **EVERYTHING)
        for number in range(60):
            one = waiting(renamed(request(number % 5, number % 3), ref=f"i0_{number}"))
            choice = scene.scheduler.choose(one.envelope, (), {})
            assert choice is not None
            look(scene, one, choice)
            scene.fleet.reserve(choice.node.name, one.envelope.ref, 1000, uncached_tokens=1000, prefill_s=0.1)
            yield choice.node.name

    def looked(scene: Scene, one: Waiting, choice: Choice) -> object:
        return explain(
            scene.scheduler, one, choice, {}, waits=Waits(put_off_ms=0), attempt=Attempt(1, 1), now_ms=0
        )

    assert list(decisions(looked)) == list(decisions(lambda *_: None))


def test_what_is_told_is_bounded_in_a_large_fleet() -> None:
    scene, _, _ = busy_scene(3, 1000)
    for number in range(0, 1000, 3):
        scene.fleet.nodes[f"n{number}"].cordoned = True
    envelope = renamed(request(1, 2, 3, tenant="t" * 256), id="r" * 256)
    _, explanation = told(scene, envelope, excluded=tuple(f"n{number}" for number in range(1, 900, 3)))
    assert explanation.serving == 1000
    assert len(explanation.candidates) == MOST_CANDIDATES
    assert explanation.asked <= 70
    assert len(explanation.barred_nodes) == len(explanation.excluded) == MOST_NAMED
    assert sum(explanation.barred.values()) > MOST_NAMED
    assert len(codec.encode(explanation)) < 6_000


def test_the_chosen_is_told_also_when_others_would_have_cost_less() -> None:
    scene = Scene(30, "round_robin", **EVERYTHING)
    for number in range(30):
        if number != 1:
            scene.index.store(f"n{number}", Medium.GPU, blocks(1, 2, 3))
    choice, explanation = told(scene, request(1, 2, 3))
    assert choice.node.name == "n1"
    assert (explanation.rule, explanation.is_priced) == (Rule.TURN, False)
    assert candidate(explanation, "n1").cached_tokens == 0
    assert candidate(explanation, "n1").prefill_ms > min(one.prefill_ms for one in explanation.candidates)
    assert not any(one.is_tied for one in explanation.candidates)


def test_rules_tell_what_decided() -> None:
    scene = Scene(3, near_tie=0.05)
    assert told(scene, request(1, 2))[1].rule is Rule.CHANCE
    scene.index.store("n2", Medium.GPU, blocks(1))
    assert told(scene, request(*range(1, 60)))[1].rule is Rule.MOST_CACHED
    scene.index.store("n2", Medium.GPU, blocks(*range(1, 50)))
    assert told(scene, request(*range(1, 60)))[1].rule is Rule.LEAST_COST


@pytest.mark.parametrize(
    ("policy", "rule"),
    [
        ("random", Rule.CHANCE),
        ("least_outstanding_tokens", Rule.FEWEST_TOKENS),
        ("round_robin_lowest_concurrency", Rule.FEWEST_REQUESTS),
        ("shortest_ttft", Rule.LEAST_COST),
    ],
)
def test_rules_of_the_other_policies(policy: str, rule: Rule) -> None:
    scene = Scene(3, policy)
    for name in ("n0", "n2"):
        scene.fleet.reserve(name, f"b{name}", 100)
    assert told(scene, request(1))[1].rule is rule


BARRED: dict[Bar, Callable[[NodeState], object]] = {
    Bar.CORDONED: lambda node: setattr(node, "cordoned", True),
    Bar.GONE: lambda node: setattr(node, "available", False),
    Bar.NOT_ADMITTED: lambda node: setattr(node, "admitted", False),
    Bar.ON_PROBATION: lambda node: [
        node.breaker.failed(f"f{n}", 0.0, random.Random(1)) for n in range(FAILURES)
    ],
}


@pytest.mark.parametrize("why", BARRED, ids=str)
def test_a_node_that_can_not_be_chosen_is_named_with_the_reason(why: Bar) -> None:
    scene = Scene(2)
    BARRED[why](scene.fleet.nodes["n1"])
    choice, explanation = told(scene, request(1))
    assert choice.node.name == "n0"
    assert explanation.barred == {why.value: 1}
    assert explanation.barred_nodes == (BarredNode(node="n1", why=why),)


def test_every_other_reason_is_named_too() -> None:
    scene = Scene(1, **EVERYTHING)
    scene.add("tuned", loras=("l",))
    scene.add("vit", role=Role.VIT, loras=("l",))
    scene.add("small", max_model_len=50, loras=("l",))
    scene.add("ill", loras=("l",))
    scene.report("ill", engine_ok=False)
    scene.add("leaving", loras=("l",))
    scene.report("leaving", draining=True)
    scene.add("again", loras=("l",))
    scene.add("suspect", loras=("l",)).suspect = "i0_9"
    choice, explanation = told(
        scene, request(1, lora="l", tokens_exact=True), excluded=("again",), crashed=("gone",)
    )
    assert choice.node.name == "tuned"
    assert {one.node: one.why for one in explanation.barred_nodes} == {
        "n0": Bar.LORA,
        "vit": Bar.ROLE,
        "small": Bar.TOO_LONG,
        "ill": Bar.ENGINE_DOWN,
        "leaving": Bar.DRAINING,
        "again": Bar.EXCLUDED,
        "suspect": Bar.SUSPECT,
    }
    assert explanation.excluded == ("again",)


@pytest.mark.parametrize("seed", range(30))
def test_a_node_has_a_reason_exactly_when_it_is_not_eligible(seed: int) -> None:
    rng = random.Random(seed)
    scene = Scene(0)
    for number in range(30):
        node = scene.add(
            f"n{number}",
            role=rng.choice([Role.FUSED, Role.FUSED, Role.VIT]),
            loras=rng.choice([(), ("l",), ("l",)]),
            max_model_len=rng.choice([500, 5000]),
        )
        scene.report(
            node.name,
            engine_ok=rng.random() < 0.9,
            draining=rng.random() < 0.1,
        )
        for flaw in BARRED.values():
            if rng.random() < 0.1:
                flaw(node)
    envelope = request(1, 2, 3, lora="l", tokens_exact=True)
    eligible = {node.name for node in scene.scheduler.eligible(envelope, ())}
    assert eligible == {name for name, node in scene.fleet.nodes.items() if bar_of(node, envelope) is None}


def test_doubts_tell_what_was_not_known() -> None:
    scene = Scene(2)
    assert set(told(scene, request(1))[1].doubts) == {Doubt.ESTIMATED_LENGTH, Doubt.EMPTY_REGISTRY}
    scene.index.store("n0", Medium.GPU, blocks(1))
    exact = {"tokens_exact": True}
    assert told(scene, request(1, **exact))[1].doubts == ()
    assert told(scene, request(**exact))[1].doubts == (Doubt.NO_BLOCKS,)
    assert told(scene, request(1, text_hashed=True, **exact))[1].doubts == (Doubt.TEXT_ONLY,)
    assert told(scene, request(1, block_size=512, **exact))[1].doubts == (Doubt.OTHER_BLOCKS,)
    scene.healthy_s = 60.0
    _, explanation = told(scene, request(1, **exact))
    assert explanation.doubts == (Doubt.STALE_LOAD,)
    assert all(one.is_stale for one in explanation.candidates)


def decode_scene() -> Scene:
    """Two prefill nodes and three decode nodes."""
    scene = Scene(0)
    for number in range(2):
        scene.add(f"p{number}", role=Role.PREFILL)
    for number in range(3):
        scene.add(f"d{number}", role=Role.DECODE, kv_total_tokens=100_000)
    return scene


def test_both_stages_are_explained() -> None:
    scene = decode_scene()
    for number in range(3):
        scene.fleet.reserve(f"d{number}", f"b{number}", 1, uncached_tokens=1, prefill_s=5.0)
    choice, explanation = told(scene, request(*range(60)))
    assert explanation.stage is choice.stage is Stage.PREFILL
    assert candidate(explanation, choice.node.name).transfer_ms > 0
    assert candidate(explanation, "d0").transfer_ms == 0
    scene = decode_scene()
    scene.fleet.reserve("d0", "b0", 50_000)
    scene.fleet.reserve("d1", "b1", 10_000)
    scene.fleet.nodes["d2"].cordoned = True
    handoff = Handoff(node="p0", kv_transfer_params=msgspec.Raw(b"{}"), expires_ms=1)
    choice, explanation = told(scene, request(1), handoff=handoff)
    assert (explanation.stage, explanation.policy, explanation.rule) == (
        Stage.DECODE,
        "least_kv",
        Rule.DECODE_POLICY,
    )
    assert [one.node for one in explanation.candidates] == ["d1", "d0"]
    assert [one.kv_use for one in explanation.candidates] == [0.104, 0.504]
    assert explanation.barred == {"role": 2, "cordoned": 1}


def test_waiting_is_told_from_append_over_intake_to_the_decision() -> None:
    window, scene = Window(), Scene(1)
    window.longer_ms = lambda envelope: 40
    envelope = request(1, appended_ms=1_000, deadline_at_ms=601_000)
    window.push(waiting(envelope, entered_ms=1_007))
    round = window.begin_round()
    found = window.choose(scene.scheduler, round, 1_500)
    assert found is not None
    one, choice = found
    told = explain(
        scene.scheduler, one, choice, {}, waits=round.waits_of(envelope), attempt=Attempt(1, 1), now_ms=1_500
    )
    assert (told.waited_ms, told.read_ms, told.put_off_ms, told.busy_rounds) == (500, 7, 40, 0)


def test_a_request_that_is_passed_over_tells_for_which_node() -> None:
    window, scene = Window(), Scene(2)
    scene.index.store("n0", Medium.GPU, blocks(*range(1, 60)))
    scene.fleet.reserve("n0", "b", 20_000, uncached_tokens=12_000, prefill_s=1.2)
    window.push(waiting(request(*range(1, 60), appended_ms=1, deadline_at_ms=10**6)))
    for now_ms in (10, 20, 30):
        round = window.begin_round()
        assert window.choose(scene.scheduler, round, now_ms) is None
        window.end_round(round)
    scene.fleet.release("n0", "b")
    round = window.begin_round()
    assert window.choose(scene.scheduler, round, 40) is not None
    assert round.waits_of(request(deadline_at_ms=10**6)) == Waits(put_off_ms=0, busy=3, busy_node="n0")
    window.push(waiting(request(1, appended_ms=1, deadline_at_ms=10**6)))
    round = window.begin_round()
    assert window.choose(scene.scheduler, round, 50) is not None
    assert round.waits_of(request(deadline_at_ms=10**6)) == Waits(put_off_ms=0), (
        "nothing is left of the one before"
    )


def test_a_request_that_no_node_could_take_tells_so() -> None:
    window, scene = Window(), Scene(1)
    window.push(waiting(request(lora="l", appended_ms=1, deadline_at_ms=10**6)))
    assert window.choose(scene.scheduler, window.begin_round(), 10) is None
    scene.add("n1", loras=("l",))
    round = window.begin_round()
    assert window.choose(scene.scheduler, round, 5_000) is not None
    assert round.waits_of(request(deadline_at_ms=10**6)).unplaced == 1


def explanation(**fields: Any) -> Explanation:
    """A made up one."""
    return Explanation(
        **{
            "ref": "i0_5",
            "id": "r1",
            "tenant": "acme",
            "model": "m",
            "node": "n1",
            "epoch": 7,
            "n": 2,
            "at_ms": 1_790_000_000_123,
            "policy": "prefill_cost",
            "rule": Rule.MOST_CACHED,
            "is_priced": True,
            "near_tie": 0.05,
            "prompt_tokens": 12_345,
            "max_tokens": 64,
            "blocks": 48,
            "block_size": 256,
            "priority": 50,
            "waited_ms": 812,
            "read_ms": 9,
            "put_off_ms": 300,
            "busy_rounds": 4,
            "busy_node": "n1",
            "failures": 1,
            "excluded": ("n9",),
            "serving": 16,
            "asked": 16,
            "looked_at": 3,
            "barred": {"cordoned": 2, "on_probation": 9},
            "barred_nodes": (
                BarredNode(node="n3", why=Bar.CORDONED),
                BarredNode(node="n4", why=Bar.CORDONED),
            ),
            "candidates": (
                Candidate(
                    node="n1",
                    cost_ms=100.25,
                    queue_ms=20.0,
                    prefill_ms=80.25,
                    cached_tokens=9_000,
                    compute_tokens=3_345,
                    held=3,
                    most=9,
                    kv_use=0.5,
                    is_tied=True,
                    has_room=True,
                ),
                Candidate(node="n2", cost_ms=101.0, prefill_ms=101.0, compute_tokens=12_345, is_tied=True),
            ),
            "doubts": (Doubt.STALE_LOAD,),
            **fields,
        }
    )


def test_the_text_tells_everything_in_lines_that_fit() -> None:
    lines = as_text(explanation()).splitlines()
    assert max(map(len, lines)) <= 110
    assert lines == [
        "request   acme/r1, record i0_5, model m, priority 50",
        "prompt    12,345 tokens, 48 blocks of 256; at most 64 of answer",
        "decided   2026-09-21T14:13:20.123Z, attempt 2 of epoch 7",
        "chosen    n1 by prefill_cost: of the near ties, the one that holds most of the prompt",
        "waited    812 ms since its append, 9 ms of it until it came into the window, its turn 300 ms later"
        " for its",
        "          size, passed over 4 times while its best node, last n1, was busy",
        "before    1 engine failures, not again at n9 if another can",
        "nodes     16 serve the model, 3 looked at; could not be chosen: 2 cordoned (n3, n4), 9 on probation",
        "",
        "   node  cost ms  queue  prefill  cached  to compute  queued  requests   KV",
        ">  n1      100.2   20.0     80.2    9000        3345       0       3/9  50%  near tie",
        "   n2      101.0    0.0    101.0       0       12345       0       0/0   0%  near tie, busy",
        "",
        "Costs, ms: queue: prompts before it; prefill: its own.",
        "Costs within 5% of the least are a near tie.",
        "The best 2 of 3 are shown.",
        "! the chosen node's report was old: what its peers had queued counted too",
    ]


def test_a_turn_that_held_nobody_up_is_not_told() -> None:
    assert "later for its size" not in as_text(explanation(waited_ms=12, read_ms=9))


def test_every_rule_reason_and_doubt_has_words() -> None:
    assert set(RULES) == set(Rule)
    assert set(BARS) == set(Bar)
    assert set(DOUBTS) == set(Doubt)


def test_a_client_s_id_does_not_reach_the_terminal_raw() -> None:
    assert "\x1b" not in as_text(explanation(id="\x1b[31mr", tenant="\x07", model="a\x1bb"))


def test_data_for_machines_has_every_field() -> None:
    data: Any = as_data(explanation())
    assert set(data) == set(Explanation.__struct_fields__)
    assert [set(one) for one in data["candidates"]] == [set(Candidate.__struct_fields__)] * 2
