"""What a node says of itself: identity at registration, load in reports, and the control it receives.

A report is written to the node's hash and appended to the pool's `reports` stream, which the
leader and its standbys follow. `sequence` orders reports of one incarnation.
"""

from __future__ import annotations

from enum import StrEnum

from msgspec import Struct

from dispatcher.protocol.request import FIRST_VERSION


class Role(StrEnum):
    """What a node does with a request."""

    FUSED = "fused"
    PREFILL = "prefill"
    DECODE = "decode"
    VIT = "vit"


class Medium(StrEnum):
    """Where an engine keeps a block of its KV cache, nearest first."""

    GPU = "GPU"
    CPU = "CPU"
    DISK = "DISK"
    EXTERNAL = "EXTERNAL"


class NodeIdentity(Struct, frozen=True, kw_only=True, omit_defaults=True):
    """What does not change while an incarnation lives.

    `routing_block_size` is that of the block events it sends, in tokens; 0 when it sends none.
    """

    node: str
    incarnation: str
    models: tuple[str, ...]
    role: Role = Role.FUSED
    group: str = ""
    loras: tuple[str, ...] = ()
    max_running: int = 32
    max_model_len: int = 131_072
    kv_total_tokens: int = 0
    engine_block_size: int = 0
    routing_block_size: int = 0
    engine_url: str = ""
    engine_version: str = ""
    v: int = FIRST_VERSION


class NodeReport(Struct, frozen=True, kw_only=True, omit_defaults=True):
    """The load of a node now. Tokens count prompt and requested output of what it holds.

    `seen_seq` is the highest assignment number it has claimed: the report covers exactly those.
    `queued_uncached_tokens` are the prompt tokens still to be computed before their first token, by the
    leader's own prediction of what was cached. `running` is what the agent has in hand;
    `engine_running`, `engine_waiting` and the KV figures are the engine's own, 0 where it tells none.
    `cache_sequence` is the number of its last block event; `cache_partial` says that some blocks of its
    engine can't be told (their beginnings are unknown), so that it holds more than its view shows.
    `left` says goodbye: this incarnation will claim nothing more and holds nothing.
    """

    node: str
    incarnation: str
    sequence: int
    running: int = 0
    waiting: int = 0
    held_tokens: int = 0
    queued_uncached_tokens: int = 0
    kv_used_tokens: int = 0
    kv_total_tokens: int = 0
    prefill_tokens_per_s: float = 0.0
    gpu_utilisation: float = 0.0
    gpu_memory_used: float = 0.0
    seen_seq: int = 0
    engine_running: int = 0
    engine_waiting: int = 0
    cache_sequence: int = 0
    cache_blocks: int = 0
    cache_partial: bool = False
    draining: bool = False
    engine_ok: bool = True
    left: bool = False
    v: int = FIRST_VERSION


class Wish(StrEnum):
    """What an operator wishes of a node, until it is taken back: it outlives incarnations and leaders."""

    CORDON = "cordon"
    DRAIN = "drain"


class ControlKind(StrEnum):
    """What a leader asks of an agent on its control stream."""

    CANCEL = "cancel"
    FENCE = "fence"
    DRAIN = "drain"


class BlockEventKind(StrEnum):
    """What happened to routing blocks at a node."""

    STORED = "stored"
    REMOVED = "removed"
    RESET = "reset"


class BlockEvent(Struct, frozen=True, kw_only=True, omit_defaults=True):
    """A diff of a node's cache view, in routing blocks; gaps in `sequence` force a rebuild.

    `hashes` are 16 hex digits each, as in requests. `medium` is the tier that holds them. A reset
    empties every tier, and may have any higher sequence.
    """

    node: str
    incarnation: str
    sequence: int
    kind: BlockEventKind
    medium: str = Medium.GPU.value
    hashes: tuple[str, ...] = ()
    v: int = FIRST_VERSION
