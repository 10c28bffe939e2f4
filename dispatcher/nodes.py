"""`flexlb nodes`, `cordon`, `drain`, `uncordon`: a pool's nodes, and what an operator wishes of them.

A wish lies in Redis beside the node, so that it outlives leaders and restarts of agents; only a loss of
all Redis data takes it away, which the leader logs and counts.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import asdict, dataclass

from dispatcher.backends.connect import connect_redis
from dispatcher.backends.environment import add_flags, read_settings
from dispatcher.backends.operator_store import OperatorStore
from dispatcher.backends.scripts import Redis, ScriptRunner
from dispatcher.backends.store_view import StoredNode, StoreView
from dispatcher.errors import SettingsError
from dispatcher.protocol import codec
from dispatcher.protocol.names import Names, check_name
from dispatcher.protocol.node import Wish
from dispatcher.settings import DispatcherSettings

CODES = "exit codes: 0 done, 1 a NODE is unknown, 2 wrong use or no answer"
ABOUT = {
    "cordon": "The leader binds nothing new to NODE; what is queued or running there goes on.\n"
    "It holds through restarts of the agent and changes of the leader, until 'flexlb uncordon'.",
    "drain": "As cordon, and what is queued at NODE and not yet claimed is bound elsewhere; what runs\n"
    "finishes. 'flexlb nodes' shows when nothing is left.",
    "uncordon": "NODE gets new work again.",
}
DONE = {Wish.CORDON: "cordoned", Wish.DRAIN: "draining", None: "gets new work"}


@dataclass(frozen=True, kw_only=True)
class NodeLine:
    """One node, as `flexlb nodes` tells of it. `state` is available, silent, fenced or gone."""

    node: str
    state: str
    wish: str
    queued: int
    claimed: int
    models: tuple[str, ...]


def configure_nodes(parser: argparse.ArgumentParser) -> None:
    """Flags of `flexlb nodes`."""
    _add_shared(parser)


def _add_shared(parser: argparse.ArgumentParser) -> None:
    add_flags(parser, DispatcherSettings, only={"redis", "pool"})
    parser.add_argument("--json", action="store_true", help="print JSON")


def _configure_wish(parser: argparse.ArgumentParser, command: str) -> None:
    parser.description = ABOUT[command]
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.epilog = (
        f"examples:\n  flexlb {command} gpu-17\n  flexlb {command} gpu-17 gpu-18 --json\n\n{CODES}"
    )
    parser.add_argument(
        "nodes", metavar="NODE", nargs="+", help="name of a node, as 'flexlb nodes' prints it"
    )
    _add_shared(parser)


def configure_cordon(parser: argparse.ArgumentParser) -> None:
    """Flags of `flexlb cordon`."""
    _configure_wish(parser, "cordon")


def configure_drain(parser: argparse.ArgumentParser) -> None:
    """Flags of `flexlb drain`."""
    _configure_wish(parser, "drain")


def configure_uncordon(parser: argparse.ArgumentParser) -> None:
    """Flags of `flexlb uncordon`."""
    _configure_wish(parser, "uncordon")


async def run_cordon(options: argparse.Namespace) -> int:
    """Let nodes get nothing new; returns the exit code."""
    return await _wish(options, Wish.CORDON)


async def run_drain(options: argparse.Namespace) -> int:
    """Let nodes get nothing new and give back what is queued; returns the exit code."""
    return await _wish(options, Wish.DRAIN)


async def run_uncordon(options: argparse.Namespace) -> int:
    """Let nodes get new work again; returns the exit code."""
    return await _wish(options, None)


async def _wish(options: argparse.Namespace, wish: Wish | None) -> int:
    async with _redis(options) as (client, names):
        store = OperatorStore(ScriptRunner(client), names)
        try:
            nodes = [check_name("node", node) for node in dict.fromkeys(options.nodes)]
        except ValueError as error:
            raise SettingsError(str(error)) from None
        before = {node: await store.wish(node, wish) for node in nodes}
    done = [
        {"node": node, "known": was is not None, "before": was or "", "now": wish.value if wish else ""}
        for node, was in before.items()
    ]
    if options.json:
        print(json.dumps(done, indent=2))
    for node, was in before.items():
        if was is None:
            print(
                f"{node}: expected a node of pool {names.pool}, seen none; see 'flexlb nodes'",
                file=sys.stderr,
            )
        elif not options.json:
            print(f"{node}: {DONE[wish]}" + (f" (was {DONE[Wish(was)]})" if was in set(Wish) else ""))
    return int(None in before.values())


async def run_nodes(options: argparse.Namespace) -> int:
    """List a pool's nodes."""
    async with _redis(options) as (client, names):
        lines = await node_lines(StoreView(client, names))
    if options.json:
        print(json.dumps([asdict(line) for line in lines], indent=2))
        return 0
    width = max((len(line.node) for line in lines), default=0)
    for line in lines:
        work = f"queued {line.queued:<4} claimed {line.claimed:<4}"
        print(
            f"{line.node:<{width}}  {line.state:<9}  {line.wish or '-':<6}  {work}  {' '.join(line.models)}"
        )
    if not lines:
        print(f"no nodes in pool {names.pool}")
    return 0


async def node_lines(view: StoreView) -> list[NodeLine]:
    """Every node that is known or wished something of, by name."""
    wishes = (await view.cordons()).wishes
    nodes = sorted({*await view.node_names(), *wishes})
    stored = {node.node: node for node in await view.nodes(nodes)}
    work = await view.node_work(nodes)
    return [
        NodeLine(
            node=node,
            state=_state(stored.get(node)),
            wish=wishes[node].value if node in wishes else "",
            queued=work[node].queued,
            claimed=work[node].claimed,
            models=_models(stored.get(node)),
        )
        for node in nodes
    ]


def _state(stored: StoredNode | None) -> str:
    if stored is None:
        return "gone"
    if stored.fenced == stored.incarnation:
        return "fenced"
    return "available" if stored.alive else "silent"


def _models(stored: StoredNode | None) -> tuple[str, ...]:
    try:
        return codec.identities.decode(stored.identity).models if stored is not None else ()
    except codec.MalformedRecord:
        return ()


@asynccontextmanager
async def _redis(options: argparse.Namespace) -> AsyncIterator[tuple[Redis, Names]]:
    settings = read_settings(DispatcherSettings, vars(options))
    client = connect_redis(settings.redis, access=settings.redis_access)
    try:
        yield client, Names(settings.pool)
    finally:
        await client.aclose()
