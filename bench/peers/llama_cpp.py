"""Measures llama.cpp through llama-cpp-python's low-level calls.

It batches as llama.cpp's own batched-bench does: each step is one `llama_batch` with one token of every sequence. numpy
picks the likeliest token, which is cheaper than llama.cpp's sampler.
"""

import ctypes
import time
from pathlib import Path
from typing import Any

import numpy as np

from bench.peers.task import DecodeTask, DecodeTurn
from bench.turns import RunTurn, Unsupported
from gptcore.export import export
from gptcore.package import open_package

PHYSICAL_BATCH = 512
"""Prompt tokens per pass; llama.cpp's default."""
WEIGHTS = {"bfloat16": "bf16", "float32": "f32", "int8": "q8_0", "int4": "q4_0"}


def open_llama_cpp(task: DecodeTask, precision: str) -> tuple[RunTurn, str]:
    """Opens the package in llama.cpp."""
    decoder = open_decoder(task, precision)

    def run_turn() -> DecodeTurn:
        decoder.clear()
        start = time.perf_counter()
        last = decoder.prefill(task.prompts())
        first = time.perf_counter()
        tokens = [last]
        for step in range(task.new_tokens - 1):
            last = decoder.decode(last, task.prompt_tokens + step)
            tokens.append(last)
        end = time.perf_counter()
        sequences = np.stack(tokens, axis=1).tolist()  # (batch, new_tokens)
        return DecodeTurn(first - start, end - first, sequences, task.batch * (task.new_tokens - 1))

    version = decoder.library.__version__
    return run_turn, f"llama.cpp by llama-cpp-python {version}, {WEIGHTS[precision]} weights, f16 cache"


def open_decoder(task: DecodeTask, precision: str) -> "Decoder":
    """Writes the package as GGUF once per precision and scratch folder, and opens it. Raises Unsupported."""
    import llama_cpp

    if task.device != "cpu":
        raise Unsupported("measured on a CPU only")
    file = Path(task.scratch) / f"{precision}.gguf"
    if not file.exists():
        export(open_package(task.package, verify=False), file, WEIGHTS[precision])
    return Decoder(llama_cpp, file, task)


class Decoder:
    """A llama.cpp context for `task.batch` sequences that advance together."""

    def __init__(self, library: Any, file: Path, task: DecodeTask) -> None:
        self.library = library
        self._quiet = library.llama_log_callback(lambda *_: None)
        library.llama_log_set(self._quiet, ctypes.c_void_p(0))
        self.model = library.llama_model_load_from_file(str(file).encode(), library.llama_model_default_params())
        if not self.model:
            raise Unsupported(f"llama.cpp cannot read {file.name}")
        settings = library.llama_context_default_params()
        settings.n_seq_max = task.batch
        settings.n_ctx = task.batch * (task.prompt_tokens + task.new_tokens)
        settings.n_batch = max(task.batch * task.prompt_tokens, PHYSICAL_BATCH)
        settings.n_ubatch = PHYSICAL_BATCH
        settings.n_threads = settings.n_threads_batch = task.threads
        self.context = library.llama_init_from_model(self.model, settings)
        if not self.context:
            raise Unsupported("llama.cpp cannot create a context of the required size")
        self.batch = library.llama_batch_init(settings.n_batch, 0, 1)
        self.vocab_size = task.vocab_size

    def clear(self) -> None:
        """Forgets every sequence."""
        self.library.llama_memory_clear(self.library.llama_get_memory(self.context), False)

    def prefill(self, prompts: list[list[int]]) -> np.ndarray:
        """The token after each prompt, int64 (batch,)."""
        self.batch.n_tokens = 0
        for sequence, prompt in enumerate(prompts):
            for position, token in enumerate(prompt):
                self._put(token, position, sequence, wanted=position == len(prompt) - 1)
        return self._run(len(prompts))

    def decode(self, tokens: np.ndarray, position: int) -> np.ndarray:
        """The token after each of `tokens` (batch,), which are at `position` of their sequences."""
        self.batch.n_tokens = 0
        for sequence, token in enumerate(tokens):
            self._put(int(token), position, sequence, wanted=True)
        return self._run(len(tokens))

    def nats(self, tokens: list[int]) -> float:
        """What the tokens after the first cost, by the model's probabilities."""
        self.clear()
        self.batch.n_tokens = 0
        for position, token in enumerate(tokens):
            self._put(token, position, 0, wanted=True)
        logits = self._logits(len(tokens))[:-1].astype(np.float64)
        logits -= logits.max(axis=1, keepdims=True)
        chosen = np.take_along_axis(logits, np.array(tokens[1:])[:, None], axis=1)[:, 0]
        return float((np.log(np.exp(logits).sum(axis=1)) - chosen).sum())

    def _put(self, token: int, position: int, sequence: int, wanted: bool) -> None:
        i = self.batch.n_tokens
        self.batch.token[i], self.batch.pos[i] = token, position
        self.batch.n_seq_id[i], self.batch.seq_id[i][0] = 1, sequence
        self.batch.logits[i] = wanted
        self.batch.n_tokens = i + 1

    def _run(self, count: int) -> np.ndarray:
        return self._logits(count).argmax(axis=1)

    def _logits(self, count: int) -> np.ndarray:
        if code := self.library.llama_decode(self.context, self.batch):
            raise RuntimeError(f"llama_decode returned {code}")
        logits = self.library.llama_get_logits(self.context)
        return np.ctypeslib.as_array(logits, shape=(count, self.vocab_size))
