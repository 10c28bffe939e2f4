"""What an agent asks of an engine: run one request as a stream, tell whether it is alive.

An engine is believed by its progress, not by its health page: a stream counts as finished only when
every choice has given a finish reason.
"""

from __future__ import annotations

from collections.abc import AsyncGenerator, Sequence
from dataclasses import dataclass
from typing import Protocol

from msgspec import Raw

from dispatcher.errors import FlexLBError
from dispatcher.protocol.assignment import Work
from dispatcher.protocol.chunk import ChoiceDelta
from dispatcher.protocol.outcome import FailureCause, Usage
from workers_agent.engines.engine_load import EngineLoad


@dataclass(frozen=True, kw_only=True)
class Piece:
    """What one event of the engine's stream added.

    `finish_reasons` holds (choice index, reason) of choices that ended; `usage` comes once, last.
    """

    choices: tuple[ChoiceDelta, ...] = ()
    tokens: int = 0
    finish_reasons: tuple[tuple[int, str], ...] = ()
    usage: Usage | None = None


@dataclass(frozen=True, kw_only=True)
class Prefilled:
    """A computed prompt: what the engine wants told to the one that goes on, verbatim, and its counts."""

    kv_transfer_params: Raw
    usage: Usage


class EngineFailure(FlexLBError):
    """An attempt failed: `cause` is what the retry decision reads.

    `message` is ours and may be logged; `said` is what the engine said, which may repeat the prompt: it
    is only for whoever asked. Both together are the error's text.
    `reached` is False when the engine can't have seen the request: it may be dead, but not of it.
    """

    def __init__(
        self,
        cause: FailureCause,
        message: str,
        *,
        said: str = "",
        http_status: int = 0,
        reached: bool = True,
    ) -> None:
        super().__init__(f"{message}: {said}" if said else message)
        self.cause = cause
        self.message = message
        self.said = said
        self.http_status = http_status
        self.reached = reached


class Engine(Protocol):
    """One engine beside this agent."""

    def stream(self, work: Work, body: bytes) -> AsyncGenerator[Piece, None]:
        """Run `body` (an OpenAI body) at `work.endpoint`; closing the generator aborts the request.

        Ends normally only after each choice's finish reason.

        Raises:
            EngineFailure: refused, overloaded, broken off, stalled or unreadable.
        """
        ...

    async def prefill(self, work: Work, body: bytes) -> Prefilled | None:
        """Compute the prompt of `body` and keep its blocks for another engine; None when it can't be split.

        Raises:
            EngineFailure: as `stream`; PROTOCOL also when the engine names no blocks.
        """
        ...

    async def prompt_ids(self, work: Work, body: bytes) -> tuple[int, ...] | None:
        """The token ids of `body`'s prompt, as this engine makes them; None when it does not tell.

        Raises:
            EngineFailure: it does not answer.
        """
        ...

    async def text_of(self, work: Work, token_ids: Sequence[int]) -> str | None:
        """The text of tokens; None when the engine does not tell.

        Raises:
            EngineFailure: it does not answer.
        """
        ...

    async def is_alive(self) -> bool:
        """Whether the engine answers at all."""
        ...

    async def load(self) -> EngineLoad | None:
        """What the engine says of its load; None when it does not answer."""
        ...

    async def probe(self, model: str) -> bool:
        """Whether one token of a small request comes through."""
        ...

    async def close(self) -> None:
        """Release connections."""
        ...
