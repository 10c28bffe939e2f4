"""What a closing entry becomes on Kafka: nothing in one may stop the leader that publishes it."""

from __future__ import annotations

import json

import pytest

from dispatcher.backends.store_view import StreamEntry
from dispatcher.protocol.names import Ref
from dispatcher.services.publication import (
    LARGEST_DEAD_BYTES,
    LARGEST_OUTCOME_BYTES,
    SMALL_OUTCOME_BYTES,
    ready_ending,
    without_long_text,
)

REF = Ref.parse("i0_7")


def entry_of(payload: bytes, kind: str = "outcome") -> StreamEntry:
    """An entry of `closing`."""
    fields = {b"kind": kind.encode(), b"ref": str(REF).encode(), b"id": b"r", b"payload": payload}
    return StreamEntry(id=b"1-0", fields=fields)


def outcome_of(size: int, **fields: object) -> bytes:
    """An outcome of about so many bytes, whose head can be read."""
    return json.dumps(
        {
            "id": "r",
            "ref": str(REF),
            "kind": "Completed",
            "reason": "finished",
            "message": "x" * size,
            **fields,
        }
    ).encode()


@pytest.mark.parametrize("size", [SMALL_OUTCOME_BYTES + 1, LARGEST_OUTCOME_BYTES + 1])
def test_an_outcome_that_a_topic_may_refuse_can_be_shortened_or_is_refused_itself(size: int) -> None:
    ready = ready_ending(entry_of(outcome_of(size)), REF)
    assert ready.publication is not None
    assert len(without_long_text(ready.publication).outcome) < SMALL_OUTCOME_BYTES
    with pytest.raises(ValueError, match="choices"):
        ready_ending(entry_of(outcome_of(size, choices=5)), REF)


def test_a_dead_letter_that_no_topic_takes_is_refused() -> None:
    letter = b"x" * (LARGEST_DEAD_BYTES + 1)
    with pytest.raises(ValueError, match="dead letter"):
        ready_ending(entry_of(outcome_of(1) + b"\n" + letter, "dead"), REF)
    assert ready_ending(entry_of(outcome_of(1) + b"\n" + letter[:100], "dead"), REF).publication is not None
