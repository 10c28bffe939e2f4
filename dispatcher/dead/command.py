"""`flexlb dead`: what an operator does with dead letters: list, show, send again, purge.

Prompts are never printed unless asked for. Sending again appends a new record under a new id, which
starts over as any other request; the old one keeps its outcome and its letter.
"""

from __future__ import annotations

import argparse
import json
import sys
from dataclasses import asdict
from typing import Any

from dispatcher.backends.connect import connect_kafka
from dispatcher.backends.dead_log import DeadLog
from dispatcher.backends.environment import add_flags, read_settings
from dispatcher.dead.again import original_of, send_again
from dispatcher.dead.text import as_data, as_text, head_of, line_of, no_letter, plain
from dispatcher.errors import LogRefused, SettingsError
from dispatcher.protocol.names import Names, Ref
from dispatcher.settings import DispatcherSettings

SHOWN = 50
MAX_ID_CHARS = 256
EXAMPLES = """\
examples:
  flexlb dead list --limit 20               the newest 20, one line each
  flexlb dead show i3_1024                  why it died, every attempt, the head of its record
  flexlb dead show i3_1024 --body           with the record whole: it holds the prompt
  flexlb dead requeue i3_1024 b0_7          send both again, each under a new id
  flexlb dead requeue i3_1024 --id r1-again
  flexlb dead purge 0:120 1:98              delete the letters below offset 120 of partition 0, 98 of 1
  flexlb dead purge --all

exit codes: 0 done, 1 a REF has no letter or could not be sent again, 2 wrong use or no answer
"""


def configure_dead(parser: argparse.ArgumentParser) -> None:
    """Actions and flags of `flexlb dead`."""
    parser.epilog, parser.formatter_class = EXAMPLES, argparse.RawDescriptionHelpFormatter
    actions = parser.add_subparsers(title="actions", metavar="ACTION", required=True, dest="action")

    def action(name: str, text: str) -> argparse.ArgumentParser:
        own = actions.add_parser(name, help=text, description=text[0].upper() + text[1:] + ".")
        add_flags(own, DispatcherSettings, only={"kafka", "pool"})
        own.add_argument("--json", action="store_true", help="print JSON")
        return own

    listing = action("list", "list dead letters, oldest first")
    listing.add_argument(
        "--limit", type=int, default=SHOWN, metavar="N", help=f"only the newest N (default {SHOWN})"
    )
    showing = action("show", "show a dead letter, its failed attempts, and the head of the original record")
    showing.add_argument("ref", metavar="REF", type=_ref, help="ref of the record, as 'list' prints it")
    showing.add_argument("--body", action="store_true", help="print the record whole, with its prompt")
    again = action("requeue", "append the original record to its topic again, under a new id")
    again.add_argument("refs", metavar="REF", type=_ref, nargs="+", help="ref of the record")
    again.add_argument(
        "--id",
        help="id of the new record, for one REF (default: a new one). The original's own is coalesced with "
        "it, and not run, for ten minutes after that was bound",
    )
    again.add_argument(
        "--poison", action="store_true", help="send also what ended as poison: engines may die of it again"
    )
    purging = action("purge", "delete dead letters for good, by Kafka's DeleteRecords; outcomes stay")
    purging.add_argument(
        "places",
        metavar="PARTITION:OFFSET",
        type=_place,
        nargs="*",
        help="delete the letters of this partition below this offset",
    )
    purging.add_argument("--all", action="store_true", help="delete all that are there now")


async def run_dead(options: argparse.Namespace) -> int:
    """Do what was asked for; returns the exit code."""
    settings = read_settings(DispatcherSettings, vars(options))
    log = DeadLog(connect_kafka(settings.kafka, settings.kafka_access), Names(settings.pool))
    match options.action:
        case "list":
            return await _list(log, options)
        case "show":
            return await _show(log, options)
        case "requeue":
            return await _requeue(log, options)
        case _:
            return await _purge(log, options)


