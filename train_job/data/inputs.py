"""Prepares the inputs of the training loop: tokenizer, token shards, model shape and, for fine-tuning, the parent.

In: a TrainConfig. Out: `Inputs`, and a `GPT` with the run's initial weights. All of them are content-addressed or
pinned, so a worker on another machine, or a resumed run, gets the same.
"""

import hashlib
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from gptcore.chat import chat_template, chat_tokenizer, template_source
from gptcore.config import ModelConfig
from gptcore.devices import pick_device
from gptcore.errors import ConfigError, CorpusError
from gptcore.files import remove_drafts, whole_folder
from gptcore.home import expanded, home
from gptcore.hub import resolve
from gptcore.lora import check_adapters
from gptcore.model import GPT, initial_weights
from gptcore.package import Package, open_package
from gptcore.progress import doing
from gptcore.tokenizer import (
    BYTES_PER_TOKEN,
    Tokenizer,
    load_tokenizer,
    parse_tokenizer,
    read_tokenizer,
    save_tokenizer,
)
from train_job.config import TUNED_LENGTH, TrainConfig
from train_job.data.batches import Batches
from train_job.data.conversations import CONVERSATION, contents
from train_job.data.corpus import Corpus, open_corpus, split, without
from train_job.data.fetch import Origin
from train_job.data.folders import summarize
from train_job.data.packing import ConversationBatches, training_batches
from train_job.data.shards import TokenSet, prepare
from train_job.files import writing

VOCAB_MULTIPLE = 64
"""Embedding rows are padded to a multiple of this for fast matrix products; the extra ids are never sampled."""
CACHED = ("downloads", "scans", "shards", "tokenizers", "unpacked")
"""The cache's folders."""


@dataclass(frozen=True)
class Inputs:
    """The inputs of a run. `parent` is the package to fine-tune, if any; `config` is resolved with its settings."""

    config: TrainConfig
    tokenizer: Tokenizer
    train_corpus: Corpus
    validation_corpus: Corpus
    train: TokenSet
    validation: TokenSet
    model: ModelConfig
    steps_per_epoch: float
    parent: Package | None = None
    notes: tuple[str, ...] = ()  # remarks on the text for the user


def cache_dir(config: TrainConfig) -> Path:
    """The folder of token shards, learned tokenizers and downloads."""
    if not config.cache_dir or shard_store(config):
        return home() / ".cache"
    return expanded(config.cache_dir).absolute()


def shard_store(config: TrainConfig) -> str | None:
    """The URL where machines share token shards, if cache_dir is one; each also has a copy in its own cache."""
    return config.cache_dir if config.cache_dir and "://" in config.cache_dir else None


def prepare_inputs(
    config: TrainConfig,
    mapper: Callable[..., Any] = map,
    refresh: bool = True,
    begun: Mapping[str, Sequence[Origin]] | None = None,
) -> Inputs:
    """Opens, splits and tokenises the corpus; `mapper` runs tokenising in parallel.

    `refresh` and `begun` (by corpus name) are passed to `open_corpus`. Raises CorpusError, TokenizerError,
    PackageError, HubError or ConfigError: all wrong input is found here.
    """
    cache = cache_dir(config)
    if not config.use_gpu:
        device = pick_device(config.device).type
        if device != "cpu" and config.workers[1] > 1:
            raise ConfigError(
                f"{config.num_workers} workers would share one {device} device; add --use-gpu or --device cpu"
            )
    for kind in CACHED:
        remove_drafts(cache / kind)

    def opened(data: str) -> Corpus:
        origins = (begun or {}).get(data, ())
        with doing(f"reading {data}"):
            column = CONVERSATION if config.objective == "chat" else config.text_column
            return open_corpus(data, column, cache, refresh, origins, config.document_separator or "")

    corpus = opened(config.data)
    if config.val_data:
        train, validation = corpus, opened(config.val_data)
    else:
        train, validation = split(corpus, config.val_fraction)
    shared = 0
    if config.objective == "chat":
        with doing(f"looking for conversations of {train.name} among those for validation"):
            validation, shared = without(validation, train)
        if next(validation.documents(), None) is None:
            raise CorpusError(
                f"every conversation for validation is in the training split too: {shared:,}; expected others, or a "
                "val_data of its own"
            )
    parent = open_package(resolve(config.init_from)) if config.init_from else None
    if not parent and config.objective == "text":
        check_size(config, train)
    tokenizer = parent.tokenizer if parent else _tokenizer(config, train)
    if config.objective == "chat":
        tokenizer = chat_tokenizer(tokenizer)
    shape = _child_shape(config, parent, tokenizer) if parent else config.model_config(padded(tokenizer.vocab_size))
    if parent and config.sequence_length is None:
        config = replace(config, sequence_length=min(shape.context_length, TUNED_LENGTH))
    check_context(config, shape)
    if config.lora:
        check_adapters(shape, config.lora)
    for prompt in config.sample_prompts:
        if (length := len(sample_prompt(config, tokenizer, prompt))) >= shape.context_length:
            raise ConfigError(
                f"the sample prompt {prompt[:40]!r} has {length} tokens; the model's context "
                f"of {shape.context_length} leaves no room for a continuation"
            )
    store = shard_store(config)
    tokens, judge = (prepare(corpus, tokenizer, cache, mapper, store) for corpus in (train, validation))
    # Raises if the text is too short.
    batches = training_batches(tokens, config.context, config.batch_size, config.seed, config.stride)
    log, every = config.intervals(config.planned_steps(batches.steps_per_epoch)[0])
    config = replace(config, log_interval=log, eval_interval=every)
    notes = (*notes_on(config, (train, validation), look=refresh), *notes_on_rows(batches, tokens, shared))
    return Inputs(config, tokenizer, train, validation, tokens, judge, shape, batches.steps_per_epoch, parent, notes)


