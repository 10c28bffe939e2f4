"""The text hash, against an implementation written from `protocol.md`'s words, and what it is for."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

import dispatcher
from dispatcher.protocol.text_hash import CHUNK_BYTES, MOST_CHUNKS, text_hashes

DOCUMENT = (Path(dispatcher.__file__).parent / "docs" / "protocol.md").read_text(encoding="utf-8")


def by_the_words(text: bytes, model: str, lora: str, cache_salt: str) -> list[str]:
    """Steps 2 and 3 of the protocol document."""
    seed_input = b"flexlb-text-v1"
    for one in (model, lora, cache_salt):
        utf8 = one.encode("utf-8")
        seed_input += len(utf8).to_bytes(4, "little") + utf8
    link = hashlib.sha256(seed_input).digest()[0:8]
    hashes = []
    for number in range(min(len(text) // 1024, 1024)):
        link = hashlib.sha256(link + text[number * 1024 : (number + 1) * 1024]).digest()[0:8]
        hashes.append(link.hex())
    return hashes


@given(st.text(min_size=0, max_size=5_000), st.text(max_size=5), st.text(max_size=5), st.text(max_size=5))
def test_hashes_are_what_the_document_says(prompt: str, model: str, lora: str, cache_salt: str) -> None:
    body = json.dumps({"max_tokens": 3, "prompt": prompt}).encode()
    expected = by_the_words(json.dumps(prompt).encode(), model, lora, cache_salt)
    assert list(text_hashes(body, model=model, lora=lora, cache_salt=cache_salt)) == expected


def test_the_documents_example_holds() -> None:
    (found,) = text_hashes(json.dumps({"prompt": "x" * 1022}).encode(), model="m")
    assert f"hash `{found}`" in DOCUMENT


def chat(*contents: str, **fields: Any) -> bytes:
    messages = [{"role": "user", "content": content} for content in contents]
    return json.dumps({**fields, "messages": messages}).encode()


def test_a_chat_that_grows_keeps_its_beginning_whatever_else_the_body_says() -> None:
    first = text_hashes(chat("a" * 5_000), model="m")
    second = text_hashes(chat("a" * 5_000, "b" * 5_000, temperature=0.3, max_tokens=9), model="m")
    assert len(first) == 4
    assert second[:4] == first
    assert len(second) == 9


@pytest.mark.parametrize(
    "other",
    [
        {"model": "n"},
        {"lora": "sql"},
        {"cache_salt": "blue"},
        {"lora": "a", "cache_salt": "b"},
        {"lora": "ab"},
    ],
)
def test_what_makes_caches_incomparable_makes_other_hashes(other: dict[str, str]) -> None:
    body = chat("a" * 2_000)
    told = {"model": "m", **other}
    assert not set(text_hashes(body, **told)) & set(text_hashes(body, model="m"))


def test_tools_come_first_since_templates_render_them_first() -> None:
    tools = [{"type": "function", "function": {"name": "f" * 2_000}}]
    with_tools = text_hashes(chat("a" * 2_000, tools=tools), model="m")
    same_tools = text_hashes(chat("z" * 2_000, tools=tools), model="m")
    assert with_tools[0] == same_tools[0]
    assert with_tools != same_tools


def test_their_number_is_bounded() -> None:
    assert len(text_hashes(chat("a" * (MOST_CHUNKS + 9) * CHUNK_BYTES), model="m")) == MOST_CHUNKS


@pytest.mark.parametrize(
    "body", [b"", b"{", b"[" * 2_000, b'{"prompt": 1}', b"\xff" * 2_000, b"[1]" + b" " * 2_000]
)
def test_what_is_no_body_has_none(body: bytes) -> None:
    assert text_hashes(body, model="m") == ()
