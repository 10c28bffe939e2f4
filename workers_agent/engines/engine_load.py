"""What an engine's `/metrics` says of its load: vLLM, SGLang, llama.cpp and the simulator.

Only the few lines that are needed are read. Names changed over releases; what is not told stays 0.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

_LINE = re.compile(rb"^([a-zA-Z_:][a-zA-Z0-9_:]*)(\{[^\n]*\})?[ \t]+([^\s]+)", re.MULTILINE)
_LABEL = re.compile(rb'([a-zA-Z_][a-zA-Z0-9_]*)="((?:[^"\\]|\\.)*)"')

_RUNNING = (b"vllm:num_requests_running", b"sglang:num_running_reqs", b"llamacpp:requests_processing")
_WAITING = (b"vllm:num_requests_waiting", b"sglang:num_queue_reqs", b"llamacpp:requests_deferred")
_KV_SHARE = (
    b"vllm:kv_cache_usage_perc",
    b"vllm:gpu_cache_usage_perc",
    b"sglang:token_usage",
    b"llamacpp:kv_cache_usage_ratio",
)
_KV_TOKENS = (b"sglang:max_total_num_tokens", b"llamacpp:kv_cache_tokens")
_PROGRESS = (
    b"vllm:generation_tokens_total",
    b"vllm:prompt_tokens_total",
    b"sglang:generation_tokens_total",
    b"sglang:prompt_tokens_total",
    b"llamacpp:tokens_predicted_total",
    b"llamacpp:prompt_tokens_total",
)
_CONFIG = b"vllm:cache_config_info"


@dataclass(frozen=True, kw_only=True)
class EngineLoad:
    """The engine's own figures; 0 where it tells none. `progress` rises while it works."""

    running: int = 0
    waiting: int = 0
    kv_share: float = 0.0
    kv_total_tokens: int = 0
    block_size: int = 0
    progress: float = 0.0
    is_known: bool = False

    @property
    def kv_used_tokens(self) -> int:
        """Tokens of the KV cache in use."""
        return round(self.kv_share * self.kv_total_tokens)


def parse_load(page: bytes) -> EngineLoad:
    """Read a page of Prometheus text; figures of several engines behind one address are added up."""
    sums: dict[bytes, float] = {}
    counts: dict[bytes, int] = {}
    block_size = blocks = 0
    for name, labels, text in _LINE.findall(page):
        if name == _CONFIG:
            found = dict(_LABEL.findall(labels))
            block_size = _number(found.get(b"block_size", b"")) or block_size
            blocks += _number(found.get(b"num_gpu_blocks", b""))
            continue
        try:
            value = float(text)
        except ValueError:
            continue
        if value == value:
            sums[name] = sums.get(name, 0.0) + value
            counts[name] = counts.get(name, 0) + 1

    def first(names: tuple[bytes, ...]) -> float:
        return next((sums[name] for name in names if name in sums), 0.0)

    share = next((sums[name] / counts[name] for name in _KV_SHARE if name in sums), 0.0)
    return EngineLoad(
        running=int(first(_RUNNING)),
        waiting=int(first(_WAITING)),
        kv_share=min(1.0, max(0.0, share)),
        kv_total_tokens=block_size * blocks or int(first(_KV_TOKENS)),
        block_size=block_size,
        progress=sum(sums.get(name, 0.0) for name in _PROGRESS),
        is_known=any(name in sums for name in _RUNNING),
    )


def _number(text: bytes) -> int:
    return int(text) if text.isdigit() else 0
