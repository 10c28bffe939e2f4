"""Profiles: each says where its numbers come from, and those numbers follow from what it says."""

from __future__ import annotations

from pathlib import Path

import pytest

import dispatcher
from dispatcher.simulation.profile import Profile
from dispatcher.simulation.profiles import PROFILES

ROOT = Path(dispatcher.__file__).parents[1]
DOC = (ROOT / "dispatcher" / "docs" / "simulation.md").read_text()

LAYERS, HIDDEN, KV_HIDDEN, INNER, VOCABULARY = 32, 4_096, 1_024, 14_336, 128_256
"""Llama-3.1-8B, from its config.json; bf16."""
LAYER_WEIGHTS = LAYERS * (2 * HIDDEN * HIDDEN + 2 * HIDDEN * KV_HIDDEN + 3 * HIDDEN * INNER)
HEAD_WEIGHTS = HIDDEN * VOCABULARY
KV_TOKEN_BYTES = 2 * LAYERS * KV_HIDDEN * 2
ROOFLINES = {
    "h100-llama-8b": (989e12, 3.35e12, 80e9),
    "h20-llama-8b": (148e12, 4.0e12, 96e9),
    "l4-llama-8b": (121e12, 300e9, 24e9),
}
"""Dense bf16 FLOP/s, memory bytes/s, memory bytes."""
MEASURED = {"b200-deepseek-r1-tp8": 108.18, "b200-deepseek-r1-tp4": 62.24}
"""GiB for the KV cache on each GPU, as vLLM logged it."""
LATENT_TOKEN_BYTES = 61 * (512 + 64)
"""DeepSeek-R1's layers, and what each keeps of a token, one byte (fp8) a value; every GPU keeps all of it."""


def test_every_profile_is_made_up_measured_or_derived() -> None:
    assert set(PROFILES) == {"test"} | set(MEASURED) | set(ROOFLINES)
    assert all(profile.name == name for name, profile in PROFILES.items())


@pytest.mark.parametrize("profile", PROFILES.values(), ids=PROFILES)
def test_a_profile_has_a_source_and_the_document_has_its_numbers(profile: Profile) -> None:
    assert profile.source
    assert f"`{profile.name}`" in DOC
    assert f"{profile.kv_blocks:,}" in DOC
    for words in profile.source.replace("(", " ").replace(")", " ").replace(",", " ").split():
        if words.endswith((".py", ".md")):
            assert any((root / words.strip(";")).exists() for root in (ROOT, ROOT / "dispatcher"))


@pytest.mark.parametrize("name", ROOFLINES)
def test_a_roofline_follows_from_the_hardware(name: str) -> None:
    peak, bandwidth, memory = ROOFLINES[name]
    profile = PROFILES[name]
    reached = peak / 2
    assert profile.kv_token_bytes == KV_TOKEN_BYTES

    def near(value: float) -> object:
        return pytest.approx(value, rel=0.02)

    assert profile.fixed_s == near(2 * (LAYER_WEIGHTS + HEAD_WEIGHTS) / bandwidth)
    assert profile.prefill_token_s == near(2 * LAYER_WEIGHTS / reached)
    # `pairs` counts each pair of tokens twice; a pair costs 4 FLOP for each hidden value of each layer.
    assert profile.attention_s == near(2 * LAYERS * HIDDEN / reached)
    assert profile.decode_sequence_s == near(2 * (LAYER_WEIGHTS + HEAD_WEIGHTS) / reached)
    assert profile.decode_context_s == near(KV_TOKEN_BYTES / bandwidth)
    assert profile.prefill_context_s == profile.decode_context_s
    room = 0.9 * memory - 2 * (LAYER_WEIGHTS + 2 * HEAD_WEIGHTS) - 1e9
    assert profile.kv_tokens == near(room / KV_TOKEN_BYTES)


@pytest.mark.parametrize("name", MEASURED)
def test_measured_engines_hold_what_they_logged(name: str) -> None:
    assert PROFILES[name].kv_tokens == pytest.approx(MEASURED[name] * 2**30 / LATENT_TOKEN_BYTES, rel=1e-3)


def test_twice_the_gpus_take_half_the_time_for_prompts() -> None:
    eight, four = PROFILES["b200-deepseek-r1-tp8"], PROFILES["b200-deepseek-r1-tp4"]
    for prompt, before in ((8_192, 0), (8_192, 100_000), (1_500, 100_000)):
        pairs = prompt * (prompt + 2 * before)
        ratio = four.step_s(prompt, pairs, before, 0, 0) / eight.step_s(prompt, pairs, before, 0, 0)
        assert 1.3 < ratio < 2.1


@pytest.mark.parametrize("profile", PROFILES.values(), ids=PROFILES)
def test_decoding_together_is_cheaper_than_one_after_the_other(profile: Profile) -> None:
    alone = profile.step_s(0, 0, 0, 1, 1_000)
    together = profile.step_s(0, 0, 0, 16, 16_000)
    assert alone <= together < 16 * alone


@pytest.mark.parametrize("name", MEASURED)
def test_a_measured_profile_hands_over_what_its_cache_holds(name: str) -> None:
    assert PROFILES[name].kv_token_bytes == LATENT_TOKEN_BYTES
    assert f"{LATENT_TOKEN_BYTES:,}" in DOC
