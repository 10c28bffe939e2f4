"""The reader of reply chunks: what it shows is always the beginning of one published answer."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from hypothesis import given
from hypothesis import strategies as st
from msgspec import Raw

from dispatcher.client.reader import Ended, ReplyEvent, ReplyReader, Restarted, TextAdded
from dispatcher.protocol.chunk import ChoiceDelta, Chunk, ChunkKind
from dispatcher.protocol.outcome import Choice, Outcome, OutcomeKind, Reason

FIRST, SECOND, THIRD = "1700000000000_1", "1700000000000_2", "1700000000001_1"


def begin(attempt: str, *, restarted: bool = False) -> Chunk:
    return Chunk(id="r", ref="i0_0", attempt=attempt, kind=ChunkKind.BEGIN, restarted=restarted)


def tokens(attempt: str, first: int, text: str, count: int | None = None) -> Chunk:
    return Chunk(
        id="r",
        ref="i0_0",
        attempt=attempt,
        kind=ChunkKind.TOKENS,
        first_token=first,
        tokens=len(text) if count is None else count,
        choices=(ChoiceDelta(text=text),),
    )


def end(attempt: str) -> Chunk:
    return Chunk(id="r", ref="i0_0", attempt=attempt, kind=ChunkKind.END, finish_reason="stop")


def completed(text: str, **fields: object) -> Outcome:
    given_fields = {"kind": OutcomeKind.COMPLETED, "reason": Reason.FINISHED, **fields}
    return Outcome(id="r", ref="i0_0", choices=(Choice(text=text),), **given_fields)  # type: ignore[arg-type]


class Screen:
    """What a person sees who follows the events, and nothing else."""

    def __init__(self) -> None:
        self.text = ""
        self.outcomes: list[Outcome] = []
        self.restarts = 0

    def show(self, events: Sequence[ReplyEvent]) -> None:
        for event in events:
            assert not self.outcomes, "nothing follows the end"
            match event:
                case TextAdded():
                    assert event.text
                    self.text += event.text
                case Restarted():
                    assert self.text, "there is something to void"
                    self.text = ""
                    self.restarts += 1
                case Ended(outcome=outcome):
                    self.outcomes.append(outcome)


def shown(items: Iterable[Chunk | Outcome]) -> Screen:
    reader, screen = ReplyReader(), Screen()
    for item in items:
        screen.show(reader.read(item) if isinstance(item, Chunk) else reader.end(item))
        assert screen.text == reader.text
        assert screen.restarts == reader.restarts
    return screen


def test_text_is_shown_as_it_comes() -> None:
    reader = ReplyReader()
    assert reader.read(begin(FIRST)) == []
    assert reader.read(tokens(FIRST, 0, "ab")) == [TextAdded(choices=(ChoiceDelta(text="ab"),))]
    assert reader.read(tokens(FIRST, 2, "c")) == [TextAdded(choices=(ChoiceDelta(text="c"),))]
    assert reader.read(end(FIRST)) == []
    outcome = completed("abc")
    assert reader.end(outcome) == [Ended(outcome=outcome)]
    assert (reader.attempts, reader.restarts, reader.text) == (1, 0, "abc")


def test_a_lower_attempt_is_ignored_once_a_higher_one_was_seen() -> None:
    stream = [
        begin(FIRST),
        tokens(FIRST, 0, "ab"),
        begin(SECOND),
        tokens(FIRST, 2, "XX"),
        tokens(SECOND, 2, "cd"),
    ]
    assert shown(stream).text == "abcd"
    assert (
        shown([begin(THIRD), begin(SECOND), tokens(SECOND, 0, "no"), tokens(THIRD, 0, "yes")]).text == "yes"
    )


def test_a_restart_voids_earlier_text_once() -> None:
    again = begin(SECOND, restarted=True)
    screen = shown([begin(FIRST), tokens(FIRST, 0, "ab"), again, tokens(SECOND, 0, "AB"), again])
    assert (screen.text, screen.restarts) == ("AB", 1)


def test_an_attempt_that_can_not_go_on_starts_over_before_its_first_tokens() -> None:
    begins = [begin(SECOND), begin(SECOND, restarted=True)]
    screen = shown([begin(FIRST), tokens(FIRST, 0, "ab"), *begins, tokens(FIRST, 2, "Z")])
    assert (screen.text, screen.restarts) == ("", 1)
    screen = shown(
        [
            begin(FIRST),
            tokens(FIRST, 0, "ab"),
            *begins,
            tokens(SECOND, 0, "AB"),
            *begins,
            tokens(SECOND, 2, "C"),
        ]
    )
    assert (screen.text, screen.restarts) == ("ABC", 1)


def test_a_restart_of_nothing_is_not_an_event() -> None:
    assert shown([begin(FIRST), begin(SECOND, restarted=True), tokens(SECOND, 0, "x")]).restarts == 0


def test_tokens_before_their_begin_are_not_shown() -> None:
    assert shown([begin(FIRST), tokens(FIRST, 0, "ab"), tokens(SECOND, 0, "AB")]).text == "ab"


def test_duplicates_add_nothing() -> None:
    chunks = [begin(FIRST), tokens(FIRST, 0, "ab"), tokens(FIRST, 2, "ab"), tokens(FIRST, 0, "ab")]
    assert shown([*chunks, *chunks]).text == "abab"


def test_chunks_written_again_after_a_refusal_fill_the_gap() -> None:
    again = [begin(FIRST), tokens(FIRST, 0, "a"), tokens(FIRST, 1, "b"), tokens(FIRST, 2, "c")]
    assert shown([tokens(FIRST, 2, "c"), *again]).text == "abc"
    assert shown([again[0], again[1], again[3], *again[2:]]).text == "abc"


def test_a_gap_is_filled_by_the_outcome() -> None:
    stream: list[Chunk | Outcome] = [begin(FIRST), tokens(FIRST, 0, "a"), tokens(FIRST, 2, "c")]
    assert shown(stream).text == "a"
    screen = shown([*stream, completed("abc")])
    assert (screen.text, screen.restarts) == ("abc", 0)


def test_chunks_without_tokens_are_shown_once() -> None:
    tail = tokens(FIRST, 1, "!", count=0)
    assert shown([begin(FIRST), tokens(FIRST, 0, "a"), tail, tail, tokens(FIRST, 1, "b"), tail]).text == "a!b"


def test_an_attempt_that_resumes_before_the_end_is_joined_where_it_agrees() -> None:
    stream = [
        begin(FIRST),
        tokens(FIRST, 0, "ab"),
        tokens(FIRST, 2, "cd"),
        begin(SECOND),
        tokens(SECOND, 2, "cdef"),
    ]
    screen = shown(stream)
    assert (screen.text, screen.restarts) == ("abcdef", 0)


def test_an_attempt_that_resumes_differently_cuts_back_what_it_replaces() -> None:
    head = [begin(FIRST), tokens(FIRST, 0, "ab"), tokens(FIRST, 2, "cd"), begin(SECOND)]
    screen = shown([*head, tokens(SECOND, 2, "c"), tokens(SECOND, 3, "X"), tokens(SECOND, 4, "Y")])
    assert (screen.text, screen.restarts) == ("abcXY", 1)


def test_an_attempt_that_resumes_at_an_unknown_place_waits_for_the_outcome() -> None:
    stream = [
        begin(FIRST),
        tokens(FIRST, 0, "abcd"),
        begin(SECOND),
        tokens(SECOND, 2, "XY"),
        tokens(SECOND, 4, "Z"),
    ]
    assert shown(stream).text == "abcd"
    screen = shown([*stream, completed("abXYZ")])
    assert (screen.text, screen.restarts) == ("abXYZ", 1)


def test_nothing_follows_the_accepted_outcome() -> None:
    late: list[Chunk | Outcome] = [
        tokens(FIRST, 1, "b"),
        begin(SECOND, restarted=True),
        tokens(SECOND, 0, "Z"),
        completed("other"),
    ]
    screen = shown([begin(FIRST), tokens(FIRST, 0, "a"), completed("ab"), *late])
    assert (screen.text, len(screen.outcomes)) == ("ab", 1)


def test_an_outcome_without_text_leaves_what_was_streamed() -> None:
    failed = Outcome(id="r", ref="i0_0", kind=OutcomeKind.FAILED, reason=Reason.ATTEMPTS_EXHAUSTED)
    assert shown([begin(FIRST), tokens(FIRST, 0, "ab"), failed]).text == "ab"


def test_choices_and_raw_deltas_are_kept_apart() -> None:
    call = Raw(b'{"tool_calls":[{"index":0}]}')
    both = (ChoiceDelta(text="a"), ChoiceDelta(index=1, text="b", deltas=(call,)))
    reader = ReplyReader()
    reader.read(begin(FIRST))
    chunk = Chunk(id="r", ref="i0_0", attempt=FIRST, kind=ChunkKind.TOKENS, tokens=2, choices=both)
    assert reader.read(chunk) == [TextAdded(choices=both)]
    rest = Outcome(
        id="r",
        ref="i0_0",
        kind=OutcomeKind.COMPLETED,
        reason=Reason.FINISHED,
        choices=(Choice(text="a"), Choice(index=1, text="bc", deltas=(call, call))),
    )
    events = reader.end(rest)
    assert events[0] == TextAdded(choices=(ChoiceDelta(index=1, text="c", deltas=(call,)),))


def test_an_attempt_that_can_not_be_read_is_ignored() -> None:
    assert shown([begin(FIRST), tokens("two", 0, "x"), tokens(FIRST, 0, "a")]).text == "a"


def chunks_of(attempt: str, text: str, sizes: Sequence[int], *, first: int = 0) -> list[Chunk]:
    chunks, at = [], 0
    for size in sizes:
        if text[at : at + size]:
            chunks.append(tokens(attempt, first + at, text[at : at + size]))
        at += size
    if text[at:]:
        chunks.append(tokens(attempt, first + at, text[at:]))
    return [*chunks, end(attempt)]


def merged(draw: st.DrawFn, one: Sequence[Chunk], other: Sequence[Chunk]) -> list[Chunk]:
    left, right, out = list(one), list(other), list[Chunk]()
    while left and right:
        out.append((left if draw(st.booleans()) else right).pop(0))
    return out + left + right


letters = st.text("ab", max_size=12)
sizes = st.lists(st.integers(1, 4), max_size=6)


@st.composite
def overtaken(draw: st.DrawFn) -> tuple[list[Chunk | Outcome], str, str]:
    """A log in which a second attempt takes over while the first keeps writing, with duplicates.

    The second resumes where the log stood when it began, or a little before, or starts over.
    """
    old = draw(letters)
    first = [begin(FIRST), *chunks_of(FIRST, old, draw(sizes))]
    cut = draw(st.integers(0, len(first)))
    published = sum(chunk.tokens for chunk in first[:cut])
    starts = [0] + [chunk.first_token for chunk in first[:cut] if chunk.kind is ChunkKind.TOKENS]
    restarted = draw(st.booleans())
    at = 0 if restarted else draw(st.sampled_from([published, published, *starts]))
    new = draw(letters)
    second = [begin(SECOND, restarted=restarted), *chunks_of(SECOND, new, draw(sizes), first=at)]
    log: list[Chunk | Outcome] = [*first[:cut], second[0], *merged(draw, first[cut:], second[1:])]
    for _ in range(draw(st.integers(0, 6))):
        copied = draw(st.integers(0, len(log) - 1))
        log.insert(draw(st.integers(copied, len(log))), log[copied])
    answer = old[:at] + new
    log.insert(draw(st.integers(0, len(log))), completed(answer))
    return log, old, answer


@given(overtaken())
def test_no_interleaving_of_two_attempts_shows_wrong_text(
    case: tuple[list[Chunk | Outcome], str, str],
) -> None:
    log, old, answer = case
    reader, screen = ReplyReader(), Screen()
    for item in log:
        screen.show(reader.read(item) if isinstance(item, Chunk) else reader.end(item))
        assert screen.text == reader.text
        assert old.startswith(screen.text) or answer.startswith(screen.text)
    assert screen.text == answer
    assert len(screen.outcomes) == 1


@given(overtaken(), st.randoms(use_true_random=False))
def test_any_order_ends_with_the_outcomes_text(
    case: tuple[list[Chunk | Outcome], str, str], order: object
) -> None:
    log, _, answer = case
    order.shuffle(log)  # type: ignore[attr-defined]
    assert shown(log).text == answer


@given(overtaken())
def test_an_undisturbed_second_attempt_is_shown_whole_before_the_outcome(
    case: tuple[list[Chunk | Outcome], str, str],
) -> None:
    log, _, answer = case
    chunks = [item for item in log if isinstance(item, Chunk)]
    # What the first attempt said beyond it stands while the second has not contradicted it.
    assert shown(chunks).text.startswith(answer)
