"""The engine of the cluster simulation: every answer is known beforehand, token by token."""

from __future__ import annotations

import asyncio
import functools
import json
import random
from collections.abc import AsyncGenerator, Sequence

from msgspec import Raw

from dispatcher.protocol.assignment import Work
from dispatcher.protocol.chunk import ChoiceDelta
from dispatcher.protocol.outcome import FailureCause, Usage
from tests.support.sim.loop import current
from workers_agent.engines.engine import EngineFailure, Piece, Prefilled
from workers_agent.engines.engine_load import EngineLoad

PROMPT_IDS = (1_000_001,) * 8
MOST_TOKENS = 12


@functools.lru_cache(maxsize=4096)
def answer_of(request_id: str, tokens: int) -> str:
    """The text that the simulated engines generate for a request."""
    return "".join(f"{request_id}.{number} " for number in range(tokens))


class ScriptedEngine:
    """Generates `answer_of` the request, at a seeded pace, fails now and then, and can be crashed."""

    def __init__(self, rng: random.Random, *, failure_share: float) -> None:
        self._rng = rng
        self._failure_share = failure_share
        self.runs: list[str] = []
        self._down_until_s = 0.0
        self._crashes = 0

    def crash(self, seconds: float) -> None:
        """Fail what runs, and refuse for `seconds`."""
        self._down_until_s = current().time() + seconds
        self._crashes += 1

    @property
    def crashes(self) -> int:
        """How often it was crashed."""
        return self._crashes

    def _check(self, crashes: int) -> None:
        if crashes != self._crashes or not self._is_up():
            raise EngineFailure(FailureCause.CONNECT, "the simulated engine crashed")

    def _is_up(self) -> bool:
        return current().time() >= self._down_until_s

    async def stream(self, work: Work, body: bytes) -> AsyncGenerator[Piece, None]:
        """Run one request."""
        rng = self._rng
        self.runs.append(work.ref)
        crashes = self._crashes
        if not self._is_up():
            raise EngineFailure(FailureCause.CONNECT, "the simulated engine is down", reached=False)
        asked = json.loads(body)
        prompt, most = asked.get("prompt"), asked.get("max_tokens")
        if not isinstance(prompt, str | list) or type(most) is not int or not 0 < most <= MOST_TOKENS:
            raise EngineFailure(FailureCause.REFUSED, "the simulated engine takes no such body")
        first = 0
        if isinstance(prompt, list):
            if prompt != [*PROMPT_IDS, *range(len(prompt) - len(PROMPT_IDS))]:
                raise AssertionError(f"expected what was generated, in order, seen {prompt}")
            first = len(prompt) - len(PROMPT_IDS)
        tokens = first + most
        fails_at = rng.randrange(first, tokens + 1) if rng.random() < self._failure_share else -1
        await asyncio.sleep(rng.uniform(0.005, 0.2))
        step_s = asked.get("pace_s") or rng.choice([0.005, 0.03, 0.16])
        for number in range(first, tokens):
            if number == fails_at:
                causes = [FailureCause.ENGINE_ERROR, FailureCause.TRUNCATED, FailureCause.CONNECT]
                raise EngineFailure(rng.choice(causes), "the simulated engine failed")
            await asyncio.sleep(step_s)
            self._check(crashes)
            delta = ChoiceDelta(text=f"{work.id}.{number} ", token_ids=(number,))
            yield Piece(choices=(delta,), tokens=1)
        usage = Usage(prompt_tokens=len(PROMPT_IDS) + first, completion_tokens=tokens - first)
        yield Piece(finish_reasons=((0, "length"),), usage=usage)

    async def prefill(self, work: Work, body: bytes) -> Prefilled | None:
        """Compute a prompt for another engine."""
        crashes = self._crashes
        if not self._is_up():
            raise EngineFailure(FailureCause.CONNECT, "the simulated engine is down", reached=False)
        await asyncio.sleep(self._rng.uniform(0.005, 0.2))
        self._check(crashes)
        if self._rng.random() < self._failure_share:
            raise EngineFailure(FailureCause.PROTOCOL, "the simulated engine named no blocks")
        usage = Usage(prompt_tokens=len(PROMPT_IDS), completion_tokens=1)
        params = {"do_remote_prefill": True, "remote_request_id": work.id}
        return Prefilled(kv_transfer_params=Raw(json.dumps(params).encode()), usage=usage)

    async def prompt_ids(self, work: Work, body: bytes) -> tuple[int, ...] | None:
        """The same for every prompt."""
        return PROMPT_IDS

    async def text_of(self, work: Work, token_ids: Sequence[int]) -> str | None:
        """A token's id is its place in the answer."""
        return "".join(f"{work.id}.{number} " for number in token_ids)

    async def is_alive(self) -> bool:
        """Whether it answers."""
        return self._is_up()

    async def load(self) -> EngineLoad | None:
        """It tells nothing of itself."""
        return EngineLoad() if self._is_up() else None

    async def probe(self, model: str) -> bool:
        """Whether a token comes through."""
        return self._is_up()

    async def close(self) -> None:
        """Nothing to close."""
