"""`python -m workers_agent.simulator`: one simulated engine as a process.

Prints one JSON line with its address once it answers; ends at once on SIGTERM or SIGINT.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import signal
import sys

from workers_agent.simulator.model import Profile
from workers_agent.simulator.server import Simulator, SimulatorSettings


def _number(text: str) -> float:
    value = float(text)
    if not 0 <= value < float("inf"):
        raise argparse.ArgumentTypeError(f"expected a number from 0 up, seen {text}")
    return value


def _speed(text: str) -> float:
    value = _number(text)
    if value == 0:
        raise argparse.ArgumentTypeError("expected a number above 0, seen 0")
    return value


def _share(text: str) -> float:
    value = _number(text)
    if value > 1:
        raise argparse.ArgumentTypeError(f"expected a share from 0 to 1, seen {text}")
    return value


def _count(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"expected 1 or more, seen {text}")
    return value


def _port(text: str) -> int:
    value = int(text)
    if not 0 <= value <= 65_535:
        raise argparse.ArgumentTypeError(f"expected a port from 0 to 65535, seen {text}")
    return value


def parser() -> argparse.ArgumentParser:
    """Describe the command line."""
    parser = argparse.ArgumentParser(
        prog="python -m workers_agent.simulator",
        description="A simulated OpenAI-compatible engine: real HTTP, modelled time, deterministic answers.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add = parser.add_argument
    add("--host", default="127.0.0.1", help="address to listen on")
    add("--port", type=_port, default=0, help="port to listen on; 0 takes a free one")
    add("--model", default="sim", help="name of the served model")
    add("--max-model-tokens", type=_count, default=131_072, help="longest prompt and answer together")
    add("--max-running", type=_count, default=32, help="sequences in the batch")
    add("--max-waiting", type=_count, default=1_024, help="sequences in the queue; above it, 429")
    add("--prefill-tokens-per-s", type=_speed, default=40_000.0, help="prompt tokens computed per second")
    add("--decode-step-ms", type=_number, default=8.0, help="time of a decode step of one sequence")
    add(
        "--decode-step-ms-per-sequence",
        type=_number,
        default=0.0,
        help="time that each further sequence adds to a decode step",
    )
    add("--cache-blocks", type=_count, default=4_096, help="prefix cache, in blocks of 16 tokens")
    add("--time-scale", type=_number, default=1.0, help="seconds per modelled second; 0 waits for nothing")
    add("--fail-rate", type=_share, default=0.0, help="share of requests that fail: 500, cut, or error event")
    add("--stall-rate", type=_share, default=0.0, help="share of requests that fall silent half-way")
    add("--seed", type=int, default=0, help="chooses which requests fail and stall")
    return parser


async def serve(settings: SimulatorSettings, host: str, port: int) -> None:
    """Serve until SIGTERM or SIGINT.

    Raises:
        OSError: the address can't be used.
    """
    stop = asyncio.Event()
    for signal_number in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(signal_number, stop.set)
    simulator = Simulator(settings)
    try:
        url = await simulator.start(host, port)
        print(json.dumps({"url": url, "model": settings.model}), flush=True)
        await stop.wait()
    finally:
        await simulator.close()


def main() -> int:
    """Run the command line; return the exit status."""
    chosen = parser().parse_args()
    settings = SimulatorSettings(
        model=chosen.model,
        profile=Profile(
            prefill_tokens_per_s=chosen.prefill_tokens_per_s,
            decode_step_s=chosen.decode_step_ms / 1000,
            decode_step_s_per_sequence=chosen.decode_step_ms_per_sequence / 1000,
            max_running=chosen.max_running,
            cache_blocks=chosen.cache_blocks,
        ),
        max_model_tokens=chosen.max_model_tokens,
        max_waiting=chosen.max_waiting,
        time_scale=chosen.time_scale,
        fail_rate=chosen.fail_rate,
        stall_rate=chosen.stall_rate,
        seed=chosen.seed,
    )
    try:
        asyncio.run(serve(settings, chosen.host, chosen.port))
    except OSError as error:
        print(
            f"simulator: can't listen on {chosen.host}:{chosen.port} ({error.strerror or error}); "
            "choose a free --port, or 0 to be given one",
            file=sys.stderr,
        )
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
