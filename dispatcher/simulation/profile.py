"""How fast an engine is and how much it holds: the numbers of one GPU and model.

A step computes prompt tokens in chunks and one token for each decoding sequence. It lasts

    fixed + prefill_token * p + attention * pairs + prefill_context * r
          + decode_sequence * b + decode_context * c

seconds, for p prompt tokens whose chunks see `pairs` = sum of u*(u + 2*before) (twice the token pairs of
causal attention) and read back `r` = sum of before, the keys and values of what came before each chunk;
b decoding sequences and their c tokens of context together.
"""

from __future__ import annotations

from dataclasses import dataclass, replace


@dataclass(frozen=True, kw_only=True)
class Profile:
    """One engine. Times are seconds; `source` says where the numbers come from.

    `max_batched_tokens` is the token budget of a step (vLLM's `max_num_batched_tokens`), `max_running` the
    most sequences in it (`max_num_seqs`); the KV cache holds `kv_blocks` blocks of `block_tokens`. A request
    reaches the scheduler `request_s` after it was sent: HTTP, chat template and tokeniser, no GPU time. A
    token's keys and values are `kv_token_bytes`, which count where engines hand them over.
    """

    name: str
    source: str
    fixed_s: float
    prefill_token_s: float
    attention_s: float = 0.0
    prefill_context_s: float = 0.0
    decode_sequence_s: float = 0.0
    decode_context_s: float = 0.0
    request_s: float = 0.0
    max_batched_tokens: int = 8_192
    max_running: int = 256
    block_tokens: int = 16
    kv_blocks: int = 16_384
    kv_token_bytes: int = 131_072

    def __post_init__(self) -> None:
        for name in (
            "fixed_s",
            "prefill_token_s",
            "attention_s",
            "prefill_context_s",
            "decode_sequence_s",
            "decode_context_s",
            "request_s",
        ):
            if not 0 <= getattr(self, name) < 3600:
                raise ValueError(f"{name}: expected seconds from 0, seen {getattr(self, name)}")
        for name in ("max_batched_tokens", "max_running", "block_tokens", "kv_blocks", "kv_token_bytes"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}: expected 1 or more, seen {getattr(self, name)}")

    @property
    def kv_tokens(self) -> int:
        """Tokens that the KV cache holds."""
        return self.kv_blocks * self.block_tokens

    def at_speed(self, factor: float) -> Profile:
        """The same engine on hardware of `factor` times its speed."""
        if factor == 1:
            return self
        return replace(
            self,
            fixed_s=self.fixed_s / factor,
            prefill_token_s=self.prefill_token_s / factor,
            attention_s=self.attention_s / factor,
            prefill_context_s=self.prefill_context_s / factor,
            decode_sequence_s=self.decode_sequence_s / factor,
            decode_context_s=self.decode_context_s / factor,
        )

    def step_s(
        self, prefill_tokens: int, pairs: int, prefill_context: int, decoding: int, decode_context: int
    ) -> float:
        """Seconds that a step takes."""
        return (
            self.fixed_s
            + self.prefill_token_s * prefill_tokens
            + self.attention_s * pairs
            + self.prefill_context_s * prefill_context
            + self.decode_sequence_s * decoding
            + self.decode_context_s * decode_context
        )
