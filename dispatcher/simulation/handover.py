"""Prompts on their way from a prefill engine to a decode engine: who holds them, how long they travel.

As vLLM's NIXL connector has it: a prefill engine keeps a prompt's keys and values until a decode engine has
read them, or until a lease ends before the request has reached one (from then on heartbeats extend it). Every
engine has one link, which carries one transfer at a time, in the order in which they were asked for.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

HOP_S = 0.002
"""From asking for a prompt to its first byte, and from its last one to the scheduler: assumed, a handshake
and a notification between two machines. Holds no link."""
LINK_BYTES_PER_S = 40e9
"""NIXL over one 400 Gbit/s InfiniBand port (NVIDIA ConnectX-7: 50 GB/s), four fifths of it assumed."""
LEASE_S = 30.0
"""vLLM's `kv_lease_duration`."""


@dataclass(kw_only=True)
class _Prompt:
    """Held by `source`; `is_claimed` once its request has reached a decode engine."""

    source: int
    since_s: float
    is_claimed: bool = False


class Handover:
    """The prompts that prefill engines hold, and every engine's link.

    Args:
        token_bytes: of one token's keys and values.
    """

    def __init__(self, engines: int, token_bytes: int) -> None:
        self._byte_s = 1.0 / LINK_BYTES_PER_S
        self._token_bytes = token_bytes
        self._free_s = [0.0] * engines
        self._prompts: dict[int, _Prompt] = {}

    def __len__(self) -> int:
        return len(self._prompts)

    @property
    def free_s(self) -> Sequence[float]:
        """When each engine's link is free of what was asked for so far."""
        return self._free_s

    def hold(self, number: int, source: int, now_s: float) -> None:
        """A prefill engine has computed a prompt."""
        self._prompts[number] = _Prompt(source=source, since_s=now_s)

    def claim(self, number: int) -> bool:
        """The request has reached a decode engine; whether its prompt is still held for it."""
        prompt = self._prompts.get(number)
        if prompt is None:
            return False
        prompt.is_claimed = True
        return True

    def expire(self, number: int, since_s: float) -> int | None:
        """The lease of then ends: the engine to free the prompt, None when it was claimed or given up."""
        prompt = self._prompts.get(number)
        if prompt is None or prompt.is_claimed or prompt.since_s != since_s:
            return None
        del self._prompts[number]
        return prompt.source

    def read(self, number: int, target: int, tokens: int, now_s: float) -> float:
        """A decode engine asks for so many of a prompt's tokens; when they are there."""
        source = self._prompts[number].source
        free_s = self._free_s
        begun_s = max(now_s, free_s[source], free_s[target])
        ended_s = begun_s + tokens * self._token_bytes * self._byte_s
        free_s[source] = free_s[target] = ended_s
        return ended_s + HOP_S

    def give_up(self, number: int) -> int | None:
        """The prompt was read, or nobody comes for it: the engine to free it, None when none holds it."""
        prompt = self._prompts.pop(number, None)
        return prompt.source if prompt is not None else None
