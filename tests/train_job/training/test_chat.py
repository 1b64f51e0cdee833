"""Training on conversations: the loss is that of the answers, whatever shares a row, with any number of workers."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from gptcore.chat import chat_template, chat_tokenizer
from gptcore.config import ModelConfig
from gptcore.errors import ConfigError, PackageError
from gptcore.model import GPT
from gptcore.package import open_package, save_package
from gptcore.tokenizer import Tokenizer, load_tokenizer
from tests.train_job.conftest import SMALL
from tests.train_job.data.test_conversations import some, written
from tests.train_job.training.test_sharded import made, train
from tests.train_job.training.workers import Workers, workers
from train_job.config import build_config
from train_job.data.conversations import CONVERSATION
from train_job.data.corpus import open_corpus
from train_job.data.inputs import build_model, initial_parameters, prepare_inputs
from train_job.training.checkpoint import save_checkpoint
from train_job.training.evaluate import bits_per_byte
from train_job.training.events import CheckpointDue, Evaluation, Progress
from train_job.training.loop import Trainer

SHAPE: dict[str, Any] = SMALL | dict(
    objective="chat", context_length=192, batch_size=4, log_interval=1, precision="fp32", val_fraction=0.2
)


@pytest.fixture(scope="module")
def crew() -> Iterator[Workers]:
    with workers(2) as ready:
        yield ready


@pytest.fixture
def base(tmp_path: Path) -> dict[str, Any]:
    folders = {"cache_dir": str(tmp_path / "cache"), "storage_path": str(tmp_path)}
    return SHAPE | {"data": str(written(tmp_path, some(120)))} | folders


def test_the_first_loss_is_that_of_the_answers_each_alone(base: dict[str, Any]) -> None:
    trainer = made(base)
    inputs = prepare_inputs(build_config({"name": "run", **base}))
    template = chat_template(inputs.tokenizer)
    assert template is not None
    with torch.no_grad():
        for parameter in trainer.model.parameters():  # all of them matter, unlike those of a new model
            parameter += 0.02 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1))
        nats = count = 0.0
        for document in inputs.validation_corpus.documents():
            ids, answered = template.answers(json.loads(document))
            for start in range(0, len(ids) - 1, 192):  # one that is longer than the context is cut
                part = torch.tensor(ids[start : start + 193])
                logprobs = trainer.model(part[None, :-1])[0].log_softmax(-1)
                ours = torch.tensor(answered[start + 1 : start + 193])
                nats -= float(logprobs.gather(1, part[1:, None])[ours].sum())
                count += int(ours.sum())
    evaluation = trainer.evaluate()
    assert evaluation.loss == pytest.approx(nats / count, rel=1e-5)
    answers = [
        m["content"] for d in inputs.validation_corpus.documents() for m in json.loads(d) if m["role"] == "assistant"
    ]
    size = sum(len(text.encode()) for text in answers)
    assert evaluation.bits_per_byte == pytest.approx(nats / size / 0.693147, rel=1e-4)


def test_it_learns(base: dict[str, Any]) -> None:
    losses = train(base | {"max_steps": 40, "eval_interval": 20, "learning_rate": 1e-2}).evaluations
    assert losses[-1] < losses[0] / 2


@pytest.mark.parametrize("parallel", ["ddp", "fsdp"])
def test_workers_take_the_steps_of_one(parallel: str, base: dict[str, Any], crew: Workers) -> None:
    [alone] = crew.call(1, train, base)
    for of_two in crew.call(2, train, base | {"parallel": parallel, "micro_batch_size": 1}):
        assert of_two.losses == pytest.approx(alone.losses, abs=1e-4)
        assert of_two.evaluations == pytest.approx(alone.evaluations, abs=1e-4)


def test_a_resumed_run_takes_the_steps_of_one_that_was_not_interrupted(base: dict[str, Any], tmp_path: Path) -> None:
    whole, again = made(base), made(base)
    identity, losses = whole.identity("x"), []
    for event in whole.run():
        if isinstance(event, CheckpointDue) and event.step == 6:
            save_checkpoint(tmp_path / "kept", whole.state, identity, whole.tensors())
        if isinstance(event, Progress) and event.step > 6:
            losses.append(event.loss)
    again.restore(tmp_path / "kept")
    assert [event.loss for event in again.run() if isinstance(event, Progress)] == losses


def parent(folder: Path, tokenizer: Tokenizer, rows: int, tied: bool = True) -> Path:
    config = ModelConfig(
        vocab_size=rows, hidden_size=32, num_layers=2, num_heads=2, context_length=192, tie_embeddings=tied
    )
    torch.manual_seed(1)
    state = GPT(config).state_dict()
    return save_package(folder, config, state, tokenizer, {}).path


@pytest.mark.parametrize(("rows", "grown"), [(257, 320), (320, 320)], ids=["no spare rows", "spare rows"])
@pytest.mark.parametrize("tied", [True, False])
def test_a_model_that_continues_text_becomes_one_that_answers(
    rows: int, grown: int, tied: bool, base: dict[str, Any], tmp_path: Path
) -> None:
    folder = parent(tmp_path / "base", load_tokenizer("bytes"), rows, tied)
    shape = {"num_layers", "num_heads", "hidden_size", "context_length", "tokenizer"}
    config = build_config({n: v for n, v in base.items() if n not in shape} | {"init_from": str(folder)})
    inputs = prepare_inputs(config)
    assert (inputs.tokenizer.vocab_size, inputs.model.vocab_size) == (259, grown)
    before, started = open_package(folder).load_model(), dict(initial_parameters(inputs))
    weight = before.embed_tokens.weight[:257]
    assert torch.equal(started["embed_tokens.weight"][:257], weight)
    for token in (257, 258):  # a new token begins as the mean of the others
        assert torch.allclose(started["embed_tokens.weight"][token], weight.mean(0), atol=1e-6)
    model = build_model(inputs.config, inputs.model, started)
    trainer = Trainer(inputs.config, model, inputs.train, inputs.validation, torch.device("cpu"))
    evaluations = [event for event in trainer.run() if isinstance(event, Evaluation)]
    assert evaluations[-1].loss < evaluations[0].loss
    made = save_package(tmp_path / "made", inputs.model, model.state_dict(), inputs.tokenizer, {"bits_per_byte": 1.0})
    corpus = inputs.validation_corpus
    assert bits_per_byte(open_package(made.path), corpus, tmp_path) == pytest.approx(
        evaluations[-1].bits_per_byte, rel=1e-3
    )


def test_adapters_cannot_learn_new_tokens(base: dict[str, Any], tmp_path: Path) -> None:
    folder = parent(tmp_path / "base", load_tokenizer("bytes"), 320)
    given = {"objective": "chat", "data": base["data"], "init_from": str(folder), "cache_dir": str(tmp_path)}
    with pytest.raises(ConfigError, match="lora_rank is 4, but the model has no chat template yet"):
        prepare_inputs(build_config(given | {"lora_rank": 4}))
    chats = parent(tmp_path / "chats", chat_tokenizer(load_tokenizer("bytes")), 320)
    assert prepare_inputs(build_config(given | {"lora_rank": 4, "init_from": str(chats)})).tokenizer.chat_template


def test_a_model_without_a_template_cannot_be_judged_by_conversations(base: dict[str, Any], tmp_path: Path) -> None:
    folder = parent(tmp_path / "base", load_tokenizer("bytes"), 320)
    corpus = open_corpus(str(base["data"]), CONVERSATION, tmp_path)
    with pytest.raises(PackageError, match="it has no chat template, so it only continues text"):
        bits_per_byte(open_package(folder), corpus, tmp_path)


def test_progress_says_which_share_of_the_tokens_are_answers(base: dict[str, Any]) -> None:
    trainer = made(base)
    shares = [event.answered for event in trainer.run() if isinstance(event, Progress)]
    tokens = trainer.tokens_per_step
    assert shares == [trainer.batches.targets(step) / tokens for step in range(12)]
    assert all(share is not None and 0 < share < 1 for share in shares)
