"""An explanation as an operator reads it: a head, a table of candidates, and what was not known."""

from __future__ import annotations

import textwrap
from collections.abc import Iterator, Sequence
from datetime import UTC, datetime

import msgspec

from dispatcher.protocol.explanation import Bar, Candidate, Doubt, Explanation, Rule
from dispatcher.protocol.handoff import Stage

WIDTH = 110
WORTH_TELLING_MS = 10
"""One that waited less in the window was not held up by its turn."""
RULES = {
    Rule.LEAST_COST: "the least cost, no other near it",
    Rule.MOST_CACHED: "of the near ties, the one that holds most of the prompt",
    Rule.CHANCE: "by chance, among equals",
    Rule.TURN: "it was its turn",
    Rule.FEWEST_TOKENS: "the fewest tokens bound per running slot",
    Rule.FEWEST_REQUESTS: "the fewest requests",
    Rule.LONGEST_UNCHOSEN: "of the best share, the one chosen longest ago",
    Rule.NEARLY_LEAST_WAIT: "by chance, of those with nearly the least wait and prefill",
    Rule.DECODE_POLICY: "by the decode policy, among those with a slot",
    Rule.LEAST_FULL: "none could hold it: the least full",
}
BARS = {
    Bar.CORDONED: "cordoned",
    Bar.GONE: "silent or fenced",
    Bar.NOT_ADMITTED: "not admitted yet",
    Bar.ON_PROBATION: "on probation",
    Bar.ENGINE_DOWN: "engine not well",
    Bar.DRAINING: "draining",
    Bar.ROLE: "of another role",
    Bar.LORA: "without the LoRA adapter",
    Bar.TOO_LONG: "too small for the prompt",
    Bar.SUSPECT: "has another suspect",
    Bar.EXCLUDED: "failed this request before",
}
DOUBTS = {
    Doubt.STALE_LOAD: "the chosen node's report was old: what its peers had queued counted too",
    Doubt.EMPTY_REGISTRY: "no node had published any cached block: only recent assignments could match",
    Doubt.OTHER_BLOCKS: "its hashes are of other blocks than the pool's: only recent assignments could match",
    Doubt.TEXT_ONLY: "the prompt came without tokens: its text was matched with recent assignments only",
    Doubt.NO_BLOCKS: "no hashes of the prompt are known: no cache could be matched",
    Doubt.ESTIMATED_LENGTH: "the prompt's length is an estimate",
}
TERMS = {
    "queue": ("queue_ms", "prompts before it"),
    "slot": ("slot_ms", "until a slot and KV cache are free"),
    "round": ("planned_ms", "requests of this round that wait for the node"),
    "prefill": ("prefill_ms", "its own"),
    "others": ("work_ms", "what that is to those who come after it"),
    "stall": ("stall_ms", "what it is to the answers under way there"),
    "burst": ("burst_ms", "long prompts there of late"),
    "full": ("pressure_ms", "how full the node is"),
    "hop": ("transfer_ms", "to hand the prompt over"),
}
"""Columns of a candidate's cost, in the order in which they add up: field and meaning."""


def as_data(one: Explanation) -> dict[str, object]:
    """An explanation for machines: every field, also where it has its default."""
    data: dict[str, object] = {name: getattr(one, name) for name in one.__struct_fields__}
    data["candidates"] = [
        {name: getattr(candidate, name) for name in candidate.__struct_fields__}
        for candidate in one.candidates
    ]
    built: dict[str, object] = msgspec.to_builtins(data)
    return built


def as_text(one: Explanation) -> str:
    """One decision, for a terminal."""
    head = [
        line
        for name, text in _head(one)
        for line in textwrap.wrap(
            f"{name:<9} {text}",
            WIDTH,
            subsequent_indent=" " * 10,
            break_long_words=False,
            break_on_hyphens=False,
        )
    ]
    tail = list(_tail(one))
    return "\n".join((*head, "", *_table(one), *([""] if tail else []), *tail))


def _head(one: Explanation) -> Iterator[tuple[str, str]]:
    who = f"{one.tenant}/{one.id}" if one.tenant else one.id
    yield "request", f"{plain(who)}, record {one.ref}, model {plain(one.model)}, priority {one.priority}"
    yield "prompt", _prompt(one)
    what = {Stage.WHOLE: "", Stage.PREFILL: "prefill stage of ", Stage.DECODE: "decode stage of "}[one.stage]
    yield "decided", f"{when(one.at_ms)}, {what}attempt {one.n} of epoch {one.epoch}"
    yield "chosen", f"{one.node} by {one.policy}: {RULES[one.rule]}"
    yield "waited", _waited(one)
    if one.failures or one.excluded:
        nodes = f", not again at {', '.join(one.excluded)} if another can" if one.excluded else ""
        yield "before", f"{one.failures} engine failures{nodes}"
    yield "nodes", f"{one.serving} serve the model, {one.looked_at} looked at{_barred(one)}"


