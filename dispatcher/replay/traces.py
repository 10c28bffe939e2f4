"""Readers of recorded workloads: each known file format becomes the same `TraceRequest`.

The format is told by content, not by name, and so is gzip. A line that can't be read stops the
reading with its number: a trace that is only partly replayed would report on another workload.
"""

from __future__ import annotations

import gzip
import io
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from datetime import datetime
from importlib import resources
from pathlib import Path
from typing import Annotated, BinaryIO

import msgspec
from msgspec import Meta, Struct

from dispatcher.errors import SettingsError
from dispatcher.protocol.request import DEFAULT_PRIORITY

EXCERPT = "mooncake_conversation_2000.jsonl.gz"
"""The excerpt that comes with the package; its source and licence are beside it in `data/NOTICE`."""
GZIP_MAGIC = b"\x1f\x8b"
MOONCAKE_BLOCK_TOKENS = 512
RTP_LLM_BLOCK_TOKENS = 1024
AZURE_HEADER = "TIMESTAMP,ContextTokens,GeneratedTokens"

Tokens = Annotated[int, Meta(ge=0, le=100_000_000)]


@dataclass(frozen=True, kw_only=True, slots=True)
class TraceRequest:
    """One recorded request.

    `block_ids` name the prompt's blocks of `block_tokens` each, from its start: equal ids are equal
    tokens. What they do not cover is shared with nobody. `arrival_s` counts from the trace's start,
    `deadline_s` from its arrival.
    """

    arrival_s: float
    prompt_tokens: int
    output_tokens: int
    block_ids: tuple[int, ...] = ()
    block_tokens: int = 0
    session: str = ""
    priority: int = DEFAULT_PRIORITY
    deadline_s: float | None = None
    tenant: str = ""


class _Recorded(Struct, omit_defaults=True):
    """A line of our own format: what `flexlb simulate --from-topic --save` writes."""

    at_ms: Annotated[float, Meta(ge=0)]
    prompt_tokens: Tokens
    output_tokens: Tokens
    block_tokens: Annotated[int, Meta(ge=0, le=65_536)] = 0
    blocks: tuple[int, ...] = ()
    priority: Annotated[int, Meta(ge=1, le=100)] = DEFAULT_PRIORITY
    deadline_ms: Annotated[int, Meta(ge=1)] | None = None
    tenant: str = ""


class _Mooncake(Struct):
    timestamp: Annotated[float, Meta(ge=0)]
    input_length: Tokens
    output_length: Tokens
    hash_ids: tuple[int, ...]


class _RtpLlm(Struct):
    ts: Annotated[float, Meta(ge=0)]
    il: Tokens
    ol: Tokens
    bh: tuple[str | int, ...]


_recorded = msgspec.json.Decoder(_Recorded)
_mooncake = msgspec.json.Decoder(_Mooncake)
_rtp_llm = msgspec.json.Decoder(_RtpLlm)


def read_trace(path: str | Path) -> list[TraceRequest]:
    """Read a whole trace, in order of arrival.

    Raises:
        SettingsError: it can't be opened, is of no known format, is empty, or a line is wrong.
    """
    try:
        with Path(path).open("rb") as file:
            return parse_trace(file, str(path))
    except OSError as error:
        raise SettingsError(f"trace {path}: {error.strerror or error}") from None


def read_excerpt() -> list[TraceRequest]:
    """Read the excerpt that comes with the package: the first 2,000 requests of a chat workload."""
    with resources.files("dispatcher.replay").joinpath("data", EXCERPT).open("rb") as file:
        return parse_trace(io.BytesIO(file.read()), EXCERPT)


def parse_trace(file: BinaryIO, name: str) -> list[TraceRequest]:
    """Read an open trace; `name` is what errors call it. Raises as `read_trace` does."""
    is_gzip = file.read(2) == GZIP_MAGIC
    file.seek(0)
    stream: BinaryIO = gzip.GzipFile(fileobj=file) if is_gzip else file  # type: ignore[assignment]
    try:
        requests = list(_parse(enumerate(stream, start=1), name))
    except (OSError, EOFError) as error:
        raise SettingsError(f"trace {name}: broken gzip data ({error}); fetch the file again") from None
    if not requests:
        raise SettingsError(f"trace {name}: expected requests, seen none")
    first_s = min(request.arrival_s for request in requests)
    requests = [_shifted(request, first_s) for request in requests] if first_s else requests
    return sorted(requests, key=lambda request: request.arrival_s)


def _parse(lines: Iterable[tuple[int, bytes]], name: str) -> Iterator[TraceRequest]:
    parse: Callable[[str], TraceRequest] | None = None
    for number, raw in lines:
        try:
            line = raw.decode("utf-8-sig" if number == 1 else "utf-8").strip()
            if not line:
                continue
            if parse is None:
                parse = _format_of(line, f"trace {name} line {number}")
                if parse is _azure_row:
                    continue
            yield parse(line)
        except (ValueError, msgspec.DecodeError, RecursionError, OverflowError) as error:
            raise SettingsError(
                f"trace {name} line {number}: {error}; expected a line of the format "
                f"{SHAPES.get(parse, 'it began with')}"
            ) from None