def notes_on(config: TrainConfig, corpora: Sequence[Corpus], look: bool) -> Iterator[str]:
    """Remarks on files left out and settings without effect; with `look`, the text is searched for the separator."""
    names = " and ".join(dict.fromkeys(corpus.name for corpus in corpora))
    for name, left_out in {corpus.name: corpus.left_out for corpus in corpora}.items():
        if left_out:
            yield f"left out of {name}: {summarize(left_out)}"
    pieces = [piece for corpus in corpora for piece in corpus.pieces]
    if config.text_column != TrainConfig.text_column and not any(piece.column for piece in pieces):
        yield f"text_column {config.text_column!r} has no effect: {names} has no columns"
    if config.workers[1] == 1 and (config.parallel == "fsdp" or config.reduce_precision == "bf16"):
        yield "parallel and reduce_precision have no effect with one worker"
    separator = config.document_separator
    if separator and look and not any(separator in text for piece in pieces for text in piece.texts()):
        yield f"document_separator {separator!r} has no effect: it does not occur in {names}"


def notes_on_rows(batches: Batches | ConversationBatches, tokens: TokenSet, shared: int) -> Iterator[str]:
    """How conversations fill the rows of a batch, and what became of those that do not fit."""
    if isinstance(batches, Batches):
        return
    rows, length = len(batches.rows), batches.context_length
    answered = tokens.num_targets / tokens.num_tokens
    yield (
        f"packed into {rows:,} rows of {length} tokens; {answered:.0%} of the tokens are answers, and only these are "
        "learned"
    )
    if batches.rows.cut:
        yield f"{batches.rows.cut:,} conversations are longer than {length} tokens, and cut into parts"
    if shared:
        yield f"left out of validation: {shared:,} conversations that are in the training split as well"


def sample_prompt(config: TrainConfig, tokenizer: Tokenizer, prompt: str) -> list[int]:
    """The ids that a sample continues: those of the text, or of a conversation that it begins."""
    if config.objective == "text":
        return tokenizer.encode_prompt(prompt)
    template = chat_template(tokenizer)
    return template.encode([{"role": "user", "content": prompt}]) if template else []


def check_size(config: TrainConfig, train: Corpus) -> None:
    """Raises CorpusError if the training split cannot fill one sequence, whatever the tokenizer."""
    size, most = 0, 1  # at most one token per byte, and one after each document
    for text in train.documents():
        if most + len(text) > config.context:  # it has at least as many bytes, and counting those takes longer
            return
        size, most = size + len(text.encode()), most + len(text.encode()) + 1
        if most > config.context:
            return
    if not size:
        raise CorpusError(f"{train.name} holds no text to train on; its documents are empty")
    flag = "--sequence-length" if config.sequence_length else "--context-length"
    wanted = max(config.context, BYTES_PER_TOKEN * parse_tokenizer(config.tokenizer) if ":" in config.tokenizer else 0)
    whole = wanted if config.val_data else round(wanted / (1 - config.val_fraction))
    raise CorpusError(
        f"{train.name} is too small to train on: {size} bytes are left for training, at most {most} tokens, "
        f"and a training sequence has {config.context} + 1. {config.tokenizer} needs about {whole:,} bytes of text; "
        f"this text is enough with {flag} {most - 1} --tokenizer bytes; a smaller --val-fraction leaves a little more"
    )


