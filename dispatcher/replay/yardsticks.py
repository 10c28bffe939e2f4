"""What a workload allows on a fleet of simulated engines: ideal hits, working set, what `random` can carry.

Computed from the prompts by the engine model in virtual time, before anything runs: the figures that a
measured run is held against.
"""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from dataclasses import dataclass
from random import Random

from dispatcher.replay.synthesis import prompt_tokens
from dispatcher.replay.traces import TraceRequest
from dispatcher.simulation.engine import EngineModel
from dispatcher.simulation.kv_cache import block_hashes
from dispatcher.simulation.profile import Profile
from dispatcher.simulation.tokens import Answer


@dataclass(frozen=True, kw_only=True)
class Workload:
    """Prompts and lengths of answers, in order of arrival; `span_s` from the first to the last."""

    prompts: Sequence[array[int]]
    outputs: Sequence[int]
    span_s: float

    @property
    def per_s(self) -> float:
        """Requests per second at the recorded pace."""
        return len(self.prompts) / self.span_s if self.span_s else float(len(self.prompts))


def workload_of(requests: Sequence[TraceRequest]) -> Workload:
    """The prompts that `replay` sends for these requests."""
    return Workload(
        prompts=[prompt_tokens(request, index=index) for index, request in enumerate(requests)],
        outputs=[max(1, request.output_tokens) for request in requests],
        span_s=requests[-1].arrival_s - requests[0].arrival_s,
    )


@dataclass(frozen=True, kw_only=True)
class CacheBounds:
    """What prompts share.

    `working_set_tokens` are those of all their different blocks. `ideal_hit_ratio` is the share of prompt
    tokens that one endless cache would serve if each prompt were in it from its arrival on.
    """

    working_set_tokens: int
    ideal_hit_ratio: float


def cache_bounds(workload: Workload, block_tokens: int) -> CacheBounds:
    """Measure what prompts share, in blocks of the engine's size."""
    seen: set[int] = set()
    hit = total = 0
    for prompt in workload.prompts:
        blocks = block_hashes(prompt, block_tokens)
        # The last token is always computed, as the engine does.
        for block in blocks[: (len(prompt) - 1) // block_tokens]:
            if block not in seen:
                break
            hit += block_tokens
        total += len(prompt)
        seen.update(blocks)
    return CacheBounds(
        working_set_tokens=len(seen) * block_tokens, ideal_hit_ratio=hit / total if total else 0.0
    )


def carried_per_s(workload: Workload, profile: Profile, nodes: int, rng: Random) -> float:
    """The most requests per modelled second that a fleet completes under `random`.

    Each request goes to any node; every node has all of its requests at once and is never idle until the
    last is done. The fleet carries as many as its nodes complete per second of their mean busy time.
    """
    engines = [EngineModel(profile) for _ in range(nodes)]
    for key, (prompt, output) in enumerate(zip(workload.prompts, workload.outputs, strict=True)):
        engines[rng.randrange(nodes)].submit(key, prompt, output, output=Answer(prompt).token_id)
    for engine in engines:
        engine.step(0.0)
        while engine.due is not None:
            engine.step(engine.due)
    return len(workload.prompts) / (sum(engine.busy_s for engine in engines) / nodes)
