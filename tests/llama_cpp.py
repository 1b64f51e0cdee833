"""llama.cpp's own server in this process (the package xllamacpp): it reads a GGUF file, tokenises and continues."""

import json
from pathlib import Path
from typing import Any
from urllib.request import Request, urlopen

import pytest

SECONDS = 60


class LlamaCpp:
    """llama.cpp with a model, in fp32 where it would take a lower precision. Fails if it cannot read the file."""

    def __init__(self, file: Path, context: int = 64) -> None:
        library = pytest.importorskip("xllamacpp", reason="xllamacpp is not installed")
        settings = library.CommonParams()
        settings.model.path = str(file)
        settings.n_ctx, settings.n_parallel, settings.n_gpu_layers, settings.port = context, 1, 0, 0
        settings.cpuparams.n_threads = settings.cpuparams_batch.n_threads = 1
        settings.cache_type_k = settings.cache_type_v = library.ggml_type.GGML_TYPE_F32
        settings.flash_attn_type = library.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED
        settings.fit_params = settings.warmup = settings.ui = settings.ctx_shift = False
        settings.cache_ram_mib = 0
        self._server = library.Server(settings)

    def __enter__(self) -> "LlamaCpp":
        return self

    def __exit__(self, *_: object) -> None:
        self._server = None

    def _post(self, route: str, **body: Any) -> Any:
        request = Request(
            self._server.listening_address + route, json.dumps(body).encode(), {"Content-Type": "application/json"}
        )
        with urlopen(request, timeout=SECONDS) as reply:
            return json.load(reply)

    def encode(self, text: str, begin: bool = False) -> list[int]:
        """The ids of `text`, in which special tokens are text; with `begin`, what begins a text comes first."""
        ids: list[int] = self._post("/tokenize", content=text, add_special=begin, parse_special=False)["tokens"]
        return ids

    def decode(self, ids: list[int]) -> str:
        text: str = self._post("/detokenize", tokens=ids)["content"]
        return text

    def greedy(self, prompt: str | list[int], count: int) -> tuple[list[int], str]:
        """The `count` likeliest tokens behind the prompt, fewer if one ends the text, and their text."""
        said = self._post(
            "/completion", prompt=prompt, n_predict=count, temperature=0.0, return_tokens=True, cache_prompt=False
        )
        return said["tokens"], said["content"]
