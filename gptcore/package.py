"""Writes and reads model packages; the only module that knows their form on disk.

A package is a Hugging Face model folder, which `transformers`, vLLM and llama.cpp's converter can read, with an
additional `foundry.json` (format, sha256 of each file, training summary). The loader also reads other folders of these
families: OpenAI's GPT-2, a published Qwen3 with its own tokenizer, fine-tunes with their weights in several files.
Weights are safetensors only; nothing is unpickled.
"""

import hashlib
import json
import os
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from gptcore.config import ModelConfig
from gptcore.documents import read_json, require_regular
from gptcore.errors import PackageError, TokenizerError, excerpt
from gptcore.files import sha256, whole_folder
from gptcore.hf_format import (
    count_parameters,
    empty_model,
    from_published,
    parse_config,
    published_config,
    published_name,
    tensor_shapes,
    to_published,
)
from gptcore.hf_tokenizer import DECIDING, MODEL_FILES, TOKENIZER, without_tokenizer
from gptcore.memory import free_memory, require_memory
from gptcore.model import GPT
from gptcore.model_card import model_card
from gptcore.quantised import GROUP, MOST_VALUE, Quantised, scheme_of
from gptcore.rotary import rotary_tables
from gptcore.tokenizer import Tokenizer, read_tokenizer, save_tokenizer, tokenizer_files
from gptcore.weights import (
    DTYPE_NAMES,
    WEIGHTS,
    StoredTensor,
    copied_bytes,
    full,
    has_untied_head,
    is_plain,
    match_config,
    read_headers,
    read_stored,
    require_finite,
    weight_files,
    write_tensors,
)

FORMAT_VERSION = 1
MANIFEST, CONFIG = "foundry.json", "config.json"
BASE_TYPE = "base_model_type"
"""In config.json of quantised weights: the model_type, which then says that only gptcore opens them."""
POSITIONS = published_name("embed_positions.weight", "gpt2")
MOST_BESIDE = 1 << 26
"""Most bytes of a file other than the weights, more than any known tokenizer has."""
PICKLE = (
    "is a pickle, which could run any code, so it is not opened. If you trust it, convert it to "
    f"{WEIGHTS}: AutoModelForCausalLM.from_pretrained(FOLDER).save_pretrained(FOLDER)"
)
PICKLES = ("pytorch_model.bin", "pytorch_model.bin.index.json", "model.pt", "model.pth")


