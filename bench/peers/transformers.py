"""Measures transformers' `generate` as its documentation shows it: a batch of prompts, greedy, the default cache."""

import time
from typing import Any

import torch

from bench.peers.task import DecodeTask, DecodeTurn
from bench.turns import RunTurn


class FirstToken:
    """A streamer that records when the first new token of the batch arrives. The prompt is put first."""

    def __init__(self) -> None:
        self.puts = 0
        self.at = 0.0

    def put(self, _: Any) -> None:
        self.puts += 1
        if self.puts == 2:
            self.at = time.perf_counter()

    def end(self) -> None: ...


def open_transformers(task: DecodeTask, precision: str) -> tuple[RunTurn, str]:
    """Opens the package with AutoModelForCausalLM."""
    import transformers

    torch.set_num_threads(task.threads)
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    dtype = getattr(torch, precision)
    model: Any = transformers.AutoModelForCausalLM.from_pretrained(task.package, dtype=dtype)
    model = model.to(task.device).eval()
    prompts = torch.tensor(task.prompts(), device=task.device)
    attention = torch.ones_like(prompts)

    def run_turn() -> DecodeTurn:
        first = FirstToken()
        start = time.perf_counter()
        with torch.inference_mode():
            output = model.generate(
                prompts,
                attention_mask=attention,
                do_sample=False,
                max_new_tokens=task.new_tokens,
                eos_token_id=[],  # no token ends a text
                streamer=first,
            )
        tokens = output[:, prompts.size(1) :].tolist()
        end = time.perf_counter()
        return DecodeTurn(first.at - start, end - first.at, tokens, task.batch * (task.new_tokens - 1))

    return run_turn, f"transformers {transformers.__version__}, generate, {model.config._attn_implementation} attention"