def check_context(config: TrainConfig, shape: ModelConfig) -> None:
    """Raises ConfigError if the training sequences are longer than the model's context."""
    if config.context > shape.context_length:
        raise ConfigError(
            f"sequence_length {config.context} is more than the model's context_length {shape.context_length}"
        )


def initial_parameters(inputs: Inputs) -> Iterator[tuple[str, torch.Tensor]]:
    """Name and value of each of the parent's parameters, with rows for all tokens; none without a parent."""
    if inputs.parent:
        for name, weight in inputs.parent.parameters(dtype=None):
            per_token = name in ("embed_tokens.weight", "lm_head.weight")
            sizes = inputs.parent.tokenizer.vocab_size, inputs.tokenizer.vocab_size, inputs.model.vocab_size
            yield name, grown(weight, *sizes) if per_token else weight


def build_model(config: TrainConfig, shape: ModelConfig, parent: Mapping[str, torch.Tensor] | None = None) -> GPT:
    """A GPT with weights from the seed, or with the parent's parameters, tied ones once."""
    torch.manual_seed(config.seed)
    model = GPT(shape)
    if parent:
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                parameter.copy_(parent[name])
    return model


def seeded_weights(config: TrainConfig, shape: ModelConfig) -> Iterator[tuple[str, torch.Tensor]]:
    """The weights that `build_model` gives a GPT, by name, one tensor at a time."""
    torch.manual_seed(config.seed)
    yield from initial_weights(shape)


def _tokenizer(config: TrainConfig, train: Corpus) -> Tokenizer:
    """The tokenizer that the config names; a learned one is cached."""
    parse_tokenizer(config.tokenizer)

    def texts() -> Iterator[str]:
        return contents(train.documents()) if train.holds_conversations else train.documents()

    if not config.tokenizer.startswith("bpe:"):
        return load_tokenizer(config.tokenizer, texts)
    key = hashlib.sha256(f"{config.tokenizer} {train.fingerprint}".encode()).hexdigest()[:32]
    folder = cache_dir(config) / "tokenizers" / key
    if not (folder / "tokenizer.json").exists():
        with doing(f"learning the tokenizer {config.tokenizer}"):
            learned = load_tokenizer(config.tokenizer, texts)
        shutil.rmtree(folder, ignore_errors=True)  # an earlier version could leave a part of one
        with writing(folder.parent), whole_folder(folder, replace=False) as draft:  # another run may learn the same
            save_tokenizer(learned, draft)
    return replace(read_tokenizer(folder), name=config.tokenizer)


def padded(vocab_size: int) -> int:
    """The rows of embedding for a vocabulary of this size."""
    return -(-vocab_size // VOCAB_MULTIPLE) * VOCAB_MULTIPLE


def _child_shape(config: TrainConfig, parent: Package, tokenizer: Tokenizer) -> ModelConfig:
    """The parent's shape, with rows for more tokens if it lacks them.

    Raises ConfigError if adapters would have to learn those.
    """
    if config.lora_rank and config.objective == "chat" and template_source(parent.tokenizer) is None:
        raise ConfigError(
            f"lora_rank is {config.lora_rank}, but the model has no chat template yet, and adapters cannot learn the "
            "tokens of one; leave lora_rank out, or start from a model that chats"
        )
    rows = parent.config.vocab_size
    rows = rows if tokenizer.vocab_size <= rows else padded(tokenizer.vocab_size)
    return replace(parent.config, dropout=config.model.get("dropout", 0.0), vocab_size=rows)


def grown(weight: torch.Tensor, known: int, tokens: int, rows: int) -> torch.Tensor:
    """A matrix (V, C) of one row per token with as many `rows`, of which the first `known` were trained.

    The rows of new tokens, up to `tokens`, and all that are added become the mean of those: a new token begins as an
    average one (Hewitt 2021).
    """
    if tokens <= known:
        return weight
    mean = weight[:known].float().mean(0).to(weight.dtype)
    weight = torch.cat([weight, mean.expand(max(0, rows - len(weight)), -1)])
    weight[known:tokens] = mean
    return weight
