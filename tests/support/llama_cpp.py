"""llama.cpp's own HTTP server on a tiny random model: an engine that we did not write.

The wheel `xllamacpp` carries the server; run as a program, this file serves a model with it in a process of
its own. The model is written on the spot by `write_model`: greedy answers are words, the same on every run,
and never end by themselves.
"""

from __future__ import annotations

import sys
import threading
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import aiohttp
import gguf
import numpy as np

from dispatcher.local.processes import HOST, ReservedPort, ServerProcess

MODEL = "tiny"
SLOTS = 4
SLOT_TOKENS = 65_536
"""The longest prompt and answer: above 15 s of generation, time enough to interfere."""
WIDTH, LAYERS, HEADS, KV_HEADS = 128, 2, 4, 1
WORDS = [
    head + tail
    for head in ("ba", "ce", "di", "fo", "gu", "ka", "le", "mi", "no", "pu")
    for tail in ("na", "re", "si", "to", "vu")
]
CHAT_TEMPLATE = (
    "{% for message in messages %}{{ message.role }}: {{ message.content }}\n{% endfor %}assistant:"
)
BYTES = 256
START_TIMEOUT_S = 30.0


def write_model(path: Path) -> None:
    """Write a llama of 400,000 random weights, with a tokenizer of bytes and a few words."""
    rng = np.random.default_rng(1)
    special = [b"<unk>", b"<s>", b"</s>"]
    tokens = [
        *special,
        *(b"<0x%02X>" % byte for byte in range(BYTES)),
        *(f"▁{word}".encode() for word in WORDS),
    ]
    kinds = [
        gguf.TokenType.UNKNOWN,
        *[gguf.TokenType.CONTROL] * 2,
        *[gguf.TokenType.BYTE] * BYTES,
        *[gguf.TokenType.NORMAL] * len(WORDS),
    ]
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_context_length(SLOT_TOKENS)
    writer.add_embedding_length(WIDTH)
    writer.add_block_count(LAYERS)
    writer.add_feed_forward_length(2 * WIDTH)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(KV_HEADS)
    writer.add_rope_dimension_count(WIDTH // HEADS)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_vocab_size(len(tokens))
    writer.add_tokenizer_model("llama")
    writer.add_token_list(tokens)
    writer.add_token_scores([-float(number) for number in range(len(tokens))])
    writer.add_token_types(kinds)
    writer.add_unk_token_id(0)
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_chat_template(CHAT_TEMPLATE)

    def random(name: str, rows: int, columns: int, scale: float) -> None:
        writer.add_tensor(name, (rng.standard_normal((rows, columns)) * scale).astype(np.float32))

    output = rng.standard_normal((len(tokens), WIDTH)).astype(np.float32)
    output[: len(special) + BYTES] = 0  # some word always has a higher logit than 0
    writer.add_tensor("output.weight", output)
    writer.add_tensor("output_norm.weight", np.ones(WIDTH, np.float32))
    random("token_embd.weight", len(tokens), WIDTH, 1.0)
    for layer in range(LAYERS):
        for name in ("attn_norm", "ffn_norm"):
            writer.add_tensor(f"blk.{layer}.{name}.weight", np.ones(WIDTH, np.float32))
        for name in ("attn_q", "attn_output"):
            random(f"blk.{layer}.{name}.weight", WIDTH, WIDTH, WIDTH**-0.5)
        for name in ("attn_k", "attn_v"):
            random(f"blk.{layer}.{name}.weight", WIDTH * KV_HEADS // HEADS, WIDTH, WIDTH**-0.5)
        for name in ("ffn_gate", "ffn_up"):
            random(f"blk.{layer}.{name}.weight", 2 * WIDTH, WIDTH, WIDTH**-0.5)
        random(f"blk.{layer}.ffn_down.weight", WIDTH, 2 * WIDTH, (2 * WIDTH) ** -0.5)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


class LlamaServer:
    """The server in a process of its own, on a port that stays its own over kills and restarts."""

    def __init__(self, folder: Path) -> None:
        """Write its model into `folder`; nothing starts yet."""
        folder.mkdir(parents=True)
        self._model = folder / "tiny.gguf"
        write_model(self._model)
        self._process = ServerProcess("llama-server", folder)
        self._port = ReservedPort()

    @property
    def url(self) -> str:
        """Where it serves HTTP."""
        return f"http://{HOST}:{self._port.port}"

    async def __aenter__(self) -> Self:
        await self.start()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self._process.stop()
        self._port.release()

    async def start(self) -> None:
        """Start it, also again after a kill; return once its `/health` says yes."""

        async def is_healthy() -> bool:
            try:
                return bool((await self.get("/health"))["status"] == "ok")
            except (aiohttp.ClientError, OSError, KeyError):
                return False

        # -P: the folder of this file must not come first among the places of modules.
        argv = [sys.executable, "-P", __file__, str(self._model), str(self._port.port)]
        await self._process.start(argv, ready=is_healthy, timeout_s=START_TIMEOUT_S)

    async def kill(self) -> None:
        """SIGKILL it."""
        self._process.kill()
        await self._process.wait_exit()

    async def get(self, path: str) -> Any:
        """A page of JSON."""
        async with aiohttp.ClientSession() as session, session.get(self.url + path) as response:
            return await response.json()

    async def ask(self, path: str, body: dict[str, Any]) -> tuple[int, Any]:
        """A request without FlexLB between: status and whole answer."""
        async with aiohttp.ClientSession() as session, session.post(self.url + path, json=body) as response:
            return response.status, await response.json()

    async def busy_slots(self) -> int:
        """How many requests it runs now."""
        return sum(bool(slot["is_processing"]) for slot in await self.get("/slots"))

    async def generated_tokens(self) -> int:
        """Tokens of finished and aborted requests since its start."""
        async with aiohttp.ClientSession() as session, session.get(f"{self.url}/metrics") as response:
            lines = (await response.text()).splitlines()
        found = (line.split()[1] for line in lines if line.startswith("llamacpp:tokens_predicted_total "))
        return int(float(next(found)))


def serve(model: str, port: int) -> None:
    """Serve until the process is ended."""
    from xllamacpp import CommonParams, Server  # type: ignore[import-untyped]

    parameters = CommonParams()
    parameters.model.path = model
    parameters.model_alias = {MODEL}
    parameters.hostnames = [HOST]
    parameters.port = port
    parameters.n_ctx = SLOTS * SLOT_TOKENS
    parameters.n_parallel = SLOTS
    parameters.cpuparams.n_threads = 1
    parameters.cpuparams_batch.n_threads = 1
    parameters.endpoint_metrics = True
    parameters.endpoint_slots = True
    parameters.ui = False
    server = Server(parameters)
    print(f"serving at {server.listening_address}", flush=True)
    threading.Event().wait()


if __name__ == "__main__":
    serve(sys.argv[1], int(sys.argv[2]))
