"""From conversations to answers over HTTP, for a model from scratch and for an open one with adapters."""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from openai import OpenAI
from transformers import AutoModelForCausalLM, AutoTokenizer

from gptcore.chat import CHATML
from tests.hugging_face import put_into_cache
from tests.open_tokenizers import QWEN_RANKS, publish, write_tokenizer
from tests.ports import free_port
from tests.system.conftest import Cluster, Job, launching
from tests.system.runs import points, versions
from tests.system.serving import QUICK, Service, said, served

pytestmark = pytest.mark.slow

ANSWER = "All is well."
SHARED = ["--objective=chat", "--learning-rate=1e-2", "--batch-size=8", "--precision=fp32", "--cpus-per-worker=1"]
SCRATCH = [
    *SHARED,
    *("--tokenizer=bytes", "--num-layers=2", "--num-heads=2", "--hidden-size=64", "--context-length=128"),
    *("--max-steps=60", "--eval-interval=30", "--sample-tokens=24", "--sample-prompts=How are you?"),
]
ADAPTED = [*SHARED, "--lora-rank=4", "--max-steps=12", "--eval-interval=6", "--sample-tokens=8"]


@dataclass
class Trained:
    """A job, what it said, and its package."""

    job: Job
    output: str

    @property
    def package(self) -> Path:
        return self.job.run_dir / "package"


@pytest.fixture(scope="module")
def trained(cluster: Cluster, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Trained]:
    root, runs = tmp_path_factory.mktemp("chat"), {}
    chats = root / "chats.jsonl"
    lines = [
        {"messages": [{"role": "user", "content": f"Question {n}?"}, {"role": "assistant", "content": ANSWER}]}
        for n in range(200)
    ]
    chats.write_text("".join(json.dumps(line) + "\n" for line in lines))
    flags = {"scratch": SCRATCH}
    if QWEN_RANKS.exists():
        tokenizer = write_tokenizer("qwen3", root / "tokenizer")
        (tokenizer / "chat_template.jinja").write_text(CHATML)
        publish(tokenizer, root / "qwen3", 151936, context=128)
        put_into_cache(root / "hf" / "hub", "someone/qwen3", root / "qwen3")
        flags["adapted"] = ["--init-from=hf:someone/qwen3", *ADAPTED]
    with launching(cluster, chats) as launch:
        for name, more in flags.items():
            job = launch(f"chat-{name}", *more, f"--register-as=chat-{name}", small=False, HF_HOME=str(root / "hf"))
            code, output = job.finish()
            assert code == 0, output
            runs[name] = Trained(job, output)
    return runs


@pytest.fixture(scope="module")
def service(cluster: Cluster, trained: dict[str, Trained]) -> Iterator[Service]:
    port = free_port()
    models = ",".join(f"{name}=models:/chat-{name}@champion" for name in trained)
    settings = QUICK | {"models": models, "eager": "all", "port": port}
    with served(cluster, "serve_app:build_app", *said(**settings), port=port) as running:
        yield running


def of(name: str, trained: dict[str, Trained]) -> Trained:
    if name not in trained:
        pytest.skip(f"{QWEN_RANKS} is missing")
    return trained[name]


NAMES = ["scratch", "adapted"]


@pytest.mark.parametrize("name", NAMES)
def test_a_run_says_what_it_learns_and_registers_a_model_that_answers(trained: dict[str, Trained], name: str):
    run = of(name, trained)
    assert "180 conversations, " in run.output
    assert "of the tokens are answers, and only these are learned" in run.output
    assert "chat      " in run.output
    assert "gptcore.generate" not in run.output
    assert points(run.job, "train/answered")[0][1] < 0.6
    losses = [loss for _, loss in points(run.job, "val/loss")]
    assert losses[-1] < losses[0]
    [version] = versions(run.job, f"chat-{name}")
    assert version.tags["promoted"] == "true"
    assert "It answers conversations" in (run.package / "README.md").read_text()


def test_its_samples_are_answers_that_end(trained: dict[str, Trained]):
    run = trained["scratch"]
    assert points(run.job, "val/answers_ended")[-1][1] == 1.0
    samples = json.loads((run.job.run_dir / "samples.json").read_text())["data"]
    assert samples[-1] == [60, "How are you?", ANSWER]
    assert f"sample    How are you? {ANSWER}" in run.output


@pytest.mark.parametrize("name", NAMES)
def test_the_service_answers_as_transformers_does(service: Service, trained: dict[str, Trained], name: str):
    run = of(name, trained)
    messages: Any = [{"role": "user", "content": "Question 7?"}]
    client = OpenAI(base_url=f"{service.url}/v1", api_key="any")
    reply = client.chat.completions.create(model=name, messages=messages, temperature=0, max_completion_tokens=20)
    tokenizer = AutoTokenizer.from_pretrained(run.package)
    prompt = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_tensors="pt", return_dict=False)
    model = AutoModelForCausalLM.from_pretrained(run.package).eval()
    with torch.no_grad():
        ids = model.generate(prompt, max_new_tokens=20, do_sample=False, pad_token_id=0)[0, prompt.shape[1] :]
    expected = tokenizer.decode(ids, skip_special_tokens=True)
    assert reply.choices[0].message.content == expected
    if name == "scratch":
        assert (expected, reply.choices[0].finish_reason) == (ANSWER, "stop")
        assert reply.usage is not None
        assert reply.usage.completion_tokens == len(ANSWER) + 1  # and what ends it
