"""`flexlb explain`: why a request went where it went, as its leader told when it decided."""

from __future__ import annotations

import argparse
import json
import sys

from dispatcher.backends.connect import connect_redis
from dispatcher.backends.environment import add_flags, read_settings
from dispatcher.backends.store_view import StoreView
from dispatcher.errors import StoreRefused
from dispatcher.explain.text import as_data, as_text, plain
from dispatcher.protocol import codec
from dispatcher.protocol.names import Names
from dispatcher.settings import DispatcherSettings

EPILOG = """\
examples:
  flexlb explain r1
  flexlb explain r1 --tenant acme --json

exit codes: 0 told, 1 no explanation is kept, 2 wrong use or no answer
"""


def configure_explain(parser: argparse.ArgumentParser) -> None:
    """Flags of `flexlb explain`."""
    parser.epilog, parser.formatter_class = EPILOG, argparse.RawDescriptionHelpFormatter
    parser.add_argument("id", metavar="REQUEST_ID", help="id of the request")
    parser.add_argument("--tenant", default="", help="its tenant (default: none)")
    parser.add_argument("--json", action="store_true", help="print JSON")
    add_flags(parser, DispatcherSettings, only={"redis", "pool"})


async def run_explain(options: argparse.Namespace) -> int:
    """Print every decision kept of a request; returns the exit code."""
    settings = read_settings(DispatcherSettings, vars(options))
    client = connect_redis(settings.redis, access=settings.redis_access)
    view = StoreView(client, Names(settings.pool))
    try:
        kept = await view.explanations(options.tenant, options.id)
        ref = "" if kept else await view.owner(options.tenant, options.id)
    finally:
        await client.aclose()
    if not kept:
        who = f"{options.tenant}/{options.id}" if options.tenant else options.id
        print(f"flexlb explain: {plain(who)}: {_why_none(ref, settings.pool)}", file=sys.stderr)
        return 1
    try:
        told = [codec.explanations.decode(one) for one in kept]
    except codec.MalformedRecord as error:
        raise StoreRefused(f"explanation: {error}") from None
    if options.json:
        print(json.dumps([as_data(one) for one in told], indent=2))
    else:
        print("\n\n".join(map(as_text, told)))
    return 0


def _why_none(ref: str, pool: str) -> str:
    if ref:
        return (
            f"pool {pool} knows it (record {ref}), but keeps no explanation: it was not sampled "
            "(explain_share, explain_rate), ended before it was bound, or newer ones took its place"
        )
    return (
        f"expected an explanation in pool {pool}, seen none: its id and tenant are unknown there, it was not "
        "bound yet, or what was kept has expired (an hour, the newest 5,000 requests)"
    )
