"""Send the record of a dead letter again: under a new id, its body byte for byte."""

from __future__ import annotations

import base64
import uuid
from collections.abc import Sequence
from dataclasses import dataclass

import msgspec

from dispatcher.backends.dead_log import DeadLog
from dispatcher.dead.text import head_of, no_letter
from dispatcher.errors import LogRefused
from dispatcher.protocol import codec
from dispatcher.protocol.names import Ref
from dispatcher.protocol.outcome import DeadLetter, Reason


@dataclass(frozen=True, kw_only=True)
class Sent:
    """What became of a letter's record: sent as `new_ref` under `id`, or why not."""

    ref: str
    id: str = ""
    new_ref: str = ""
    refused: str = ""


async def send_again(log: DeadLog, refs: Sequence[str], *, id: str | None, poison: bool) -> list[Sent]:
    """Send the records of these letters again, each under `id` or a new one.

    Args:
        poison: whether those under which engines died are sent too.
    """
    letters = {one.letter.ref: one.letter for one in await log.read(refs=frozenset(refs)) if one.letter}
    results = []
    for ref in refs:
        letter = letters.get(ref)
        if letter is None:
            results.append(Sent(ref=ref, refused=no_letter(ref)))
            continue
        if letter.reason is Reason.POISON and not poison:
            results.append(Sent(ref=ref, refused=f"{letter.message}; --poison sends it all the same"))
            continue
        try:
            new_id = id if id is not None else uuid.uuid4().hex
            record = sent_again(await original_of(log, letter), ref=ref, id=new_id)
            new_ref = await log.append(Ref.parse(ref).lane, new_id, record)
            results.append(Sent(ref=ref, id=new_id, new_ref=str(new_ref)))
        except (LogRefused, codec.MalformedRecord) as error:
            results.append(Sent(ref=ref, refused=str(error)))
    return results


def sent_again(record: bytes, *, ref: str, id: str) -> bytes:
    """The record under a new id, marked as sent again; its body stays byte for byte.

    A reply route goes with the old id: its reader waits for that, and the partition may be another's now.

    Raises:
        MalformedRecord: it can't be read as a request: it would be refused again.
    """
    try:
        request = codec.requests.decode(record)
    except codec.MalformedRecord as error:
        raise codec.MalformedRecord(
            f"the record would be refused again: {error}; send a mended one instead"
        ) from error
    fields = msgspec.json.decode(record, type=dict[str, msgspec.Raw])
    if request.id != id:
        fields.pop("reply_to", None)
    fields["id"] = msgspec.Raw(msgspec.json.encode(id))
    fields["requeued_from"] = msgspec.Raw(msgspec.json.encode(ref))
    return msgspec.json.encode(fields)


async def original_of(log: DeadLog, letter: DeadLetter) -> bytes:
    """The record that died: from the letter, else from its log."""
    if letter.record_base64:
        try:
            return base64.b64decode(letter.record_base64, validate=True)
        except ValueError as error:
            raise LogRefused("record: expected base64 in the letter, seen something else") from error
    record = await log.original(Ref.parse(letter.ref))
    if letter.id and (seen := head_of(record).get("id")) != letter.id:
        raise LogRefused(
            f"record: expected id {letter.id!r} at {letter.ref}, seen {seen!r}; its topic was made anew"
        )
    return record
