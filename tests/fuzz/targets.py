"""What reads bytes from outside: packages, checkpoints, texts, settings, templates and request bodies.

Each target takes any bytes. It returns, or raises one of its refusals. The first byte of most inputs chooses which file
the rest of them is.
"""

import hashlib
import json
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from pydantic import ValidationError

from gptcore.chat import CHATML, ChatTemplate
from gptcore.config import ModelConfig
from gptcore.errors import FoundryError
from gptcore.model import GPT
from gptcore.package import MANIFEST, open_package, save_package
from gptcore.tokenizer import load_tokenizer
from serve_app.errors import ApiError
from serve_app.http.chat_schemas import ChatRequest, conversation_of
from serve_app.http.schemas import CompletionRequest, DetokenizeRequest, GenerateRequest, TokenizeRequest
from train_job.config import build_config
from train_job.data.conversations import CONVERSATION, messages_of
from train_job.data.corpus import open_corpus
from train_job.training.checkpoint import STATE, Identity, StoredModel, TrainState, save_checkpoint, verified
from train_job.yaml_files import read_yaml

LONGEST_ERROR = 20_000
Read = Callable[[bytes, Path], None]
"""Reads an input, in a folder that it may use."""


@dataclass(frozen=True)
class Target:
    """Something that reads bytes, and how it may refuse them."""

    read: Read
    seeds: Callable[[Path], Iterator[bytes]]
    """Inputs that are right, from which wrong ones are made."""
    refusals: tuple[type[Exception], ...] = (FoundryError,)

    def __call__(self, data: bytes, folder: Path) -> bool:
        """Whether the input was taken, and not refused."""
        try:
            self.read(data, folder)
        except self.refusals as error:
            if isinstance(error, FoundryError) and len(str(error)) > LONGEST_ERROR:
                raise RuntimeError(f"an error of {len(str(error)):,} characters") from error
            return False
        return True


CONFIG = ModelConfig(vocab_size=320, hidden_size=16, num_layers=1, num_heads=2, context_length=32)


def chosen(data: bytes, names: list[str]) -> tuple[str, bytes]:
    """The name that the first byte chooses, and the rest."""
    return names[data[0] % len(names) if data else 0], data[1:]


# --- packages and checkpoints -----------------------------------------------------------------------------------

PACKAGE_FILES = [
    "config.json",
    MANIFEST,
    "model.safetensors",
    "tokenizer.json",
    "tokenizer_config.json",
    "generation_config.json",
]


def good_package(folder: Path) -> Path:
    """A small package, made once for a folder."""
    package = folder / "good"
    if not package.exists():
        state = GPT(CONFIG).state_dict()
        save_package(package, CONFIG, state, load_tokenizer("bytes"), {})
    return package


def read_package(data: bytes, folder: Path) -> None:
    """Opens a package of which one file is the input, with the right hash, and loads the model."""
    good, package = good_package(folder), folder / "package"
    if not package.exists():
        shutil.copytree(good, package)
    name, content = chosen(data, PACKAGE_FILES)
    try:
        (package / name).write_bytes(content)
        if name != MANIFEST:
            manifest = json.loads((good / MANIFEST).read_text())
            manifest["files"][name] = hashlib.sha256(content).hexdigest()
            (package / MANIFEST).write_text(json.dumps(manifest))
        open_package(package).load_model()
    finally:
        for changed in (name, MANIFEST):
            shutil.copyfile(good / changed, package / changed)


def package_seeds(folder: Path) -> Iterator[bytes]:
    for number, name in enumerate(PACKAGE_FILES):
        yield bytes([number]) + (good_package(folder) / name).read_bytes()


def good_checkpoint(folder: Path) -> Path:
    """A checkpoint of a small model, made once for a folder."""
    checkpoint = folder / "good-checkpoint"
    if not checkpoint.exists():
        tensors = {name: value.clone() for name, value in GPT(CONFIG).state_dict().items()}
        save_checkpoint(checkpoint, TrainState(step=5), Identity("m" * 64, "t" * 64, "d" * 64), tensors)
    return checkpoint


def read_checkpoint(data: bytes, folder: Path) -> None:
    """Verifies and reads a checkpoint of which one file is the input; a changed shard has the right hash."""
    good, checkpoint = good_checkpoint(folder), folder / "checkpoint"
    if not checkpoint.exists():
        shutil.copytree(good, checkpoint)
    names = sorted(file.name for file in good.iterdir())
    name, content = chosen(data, names)
    try:
        (checkpoint / name).write_bytes(content)
        if name != STATE:
            record = json.loads((good / STATE).read_text())
            record.pop("sha256")
            record["files"][name] = hashlib.sha256(content).hexdigest()
            digest = hashlib.sha256(json.dumps(record, sort_keys=True).encode()).hexdigest()
            (checkpoint / STATE).write_text(json.dumps(record | {"sha256": digest}))
        verified(checkpoint)
        stored = StoredModel(checkpoint)
        for tensor in list(stored):
            assert isinstance(stored[tensor], torch.Tensor)
    finally:
        for changed in (name, STATE):
            shutil.copyfile(good / changed, checkpoint / changed)


