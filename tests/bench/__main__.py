"""`python -m tests.bench`: every benchmark, one after the other; a table each, and JSON on request.

One that fails does not keep the others from being run; the exit code tells.

`scheduling`, `tuning` and `ablation`, which simulate, are commands of their own with flags of their own.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import sys
import time
import traceback
from pathlib import Path

from dispatcher.errors import SettingsError
from tests.bench import (
    ablation,
    agent,
    bodies,
    cancel,
    decision,
    explain,
    failover,
    growth,
    hops,
    latency,
    leader,
    lifecycle,
    load,
    pools,
    registry,
    replies,
    scheduling,
    soak,
    tuning,
)
from tests.bench.machine import describe_machine

BENCHES = {
    "decision": decision.run,
    "leader": leader.run,
    "lifecycle": lifecycle.run,
    "latency": latency.run,
    "hops": hops.run,
    "explain": explain.run,
    "registry": registry.run,
    "growth": growth.run,
    "load": load.run,
    "pools": pools.run,
    "bodies": bodies.run,
    "agent": agent.run,
    "replies": replies.run,
    "failover": failover.run,
    "cancel": cancel.run,
}
ALONE = {"soak": soak.run}
"""Too long to be run with the others: by name only."""


def main() -> int:
    """Run the benchmarks named, or all."""
    simulated = {"scheduling": scheduling.main, "tuning": tuning.main, "ablation": ablation.main}
    if sys.argv[1:2] and sys.argv[1] in simulated:
        try:
            return simulated[sys.argv[1]](sys.argv[2:])
        except SettingsError as error:
            print(f"tests.bench {sys.argv[1]}: {error}", file=sys.stderr)
            return 2
    parser = argparse.ArgumentParser(prog="python -m tests.bench", description=__doc__)
    parser.add_argument(
        "names",
        nargs="*",
        metavar="NAME",
        help=f"of {', '.join([*BENCHES, *ALONE])}; all but {', '.join(ALONE)} when absent; "
        "or scheduling, tuning or ablation, alone and with flags of their own (scheduling --help)",
    )
    parser.add_argument("--json", type=Path, metavar="DIR", help="leave one JSON file per benchmark here")
    options = parser.parse_args()
    benches = BENCHES | ALONE
    unknown = set(options.names) - set(benches)
    if unknown:
        parser.error(f"expected {', '.join(benches)}, seen {', '.join(sorted(unknown))}")
    machine = describe_machine()
    print(machine)
    failed = []
    for name in options.names or BENCHES:
        print(f"\n{name}", flush=True)
        began_s = time.monotonic()
        try:
            measured = asyncio.run(benches[name]())
        except Exception:
            traceback.print_exc()
            failed.append(name)
            continue
        took_s = round(time.monotonic() - began_s, 1)
        print(f"({took_s} s)", flush=True)
        if options.json:
            result = {"bench": name, "machine": machine, "took_s": took_s, **measured}
            options.json.mkdir(parents=True, exist_ok=True)
            (options.json / f"{name}.json").write_text(json.dumps(result, indent=2) + "\n")
    if failed:
        print(f"failed: {', '.join(failed)}", file=sys.stderr)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