@dataclass(frozen=True)
class Package:
    """An opened package. `info` is the content of foundry.json, {} without one."""

    path: Path
    config: ModelConfig
    tokenizer: Tokenizer
    info: dict[str, Any] = field(repr=False)
    stored: ModelConfig | None = field(default=None, repr=False)
    """The shape in the files, if `config` has a shorter context."""

    @property
    def weights(self) -> str:
        """int8 or int4 if its matrices are stored so, else empty."""
        return scheme_of(self.info)

    def with_context(self, length: int) -> "Package":
        """The same package with a context of at most `length` tokens, whose positions take less memory."""
        if length >= self.config.context_length:
            return self
        return replace(self, config=replace(self.config, context_length=length), stored=self.stored or self.config)

    def memory(self, dtype: torch.dtype = torch.float32) -> dict[str, int]:
        """The bytes that `load_model` allocates, by purpose. Raises PackageError for unusable weights."""
        c, places = self.config, self.places()
        positions = 4 * 4 * c.head_size * c.context_length if c.rotary else 0  # angles, cos, sin and a copy
        return {"weights": copied_bytes(c, places, dtype), f"a context of {c.context_length:,} tokens": positions}

    def load_model(self, device: str | torch.device = "cpu", dtype: torch.dtype = torch.float32) -> GPT:
        """The network in eval mode.

        Raises PackageError if the weights are unreadable, of another shape or not finite, and NoMemory.
        """
        require_memory(f"the model in {self.path}", self.memory(dtype), free_memory(torch.device(device)))
        model = empty_model(self.config)
        state = dict(self.parameters(device, dtype))
        if self.config.tie_embeddings:
            state["lm_head.weight"] = state["embed_tokens.weight"]
        model.load_state_dict(state, assign=True)
        if self.config.tie_embeddings:
            model.lm_head.weight = model.embed_tokens.weight
        if self.config.rotary:  # positions stay in fp32, whatever the weights' dtype
            model.cos, model.sin = (table.to(device) for table in rotary_tables(self.config))
        return model.eval()

    def parameters(
        self, device: str | torch.device = "cpu", dtype: torch.dtype | None = torch.float32
    ) -> Iterator[tuple[str, Tensor]]:
        """Name and value of each of the network's parameters, tied ones once, read one at a time.

        If `dtype` is None, they are in the dtype in which they are stored, or quantised ones in float32.

        Raises PackageError if the weights are unreadable, of another shape or not finite.
        """
        return from_published(empty_model(self.config), self.published_tensors(device, dtype))

    def stored_parameters(self) -> Iterator[tuple[str, Tensor | Quantised]]:
        """`parameters` as they are stored: the matrices of quantised weights remain so.

        Raises PackageError as `parameters` does.
        """
        return from_published(empty_model(self.config), self.published_stored())

    def published_stored(self) -> Iterator[tuple[str, Tensor | Quantised]]:
        """`stored_parameters` in Hugging Face's names, and in its layout if not quantised."""
        for name, stored in self._stored_tensors():
            require_finite(name, stored if isinstance(stored, Tensor) else stored.scales.float() * MOST_VALUE)
            yield name, stored

    def weights_hash(self) -> str:
        """A hash of the weights' files, in hexadecimal. It reads them unless foundry.json has their sha256."""
        listed = self.info.get("files", {})
        digests = [listed.get(file.name) or sha256(file) for file in weight_files(self.path)]
        return hashlib.sha256(" ".join(digests).encode()).hexdigest()

    def places(self) -> dict[str, StoredTensor]:
        """Where each tensor lies, by its published name, in the model's order. Raises PackageError."""
        return match_config(self.stored or self.config, read_headers(self.path, self.config.family), self.weights)

    def published_tensors(
        self, device: str | torch.device = "cpu", dtype: torch.dtype | None = torch.float32
    ) -> Iterator[tuple[str, Tensor]]:
        """`parameters` in Hugging Face's names and layout, in the order of `tensor_shapes`."""
        for name, stored in self._stored_tensors():
            tensor = full(name, stored).to(device=device, dtype=dtype)
            require_finite(name, tensor)  # now, while it is in the CPU caches
            yield name, tensor

    def _stored_tensors(self) -> Iterator[tuple[str, Tensor | Quantised]]:
        for name, stored in read_stored(self.places()):
            if name == POSITIONS and isinstance(stored, Tensor):
                stored = stored[: self.config.context_length]
            yield name, stored


def save_package(
    folder: Path | str,
    config: ModelConfig,
    state: Mapping[str, Tensor],
    tokenizer: Tokenizer,
    training: dict[str, Any],
) -> Package:
    """Write a package at `folder`, replacing an earlier one, and open it. `state` uses gptcore.model.GPT's names.

    It appears whole or not at all. Raises PackageError if the parts do not match, if the folder contains something
    else, or if it cannot be written.
    """
    folder = Path(folder).absolute()
    _check_vocabulary(config, tokenizer, folder)
    if folder.exists() and not (folder / MANIFEST).is_file() and (not folder.is_dir() or any(folder.iterdir())):
        raise PackageError(f"{folder} exists and is not a model package; choose another folder")
    embedding = state.get("embed_tokens.weight")
    dtype = torch.float32 if embedding is None else embedding.dtype  # to_published says what is missing
    shapes = [(name, shape, DTYPE_NAMES[dtype]) for name, shape in tensor_shapes(config)]
    tensors = to_published(empty_model(config), state)
    raw = {**published_config(config), "torch_dtype": str(dtype).removeprefix("torch.")}
    return write_package(Package(folder, config, tokenizer, {"training": training}), raw, shapes, tensors)


