"""Engine profiles by name. `docs/simulation.md` shows how each number came about and what it leaves out."""

from __future__ import annotations

from collections.abc import Mapping

from dispatcher.simulation.profile import Profile

_MEASURED = (
    "fitted to SemiAnalysis InferenceX's per-request measurements of vLLM, DeepSeek-R1 FP4 on B200, by "
    "tests/bench/calibration.py; seconds per prefill token from 74 GFLOP a token at 30 % of peak"
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
        request_s=0.340,
        fixed_s=6.80e-3,
        prefill_token_s=3.4e-6,
        attention_s=3.7e-10,
        decode_sequence_s=7.14e-4,
        decode_context_s=8.8e-9,
        block_tokens=64,
        kv_blocks=12_000,
    ),
    Profile(
        name="b200-deepseek-r1-tp4",
        source=_MEASURED,
        request_s=0.390,
        fixed_s=6.63e-3,
        prefill_token_s=6.9e-6,
        attention_s=5.8e-10,
        decode_sequence_s=1.20e-3,
        decode_context_s=1.26e-8,
        block_tokens=64,
        kv_blocks=5_000,
    ),
    Profile(
        name="h100-llama-8b",
        source=_ROOFLINE,
        fixed_s=4.8e-3,
        prefill_token_s=3.2e-5,
        attention_s=5.3e-10,
        decode_sequence_s=2e-5,
        decode_context_s=3.9e-8,
        kv_blocks=26_700,
    ),
    Profile(
        name="l4-llama-8b",
        source=_ROOFLINE,
        fixed_s=5.3e-2,
        prefill_token_s=2.6e-4,
        attention_s=4.3e-9,
        decode_sequence_s=2e-5,
        decode_context_s=4.4e-7,
        max_batched_tokens=2_048,
        kv_blocks=2_670,
    ),
)
PROFILES: Mapping[str, Profile] = {profile.name: profile for profile in _ALL}