def checkpoint_seeds(folder: Path) -> Iterator[bytes]:
    for number, file in enumerate(sorted(good_checkpoint(folder).iterdir())):
        yield bytes([number]) + file.read_bytes()


# --- texts, conversations, settings -----------------------------------------------------------------------------

TEXT_FILES = [
    "data.jsonl",
    "data.json",
    "data.csv",
    "data.txt",
    "data.jsonl.gz",
    "data.parquet",
    "data.jsonl.zst",
    "data.zip",
]
MESSAGES = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "1+1?"},
    {"role": "assistant", "content": "2"},
]


def read_conversations(data: bytes, folder: Path) -> None:
    """Reads a file of conversations of some kind."""
    for document in documents(data, folder, CONVERSATION):
        assert messages_of(document)


def read_texts(data: bytes, folder: Path) -> None:
    """Reads a file of texts of some kind."""
    for document in documents(data, folder, "text"):
        document.encode()


def documents(data: bytes, folder: Path, column: str) -> Iterator[str]:
    name, content = chosen(data, TEXT_FILES)
    (folder / name).write_bytes(content)
    for piece in open_corpus(str(folder / name), column, folder / "cache").pieces:
        yield from piece.documents()


def conversation_seeds(folder: Path) -> Iterator[bytes]:
    shaped = [
        {"messages": MESSAGES},
        {"conversations": [{"from": "human", "value": "hi"}, {"from": "gpt", "value": "hello"}]},
        {"prompt": "hi", "completion": "hello"},
    ]
    for line in shaped:
        yield b"\0" + json.dumps(line).encode() + b"\n"
    yield b"\1" + json.dumps(shaped).encode()


def text_seeds(folder: Path) -> Iterator[bytes]:
    yield b"\0" + b'{"text": "one"}\n{"text": "two"}\n'
    yield b"\1" + b'[{"text": "one"}, {"text": "two"}]'
    yield b"\2" + b'text,other\n"one, two",3\n'
    yield b"\3" + "Grüße\n\nan alle\n".encode()


def read_settings(data: bytes, folder: Path) -> None:
    """Reads a YAML file of settings."""
    (folder / "settings.yaml").write_bytes(data)
    build_config(read_yaml(str(folder / "settings.yaml")))


def settings_seeds(folder: Path) -> Iterator[bytes]:
    yield b"preset: tiny\nmax_steps: 10\nlearning_rate: 1e-3\ndata: builtin\n"
    yield b"preset: &name tiny\ndata: builtin\nname: *name\n"


# --- templates and requests -------------------------------------------------------------------------------------


def render_template(data: bytes, folder: Path) -> None:
    """Compiles a chat template and renders a conversation."""
    ChatTemplate(data.decode("utf-8", "replace"), load_tokenizer("bytes")).render(MESSAGES)


def template_seeds(folder: Path) -> Iterator[bytes]:
    yield CHATML.encode()
    yield b"{% for m in messages if m.role == 'user' %}{{ m.content | trim | upper }}{% else %}none{% endfor %}"
    yield b"{% macro a(b) %}{{ b[:3] ~ 'x' * 3 }}{% endmacro %}{% set n = namespace(i=0) %}{{ a(messages[0].content) }}"
    yield b"{% if not messages %}{{ raise_exception('no') }}{% endif %}{{ strftime_now('%Y') }}{{ messages | tojson }}"


BODIES = {
    "generate": GenerateRequest,
    "completions": CompletionRequest,
    "chat": ChatRequest,
    "tokenize": TokenizeRequest,
    "detokenize": DetokenizeRequest,
}


def read_body(data: bytes, folder: Path) -> None:
    """Checks the body of a request as the routes do."""
    name, content = chosen(data, list(BODIES))
    body = BODIES[name].model_validate_json(content)
    if isinstance(body, ChatRequest):
        conversation_of(body.messages)
    if isinstance(body, CompletionRequest):
        body.params()
        body.prompts()


def body_seeds(folder: Path) -> Iterator[bytes]:
    bodies = [
        {
            "prompt": "a",
            "max_new_tokens": 3,
            "temperature": 0.5,
            "top_p": 0.9,
            "stop": ["x"],
            "seed": 1,
            "stream": True,
        },
        {"model": "m", "prompt": ["a", "b"], "max_tokens": 3, "n": 2, "logprobs": 1, "echo": False},
        {"model": "m", "messages": MESSAGES, "max_completion_tokens": 3, "top_logprobs": 2, "logprobs": True},
        {"prompt": "a"},
        {"tokens": [1, 2]},
    ]
    for number, body in enumerate(bodies):
        yield bytes([number]) + json.dumps(body).encode()


TARGETS = {
    "package": Target(read_package, package_seeds),
    "checkpoint": Target(read_checkpoint, checkpoint_seeds),
    "conversations": Target(read_conversations, conversation_seeds),
    "texts": Target(read_texts, text_seeds),
    "settings": Target(read_settings, settings_seeds),
    "template": Target(render_template, template_seeds),
    "body": Target(read_body, body_seeds, (ValidationError, ApiError)),
}