def write_package(
    package: Package,
    raw: dict[str, Any],
    shapes: Iterable[tuple[str, tuple[int, ...], str]],
    tensors: Iterable[tuple[str, Tensor]],
) -> Package:
    """Write `package` at its path, with `raw` as config.json, and open it. `shapes` and `tensors`: see write_tensors.

    It appears whole or not at all. Raises PackageError if it cannot be written.
    """
    folder, config, tokenizer = package.path, package.config, package.tokenizer
    try:
        with whole_folder(folder) as partial:
            write_tensors(partial / WEIGHTS, shapes, tensors)
            save_tokenizer(tokenizer, partial)
            _write_json(partial / CONFIG, {**raw, **_special_ids(tokenizer)})
            _write_json(partial / "generation_config.json", _generation_config(config, tokenizer))
            info: dict[str, Any] = {
                "format": FORMAT_VERSION,
                "tokenizer": {"name": tokenizer.name, "fingerprint": tokenizer.fingerprint},
                **package.info,
            }
            card = model_card(folder.name, describe(package), package.info["training"], package.weights)
            (partial / "README.md").write_text(card, encoding="utf-8")
            files = {file.name: sha256(file) for file in sorted(partial.iterdir())}
            _write_json(partial / MANIFEST, {**info, "files": files})
    except OSError as error:
        raise PackageError(f"the package {folder} cannot be written: {error}") from error
    return open_package(folder, verify=False)


def open_package(folder: Path | str, verify: bool = True) -> Package:
    """Open the package at `folder`; with `verify`, check each file against its sha256 in foundry.json.

    Raises PackageError, naming the file, if something is missing, altered, truncated or of an unknown kind.
    """
    folder = Path(folder).absolute()
    if not folder.is_dir():
        reason = "it is not a folder" if folder.exists() else "no such folder"
        raise PackageError(f"there is no package at {folder}: {reason}")
    info = _read_manifest(folder) if os.path.lexists(folder / MANIFEST) else {}
    try:
        scheme = scheme_of(info)
    except PackageError as error:
        raise PackageError(f"{folder / MANIFEST}: {error}") from error
    listed = {folder / name: digest for name, digest in info.get("files", {}).items()}
    weights = {file: listed[file] for file in listed if file.suffix == ".safetensors"}
    _check_unaltered({file: listed[file] for file in listed if file not in weights}, MOST_BESIDE, verify)
    _check_files_exist(folder)
    if info:
        _check_listed(folder, info["files"])
    try:
        raw = read_json(folder / CONFIG)
        config = parse_config({**raw, "model_type": raw.get(BASE_TYPE)} if scheme else raw)
    except PackageError as error:
        message = str(error)
        raise PackageError(message if message.startswith(str(folder)) else f"{folder / CONFIG}: {message}") from error
    try:
        tokenizer = read_tokenizer(folder)
    except TokenizerError as error:
        raise PackageError(str(error)) from error
    _check_vocabulary(config, tokenizer, folder)
    _check_unaltered(weights, _most_of_weights(config), verify)
    try:
        found = read_headers(folder, config.family)
        if has_untied_head(config, found):
            config = replace(config, tie_embeddings=False)
        match_config(config, found, scheme)
    except PackageError as error:
        message = str(error)
        raise PackageError(
            message if str(folder) in message else f"{folder / WEIGHTS} cannot be used: {message}"
        ) from error
    if info and info["tokenizer"]["fingerprint"] != tokenizer.fingerprint:
        raise PackageError(f"the tokenizer in {folder} is not the one that the model was trained with")
    return Package(folder, config, tokenizer, info)


def _check_unaltered(files: Mapping[Path, str], most: int, verify: bool) -> None:
    """Raises PackageError for a file that differs from the manifest or has more than `most` bytes."""
    for file, digest in files.items():
        require_regular(file)
        size = file.stat().st_size
        if size > most:
            raise PackageError(f"{file} has {size:,} bytes; for this model it can have at most {most:,}")
        if verify and sha256(file) != digest:
            raise PackageError(f"{file} was altered or cut short: its sha256 is not the one in {MANIFEST}")


def _most_of_weights(config: ModelConfig) -> int:
    """Most bytes of a weights file: eight per parameter, its header, and the masks of old GPT-2 files."""
    masks = 0 if config.rotary else 4 * config.num_layers * config.context_length**2
    return 8 * count_parameters(config) + MOST_BESIDE + masks


def missing_files(folder: Path) -> list[str]:
    """Names of required files that `folder` lacks: config, weights, tokenizer."""
    files = [folder / CONFIG, *weight_files(folder)]
    if not all((folder / name).is_file() for name in ("vocab.json", "merges.txt")):
        files.append(folder / "tokenizer.json")
    return [file.name for file in files if not file.is_file()]


