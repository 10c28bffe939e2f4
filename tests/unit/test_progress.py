"""Marks: against a naive model that keeps every offset, with gaps, takeovers and any order of endings."""

from __future__ import annotations

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from dispatcher.scheduling.progress import FEWEST_STALE, MOST_ANSWERS, SourceProgress


class Marks(RuleBasedStateMachine):
    """One partition's life under one leader, beside plain sets."""

    def __init__(self) -> None:
        super().__init__()
        self.progress = SourceProgress(next_read=0)
        self.next_read = 0
        self.untaken: set[int] = set()
        self.unanswered: set[int] = set()
        self.taken_above: set[int] = set()
        self.answered: dict[int, int] = {}
        self.floor = -1
        """The highest offset that may have been answered before this leader, in its transaction 0."""
        self.transaction = 0

    @initialize(
        next_read=st.integers(min_value=0, max_value=30),
        open_below=st.sets(st.integers(min_value=0, max_value=29), max_size=5),
        above=st.dictionaries(st.integers(min_value=0, max_value=30), st.booleans(), max_size=8),
    )
    def take_over(self, next_read: int, open_below: set[int], above: dict[int, bool]) -> None:
        """Begin where a former leader left off: `above` tells by distance whether it is still open."""
        below = {offset for offset in open_below if offset < next_read}
        taken = {next_read + distance for distance in above}
        still_open = {next_read + distance for distance, is_open in above.items() if is_open}
        self.progress = SourceProgress(
            next_read=next_read, open_below=below, taken_above=taken, open_above=still_open
        )
        self.next_read = next_read
        self.taken_above = taken
        self.unanswered = below | still_open
        self.floor = max([next_read - 1, *taken])

    @rule(gap=st.integers(min_value=0, max_value=3))
    def read(self, gap: int) -> None:
        """The next record of the log, after some offsets that hold none."""
        offset = self.next_read + gap
        if gap and self.taken_above & set(range(self.next_read, offset)):
            offset = self.next_read
        is_news = self.progress.read(offset)
        assert is_news == (offset not in self.taken_above)
        self.next_read = offset + 1
        if is_news:
            self.untaken.add(offset)
            self.unanswered.add(offset)

    @precondition(lambda self: self.untaken)
    @rule(data=st.data())
    def take(self, data: st.DataObject) -> None:
        """Redis has it: any of those read, late binding takes no order."""
        offset = data.draw(st.sampled_from(sorted(self.untaken)))
        self.progress.take(offset)
        self.untaken.discard(offset)

    @precondition(lambda self: self.unanswered)
    @rule(data=st.data(), together=st.integers(min_value=1, max_value=3))
    def finish(self, data: st.DataObject, together: int) -> None:
        """A transaction publishes some outcomes."""
        self.transaction += 1
        for _ in range(min(together, len(self.unanswered))):
            offset = data.draw(st.sampled_from(sorted(self.unanswered)))
            self.progress.finish(offset, self.transaction)
            self.untaken.discard(offset)
            self.unanswered.discard(offset)
            self.answered[offset] = self.transaction

    @precondition(lambda self: self.answered)
    @rule(data=st.data())
    def finish_again(self, data: st.DataObject) -> None:
        """What is finished already changes nothing."""
        self.progress.finish(data.draw(st.sampled_from(sorted(self.answered))), self.transaction + 1)

    @invariant()
    def assigned_is_the_lowest_offset_not_taken(self) -> None:
        """Reading on from there misses nothing."""
        assert self.progress.assigned == min(self.untaken, default=self.next_read)
        assert self.progress.span == self.next_read - self.progress.assigned

    @invariant()
    def finished_is_the_lowest_offset_without_an_answer(self) -> None:
        """Everything below has its outcome."""
        assert self.progress.finished == min([self.next_read, *self.unanswered])
        assert self.progress.open_count == len(self.unanswered)
        assert self.progress.next_read == self.next_read

    @invariant()
    def openness_is_known_of_each_offset(self) -> None:
        """What was answered once is never published again."""
        for offset in range(self.next_read + 3):
            assert self.progress.is_open(offset) == (offset in self.unanswered)

    @invariant()
    def the_earliest_answer_above_the_mark_is_known(self) -> None:
        """Recovery reads `outcomes` from that transaction on."""
        answers = [(self.floor, 0), *self.answered.items()]
        above = [transaction for offset, transaction in answers if offset >= self.progress.finished]
        assert self.progress.earliest_answer() == min(above, default=None)


