"""`python -m tests.bench.sampled FILE MODULE ...`: run a module and note where its processor time goes.

From SIGUSR1 to SIGUSR2 a timer of the process's CPU time takes the main thread's stack a few hundred times a
second; the file gets one line for each different stack, outermost first, and how often it was seen.
"""

from __future__ import annotations

import runpy
import signal
import sys
from collections import Counter
from pathlib import Path
from types import FrameType

EVERY_S = 0.003
"""CPU time between samples: the process spends a few per cent on them."""


class _Samples:
    def __init__(self) -> None:
        self.counts: Counter[tuple[tuple[str, str], ...]] = Counter()

    def take(self, _: int, frame: FrameType | None) -> None:
        """Note one stack."""
        stack = []
        while frame is not None:
            code = frame.f_code
            stack.append((code.co_filename, code.co_name))
            frame = frame.f_back
        self.counts[tuple(reversed(stack))] += 1

    def write(self, path: Path) -> None:
        """Write what was noted."""
        lines = []
        for stack, count in self.counts.most_common():
            named = (f"{'/'.join(Path(file).parts[-2:])}:{function}" for file, function in stack)
            lines.append(f"{';'.join(named)} {count}\n")
        path.write_text("".join(lines))


def main() -> None:
    """Run the module to its end, then write."""
    path, module, *arguments = sys.argv[1:]
    samples = _Samples()
    signal.signal(signal.SIGPROF, samples.take)
    signal.signal(signal.SIGUSR1, lambda *_: signal.setitimer(signal.ITIMER_PROF, EVERY_S, EVERY_S))
    signal.signal(signal.SIGUSR2, lambda *_: signal.setitimer(signal.ITIMER_PROF, 0.0))
    sys.argv = [module, *arguments]
    try:
        runpy.run_module(module, run_name="__main__", alter_sys=True)
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0.0)
        samples.write(Path(path))


if __name__ == "__main__":
    main()
