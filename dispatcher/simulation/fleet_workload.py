"""What is sent to a simulated fleet: arrivals of a trace, each with the blocks of its prompt.

Open loop: every arrival at its time, whatever the fleet does. Closed loop, where a trace has sessions: a
turn follows the answer to the turn before it, after the recorded pause. Rates are multiples of the trace's
own; a trace that is too short is sent again, each time with prompts of its own.
"""

from __future__ import annotations

import gzip
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from random import Random
from typing import Annotated

import msgspec
from msgspec import Meta, Struct

from dispatcher.errors import SettingsError
from dispatcher.protocol.prefix_hash import BLOCK_TOKENS
from dispatcher.protocol.request import DEFAULT_PRIORITY
from dispatcher.replay.arrivals import poisson_times, spread
from dispatcher.replay.traces import GZIP_MAGIC, TraceRequest, read_excerpt, read_trace

MASK = (1 << 62) - 1
"""Hashes of blocks are from 0 to this."""
SHARED = -1
"""What blocks common to all sessions are chained to."""


@dataclass(frozen=True, kw_only=True)
class Turn:
    """One request, `pause_s` after the trace's start, or after the answer to the turn before it."""

    pause_s: float
    prompt_tokens: int
    output_tokens: int
    blocks: tuple[int, ...]
    priority: int = DEFAULT_PRIORITY
    deadline_s: float | None = None
    tenant: str = ""


@dataclass(frozen=True, kw_only=True)
class FleetWorkload:
    """Sessions of turns, one each where the trace is open loop. `per_s`: arrivals a second at rate 1."""

    sessions: Sequence[Sequence[Turn]]
    block_tokens: int
    per_s: float

    @property
    def requests(self) -> int:
        """Turns of all sessions."""
        return sum(map(len, self.sessions))


Source = str | Path | Sequence[TraceRequest] | None
"""Where a workload comes from: a trace file, recorded requests, or the package's excerpt."""


def workload_of(
    source: Source,
    *,
    requests: int | None = None,
    block_tokens: int = BLOCK_TOKENS,
    poisson: Random | None = None,
    longest: int | None = None,
) -> FleetWorkload:
    """Make a workload of any source; arguments and errors as of `read_workload`."""
    if isinstance(source, str | Path):
        return read_workload(
            source, requests=requests, block_tokens=block_tokens, poisson=poisson, longest=longest
        )
    trace = read_excerpt() if source is None else source
    return open_loop(trace, requests=requests, block_tokens=block_tokens, poisson=poisson, longest=longest)


def workloads_of(
    source: Source,
    seeds: Sequence[int],
    *,
    is_drawn: bool,
    requests: int | None = None,
    block_tokens: int = BLOCK_TOKENS,
    longest: int | None = None,
) -> dict[int, FleetWorkload]:
    """Read what is sent by seed: gaps drawn from each, or the recorded times for all."""

    def read(poisson: Random | None) -> FleetWorkload:
        return workload_of(
            source, requests=requests, block_tokens=block_tokens, poisson=poisson, longest=longest
        )

    if is_drawn:
        return {seed: read(Random(seed)) for seed in seeds}
    return dict.fromkeys(seeds, read(None))


def read_workload(
    path: str | Path,
    *,
    requests: int | None = None,
    block_tokens: int = BLOCK_TOKENS,
    poisson: Random | None = None,
    longest: int | None = None,
) -> FleetWorkload:
    """Read a trace of any known format, sessions of coding agents included.

    Args:
        requests: so many, the trace's own number when absent.
        poisson: draws exponential gaps of the trace's mean rate instead of the recorded times.
        longest: tokens that prompt and answer may have; requests beyond are left out.
    Raises:
        SettingsError: it can't be read, or nothing is left of it.
    """
    if _has_sessions(path):
        return _limited(read_sessions(path, block_tokens=block_tokens), requests, longest)
    return open_loop(
        read_trace(path), requests=requests, block_tokens=block_tokens, poisson=poisson, longest=longest
    )