def _prompt(one: Explanation) -> str:
    about = "about " if Doubt.ESTIMATED_LENGTH in one.doubts else ""
    blocks = (
        f", {one.blocks} block{'s' * (one.blocks != 1)} of {one.block_size}"
        if one.blocks and one.block_size
        else ""
    )
    return f"{about}{one.prompt_tokens:,} tokens{blocks}; at most {one.max_tokens:,} of answer"


def _waited(one: Explanation) -> str:
    parts = [f"{_s(one.waited_ms)} since its append"]
    if one.read_ms:
        parts.append(f"{_s(one.read_ms)} of it until it came into the window")
    if one.put_off_ms and one.waited_ms - one.read_ms >= WORTH_TELLING_MS:
        parts.append(f"its turn {_s(one.put_off_ms)} later for its size")
    if one.busy_rounds:
        parts.append(
            f"passed over {one.busy_rounds} times while its best node, last {one.busy_node}, was busy"
        )
    if one.unplaced_rounds:
        parts.append(f"looked at {one.unplaced_rounds} times when no eligible node could take it")
    return ", ".join(parts)


def _barred(one: Explanation) -> str:
    if not one.barred:
        return ""
    asked = f" of {one.asked} asked" if one.asked < one.serving else ""
    kinds = []
    for why, count in one.barred.items():
        named = [barred.node for barred in one.barred_nodes if barred.why == why]
        some = f" ({', '.join(named)}{', ...' if len(named) < count else ''})" if named else ""
        kinds.append(f"{count} {BARS[Bar(why)]}{some}")
    return f"; could not be chosen{asked}: {', '.join(kinds)}"


def _table(one: Explanation) -> Iterator[str]:
    if one.stage is Stage.DECODE:
        yield from _aligned(
            ["", "node", "KV after", "requests", ""],
            [
                [
                    ">" if candidate.node == one.node else "",
                    candidate.node,
                    f"{candidate.kv_use:.1%}",
                    f"{candidate.held}/{candidate.most}",
                    _notes(one, candidate),
                ]
                for candidate in one.candidates
            ],
        )
        return
    terms = _terms(one)
    yield from _aligned(
        ["", "node", "cost ms", *terms, "cached", "to compute", "queued", "requests", "KV", ""],
        [
            [
                ">" if candidate.node == one.node else "",
                candidate.node,
                f"{candidate.cost_ms:.1f}",
                *(f"{getattr(candidate, field):.1f}" for field in terms.values()),
                f"{candidate.cached_tokens}",
                f"{candidate.compute_tokens}",
                f"{candidate.queued_tokens}",
                f"{candidate.held}/{candidate.most}",
                f"{candidate.kv_use:.0%}",
                _notes(one, candidate),
            ]
            for candidate in one.candidates
        ],
    )


def _terms(one: Explanation) -> dict[str, str]:
    """The columns of costs that are not 0 everywhere, with their fields."""
    return {
        name: field
        for name, (field, _) in TERMS.items()
        if any(getattr(candidate, field) for candidate in one.candidates)
    }


def _notes(one: Explanation, candidate: Candidate) -> str:
    # Alone within the band there is nobody to tie with.
    is_tied = candidate.is_tied and sum(other.is_tied for other in one.candidates) > 1
    notes = {
        "near tie": is_tied,
        "busy": not candidate.has_room,
        "old report": candidate.is_stale,
    }
    return ", ".join(note for note, holds in notes.items() if holds)


def _aligned(head: Sequence[str], rows: Sequence[Sequence[str]]) -> Iterator[str]:
    widths = [max(map(len, column)) for column in zip(head, *rows, strict=True)]
    for row in (head, *rows):
        cells = [
            cell.ljust(width) if place in {0, 1, len(head) - 1} else cell.rjust(width)
            for place, (cell, width) in enumerate(zip(row, widths, strict=True))
        ]
        yield "  ".join(cells).rstrip()


def _tail(one: Explanation) -> Iterator[str]:
    if one.stage is not Stage.DECODE:
        if not one.is_priced:
            yield f"{one.policy} does not choose by these costs: prefill_cost would have."
        terms = "; ".join(f"{name}: {TERMS[name][1]}" for name in _terms(one))
        yield from textwrap.wrap(f"Costs, ms: {terms}.", WIDTH)
    if one.near_tie:
        yield f"Costs within {one.near_tie:.0%} of the least are a near tie."
    if len(one.candidates) < one.looked_at:
        yield f"The best {len(one.candidates)} of {one.looked_at} are shown."
    for doubt in one.doubts:
        yield f"! {DOUBTS[doubt]}"


def plain(text: str) -> str:
    """A client's text for a terminal: no control characters."""
    return "".join(one if one.isprintable() else " " for one in text)


def when(ms: int) -> str:
    """A time, to the millisecond."""
    return datetime.fromtimestamp(ms / 1000, UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")


def _s(ms: int) -> str:
    return f"{ms} ms" if ms < 10_000 else f"{ms / 1000:.1f} s"
