"""What passes from the node that computes a prompt to the node that generates the answer.

A request in a pool with prefill and decode nodes is run in two stages, each an attempt of its own. The first
ends with a hand-off instead of an outcome; the second goes on from the keys and values that it names.
"""

from __future__ import annotations

from enum import StrEnum

import msgspec
from msgspec import Struct

from dispatcher.protocol.request import FIRST_VERSION

KV_LEASE_MS = 20_000
"""How long a hand-off is good for: an engine keeps the blocks for 30 s (vLLM's `kv_lease_duration`), and the
pull must have begun by then."""
NO_PARAMETERS = msgspec.Raw(b"null")


class Stage(StrEnum):
    """What an attempt does of its request."""

    WHOLE = ""
    PREFILL = "prefill"
    DECODE = "decode"


def stage_of(text: str) -> Stage:
    """A stage by its text; what no release of ours wrote is the whole."""
    return Stage(text) if text in Stage.__members__.values() else Stage.WHOLE


class Handoff(Struct, frozen=True, kw_only=True, omit_defaults=True):
    """How a prefill stage ended: tokens, and epoch milliseconds by Redis's clock.

    `kv_transfer_params` are the engine's, kept verbatim: `null` when the request can't be split (several
    choices, an answer that goes on from earlier tokens), so that the decode node computes its prompt itself.
    """

    node: str
    kv_transfer_params: msgspec.Raw = NO_PARAMETERS
    expires_ms: int = 0
    prompt_tokens: int = 0
    cached_tokens: int = 0
    predicted_cached_tokens: int = 0
    prefill_us: int = 0
    prefilled_ms: int = 0
    v: int = FIRST_VERSION

    @property
    def has_blocks(self) -> bool:
        """Whether there is something to pull."""
        return bytes(self.kv_transfer_params) != bytes(NO_PARAMETERS)
