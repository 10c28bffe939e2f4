"""`python -m tests.simulation SEED...`: replay seeds of the cluster simulation, run many (`--seeds FROM-TO`),
or plant bugs (`--bugs`)."""

from __future__ import annotations

import argparse
import os
import sys

from dispatcher.telemetry.logging import configure_logging
from tests.simulation.many import report, run_many
from tests.simulation.planted_bugs import table
from tests.support.cluster import simulate


def main() -> int:
    """Replay the seeds; exit 1 when one violates an invariant."""
    parser = argparse.ArgumentParser(prog="python -m tests.simulation", description=__doc__)
    parser.add_argument("seeds", nargs="*", type=int, metavar="SEED")
    parser.add_argument("--trace", action="store_true", help="print every message and effect")
    parser.add_argument("--logs", action="store_true", help="print the processes' own logs")
    parser.add_argument("--hostile", type=int, default=0, metavar="N", help="append N arbitrary records too")
    parser.add_argument("--split", action="store_true", help="with prefill and decode nodes")
    parser.add_argument("--bugs", action="store_true", help="plant each known bug and say when it is caught")
    parser.add_argument(
        "--seeds",
        dest="many",
        type=seed_range,
        metavar="FROM-TO",
        help="run all of these: print those that violate an invariant, and schedules per minute",
    )
    parser.add_argument(
        "--jobs", type=int, default=os.cpu_count() or 1, metavar="N", help="processes for --seeds"
    )
    options = parser.parse_args()
    if options.bugs:
        for line in table():
            print(line, flush=True)
        return 0
    if options.many:
        many = run_many(
            options.many, jobs=options.jobs, hostile_records=options.hostile, is_split=options.split
        )
        return report(many)
    if not options.seeds:
        parser.error("expected seeds, --seeds FROM-TO or --bugs, seen none")
    if options.logs:
        configure_logging("INFO")
    bad = 0
    for seed in options.seeds:
        result = simulate(
            seed,
            trace=print if options.trace else None,
            logs=options.logs,
            hostile_records=options.hostile,
            is_split=options.split,
        )
        bad += bool(result.violations)
        print(
            f"seed {seed}: {result.outcomes} outcomes in {result.virtual_s:.1f} virtual s, "
            f"{len(result.violations)} violations"
        )
        for violation in result.violations:
            print(f"  {violation}")
    return 1 if bad else 0


def seed_range(text: str) -> range:
    """`FROM-TO`, both included."""
    first, dash, last = text.partition("-")
    if not dash or not first.isdigit() or not last.isdigit() or int(first) > int(last):
        raise argparse.ArgumentTypeError(f"expected FROM-TO, such as 60001-63000, seen {text!r}")
    return range(int(first), int(last) + 1)


if __name__ == "__main__":
    sys.exit(main())
