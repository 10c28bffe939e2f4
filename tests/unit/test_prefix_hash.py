"""The routing-block hash, against an implementation written from `protocol.md`'s words alone.

`prefix_hash_vectors.json` is for implementers in other languages; here the file, the words and the code
are held together. The independent implementation shares nothing with `dispatcher.protocol.prefix_hash`.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

import dispatcher
from dispatcher.protocol import prefix_hash

VECTORS = json.loads(
    (Path(dispatcher.__file__).parent / "docs" / "prefix_hash_vectors.json").read_text(encoding="utf-8")
)["vectors"]
TOKEN = st.integers(min_value=0, max_value=2**32 - 1)


def little_endian(number: int) -> bytes:
    """Four bytes, the lowest first."""
    return bytes([number & 255, number >> 8 & 255, number >> 16 & 255, number >> 24 & 255])


def by_the_words(
    token_ids: list[int], *, model: str, block_size: int, lora: str = "", cache_salt: str = ""
) -> tuple[str, list[str]]:
    """(seed, hashes) as the protocol document says, word by word."""
    seed_input = b"flexlb-prefix-v1" + little_endian(block_size)
    for text in (model, lora, cache_salt):
        utf8 = text.encode("utf-8")
        seed_input += little_endian(len(utf8)) + utf8
    link = hashlib.sha256(seed_input).digest()[0:8]
    seed = link.hex()
    hashes = []
    for block in range(len(token_ids) // block_size):
        data = link
        for token in token_ids[block * block_size : (block + 1) * block_size]:
            data += little_endian(token)
        link = hashlib.sha256(data).digest()[0:8]
        hashes.append(link.hex())
    return seed, hashes


def tokens_of(vector: dict[str, Any]) -> list[int]:
    """The token ids of a vector: a list, or `first + i * step` modulo 2**32 for i below `count`."""
    tokens = vector["token_ids"]
    if isinstance(tokens, list):
        return tokens
    return [(tokens["first"] + i * tokens["step"]) % 2**32 for i in range(tokens["count"])]


def salts_of(vector: dict[str, Any]) -> dict[str, Any]:
    """The other inputs of a vector."""
    return {name: vector[name] for name in ("model", "block_size", "lora", "cache_salt")}


@pytest.mark.parametrize("vector", VECTORS, ids=lambda vector: vector["name"])
def test_vectors_are_what_the_document_says(vector: dict[str, Any]) -> None:
    assert by_the_words(tokens_of(vector), **salts_of(vector)) == (vector["seed"], vector["hashes"])


@pytest.mark.parametrize("vector", VECTORS, ids=lambda vector: vector["name"])
def test_code_agrees_with_the_vectors(vector: dict[str, Any]) -> None:
    salts = salts_of(vector)
    assert prefix_hash.seed(**salts).hex() == vector["seed"]
    assert list(prefix_hash.block_hashes(tokens_of(vector), **salts)) == vector["hashes"]


def test_vectors_cover_the_cases_that_implementations_get_wrong() -> None:
    by_name = {vector["name"]: vector for vector in VECTORS}
    assert by_name["empty"]["hashes"] == []
    assert by_name["partial_block_only"]["hashes"] == []
    assert len(by_name["full_and_partial_block"]["hashes"]) == 1
    assert by_name["block_size_1"]["block_size"] == 1
    assert not by_name["unicode"]["model"].isascii()
    assert 2**32 - 1 in by_name["largest_token_id"]["token_ids"]
    assert len({vector["seed"] for vector in VECTORS if vector["name"].startswith("salt_")}) == 4


def test_defaults_are_empty_salts_and_blocks_of_256() -> None:
    tokens = list(range(600))
    given_in_full = prefix_hash.block_hashes(tokens, model="m", block_size=256, lora="", cache_salt="")
    assert prefix_hash.block_hashes(tokens, model="m") == given_in_full


@given(
    tokens=st.lists(TOKEN, max_size=40),
    block_size=st.integers(min_value=1, max_value=9),
    model=st.text(max_size=8),
    lora=st.text(max_size=8),
    salt=st.text(max_size=8),
)
def test_any_input_hashes_as_the_document_says(
    tokens: list[int], block_size: int, model: str, lora: str, salt: str
) -> None:
    hashes = prefix_hash.block_hashes(tokens, model=model, block_size=block_size, lora=lora, cache_salt=salt)
    _, expected = by_the_words(tokens, model=model, block_size=block_size, lora=lora, cache_salt=salt)
    assert list(hashes) == expected


@given(
    prefix=st.lists(TOKEN, max_size=24),
    left=st.lists(TOKEN, max_size=12),
    right=st.lists(TOKEN, max_size=12),
    block_size=st.integers(min_value=1, max_value=6),
)
def test_equal_prefixes_share_exactly_their_full_blocks(
    prefix: list[int], left: list[int], right: list[int], block_size: int
) -> None:
    one, other = prefix + left, prefix + right
    alike = 0
    while alike < min(len(one), len(other)) and one[alike] == other[alike]:
        alike += 1
    hashes = prefix_hash.block_hashes(one, model="m", block_size=block_size)
    others = prefix_hash.block_hashes(other, model="m", block_size=block_size)
    shared = alike // block_size
    assert hashes[:shared] == others[:shared]
    assert not set(hashes[shared:]) & set(others[shared:])


def test_lengths_keep_neighbouring_salts_apart() -> None:
    seeds = {
        prefix_hash.seed(model=model, lora=lora, cache_salt=salt)
        for model, lora, salt in (
            ("ab", "", ""),
            ("a", "b", ""),
            ("a", "", "b"),
            ("", "ab", ""),
            ("", "a", "b"),
        )
    }
    assert len(seeds) == 5


def test_a_block_of_no_tokens_is_refused() -> None:
    with pytest.raises(ValueError, match="block_size: expected at least 1"):
        prefix_hash.block_hashes([1, 2, 3], model="m", block_size=0)


@pytest.mark.parametrize("token", [-1, 2**32])
def test_a_token_id_that_does_not_fit_32_bits_is_refused(token: int) -> None:
    with pytest.raises(OverflowError):
        prefix_hash.block_hashes([token], model="m", block_size=1)
