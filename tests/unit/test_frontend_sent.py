"""What may follow what a stream has sent, when the answer starts over."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st
from msgspec import Raw

from dispatcher.frontend.sent import Sent
from dispatcher.protocol.chunk import ChoiceDelta


def text(said: str, index: int = 0, *deltas: bytes) -> tuple[ChoiceDelta, ...]:
    return (ChoiceDelta(index=index, text=said, deltas=tuple(map(Raw, deltas))),)


def test_what_is_new_is_sent() -> None:
    sent = Sent()
    assert sent.take(text("a")) == text("a")
    assert sent.take(text("b", 1, b"{}")) == text("b", 1, b"{}")
    assert sent.is_whole


def test_what_equals_the_void_text_is_passed_over_and_the_rest_sent() -> None:
    sent = Sent()
    sent.take(text("abc"))
    sent.restart()
    was_whole = [sent.is_whole]
    for more, rest in (("ab", ()), ("cd", text("d"))):
        assert sent.take(text(more)) == rest
        was_whole.append(sent.is_whole)
    assert was_whole == [False, False, True]
    sent.restart()
    assert sent.take(text("abcde")) == text("e")


def test_what_contradicts_the_void_text_can_not_follow() -> None:
    sent = Sent()
    sent.take(text("abc"))
    sent.restart()
    assert sent.take(text("ax")) is None


def test_raw_deltas_are_compared_too() -> None:
    for again, expected in ((b"1", ()), (b"2", None)):
        sent = Sent()
        sent.take(text("", 0, b"1"))
        sent.restart()
        assert sent.take(text("", 0, again)) == expected


def test_each_choice_is_compared_with_itself() -> None:
    sent = Sent()
    sent.take(text("a") + text("b", 1))
    sent.restart()
    was_whole = []
    for more, rest in ((text("b", 1), ()), (text("c", 2), text("c", 2)), (text("ab"), text("b"))):
        assert sent.take(more) == rest
        was_whole.append(sent.is_whole)
    assert was_whole == [False, False, True]


@given(
    st.text("ab", max_size=12),
    st.lists(st.tuples(st.booleans(), st.integers(1, 4)), max_size=12),
)
def test_however_an_answer_comes_what_is_sent_is_its_beginning(
    answer: str, steps: list[tuple[bool, int]]
) -> None:
    """The answer is shown in pieces, over and over."""
    sent, shown, sent_text = Sent(), 0, ""
    for restarts, length in steps:
        if restarts:
            sent.restart()
            shown = 0
        piece = answer[shown : shown + length]
        shown += len(piece)
        fresh = sent.take(text(piece))
        assert fresh is not None
        sent_text += "".join(choice.text for choice in fresh)
        assert answer.startswith(sent_text)
        assert sent.is_whole == (shown >= len(sent_text))