def describe(package: Package) -> str:
    """A few lines for people: the network, its tokenizer, and the training summary of foundry.json."""
    c, tokenizer = package.config, package.tokenizer
    heads = f"{c.num_heads} heads" + (f" ({c.kv_heads} for keys and values)" if c.kv_heads != c.num_heads else "")
    lines = [
        f"{c.family}, {count_parameters(c) / 1e6:.1f} M parameters: {c.num_layers} layers, {heads}, "
        f"hidden size {c.hidden_size}, context {c.context_length} tokens",
        f"tokenizer {tokenizer.name}: {tokenizer.vocab_size:,} tokens",
    ]
    for key, value in package.info.get("training", {}).items():
        if isinstance(value, str | int | float):
            lines.append(f"{key.replace('_', ' ')}: {f'{value:.4g}' if isinstance(value, float) else value}")
    if package.weights:
        measured = "bits_per_byte" in package.info.get("training", {})
        since = ", quantised after bits per byte were measured" if measured else ""
        lines.append(f"weights: {package.weights} in groups of {GROUP}{since}")
    return "\n".join(lines)


def _special_ids(tokenizer: Tokenizer) -> dict[str, Any]:
    if tokenizer.published:
        return tokenizer.published.special_ids()
    ends = tokenizer.eot if len(tokenizer.stops) == 1 else [*tokenizer.stops]
    return {"bos_token_id": tokenizer.eot, "eos_token_id": ends}


def _generation_config(config: ModelConfig, tokenizer: Tokenizer) -> dict[str, Any]:
    """Defaults for `generate` in transformers: stop at the end of text, never choose a padding row."""
    padding = list(range(tokenizer.vocab_size, config.vocab_size))
    ids = _special_ids(tokenizer)
    settings = {**ids, "pad_token_id": ids.get("pad_token_id", tokenizer.eot), "do_sample": True}
    return {**settings, "suppress_tokens": padding} if padding else settings


def _read_manifest(folder: Path) -> dict[str, Any]:
    info = read_json(folder / MANIFEST)
    if info.get("format") != FORMAT_VERSION or isinstance(info.get("format"), bool):
        raise PackageError(
            f"{folder / MANIFEST} has format {excerpt(info.get('format'))}; this version reads format {FORMAT_VERSION}"
        )
    files, tokenizer = info.get("files"), info.get("tokenizer")
    if not isinstance(files, dict) or not isinstance(tokenizer, dict) or "fingerprint" not in tokenizer:
        raise PackageError(f"{folder / MANIFEST} is incomplete: it lacks the files' sha256 or the tokenizer's")
    for name, digest in files.items():
        if not is_plain(name):
            raise PackageError(
                f"{folder / MANIFEST} names the file {excerpt(name)}; expected plain names in the folder"
            )
        if not isinstance(digest, str):
            raise PackageError(f"{folder / MANIFEST} has {excerpt(digest)} for {excerpt(name)}; expected its sha256")
    if not isinstance(info.setdefault("training", {}), dict):
        raise PackageError(f"{folder / MANIFEST} has {excerpt(info['training'])} for training; expected an object")
    return info


def _check_listed(folder: Path, files: Mapping[str, Any]) -> None:
    """Raises PackageError if the manifest lacks a file that will be opened."""
    beside = [folder / name for name in (*DECIDING, *MODEL_FILES) if (folder / name).exists()]
    for file in (folder / CONFIG, *weight_files(folder), *tokenizer_files(folder), *beside):
        if file.name not in files:
            raise PackageError(f"{folder / MANIFEST} is incomplete: it lacks the sha256 of {file.name}")


def _check_files_exist(folder: Path) -> None:
    """Raises PackageError for missing files and for dangling links, which an interrupted download leaves."""
    pickles = [name for name in PICKLES if (folder / name).is_file()]
    if pickles and [file.name for file in weight_files(folder)] == [WEIGHTS] and not (folder / WEIGHTS).exists():
        raise PackageError(f"{folder / pickles[0]} {PICKLE}")
    for file in (*weight_files(folder), *(folder / name for name in missing_files(folder))):
        if file.name == TOKENIZER and not os.path.lexists(file):
            raise PackageError(without_tokenizer(folder))
        require_regular(file)


def _check_vocabulary(config: ModelConfig, tokenizer: Tokenizer, folder: Path) -> None:
    if tokenizer.vocab_size > config.vocab_size:
        raise PackageError(
            f"the vocabulary of {folder} does not match: the tokenizer {tokenizer.name} has {tokenizer.vocab_size} "
            f"tokens, the model only {config.vocab_size}"
        )


def _write_json(file: Path, value: dict[str, Any]) -> None:
    file.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")
