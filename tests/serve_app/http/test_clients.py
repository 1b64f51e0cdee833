"""Other projects' clients against the real service, used as their users do, without code of ours in between.

The extra `clients` installs them. Tests of a missing client are skipped. test_openai.py tests OpenAI's own client.
"""

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx2
import pytest
import torch

from gptcore.package import Package
from serve_app.settings import ServeSettings
from tests.open_tokenizers import publish, write_tokenizer
from tests.serve_app.running import Running, running

pytestmark = pytest.mark.slow
PROMPT = "The future of AI is"
FIXED: dict[str, Any] = dict(max_tokens=12, temperature=0.5, seed=7)
SYSTEM, QUESTION, MORE = "Be kind.", "The cat?", "And?"
TEMPLATE = """{% for m in messages %}<|im_start|>{{ m.role + '\n' + m.content }}<|im_end|>
{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant
{% endif %}"""
DOCUMENTS = [
    {"question": "The cat sat on the", "choices": [" mat.", " moon, at last."], "answer": 0},
    {"question": "Füße und 東京:", "choices": [" ja", " nein"], "answer": 1},
    {"question": "", "choices": ["Once upon a time", "x"], "answer": 0},
    {"question": " ".join(["long"] * 23), "choices": [" end", " and so on"], "answer": 1},
]
TASKS = {
    "choosing": "output_type: multiple_choice\ndoc_to_choice: '{{choices}}'\ndoc_to_target: answer",
    "reading": "output_type: loglikelihood_rolling\ndoc_to_target: '{{question}}{{choices[0]}}'\n"
    "metric_list: [{metric: bits_per_byte}]",
    "writing": "output_type: generate_until\ndoc_to_target: '{{choices[0]}}'\n"
    "generation_kwargs: {until: ['\\n\\n'], max_gen_toks: 8}\nmetric_list: [{metric: exact_match}]",
}