TestMarks = Marks.TestCase
TestMarks.settings = settings(max_examples=300, stateful_step_count=40)


def test_a_fresh_partition_begins_at_its_next_record() -> None:
    progress = SourceProgress(next_read=7)
    assert (progress.assigned, progress.finished, progress.open_count, progress.span) == (7, 7, 0, 0)


def test_one_long_generation_pins_only_the_finished_mark() -> None:
    progress = SourceProgress(next_read=0)
    for offset in range(100):
        assert progress.read(offset)
        progress.take(offset)
    for offset in range(1, 100):
        progress.finish(offset, offset)
    assert (progress.assigned, progress.finished, progress.open_count) == (100, 0, 1)
    progress.finish(0, 100)
    assert progress.finished == 100


def test_one_request_that_nobody_binds_pins_the_assigned_mark() -> None:
    progress = SourceProgress(next_read=0)
    for offset in range(10):
        progress.read(offset)
    for offset in range(1, 10):
        progress.take(offset)
    assert (progress.assigned, progress.span) == (0, 10)


def test_offsets_that_hold_no_record_hold_nothing_back() -> None:
    progress = SourceProgress(next_read=0)
    progress.read(3)
    progress.read(9)
    progress.take(3)
    progress.finish(3, 1)
    assert (progress.assigned, progress.finished) == (9, 9)


def test_what_a_former_leader_took_is_skipped_once() -> None:
    progress = SourceProgress(next_read=5, taken_above=[6], open_above=[6])
    assert progress.read(5)
    assert not progress.read(6)
    assert progress.is_open(6)
    progress.finish(6, 1)
    assert not progress.is_open(6)
    assert progress.finished == 5


def test_a_request_that_runs_for_a_day_keeps_little_of_those_after_it() -> None:
    count = 20 * MOST_ANSWERS
    progress = SourceProgress(next_read=0)
    progress.read(0)
    progress.take(0)
    for offset in range(1, count):
        progress.read(offset)
        progress.take(offset)
        progress.finish(offset, offset)
    assert len(progress._open._heap) + len(progress._untaken._heap) <= 2 * FEWEST_STALE + 4
    assert len(progress.answering()) <= MOST_ANSWERS
    assert progress.earliest_answer() == 0
    progress.read(count)
    progress.finish(0, count)
    earliest = progress.earliest_answer()
    assert earliest is None
    progress.read(count + 1)
    progress.finish(count + 1, count + 1)
    assert progress.earliest_answer() == count + 1


def test_answers_taken_together_begin_no_later_than_they_did() -> None:
    progress = SourceProgress(next_read=0)
    count = 3 * MOST_ANSWERS
    for offset in range(count + 1):
        progress.read(offset)
    for offset in range(1, count, 2):
        progress.finish(offset, offset)
    for mark in range(0, count, 2):
        earliest = progress.earliest_answer()
        assert earliest is not None
        assert earliest <= mark + 1
        progress.finish(mark, count + mark)


def test_a_request_is_known_once_it_was_read_or_taken() -> None:
    progress = SourceProgress(next_read=5, taken_above=[7], open_above=[7, 1000])
    assert [progress.is_known(offset) for offset in (4, 5, 7, 1000)] == [True, False, True, False]
    progress.read(5)
    assert progress.is_known(5)
