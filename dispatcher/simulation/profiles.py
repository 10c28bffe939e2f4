"""Engine profiles by name. `docs/simulation.md` shows how each number came about and what it leaves out."""

from __future__ import annotations

from collections.abc import Mapping

from dispatcher.simulation.profile import Profile

_MEASURED = (
    "fitted to SemiAnalysis InferenceX's per-request measurements of vLLM, DeepSeek-R1 FP4 on B200, by "
    "tests/bench/calibration.py; KV blocks as those engines logged them"
)
_ROOFLINE = "derived: FLOPs at half of the bf16 peak, bytes at the memory's bandwidth (docs/simulation.md)"

_ALL = (
    Profile(
        name="test",
        source="made up: 40,000 prompt tokens a second, 8 ms a step",
        fixed_s=0.008,
        prefill_token_s=2.5e-5,
        kv_blocks=4_096,
        max_running=32,
    ),
    Profile(
        name="b200-deepseek-r1-tp8",
        source=_MEASURED,
        request_s=0.092,
        fixed_s=7.3e-3,
        prefill_token_s=1.9e-5,
        attention_s=2.3e-11,
        prefill_context_s=3.9e-6,
        decode_sequence_s=5.1e-4,
        decode_context_s=4.6e-9,
        block_tokens=32,
        kv_blocks=103_310,
        kv_token_bytes=35_136,
    ),
    Profile(
        name="b200-deepseek-r1-tp4",
        source=_MEASURED,
        fixed_s=7.1e-3,
        prefill_token_s=2.5e-5,
        attention_s=7.0e-11,
        prefill_context_s=6.9e-6,
        decode_sequence_s=6.7e-4,
        decode_context_s=1.17e-8,
        block_tokens=32,
        kv_blocks=59_434,
        kv_token_bytes=35_136,
    ),
    Profile(
        name="h100-llama-8b",
        source=_ROOFLINE,
        fixed_s=4.5e-3,
        prefill_token_s=2.8e-5,
        attention_s=5.3e-10,
        prefill_context_s=3.9e-8,
        decode_sequence_s=3.0e-5,
        decode_context_s=3.9e-8,
        kv_blocks=26_200,
    ),
    Profile(
        name="h20-llama-8b",
        source=_ROOFLINE,
        fixed_s=3.75e-3,
        prefill_token_s=1.9e-4,
        attention_s=3.5e-9,
        prefill_context_s=3.3e-8,
        decode_sequence_s=2.0e-4,
        decode_context_s=3.3e-8,
        kv_blocks=33_100,
    ),
    Profile(
        name="l4-llama-8b",
        source=_ROOFLINE,
        fixed_s=5.0e-2,
        prefill_token_s=2.3e-4,
        attention_s=4.3e-9,
        prefill_context_s=4.4e-7,
        decode_sequence_s=2.5e-4,
        decode_context_s=4.4e-7,
        max_batched_tokens=2_048,
        kv_blocks=2_160,
    ),
)
PROFILES: Mapping[str, Profile] = {profile.name: profile for profile in _ALL}