@pytest.fixture(scope="module")
def service(package: Package, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    """A service with a model that continues text and one that chats."""
    root = tmp_path_factory.mktemp("chat")
    folder = publish(write_tokenizer("smollm2", root / "tokenizer"), root / "model", 512, "llama", context=128)
    (folder / "chat_template.jinja").write_text(TEMPLATE)
    models = (f"tiny={package.path}", f"talker={folder}")
    with running(ServeSettings(models=models, dtype="float32", slots=8)) as service:
        yield service


@pytest.fixture(scope="module")
def expected(service: Running) -> str:
    """The service's answer to `PROMPT` with `FIXED`."""
    reply = httpx2.post(f"{service.url}/v1/completions", json={"model": "tiny", "prompt": PROMPT, **FIXED})
    return reply.json()["choices"][0]["text"]


@pytest.fixture(scope="module")
def conversation(service: Running) -> list[dict[str, str]]:
    """A conversation in which the service has answered twice, with `FIXED`."""
    messages = [{"role": "system", "content": SYSTEM}]
    for question in (QUESTION, MORE):
        messages.append({"role": "user", "content": question})
        body = {"model": "talker", "messages": messages, **FIXED}
        reply = httpx2.post(f"{service.url}/v1/chat/completions", json=body)
        messages.append({"role": "assistant", "content": reply.json()["choices"][0]["message"]["content"]})
    return messages


def test_langchain(service: Running, expected: str) -> None:
    OpenAI = pytest.importorskip("langchain_openai").OpenAI
    model = OpenAI(model="tiny", base_url=f"{service.url}/v1", api_key="any", max_retries=0, **FIXED)
    assert model.invoke(PROMPT) == expected
    assert "".join(model.stream(PROMPT)) == expected
    assert [text.generations[0][0].text for text in [model.generate([PROMPT])]] == [expected]


def test_langchain_chats(service: Running, conversation: list[dict[str, str]]) -> None:
    ChatOpenAI = pytest.importorskip("langchain_openai").ChatOpenAI
    model = ChatOpenAI(model="talker", base_url=f"{service.url}/v1", api_key="any", max_retries=0, **FIXED)
    *asked, last = [(message["role"], message["content"]) for message in conversation]
    reply = model.invoke(asked)
    assert (reply.type, reply.content) == ("ai", last[1])
    assert reply.usage_metadata["output_tokens"] == FIXED["max_tokens"]
    assert "".join(part.content for part in model.stream(asked)) == last[1]
    assert [reply.content for reply in model.batch([asked, asked[:2]])] == [last[1], asked[2][1]]
    shortened = ChatOpenAI(
        model="talker",
        base_url=f"{service.url}/v1",
        api_key="any",
        max_retries=0,
        extra_body={"truncate": "oldest"},
        **FIXED,
    )
    assert shortened.invoke([("user", "The " * 30), ("ai", "The " * 30), *asked]).content


def test_litellm(service: Running, expected: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LITELLM_LOCAL_MODEL_COST_MAP", "True")  # it would be fetched when litellm is imported
    litellm = pytest.importorskip("litellm")
    fields = dict(model="text-completion-openai/tiny", api_base=f"{service.url}/v1", api_key="any", prompt=PROMPT)
    assert litellm.text_completion(**fields, **FIXED).choices[0].text == expected
    parts = litellm.text_completion(**fields, **FIXED, stream=True)
    assert "".join(choice.text or "" for part in parts for choice in part.choices) == expected


def test_litellm_chats(service: Running, conversation: list[dict[str, str]], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LITELLM_LOCAL_MODEL_COST_MAP", "True")
    litellm = pytest.importorskip("litellm")
    *asked, last = conversation
    fields = dict(model="openai/talker", api_base=f"{service.url}/v1", api_key="any", messages=asked, **FIXED)
    assert litellm.completion(**fields).choices[0].message.content == last["content"]
    parts = [*litellm.completion(**fields, stream=True, stream_options={"include_usage": True})]
    assert "".join(choice.delta.content or "" for part in parts for choice in part.choices) == last["content"]
    assert parts[-1].usage.completion_tokens == FIXED["max_tokens"]
    with pytest.raises(litellm.ContextWindowExceededError, match="this model's maximum context length is 128"):
        litellm.completion(**fields | {"messages": [{"role": "user", "content": "The " * 200}]})


def test_llm(service: Running, expected: str, tmp_path: Path) -> None:
    pytest.importorskip("llm")
    (tmp_path / "extra-openai-models.yaml").write_text(
        f"- {{model_id: foundry, model_name: tiny, api_base: '{service.url}/v1', completion: true}}\n"
    )
    options = [part for name, value in FIXED.items() for part in ("-o", name, str(value))]
    command = [sys.executable, "-m", "llm", "-m", "foundry", PROMPT, "--key", "any", "--no-log", *options]
    environment = os.environ | {"LLM_USER_PATH": str(tmp_path), "PYTHONUTF8": "1"}
    for streamed in ([], ["--no-stream"]):
        done = subprocess.run([*command, *streamed], env=environment, capture_output=True, timeout=120)
        assert done.stdout.decode().removesuffix("\n") == expected, done.stderr.decode()


def test_llm_chats(service: Running, conversation: list[dict[str, str]], tmp_path: Path) -> None:
    pytest.importorskip("llm")
    (tmp_path / "extra-openai-models.yaml").write_text(
        f"- {{model_id: foundry, model_name: talker, api_base: '{service.url}/v1'}}\n"
    )
    options = [part for name, value in FIXED.items() for part in ("-o", name, str(value))]
    environment = os.environ | {"LLM_USER_PATH": str(tmp_path), "PYTHONUTF8": "1"}
    for asked, expected in ((["-s", SYSTEM, QUESTION], conversation[2]), (["-c", MORE], conversation[4])):
        command = [sys.executable, "-m", "llm", "-m", "foundry", "--key", "any", *options, *asked]
        done = subprocess.run(command, env=environment, capture_output=True, timeout=120)
        assert done.stdout.decode().removesuffix("\n") == expected["content"], done.stderr.decode()


@pytest.mark.parametrize("backend", ["remote", "huggingface"])
def test_lm_eval_gets_the_same_scores_as_transformers(
    service: Running, package: Package, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, backend: str
) -> None:
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hub"))
    monkeypatch.setenv("HF_DATASETS_OFFLINE", "1")
    lm_eval = pytest.importorskip("lm_eval")
    from lm_eval.tasks import TaskManager

    data = tmp_path / "documents.jsonl"
    data.write_text("".join(json.dumps(document) + "\n" for document in DOCUMENTS), encoding="utf-8")
    for name, task in TASKS.items():
        source = f"dataset_path: json\ndataset_kwargs: {{data_files: {{test: {data}}}}}\ntest_split: test\n"
        (tmp_path / f"{name}.yaml").write_text(f"task: {name}\n{source}doc_to_text: '{{{{question}}}}'\n{task}\n")
    tokenizer = {"tokenizer": str(package.path)} if backend == "huggingface" else {}
    results = lm_eval.simple_evaluate(
        model="local-completions",
        model_args={
            "model": "tiny",
            "base_url": f"{service.url}/v1/completions",
            "tokenizer_backend": backend,
            "max_length": 128,
            **tokenizer,
        },
        tasks=list(TASKS),
        task_manager=TaskManager(include_path=str(tmp_path), include_defaults=False),
        bootstrap_iters=0,
    )
    samples = results["samples"]
    for sample in samples["choosing"]:
        for (context, continuation), ((said, greedy),) in zip(sample["arguments"], sample["resps"], strict=True):
            ours, likeliest = scored(package, context, continuation)
            assert float(said) == pytest.approx(ours, abs=0.05)
            assert str(greedy) == str(likeliest)
    for sample in samples["reading"]:
        ours, _ = scored(package, "", sample["arguments"][0][0])
        assert float(sample["resps"][0][0]) == pytest.approx(ours, abs=0.05)
    assert all(isinstance(sample["resps"][0][0], str) for sample in samples["writing"])


def scored(package: Package, context: str, continuation: str) -> tuple[float, bool]:
    """log p(continuation | context) in nats by `transformers`, and whether each of its tokens is the likeliest."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(package.path)
    model = AutoModelForCausalLM.from_pretrained(package.path, dtype=torch.float32)
    before = tokenizer(context).input_ids or [tokenizer.bos_token_id]
    after = tokenizer(continuation).input_ids
    ids = torch.tensor([before + after])
    with torch.inference_mode():
        logprobs = model(ids).logits[0, len(before) - 1 : -1, : len(tokenizer)].log_softmax(-1)  # (T, V)
    chosen = logprobs.gather(1, ids[0, len(before) :, None])[:, 0]
    return float(chosen.sum()), bool((chosen == logprobs.amax(-1)).all())