def _format_of(line: str, where: str) -> Callable[[str], TraceRequest]:
    if line.replace(" ", "") == AZURE_HEADER:
        return _azure_row
    try:
        fields = msgspec.json.decode(line, type=dict[str, msgspec.Raw]).keys()
    except (msgspec.DecodeError, RecursionError):
        fields = {}.keys()
    if {"at_ms", "prompt_tokens", "output_tokens"} <= fields:
        return _recorded_line
    if {"timestamp", "input_length", "hash_ids"} <= fields:
        return _mooncake_line
    if {"ts", "il", "bh"} <= fields:
        return _rtp_llm_line
    raise SettingsError(
        f"{where}: expected {' or '.join(SHAPES.values())}, plain or gzip-compressed; seen {line[:80]!r}"
    )


def _recorded_line(line: str) -> TraceRequest:
    row = _recorded.decode(line)
    return TraceRequest(
        arrival_s=row.at_ms / 1000,
        prompt_tokens=row.prompt_tokens,
        output_tokens=row.output_tokens,
        block_ids=row.blocks,
        block_tokens=row.block_tokens,
        priority=row.priority,
        deadline_s=row.deadline_ms / 1000 if row.deadline_ms is not None else None,
        tenant=row.tenant,
    )


def _mooncake_line(line: str) -> TraceRequest:
    row = _mooncake.decode(line)
    return TraceRequest(
        arrival_s=row.timestamp / 1000,
        prompt_tokens=row.input_length,
        output_tokens=row.output_length,
        block_ids=row.hash_ids,
        block_tokens=MOONCAKE_BLOCK_TOKENS,
    )


def _rtp_llm_line(line: str) -> TraceRequest:
    row = _rtp_llm.decode(line)
    return TraceRequest(
        arrival_s=row.ts / 1000,
        prompt_tokens=row.il,
        output_tokens=row.ol,
        block_ids=tuple(int(one) for one in row.bh),
        block_tokens=RTP_LLM_BLOCK_TOKENS,
    )


def _azure_row(line: str) -> TraceRequest:
    cells = line.split(",")
    if len(cells) != 3:
        raise ValueError(f"expected 3 cells ({AZURE_HEADER}), seen {len(cells)}")
    prompt_tokens, output_tokens = int(cells[1]), int(cells[2])
    if prompt_tokens < 0 or output_tokens < 0:
        raise ValueError(f"expected token counts from 0, seen {cells[1]} and {cells[2]}")
    return TraceRequest(
        arrival_s=_epoch_s(cells[0]), prompt_tokens=prompt_tokens, output_tokens=output_tokens
    )


def _epoch_s(text: str) -> float:
    """Read `2023-11-16 18:15:46.6805900`, whose fraction may have more digits than Python reads."""
    whole, _, fraction = text.strip().partition(".")
    moment = datetime.fromisoformat(whole + "+00:00").timestamp()
    return moment + (float(f"0.{fraction}") if fraction else 0.0)


SHAPES: dict[Callable[[str], TraceRequest] | None, str] = {
    _mooncake_line: 'Mooncake (JSON lines with "timestamp", "input_length", "output_length", "hash_ids")',
    _rtp_llm_line: 'RTP-LLM (JSON lines with "ts", "il", "ol", "bh")',
    _recorded_line: 'FlexLB (JSON lines with "at_ms", "prompt_tokens", "output_tokens")',
    _azure_row: f"Azure (CSV with the header {AZURE_HEADER})",
}


def _shifted(request: TraceRequest, by_s: float) -> TraceRequest:
    return replace(request, arrival_s=request.arrival_s - by_s)


def write_trace(path: str | Path, requests: Iterable[TraceRequest]) -> None:
    """Write a trace in our own format, gzip-compressed when its name ends so; `read_trace` reads it.

    Raises:
        SettingsError: it can't be written.
    """
    lines = [
        msgspec.json.encode(
            _Recorded(
                at_ms=round(1000 * one.arrival_s, 3),
                prompt_tokens=one.prompt_tokens,
                output_tokens=one.output_tokens,
                block_tokens=one.block_tokens if one.block_ids else 0,
                blocks=one.block_ids,
                priority=one.priority,
                deadline_ms=round(1000 * one.deadline_s) if one.deadline_s is not None else None,
                tenant=one.tenant,
            )
        )
        for one in requests
    ]
    data = b"\n".join(lines) + b"\n"
    try:
        Path(path).write_bytes(gzip.compress(data, mtime=0) if str(path).endswith(".gz") else data)
    except OSError as error:
        raise SettingsError(f"{path}: {error.strerror or error}; name a file that can be written") from None
