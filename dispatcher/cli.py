"""`flexlb`: every command of the system.

Commands of other processes (`agent`, `engine-sim`) replace this process by theirs, so that nothing is
imported across packages. Exit codes: 0 done, 1 findings or a failed run, 2 wrong use or settings.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import sys
from collections.abc import Awaitable, Callable, Sequence

from dispatcher.errors import FlexLBError

Command = Callable[[argparse.Namespace], Awaitable[int]]

FORWARDED = {"agent": "workers_agent", "engine-sim": "workers_agent.simulator"}


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; returns its exit code."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    if arguments and arguments[0] in FORWARDED:
        module = FORWARDED[arguments[0]]
        os.execv(sys.executable, [sys.executable, "-m", module, *arguments[1:]])
    parser = build_parser()
    options = parser.parse_args(arguments)
    command: Command = options.command
    try:
        return asyncio.run(_awaited(command, options))
    except KeyboardInterrupt:
        return 130
    except FlexLBError as error:
        print(f"flexlb {options.name}: {error}", file=sys.stderr)
        return 2


async def _awaited(command: Command, options: argparse.Namespace) -> int:
    return await command(options)


def build_parser() -> argparse.ArgumentParser:
    """The parser of all commands."""
    parser = argparse.ArgumentParser(
        prog="flexlb",
        description="Message-queue-driven dispatcher for large-language-model inference.",
        epilog="Start with 'flexlb demo'. Every command explains itself: flexlb COMMAND --help",
    )
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True, dest="name")
    from dispatcher.audit import configure_audit, run_audit
    from dispatcher.local.demo import configure_demo, run_demo
    from dispatcher.local.up import configure_up, run_up
    from dispatcher.replay.command import configure_replay, run_replay
    from dispatcher.serve import configure_dispatcher, configure_init, run_dispatcher, run_init

    table: list[tuple[str, str, Callable[[argparse.ArgumentParser], None], Command]] = [
        (
            "demo",
            "run a real workload through a whole stack on this machine, then audit it",
            configure_demo,
            run_demo,
        ),
        ("up", "run a whole stack on this machine until Ctrl-C", configure_up, run_up),
        ("dispatcher", "run a dispatcher: a standby that may lead", configure_dispatcher, run_dispatcher),
        ("init", "create a pool's topics", configure_init, run_init),
        ("replay", "send a trace's requests, open loop, and report", configure_replay, run_replay),
        (
            "audit",
            "read the raw topics and name every lost or duplicated request",
            configure_audit,
            run_audit,
        ),
    ]
    for name, text, configure, run in table:
        command = commands.add_parser(name, help=text, description=text[0].upper() + text[1:] + ".")
        configure(command)
        command.set_defaults(command=run)
    for name, text in (
        ("agent", "run the agent beside an engine"),
        ("engine-sim", "run a simulated engine"),
    ):
        commands.add_parser(name, help=text, add_help=False)
    return parser
