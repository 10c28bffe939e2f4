"""What an attempt finds published of earlier ones: what clients show, as token ids, or nothing it may use."""

from __future__ import annotations

from collections.abc import Iterable

from hypothesis import given
from hypothesis import strategies as st
from msgspec import Raw

from dispatcher.client.reader import ReplyReader
from dispatcher.protocol.chunk import ChoiceDelta, Chunk, ChunkKind
from dispatcher.protocol.names import Attempt
from workers_agent.trail import Trail

FIRST, SECOND, OWN, LATER = "1700000000000_1", "1700000000000_2", "1700000000000_3", "1700000000000_4"


def begin(attempt: str, *, restarted: bool = False) -> Chunk:
    return Chunk(id="r", ref="i0_0", attempt=attempt, kind=ChunkKind.BEGIN, restarted=restarted)


def tokens(attempt: str, first: int, text: str, ids: tuple[int, ...] | None = None) -> Chunk:
    """A token for each letter, whose id is the letter's."""
    delta = ChoiceDelta(text=text, token_ids=tuple(map(ord, text)) if ids is None else ids)
    return Chunk(
        id="r",
        ref="i0_0",
        attempt=attempt,
        kind=ChunkKind.TOKENS,
        first_token=first,
        tokens=len(text),
        choices=(delta,),
    )


def end(attempt: str, first: int) -> Chunk:
    return Chunk(
        id="r", ref="i0_0", attempt=attempt, kind=ChunkKind.END, first_token=first, finish_reason="stop"
    )


def read(chunks: Iterable[Chunk]) -> Trail:
    trail = Trail(Attempt.parse(OWN))
    for number, chunk in enumerate(chunks):
        trail.read(chunk, 1000 + number)
    return trail


def found(chunks: Iterable[Chunk]) -> str | None:
    """The text to go on from; None when there is none."""
    trail = read(chunks)
    if not trail.is_sound:
        return None
    assert "".join(map(chr, trail.ids)) == trail.text
    return trail.text


ONE = [begin(FIRST, restarted=True), tokens(FIRST, 0, "ab"), tokens(FIRST, 2, "c")]


def test_the_tokens_of_one_attempt_are_found() -> None:
    trail = read([*ONE, begin(OWN)])
    assert (trail.text, trail.ids, trail.first_token_ms) == ("abc", [97, 98, 99], 1001)
    assert trail.is_closed


def test_an_attempt_that_went_on_is_joined() -> None:
    assert found([*ONE, begin(SECOND), tokens(SECOND, 3, "d")]) == "abcd"


def test_a_restart_voids_what_was_before() -> None:
    again = [begin(SECOND, restarted=True), tokens(SECOND, 0, "x")]
    assert found([*ONE, *again]) == "x"
    assert found([*ONE, begin(SECOND), *again]) == "x"


def test_a_superseded_attempt_is_dropped_once_another_began() -> None:
    assert found([*ONE, begin(SECOND), tokens(FIRST, 3, "Z"), tokens(SECOND, 3, "d")]) == "abcd"


def test_nothing_counts_after_the_own_beginning() -> None:
    assert found([*ONE, begin(OWN), tokens(FIRST, 3, "Z"), begin(OWN)]) == "abc"
    assert found([*ONE, begin(LATER, restarted=True), tokens(LATER, 0, "Z")]) == "abc"


def test_repetitions_and_gaps_add_nothing() -> None:
    assert found([*ONE, tokens(FIRST, 4, "e"), *ONE, tokens(FIRST, 3, "d")]) == "abcd"


def test_an_end_is_known_where_nothing_is_missing() -> None:
    assert read([*ONE, end(FIRST, 3)]).finish_reason == "stop"
    assert read([*ONE, end(FIRST, 4)]).finish_reason == ""
    assert read([*ONE, end(FIRST, 3), begin(SECOND, restarted=True)]).finish_reason == ""


def test_text_without_all_its_ids_is_no_use() -> None:
    assert found([*ONE, tokens(FIRST, 3, "de", (100,))]) is None
    assert found([begin(FIRST, restarted=True), tokens(FIRST, 0, "ab", ())]) is None


def test_other_choices_and_raw_deltas_are_no_use() -> None:
    for delta in (
        ChoiceDelta(index=1, text="d", token_ids=(100,)),
        ChoiceDelta(text="d", token_ids=(100,), deltas=(Raw(b'{"reasoning":"x"}'),)),
    ):
        chunk = Chunk(
            id="r",
            ref="i0_0",
            attempt=FIRST,
            kind=ChunkKind.TOKENS,
            first_token=3,
            tokens=1,
            choices=(delta,),
        )
        assert found([*ONE, chunk]) is None
        assert found([*ONE, chunk, begin(SECOND, restarted=True), tokens(SECOND, 0, "x")]) == "x"


def test_an_attempt_that_joins_before_the_end_is_no_use() -> None:
    assert found([*ONE, begin(SECOND), tokens(SECOND, 2, "c"), tokens(SECOND, 3, "d")]) is None


def test_an_attempt_that_can_not_be_read_is_ignored() -> None:
    assert found([*ONE, tokens("two", 3, "x")]) == "abc"


@st.composite
def logs(draw: st.DrawFn) -> tuple[list[Chunk], list[Chunk]]:
    """What two attempts of one answer wrote before the own `begin`, and what comes after it."""
    before: list[Chunk] = []
    late: list[Chunk] = []
    shown = 0
    for attempt in (FIRST, SECOND):
        restarted = attempt == FIRST or draw(st.booleans())
        before.append(begin(attempt, restarted=restarted))
        first = 0 if restarted else shown
        text = draw(st.text("ab", max_size=6))
        cut = draw(st.integers(0, len(text)))
        written = [tokens(attempt, first + at, letter) for at, letter in enumerate(text)]
        before += written[:cut]
        late += written[cut:]
        shown = first + cut
        for _ in range(draw(st.integers(0, 2))):
            before.append(draw(st.sampled_from(before)))
    return before, late


@given(logs(), st.text("ab", min_size=1, max_size=4))
def test_what_is_found_is_what_clients_show_and_going_on_restarts_nothing(
    log: tuple[list[Chunk], list[Chunk]], rest: str
) -> None:
    before, late = log
    trail = read([*before, begin(OWN), *late])
    reader = ReplyReader()
    for chunk in before:
        reader.read(chunk)
    if not trail.is_sound:
        return
    assert trail.text == reader.text
    restarts = reader.restarts
    for chunk in [begin(OWN), *late, tokens(OWN, len(trail.ids), rest), *late]:
        reader.read(chunk)
    assert (reader.text, reader.restarts) == (trail.text + rest, restarts)
