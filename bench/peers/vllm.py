"""Measures vLLM's engine, which runs in `.venv-vllm`, because its pins differ from ours.

`open_vllm` runs this module there as a program. It answers each line of its standard input with one turn, as JSON.
"""

import json
import os
import subprocess
import sys
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

from bench.peers.task import DecodeTask, DecodeTurn
from bench.turns import RunTurn, Unsupported

ROOT = Path(__file__).resolve().parents[2]
PYTHON = ROOT / ".venv-vllm" / "bin" / "python"
ENVIRONMENT = {
    "VLLM_NO_USAGE_STATS": "1",
    "VLLM_LOGGING_LEVEL": "ERROR",
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",  # no messages between processes, which is fastest for one batch
    "VLLM_CPU_KVCACHE_SPACE": "2",  # GiB; its own choice is a share of the machine's memory
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",  # its own binding leaves a core to the HTTP server that is not there
}


def open_vllm(task: DecodeTask, precision: str) -> tuple[RunTurn, str]:
    """Starts vLLM with the package as it is."""
    if task.device != "cpu":
        raise Unsupported("measured on a CPU only")
    if not PYTHON.exists():
        raise Unsupported("not installed; make .venv-vllm/installed does that")
    process = subprocess.Popen(
        [PYTHON, "-m", "bench.peers.vllm", json.dumps(asdict(task)), precision],
        cwd=ROOT,
        env=os.environ | ENVIRONMENT,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert process.stdin
    assert process.stdout
    requests, answers = process.stdin, process.stdout

    def answer() -> Any:
        line = answers.readline()
        if not line:
            raise RuntimeError(f"vLLM ended with exit code {process.wait()}")
        return json.loads(line)

    def run_turn() -> DecodeTurn:
        requests.write("turn\n")
        requests.flush()
        return DecodeTurn(**answer())

    return run_turn, answer()


def main() -> None:
    """Opens the task's package and runs turns until standard input ends."""
    task, precision = DecodeTask(**json.loads(sys.argv[1])), sys.argv[2]
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # vLLM prints there
    run_turn, note = _open(task, precision)
    print(json.dumps(note), file=answers, flush=True)
    for _ in sys.stdin:
        print(json.dumps(asdict(run_turn())), file=answers, flush=True)


def _open(task: DecodeTask, precision: str) -> tuple[RunTurn, str]:
    import vllm

    engine = vllm.LLM(
        task.package,
        dtype=precision,
        skip_tokenizer_init=True,
        max_model_len=task.prompt_tokens + task.new_tokens,
        max_num_seqs=task.batch,
        max_num_batched_tokens=max(task.batch * task.prompt_tokens, task.prompt_tokens + task.new_tokens),
        enable_prefix_caching=False,  # every turn has the same prompts
    ).llm_engine
    greedy = vllm.SamplingParams(temperature=0, max_tokens=task.new_tokens, ignore_eos=True, detokenize=False)

    def run_turn() -> DecodeTurn:
        tokens: dict[str, list[int]] = {}
        first, begun = 0.0, 0
        start = time.perf_counter()
        for number, prompt in enumerate(task.prompts()):
            engine.add_request(str(number), {"prompt_token_ids": prompt}, greedy)
        while engine.has_unfinished_requests():
            for output in engine.step():
                tokens[output.request_id] = list(output.outputs[0].token_ids)
            if not first and len(tokens) == task.batch:
                first, begun = time.perf_counter(), sum(map(len, tokens.values()))
        end = time.perf_counter()
        ordered = [tokens[str(number)] for number in range(task.batch)]
        return DecodeTurn(first - start, end - first, ordered, sum(map(len, ordered)) - begun)

    return run_turn, f"vLLM {vllm.__version__}, {precision}"


if __name__ == "__main__":
    main()
