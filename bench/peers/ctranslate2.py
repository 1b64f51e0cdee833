"""Measures CTranslate2's generator. Its own converter reads the package."""

import json
import time
from pathlib import Path
from typing import Any

from bench.peers.task import DecodeTask, DecodeTurn
from bench.turns import RunTurn, Unsupported
from gptcore.tokenizer import EOT


def open_ctranslate2(task: DecodeTask, precision: str) -> tuple[RunTurn, str]:
    """Converts the package once per scratch folder, and opens it. Weights are cast or quantised as they load."""
    import ctranslate2

    if task.device != "cpu":
        raise Unsupported("measured on a CPU only")
    known = ctranslate2.get_supported_compute_types("cpu")
    if precision not in known:
        raise Unsupported(f"CTranslate2 {ctranslate2.__version__} computes in {', '.join(sorted(known))} on this CPU")
    folder = Path(task.scratch) / "ctranslate2"
    if not folder.exists():
        _convert(task.package, folder)
    generator = ctranslate2.Generator(
        str(folder), device="cpu", compute_type=precision, inter_threads=1, intra_threads=task.threads
    )
    names = _vocabulary(task.package)
    prompts = [[names[token] for token in prompt] for prompt in task.prompts()]

    def run_turn() -> DecodeTurn:
        first = 0.0

        def note_first(_: Any) -> bool:
            nonlocal first
            first = first or time.perf_counter()
            return False

        start = time.perf_counter()
        results = generator.generate_batch(
            prompts,
            max_length=task.new_tokens,
            min_length=task.new_tokens,  # no token ends a text
            include_prompt_in_result=False,  # then the prompt runs in one pass
            sampling_topk=1,
            callback=note_first,
        )
        end = time.perf_counter()
        tokens = [result.sequences_ids[0] for result in results]
        return DecodeTurn(first - start, end - first, tokens, task.batch * (task.new_tokens - 1))

    return run_turn, f"CTranslate2 {ctranslate2.__version__}, compute type {generator.compute_type}"


def _convert(package: str, folder: Path) -> None:
    """Writes CTranslate2's form of the package to `folder`, in fp32."""
    import ctranslate2
    import transformers

    transformers.logging.disable_progress_bar()
    ctranslate2.converters.TransformersConverter(package).convert(str(folder))
    # Its loader requires an unknown token, which a byte-level vocabulary does not have.
    file = folder / "config.json"
    settings = json.loads(file.read_text())
    file.write_text(json.dumps({name: EOT if name == "unk_token" else value for name, value in settings.items()}))


def _vocabulary(package: str) -> list[str]:
    """The tokens as strings, in the order of their ids, because CTranslate2 takes prompts as strings."""
    from transformers import AutoTokenizer

    vocabulary = AutoTokenizer.from_pretrained(package).get_vocab()
    return sorted(vocabulary, key=vocabulary.__getitem__)
