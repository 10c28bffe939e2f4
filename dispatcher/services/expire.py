"""Expire: deadlines, overload, models that nobody serves, and carrying out decided endings.

An agent ends its own work at the deadline; the leader does so a little later for whatever an agent
did not end, and at once for what still waits.
"""

from __future__ import annotations

import asyncio
import heapq

from dispatcher.protocol.outcome import OutcomeKind, Reason
from dispatcher.services.close import Endings, prompt_too_long_message
from dispatcher.services.shed import Shedder
from dispatcher.services.state import LeaderState

TICK_S = 0.1
RUNNING_GRACE_MS = 1000


class Expire:
    """Ends what has waited or run too long."""

    def __init__(
        self, state: LeaderState, endings: Endings, shedder: Shedder, *, unknown_model_grace_s: float
    ) -> None:
        self._state = state
        self._endings = endings
        self._shedder = shedder
        self._grace_s = unknown_model_grace_s
        self._checked_version = -1
        self._since = state.clock.monotonic()

    async def run(self) -> None:
        """Look every tenth of a second until cancelled."""
        while True:
            await asyncio.sleep(TICK_S)
            self._deadlines()
            self._shedder.tick()
            if self._state.clock.monotonic() - self._since >= self._grace_s:
                self._unknown_models()
                self._unknown_loras()
                self._too_long_prompts()
            await self._endings.carry_out()

    def _deadlines(self) -> None:
        state = self._state
        now = state.clock.now_ms()
        later = []
        while state.deadlines and state.deadlines[0][0] <= now:
            _, ref = heapq.heappop(state.deadlines)
            envelope = state.envelope_of(ref)
            if envelope is None:
                if state.is_unfinished(ref):
                    later.append((now + RUNNING_GRACE_MS, ref))
                continue
            if ref in state.bound and now < envelope.deadline_at_ms + RUNNING_GRACE_MS:
                later.append((envelope.deadline_at_ms + RUNNING_GRACE_MS, ref))
                continue
            message = f"deadline passed {now - envelope.deadline_at_ms} ms ago"
            self._endings.doom(envelope, OutcomeKind.EVICTED, Reason.DEADLINE_EXCEEDED, message)
        for entry in later:
            heapq.heappush(state.deadlines, entry)

    def _too_long_prompts(self) -> None:
        state = self._state
        if state.fleet.version == self._checked_version:
            return
        self._checked_version = state.fleet.version
        for waiting in state.window:
            envelope = waiting.envelope
            longest = state.fleet.longest_prompt(envelope.model)
            if longest and envelope.tokens_exact and envelope.prompt_tokens > longest:
                message = prompt_too_long_message(envelope, longest)
                self._endings.doom(envelope, OutcomeKind.REJECTED, Reason.PROMPT_TOO_LONG, message)

    def _unknown_models(self) -> None:
        state = self._state
        if not any(node.available for node in state.fleet.nodes.values()):
            return
        unknown = {model for model in state.window.models() if not state.fleet.serving(model)}
        if not unknown:
            return
        served = sorted({model for node in state.fleet.nodes.values() for model in node.identity.models})
        for waiting in state.window:
            model = waiting.envelope.model
            if model in unknown:
                message = f"model: expected one of {', '.join(served)[:200]}, seen {model!r}"
                self._endings.doom(waiting.envelope, OutcomeKind.REJECTED, Reason.UNKNOWN_MODEL, message)

    def _unknown_loras(self) -> None:
        state = self._state
        unknown: dict[tuple[str, str], str] = {}
        for model, lora in state.window.loras():
            serving = state.fleet.serving(model)
            known = sorted({name for node in serving for name in node.identity.loras})
            if serving and lora not in known:
                unknown[(model, lora)] = ", ".join(known)[:200] or "none"
        if not unknown:
            return
        for waiting in state.window:
            envelope = waiting.envelope
            known_names = unknown.get((envelope.model, envelope.lora)) if envelope.lora else None
            if known_names is not None:
                message = (
                    f"lora: expected an adapter of {envelope.model} ({known_names}), seen {envelope.lora!r}"
                )
                self._endings.doom(envelope, OutcomeKind.REJECTED, Reason.UNKNOWN_MODEL, message)
