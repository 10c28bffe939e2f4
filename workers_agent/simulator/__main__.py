"""`flexlb engine-sim` (`python -m workers_agent.simulator`): one simulated engine as a process.

Prints one JSON line with its address once it answers; ends at once on SIGTERM or SIGINT.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import signal
import sys
from dataclasses import replace
from typing import Any

from dispatcher.simulation.profile import Profile
from dispatcher.simulation.profiles import PROFILES
from workers_agent.simulator.faults import Faults
from workers_agent.simulator.server import Simulator, SimulatorSettings

DESCRIPTION = """\
A simulated OpenAI-compatible engine: real HTTP and KV events, modelled time, deterministic answers.

It shows itself as vLLM does: /v1/completions, /v1/chat/completions (streamed or whole), /v1/models,
/tokenize, /health, /version, /metrics, /reset_prefix_cache. Closing a connection aborts its request.
Once it answers it prints one line of JSON: url, model, profile, and kv_events and kv_replay if it has them.
"""
EPILOG = """\
Faults can be changed while it runs; what is not named goes back to its default:

  curl URL/sim/faults -d '{"fail_rate": 0.1, "stall_rate": 0.05, "crash_rate": 0, "crash_after": 100,
                           "slow_rate": 0.2, "slow_factor": 4, "step_factor": 1}'

"step_factor" makes every step of the engine take so many times as long, as a throttled GPU does.

Examples:
  flexlb engine-sim --profile h100-llama-8b --port 8001 --kv-events-endpoint 'tcp://*:5557' \\
      --kv-replay-endpoint 'tcp://*:5558'
  flexlb engine-sim --time-scale 0.1 --fail-rate 0.05 --seed 7       ten times as fast, 1 in 20 fails
