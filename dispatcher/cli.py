"""`flexlb`: every command of the system.

A command's module is imported only when it is the one asked for. Commands of other processes (`agent`,
`engine-sim`) replace this process by theirs, so that nothing is imported across packages. Exit codes:
0 done, 1 findings or a failed run, 2 wrong use, settings or servers; 130 Ctrl-C, 141 output cut off.
"""

from __future__ import annotations

import argparse
import asyncio
import logging
import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import import_module

from dispatcher.errors import FlexLBError


@dataclass(frozen=True, kw_only=True)
class Command:
    """One command: its module has `configure_<name>(parser)` and `async run_<name>(options) -> int`."""

    name: str
    text: str
    module: str


COMMANDS = (
    Command(
        name="demo",
        text="run a real workload through a whole stack on this machine, then audit it",
        module="dispatcher.local.demo",
    ),
    Command(
        name="chaos",
        text="break a whole stack under load by seeded faults, then audit it",
        module="dispatcher.local.chaos",
    ),
    Command(name="up", text="run a whole stack on this machine until Ctrl-C", module="dispatcher.local.up"),
    Command(name="dispatcher", text="run a dispatcher: a standby that may lead", module="dispatcher.serve"),
    Command(name="frontend", text="serve the OpenAI API over the queue", module="dispatcher.frontend.serve"),
    Command(name="init", text="create a pool's topics", module="dispatcher.serve"),
    Command(
        name="replay",
        text="send a trace's requests, open loop, and report",
        module="dispatcher.replay.command",
    ),
    Command(
        name="simulate",
        text="send a trace through a simulated fleet in virtual time, policy against policy",
        module="dispatcher.simulation.command",
    ),
    Command(
        name="audit",
        text="read the raw topics and name every lost, duplicated or re-executed request",
        module="dispatcher.audit",
    ),
    Command(name="nodes", text="list a pool's nodes: state, wishes, work", module="dispatcher.nodes"),
    Command(
        name="cordon", text="bind nothing new to nodes; what is there goes on", module="dispatcher.nodes"
    ),
    Command(
        name="drain",
        text="cordon nodes and give back what is queued there; what runs finishes",
        module="dispatcher.nodes",
    ),
    Command(name="uncordon", text="take a cordon or drain back", module="dispatcher.nodes"),
    Command(
        name="explain",
        text="tell why a request went to its node: candidates, costs, waiting",
        module="dispatcher.explain.command",
    ),
    Command(
        name="dead",
        text="list dead letters, show why each died, send its record again, purge",
        module="dispatcher.dead.command",
    ),
    Command(
        name="config",
        text="print the effective settings and where each comes from",
        module="dispatcher.config_command",
    ),
    Command(
        name="doctor",
        text="check what a cluster needs, with the fix for each finding",
        module="dispatcher.doctor.command",
    ),
)
FORWARDED = {
    "agent": ("run the agent beside an engine", "workers_agent"),
    "engine-sim": ("run a simulated engine", "workers_agent.simulator"),
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; returns its exit code."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    if arguments and arguments[0] in FORWARDED:
        module = FORWARDED[arguments[0]][1]
        os.execv(sys.executable, [sys.executable, "-m", module, *arguments[1:]])
    # Commands that configure no logging tell what went wrong themselves: not the client library, twice.
    logging.getLogger("aiokafka").addHandler(logging.NullHandler())
    parser = build_parser(arguments[0] if arguments else "")
    options = parser.parse_args(arguments)
    try:
        code: int = asyncio.run(options.run(options))
        sys.stdout.flush()
        return code
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:
        # Whoever read the output, `head` perhaps, has left; what is buffered must not fail once more at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141
    except FlexLBError as error:
        _complain(options.command, error)
    except BaseExceptionGroup as group:
        ours, others = group.split(FlexLBError)
        if others is not None or ours is None:
            raise
        _complain(options.command, ours)
    return 2


def _complain(command: str, error: BaseException) -> None:
    if isinstance(error, BaseExceptionGroup):
        for one in error.exceptions:
            _complain(command, one)
    else:
        print(f"flexlb {command}: {error}", file=sys.stderr)


def build_parser(wanted: str) -> argparse.ArgumentParser:
    """The parser of all commands, with the flags of the one `wanted`."""
    parser = argparse.ArgumentParser(
        prog="flexlb",
        description="Message-queue-driven dispatcher for large-language-model inference.",
        epilog="Start with 'flexlb demo'. Every command explains itself: flexlb COMMAND --help",
    )
    subparsers = parser.add_subparsers(title="commands", metavar="COMMAND", required=True, dest="command")
    for command in COMMANDS:
        own = subparsers.add_parser(
            command.name, help=command.text, description=command.text[0].upper() + command.text[1:] + "."
        )
        if command.name == wanted:
            module = import_module(command.module)
            getattr(module, f"configure_{command.name}")(own)
            own.set_defaults(run=getattr(module, f"run_{command.name}"))
    for name, (text, _) in FORWARDED.items():
        subparsers.add_parser(name, help=text, add_help=False)
    return parser
