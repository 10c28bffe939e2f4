"""`python -m tests.simulation SEED...`: replay seeds of the cluster simulation with a trace."""

from __future__ import annotations

import argparse
import sys

from dispatcher.telemetry.logging import configure_logging
from tests.support.cluster import simulate


def main() -> int:
    """Replay the seeds; exit 1 when one violates an invariant."""
    parser = argparse.ArgumentParser(prog="python -m tests.simulation", description=__doc__)
    parser.add_argument("seeds", nargs="+", type=int, metavar="SEED")
    parser.add_argument("--trace", action="store_true", help="print every message and effect")
    parser.add_argument("--logs", action="store_true", help="print the processes' own logs")
    options = parser.parse_args()
    if options.logs:
        configure_logging("INFO")
    bad = 0
    for seed in options.seeds:
        result = simulate(seed, trace=print if options.trace else None, logs=options.logs)
        bad += bool(result.violations)
        print(
            f"seed {seed}: {result.outcomes} outcomes in {result.virtual_s:.1f} virtual s, "
            f"{len(result.violations)} violations"
        )
        for violation in result.violations:
            print(f"  {violation}")
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())
