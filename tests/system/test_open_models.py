"""Open models from the hub to HTTP: opened, tuned with adapters, registered, compared by the gate, and served."""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

from tests.hugging_face import publish_gpt2, put_into_cache
from tests.open_tokenizers import QWEN_RANKS, publish, write_tokenizer
from tests.ports import free_port
from tests.system.conftest import Cluster, Job, launching
from tests.system.runs import artifacts, versions
from tests.system.serving import QUICK, Service, said, served

pytestmark = [pytest.mark.slow, pytest.mark.timeout(2400)]  # five jobs before the first test

TOKENIZERS = {
    "qwen3": ("qwen3", 151936),
    "qwen2": ("smollm2", 512),
    "llama": ("llama3", 1024),
    "mistral": ("mistral", 768),
}
"""The tokenizer of each family here, and the rows of its embedding."""
PROMPT = "12 green bottles"
LORA = [
    "--lora-rank=4",
    "--learning-rate=2e-2",
    "--batch-size=8",
    "--max-steps=8",
    "--eval-interval=4",
    "--log-interval=2",
    "--sample-tokens=8",
    "--precision=fp32",
    "--cpus-per-worker=1",
    "--register-as=open",
]


def on_the_hub(family: str, root: Path, cache: Path) -> str:
    """Puts a model of this family into the hub's cache, as their client does; returns its name."""
    folder = root / family
    if family == "gpt2":
        publish_gpt2(folder)
    else:
        kind, rows = TOKENIZERS[family]
        publish(write_tokenizer(kind, root / "tokenizers" / kind), folder, rows, family)
    put_into_cache(cache / "hub", f"someone/{family}", folder)
    return f"hf:someone/{family}"


@dataclass
class Tuned:
    """A family's run: its base, its job, and what the job said."""

    base: Path
    job: Job
    output: str

    @property
    def package(self) -> Path:
        return self.job.run_dir / "package"

    @property
    def outcome(self) -> dict[str, Any]:
        return dict(json.loads((self.job.run_dir / "outcome.json").read_text()))


@pytest.fixture(scope="module")
def tuned(cluster: Cluster, text_file: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Tuned]:
    """Every family, tuned with the same command and registered under the same name."""
    root, runs = tmp_path_factory.mktemp("open"), {}
    families = [*TOKENIZERS, "gpt2"] if QWEN_RANKS.exists() else [*[*TOKENIZERS][1:], "gpt2"]
    with launching(cluster, text_file) as launch:
        for family in families:
            name = on_the_hub(family, root, root / "hf")
            job = launch(family, f"--init-from={name}", *LORA, small=False, HF_HOME=str(root / "hf"))
            code, output = job.finish()
            assert code == 0, output
            runs[family] = Tuned(root / family, job, output)
    return runs


@pytest.fixture(scope="module")
def service(cluster: Cluster, tuned: dict[str, Tuned]) -> Iterator[Service]:
    """All of them, each by its registered version."""
    port = free_port()
    models = ",".join(f"{family}=models:/open/{run.outcome['version']}" for family, run in tuned.items())
    settings = QUICK | {"models": models, "eager": "all", "port": port}
    with served(cluster, "serve_app:build_app", *said(**settings), port=port) as running:
        yield running


FAMILIES = [*TOKENIZERS, "gpt2"]


def of(family: str, tuned: dict[str, Tuned]) -> Tuned:
    if family not in tuned:
        pytest.skip(f"{QWEN_RANKS} is missing")
    return tuned[family]


@pytest.mark.parametrize("family", FAMILIES)
def test_a_tuned_model_is_better_than_its_base_and_is_a_version_with_its_adapter(tuned: dict[str, Tuned], family: str):
    run = of(family, tuned)
    training = json.loads((run.package / "foundry.json").read_text())["training"]
    assert training["bits_per_byte"] < training["parent_bits_per_byte"]
    assert training["parent"].startswith(f"hf:someone/{family}")
    assert [int(version.version) for version in versions(run.job, "open")] == [int(run.outcome["version"])]
    assert artifacts(run.job, "adapter") == ["adapter/adapter_config.json", "adapter/adapter_model.safetensors"]
    assert "adapters of" in run.output


def test_the_gate_compares_models_with_different_tokenizers_by_bits_per_byte(tuned: dict[str, Tuned]):
    best = float("inf")
    for run in tuned.values():
        bits = json.loads((run.package / "foundry.json").read_text())["training"]["bits_per_byte"]
        assert run.outcome["promoted"] == (bits < best), run.outcome["reason"]
        best = min(best, bits)


@pytest.mark.parametrize("family", FAMILIES)
def test_the_service_continues_a_text_as_transformers_does(service: Service, tuned: dict[str, Tuned], family: str):
    run = of(family, tuned)
    tokenizer = PreTrainedTokenizerFast.from_pretrained(run.package)
    prompt = tokenizer(PROMPT, return_tensors="pt").input_ids
    model = AutoModelForCausalLM.from_pretrained(run.package).eval()
    whole = model.generate(prompt, max_new_tokens=16, do_sample=False, pad_token_id=0)[0]
    before, after = (tokenizer.decode(ids, skip_special_tokens=True) for ids in (prompt[0], whole))
    body = {"model": family, "prompt": PROMPT, "max_new_tokens": 16, "temperature": 0}
    status, reply = service.ask("/generate", body)
    assert status == 200, reply
    assert before + reply["choices"][0]["text"] == after


@pytest.mark.parametrize("family", FAMILIES)
def test_peft_loads_the_adapter_beside_the_base_with_the_logits_of_the_merged_package(
    tuned: dict[str, Tuned], family: str
):
    run = of(family, tuned)
    tokens = torch.tensor([PreTrainedTokenizerFast.from_pretrained(run.package)(PROMPT).input_ids])
    merged = AutoModelForCausalLM.from_pretrained(run.package).eval()
    adapted = PeftModel.from_pretrained(
        AutoModelForCausalLM.from_pretrained(run.base), run.job.run_dir / "adapter"
    ).eval()
    with torch.no_grad():
        assert torch.allclose(adapted(tokens).logits, merged(tokens).logits, atol=1e-4)
