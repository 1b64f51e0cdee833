"""`python -m gptcore.inspect` says what a model needs, and docs/open-models.md says the same."""

import re
from pathlib import Path

import pytest
import torch

from bench.open_models import OPEN_MODELS
from gptcore import inspect
from gptcore.config import ModelConfig
from gptcore.engine import runners
from gptcore.hf_format import count_parameters
from gptcore.inspect import ADAPTERS, main, needs
from gptcore.lora import check_adapters
from gptcore.package import Package
from gptcore.units import count, gib
from tests.open_tokenizers import publish, write_tokenizer
from tests.refusals import one_error

PAGE = Path(__file__).parents[2] / "docs" / "open-models.md"


def test_the_report_has_the_network_its_needs_and_what_fits_here(
    package: Package, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([str(package.path)]) == 0
    said = capsys.readouterr().out
    assert said.startswith("qwen3, 0.2 M parameters: 2 layers, 4 heads (2 for keys and values)")
    assert "to serve: 0.0 GiB of weights in bfloat16, and 0 KiB for each token" in said
    assert re.search(r"here: in \w+ on \w+, at least 4 sequences of all 64 tokens fit", said)
    assert "to train: 0.0 GiB for weights, gradients and AdamW's state in fp32" in said
    assert "to chat: no: it has no chat template, so it only continues text" in said


def test_it_says_whether_the_model_can_chat(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = publish(write_tokenizer("smollm2", tmp_path / "tokenizer"), tmp_path / "model", 512, "llama")
    template = folder / "chat_template.jinja"
    template.write_text("{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>{% endfor %}")
    assert main([str(folder)]) == 0
    assert re.search(r"to chat: by its own template, which makes \d+ tokens of a user's Hello", capsys.readouterr().out)
    template.write_text("{{ raise_exception('no users here') }}")
    assert main([str(folder)]) == 0
    assert "to chat: no: the model's chat template refuses the messages: no users here" in capsys.readouterr().out


def test_it_says_if_the_model_does_not_fit_here(
    package: Package, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(runners, "free_memory", lambda device: 2**10)
    monkeypatch.setattr(inspect, "pick_device", lambda name: torch.device("cpu"))
    assert main([str(package.path)]) == 0
    assert re.search(r"here: the model in \S+ needs .* MiB of memory are free", capsys.readouterr().out)


def test_a_model_that_cannot_be_used_is_refused_with_the_reason(
    package: Package, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["no/such/folder"]) == 2
    assert "there is no model 'no/such/folder'" in one_error(capsys.readouterr().err)
    (package.path / "config.json").unlink()
    assert main([str(package.path)]) == 2
    assert "config.json" in one_error(capsys.readouterr().err)


def test_a_model_needs_its_weights_and_keys_and_values() -> None:
    config = ModelConfig(vocab_size=1000, num_layers=3, num_heads=4, num_kv_heads=2, head_dim=32, context_length=100)
    need = needs(config)
    assert need.weights == 2 * count_parameters(config)
    assert need.token == 2 * 2 * 3 * 2 * 32  # bytes, keys and values, layers, heads, features
    assert need.sequence == 100 * need.token
    assert need.training == 16 * count_parameters(config)
    assert need.tuning == need.weights + 16 * check_adapters(config, ADAPTERS)


@pytest.mark.parametrize("name", OPEN_MODELS)
def test_the_page_has_the_figures_of_each_model(name: str) -> None:
    config = ModelConfig(**OPEN_MODELS[name])
    need = needs(config)
    row = next(line for line in PAGE.read_text().splitlines() if line.lower().startswith(f"| {name} |"))
    assert [cell.strip() for cell in row.split("|")[2:-1]] == [
        count(count_parameters(config)),
        gib(need.weights),
        f"{need.token / 2**10:,.0f}",
        f"{gib(need.sequence)} for {config.context_length:,}",
        gib(need.training),
        gib(need.tuning),
    ]
