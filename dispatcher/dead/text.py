"""Dead letters as an operator reads them: in lines without prompts and control characters, or as JSON."""

from __future__ import annotations

from datetime import UTC, datetime
from typing import Any

import msgspec

from dispatcher.backends.dead_log import PlacedLetter
from dispatcher.protocol.outcome import DeadLetter

MESSAGE_CHARS = 100
HEAD = ("id", "model", "endpoint", "tenant", "priority", "deadline_ms", "session", "lora", "requeued_from")
"""Fields of a record that hold no prompt."""


def line_of(placed: PlacedLetter) -> str:
    """One letter in a line."""
    letter = placed.letter
    if letter is None:
        return f"{placed.place:<10}  a letter that can't be read"
    who = f"{letter.tenant}/{letter.id}" if letter.tenant else letter.id
    line = f"{placed.place:<10}  {letter.ref:<12}  {when(letter.dead_at_ms)}  {letter.reason.value:<18}"
    return f"{line}  {_tries(letter):<21}  {plain(who) or '(no id)'}  {plain(letter.message)[:MESSAGE_CHARS]}"


def _tries(letter: DeadLetter) -> str:
    crashes = sum(attempt.crash for attempt in letter.attempts)
    if not letter.attempts:
        return "never bound"
    tries = f"{len(letter.attempts)} attempts"
    return f"{tries}, {crashes} crashes" if crashes else tries


def head_of(record: bytes) -> dict[str, Any]:
    """What a record tells without its prompt; {} when it is no JSON object."""
    try:
        fields = msgspec.json.decode(record, type=dict[str, msgspec.Raw])
        return {name: msgspec.json.decode(fields[name]) for name in HEAD if name in fields}
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        return {}


def as_data(placed: PlacedLetter) -> dict[str, Any]:
    """A letter as JSON has it, without the record, which may hold a prompt."""
    letter = msgspec.to_builtins(placed.letter) if placed.letter is not None else {}
    letter.pop("record_base64", None)
    return {"partition": placed.partition, "offset": placed.offset, **letter}


def as_text(placed: PlacedLetter, letter: DeadLetter) -> str:
    lines = [
        f"ref        {letter.ref}, in {plain(letter.topic)}",
        f"letter     {placed.place}, written {when(letter.dead_at_ms)}",
        f"id         {plain(letter.id) or '(none could be read)'}",
        *([f"tenant     {plain(letter.tenant)}"] if letter.tenant else []),
        f"reason     {letter.reason.value}: {plain(letter.message)}",
    ]
    for attempt in letter.attempts:
        status = f" (HTTP {attempt.http_status})" if attempt.http_status else ""
        crash = " CRASH: the engine died while it ran this;" if attempt.crash else ""
        where = f"{attempt.attempt} at {attempt.node}:"
        lines.append(
            f"attempt    {where}{crash} {attempt.cause.value}{status} {plain(attempt.message)}".rstrip()
        )
    return "\n".join(lines)


def plain(text: str) -> str:
    """Clients' text for a terminal: no control characters."""
    return "".join(one if one.isprintable() else " " for one in text)


def when(ms: int) -> str:
    return datetime.fromtimestamp(ms / 1000, UTC).isoformat(timespec="seconds").replace("+00:00", "Z")


def no_letter(ref: object) -> str:
    return f"expected a dead letter of {ref}, seen none; 'flexlb dead list' names them"