def open_loop(
    trace: Sequence[TraceRequest],
    *,
    requests: int | None = None,
    block_tokens: int = BLOCK_TOKENS,
    poisson: Random | None = None,
    longest: int | None = None,
) -> FleetWorkload:
    """Make a workload of recorded requests; arguments and errors as of `read_workload`."""
    trace = [one for one in trace if longest is None or _tokens(one) <= longest]
    if not trace:
        raise SettingsError(f"trace: expected requests of up to {longest} tokens (the KV cache), seen none")
    wanted = requests if requests is not None else len(trace)
    times = spread([one.arrival_s for one in trace])
    period_s = times[-1] * len(times) / (len(times) - 1) if times[-1] else 1.0
    times = [copy * period_s + time for copy in range(-(-wanted // len(trace))) for time in times][:wanted]
    if poisson is not None:
        times = poisson_times(times, poisson)
    first_s = times[0]
    sessions = []
    for number, at_s in enumerate(times):
        copy, place = divmod(number, len(trace))
        one = trace[place]
        sessions.append(
            (
                Turn(
                    pause_s=at_s - first_s,
                    prompt_tokens=max(1, one.prompt_tokens),
                    output_tokens=max(1, one.output_tokens),
                    blocks=_chained(one, copy, block_tokens),
                    priority=one.priority,
                    deadline_s=one.deadline_s,
                    tenant=one.tenant,
                ),
            )
        )
    span_s = times[-1] - first_s
    return FleetWorkload(
        sessions=sessions,
        block_tokens=block_tokens,
        per_s=len(times) / span_s if span_s else float(len(times)),
    )


def _tokens(request: TraceRequest) -> int:
    return max(1, request.prompt_tokens) + max(1, request.output_tokens)


def _chained(request: TraceRequest, copy: int, block_tokens: int) -> tuple[int, ...]:
    """The prompt's full blocks of `block_tokens`, as far as the trace names what they hold."""
    size = request.block_tokens
    if not size:
        return ()
    covered = min(request.prompt_tokens, size * len(request.block_ids)) // block_tokens
    link, blocks = hash((copy, block_tokens)), []
    for place in range(covered):
        start = place * block_tokens
        named = request.block_ids[start // size : -(-(start + block_tokens) // size)]
        link = hash((link, start % size, named)) & MASK
        blocks.append(link)
    return tuple(blocks)


# Sessions of coding agents (github.com/callanjfox/kv-cache-tester)


class _Session(Struct):
    id: str
    block_size: Annotated[int, Meta(ge=1)]
    tool_tokens: Annotated[int, Meta(ge=0)]
    system_tokens: Annotated[int, Meta(ge=0)]
    requests: list[
        tuple[float, int, int, str, int, list[tuple[int, int]], float | None, float | None, str | None]
    ]
    """t_s, input, output, agent, blocks kept of the one before, (start, length) of others, think_s, ..."""


_session = msgspec.json.Decoder(_Session)


def read_sessions(path: str | Path, *, block_tokens: int = BLOCK_TOKENS) -> FleetWorkload:
    """Read sessions, each a closed loop; tools and system prompt are taken for common to all."""
    sessions = []
    busy_s = turns = 0.0
    for number, line in enumerate(_lines(path), start=1):
        try:
            session = _session.decode(line)
        except msgspec.DecodeError as error:
            raise SettingsError(
                f"trace {path} line {number}: {error}; expected a session of an agent"
            ) from None
        made = list(_turns(session, number, block_tokens))
        if made:
            sessions.append(made)
            busy_s += sum((one[6] or 0) + (one[7] or 0) for one in session.requests)
            turns += len(made)
    if not sessions:
        raise SettingsError(f"trace {path}: expected sessions, seen none")
    # Each is recorded from its own start: they begin one after the other, over a mean session's time.
    mean_s = busy_s / len(sessions)
    gap_s = mean_s / len(sessions)
    sessions = [[replace(one[0], pause_s=place * gap_s), *one[1:]] for place, one in enumerate(sessions)]
    return FleetWorkload(
        sessions=sessions, block_tokens=block_tokens, per_s=turns / mean_s if mean_s else turns
    )


def _turns(session: _Session, number: int, block_tokens: int) -> Iterator[Turn]:
    size = session.block_size
    common = (session.tool_tokens + session.system_tokens) // size
    ids: list[int] = []
    for _, input_tokens, output_tokens, _, kept, runs, think_s, _, _ in session.requests:
        ids = ids[:kept]
        for start, length in runs:
            ids.extend(range(start, start + length))
        request = TraceRequest(
            arrival_s=0,
            prompt_tokens=input_tokens,
            output_tokens=output_tokens,
            block_ids=tuple(
                hash((SHARED, place)) if place < common else hash((number, id))
                for place, id in enumerate(ids)
            ),
            block_tokens=size,
        )
        yield Turn(
            pause_s=max(0.0, think_s or 0.0),
            prompt_tokens=max(1, input_tokens),
            output_tokens=max(1, output_tokens),
            blocks=_chained(request, 0, block_tokens),
        )


def _limited(workload: FleetWorkload, requests: int | None, longest: int | None) -> FleetWorkload:
    """Whole sessions up to `requests` turns, each up to its first turn that is too long."""
    sessions: list[Sequence[Turn]] = []
    left = requests if requests is not None else workload.requests
    for session in workload.sessions:
        turns: list[Turn] = []
        for turn in session:
            if longest is not None and turn.prompt_tokens + turn.output_tokens > longest:
                break
            turns.append(turn)
        turns = turns[:left]
        left -= len(turns)
        if turns:
            sessions.append(turns)
    if not sessions:
        raise SettingsError(f"trace: expected requests of up to {longest} tokens (the KV cache), seen none")
    return replace(workload, sessions=sessions)


def _lines(path: str | Path) -> Iterator[bytes]:
    try:
        data = Path(path).read_bytes()
        data = gzip.decompress(data) if data.startswith(GZIP_MAGIC) else data
    except (OSError, EOFError) as error:
        raise SettingsError(f"trace {path}: {error}") from None
    return (line for line in data.splitlines() if line.strip())


def _has_sessions(path: str | Path) -> bool:
    line = next(_lines(path), b"")
    try:
        fields = msgspec.json.decode(line, type=dict[str, msgspec.Raw]).keys()
    except (msgspec.DecodeError, RecursionError):
        return False
    return {"tool_tokens", "system_tokens", "requests"} <= fields