async def _list(log: DeadLog, options: argparse.Namespace) -> int:
    if options.limit < 1:
        raise SettingsError(f"--limit: expected at least 1, seen {options.limit}")
    letters = await log.read(limit=options.limit)
    if options.json:
        print(json.dumps([as_data(placed) for placed in letters], indent=2))
        return 0
    for placed in letters:
        print(line_of(placed))
    if not letters:
        print("no dead letters")
    elif len(letters) == options.limit:
        print(f"the newest {options.limit}; --limit prints more", file=sys.stderr)
    return 0


async def _show(log: DeadLog, options: argparse.Namespace) -> int:
    ref: Ref = options.ref
    found = await log.read(refs=frozenset({str(ref)}))
    if not found:
        print(f"flexlb dead: {ref}: {no_letter(ref)}", file=sys.stderr)
        return 1
    placed = found[-1]
    letter = placed.letter
    assert letter is not None
    record, gone = b"", ""
    try:
        record = await original_of(log, letter)
    except LogRefused as error:
        gone = str(error)
    if options.json:
        original: dict[str, Any] = {"gone": gone} if gone else {"bytes": len(record), "head": head_of(record)}
        if options.body and not gone:
            original["record"] = record.decode(errors="replace")
        print(json.dumps({**as_data(placed), "original": original}, indent=2))
        return 0
    print(as_text(placed, letter))
    if gone:
        print(f"original   gone: {gone}")
        return 0
    print(f"original   {len(record)} bytes")
    for name, value in head_of(record).items():
        print(f"  {name:<13} {plain(str(value))}")
    if options.body:
        sys.stdout.flush()
        sys.stdout.buffer.write(record + b"\n")
    return 0


async def _requeue(log: DeadLog, options: argparse.Namespace) -> int:
    refs = list(dict.fromkeys(map(str, options.refs)))
    if options.id is not None and len(refs) > 1:
        raise SettingsError(f"--id: expected one REF with it, seen {len(refs)}")
    if options.id is not None and not 0 < len(options.id) <= MAX_ID_CHARS:
        raise SettingsError(f"--id: expected 1-{MAX_ID_CHARS} characters, seen {len(options.id)}")
    results = await send_again(log, refs, id=options.id, poison=options.poison)
    if options.json:
        print(json.dumps([asdict(result) for result in results], indent=2))
    else:
        for result in results:
            if result.refused:
                print(f"flexlb dead: {result.ref}: not sent again: {plain(result.refused)}", file=sys.stderr)
            else:
                print(f"{result.ref}: sent again as {result.new_ref}, id {plain(result.id)}")
    return int(any(result.refused for result in results))


async def _purge(log: DeadLog, options: argparse.Namespace) -> int:
    if bool(options.places) == options.all:
        raise SettingsError(
            "purge: expected PARTITION:OFFSET for what to delete, or --all; seen neither or both"
        )
    spans = await log.spans()
    below = (
        {partition: span.end for partition, span in spans.items()} if options.all else dict(options.places)
    )
    for partition, offset in below.items():
        span = spans.get(partition)
        if span is None:
            raise SettingsError(f"purge: expected a partition from 0 to {len(spans) - 1}, seen {partition}")
        if offset > span.end:
            raise SettingsError(
                f"purge: expected an offset up to {span.end}, the end of partition {partition}, seen {offset}"
            )
    below = {partition: offset for partition, offset in below.items() if offset > spans[partition].start}
    starts = await log.delete_below(below) if below else {}
    results = [
        {"partition": partition, "began": span.start, "begins": starts.get(partition, span.start)}
        for partition, span in sorted(spans.items())
    ]
    if options.json:
        print(json.dumps(results, indent=2))
        return 0
    for one in results:
        done = "nothing deleted" if one["began"] == one["begins"] else f"deleted from {one['began']} on"
        print(f"partition {one['partition']}: {done}, begins at {one['begins']}")
    return 0


def _ref(text: str) -> Ref:
    try:
        return Ref.parse(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def _place(text: str) -> tuple[int, int]:
    partition, colon, offset = text.partition(":")
    if not (colon and partition.isdecimal() and offset.isdecimal()):
        raise argparse.ArgumentTypeError(f"expected PARTITION:OFFSET like 0:120, seen {text[:60]!r}")
    return int(partition), int(offset)