"""


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


def _factor(text: str) -> float:
    value = _number(text)
    if not 1 <= value <= 10_000:
        raise argparse.ArgumentTypeError(f"expected a factor from 1 to 10000, seen {text}")
    return value


def _whole_number(text: str) -> int:
    value = int(text)
    if value < 0:
        raise argparse.ArgumentTypeError(f"expected 0 or more, seen {text}")
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
        prog="flexlb engine-sim",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        description=DESCRIPTION,
        epilog=EPILOG,
    )
    serving = parser.add_argument_group("serving").add_argument
    serving("--host", default="127.0.0.1", help="address to listen on (default 127.0.0.1)")
    serving("--port", type=_port, default=0, help="port to listen on (default 0: a free one)")
    serving("--model", default="sim", help="name of the served model (default sim)")
    serving("--max-model-tokens", type=_count, default=131_072, help="longest prompt and answer together")
    serving("--max-waiting", type=_count, default=1_024, help="sequences in the queue; above it, 429")
    serving("--time-scale", type=_number, default=1.0, help="wall seconds per modelled second; 0 never waits")
    profile = parser.add_argument_group("profile", "how fast it is and how much it holds").add_argument
    profile("--profile", choices=sorted(PROFILES), default="test", help="GPU and model (default test)")
    profile("--list-profiles", action="store_true", help="print the profiles with their sources, and end")
    profile("--max-running", type=_count, help="sequences in the batch")
    profile("--max-batched-tokens", type=_count, help="token budget of a step")
    profile("--block-size", type=_count, help="tokens of a KV block")
    profile("--kv-blocks", type=_count, help="blocks of the KV cache")
    profile("--prefill-tokens-per-s", type=_speed, help="prompt tokens computed per second")
    profile("--decode-step-ms", type=_number, help="fixed time of a step")
    profile("--decode-step-ms-per-sequence", type=_number, help="what each decoding sequence adds to it")
    events = parser.add_argument_group("KV events", "as vLLM publishes them on ZeroMQ").add_argument
    events(
        "--kv-events-endpoint",
        default="",
        metavar="ADDRESS",
        help="tcp://*:PORT and ipc://PATH bind (port 0: a free one), tcp://HOST:PORT connects",
    )
    events("--kv-replay-endpoint", default="", metavar="ADDRESS", help="where missed events are replayed")
    events("--kv-events-topic", default="", metavar="TEXT", help="topic of the events")
    events("--kv-events-encoding", choices=("map", "array"), default="map", help="of newer or older vLLM")
    events(
        "--drop-kv-events",
        type=_share,
        default=0.0,
        metavar="SHARE",
        help="share of batches lost on the way; they can still be replayed",
    )
    faults = parser.add_argument_group("faults", "chosen by the seed").add_argument
    faults("--fail-rate", type=_share, default=0.0, help="share of requests that fail: 500, cut, error event")
    faults("--stall-rate", type=_share, default=0.0, help="share that falls silent half-way")
    faults("--crash-rate", type=_share, default=0.0, help="share that kills the process half-way")
    faults(
        "--crash-after",
        type=_whole_number,
        metavar="N",
        help="answer N requests; the next kills the process half-way, as kill -9 does",
    )
    faults("--slow-rate", type=_share, default=0.0, help="share whose tokens are late")
    faults("--slow-factor", type=_factor, default=4.0, help="their tokens take this many times as long (4)")
    faults("--step-factor", type=_factor, default=1.0, help="every step takes this many times as long (1)")
    faults("--seed", type=int, default=0, help="chooses which (default 0)")
    return parser


def chosen_profile(chosen: argparse.Namespace) -> Profile:
    """The named profile with what was given in place of its own."""
    given: dict[str, Any] = {
        "max_running": chosen.max_running,
        "max_batched_tokens": chosen.max_batched_tokens,
        "block_tokens": chosen.block_size,
        "kv_blocks": chosen.kv_blocks,
        "prefill_token_s": chosen.prefill_tokens_per_s and 1 / chosen.prefill_tokens_per_s,
        "fixed_s": chosen.decode_step_ms and chosen.decode_step_ms / 1000,
        "decode_sequence_s": chosen.decode_step_ms_per_sequence and chosen.decode_step_ms_per_sequence / 1000,
    }
    return replace(
        PROFILES[chosen.profile], **{name: value for name, value in given.items() if value is not None}
    )


async def serve(settings: SimulatorSettings, host: str, port: int) -> None:
    """Serve until SIGTERM or SIGINT.

    Raises:
        OSError: an address can't be used.
    """
    stop = asyncio.Event()
    for signal_number in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(signal_number, stop.set)
    simulator = Simulator(settings)
    try:
        url = await simulator.start(host, port)
        ready = {"url": url, "model": settings.model, "profile": settings.profile.name}
        if simulator.kv is not None:
            ready |= {"kv_events": simulator.kv.endpoint, "kv_replay": simulator.kv.replay}
        print(json.dumps(ready), flush=True)
        await stop.wait()
    finally:
        await simulator.close()


def main() -> int:
    """Run the command line; return the exit status."""
    flags = parser()
    chosen = flags.parse_args()
    if chosen.list_profiles:
        for profile in PROFILES.values():
            print(f"{profile.name:22} {profile.source}")
        return 0
    try:
        profile = chosen_profile(chosen)
    except ValueError as error:
        flags.error(str(error))
    settings = SimulatorSettings(
        model=chosen.model,
        profile=profile,
        max_model_tokens=chosen.max_model_tokens,
        max_waiting=chosen.max_waiting,
        time_scale=chosen.time_scale,
        faults=Faults(
            fail_rate=chosen.fail_rate,
            stall_rate=chosen.stall_rate,
            crash_rate=chosen.crash_rate,
            crash_after=chosen.crash_after,
            slow_rate=chosen.slow_rate,
            slow_factor=chosen.slow_factor,
            step_factor=chosen.step_factor,
        ),
        seed=chosen.seed,
        kv_events=chosen.kv_events_endpoint,
        kv_replay=chosen.kv_replay_endpoint,
        kv_topic=chosen.kv_events_topic,
        kv_encoding=chosen.kv_events_encoding,
        kv_drop_share=chosen.drop_kv_events,
    )
    try:
        asyncio.run(serve(settings, chosen.host, chosen.port))
    except OSError as error:
        print(
            f"simulator: can't listen on {error.strerror or error}; choose a free port, or 0 to be given one",
            file=sys.stderr,
        )
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
