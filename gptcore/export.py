"""Writes a model as a GGUF file, which llama.cpp, Ollama and LM Studio run, on the command line.

    python -m gptcore.export PACKAGE_OR_URI model.gguf

The file holds the weights, a tensor at a time, the tokenizer (`gptcore.gguf_tokenizer`) and the metadata. Beside it is
model.Modelfile, for Ollama. Both are written whole or not at all. What GGUF cannot say is refused by name.
"""

import logging
import math
import re
import shlex
import sys
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from gptcore.chat import template_source
from gptcore.cli import Parser
from gptcore.config import ModelConfig
from gptcore.errors import ExportError, FoundryError, did_you_mean, excerpt
from gptcore.files import whole_file, write_file
from gptcore.gguf_tokenizer import add_tokenizer
from gptcore.hf_format import count_parameters, is_transposed, tensor_shapes
from gptcore.hub import KINDS, resolve
from gptcore.package import Package, describe, open_package
from gptcore.progress import doing
from gptcore.rotary import rotary_frequencies
from gptcore.units import count, gib

WEIGHTS = {"bf16": "BF16", "q8_0": "Q8_0", "q4_0": "Q4_0", "f32": "F32"}
"""--weights -> the type of the matrices in the file."""
ARCHITECTURES = {"gpt2": "gpt2", "qwen3": "qwen3", "qwen2": "qwen2", "llama": "llama", "mistral": "llama"}
"""Family -> llama.cpp's architecture."""
OLLAMA_CONTEXT = 4096
"""Tokens of context that Ollama takes by default."""


@dataclass(frozen=True)
class Export:
    """What was written."""

    file: Path
    modelfile: Path
    kept: bool
    """Whether the Modelfile was there already, and was left as it is."""
    notes: list[str]
    """What llama.cpp does differently."""


def export(package: Package, file: Path, weights: str = "bf16", name: str = "") -> Export:
    """Writes `file` and its Modelfile, with the matrices in `weights`, one of WEIGHTS. `name` is shown to users.

    Raises ExportError, and PackageError for unusable weights.
    """
    if weights not in WEIGHTS:
        raise ExportError(
            f"--weights is {excerpt(weights)}; expected one of {', '.join(WEIGHTS)}.{did_you_mean(weights, WEIGHTS)}"
        )
    if file.suffix.lower() != ".gguf":
        raise ExportError(
            f"the file is called {file}; expected a name that ends with .gguf, such as {file.with_suffix('.gguf')}"
        )
    if not file.parent.is_dir():
        raise ExportError(f"{file} cannot be written: there is no folder {file.parent}")
    if file.is_dir():
        raise ExportError(f"{file} is a folder; expected the name of a new file")
    writer = _writer(package.config)
    notes = add_tokenizer(writer, package.tokenizer, package.config.vocab_size)
    _add_facts(writer, package, weights, name or package.path.name)
    _add_network(writer, package.config)
    modelfile = file.with_suffix(".Modelfile")
    kept = modelfile.exists()
    try:
        with whole_file(file) as draft:
            _write(writer, package, Path(draft.name), weights)
        if not kept:
            write_file(modelfile, _modelfile(package, file).encode())
    except OSError as error:
        raise ExportError(f"{file} cannot be written: {error.strerror or error}") from error
    return Export(file, modelfile, kept, notes)


def _gguf() -> Any:
    """The library, whose messages about its own steps are left out."""
    try:
        import gguf
    except ImportError as error:
        raise ExportError(
            "to export a model, install the library gguf: .venv/bin/pip install -c constraints.txt -e '.[gguf]'"
        ) from error
    logging.getLogger("gguf").setLevel(logging.WARNING)
    return gguf


def _writer(config: ModelConfig) -> Any:
    """A gguf.GGUFWriter without a file."""
    return _gguf().GGUFWriter(None, ARCHITECTURES[config.family])


def _add_facts(writer: Any, package: Package, weights: str, name: str) -> None:
    gguf = _gguf()
    writer.add_type("model")
    writer.add_name(name)
    writer.add_description(describe(package))
    writer.add_size_label(count(count_parameters(package.config)))
    kind = "ALL_F32" if weights == "f32" else f"MOSTLY_{WEIGHTS[weights]}"
    writer.add_file_type(gguf.LlamaFileType[kind])
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)


def _add_network(writer: Any, c: ModelConfig) -> None:
    """The shape. Raises ExportError for one that llama.cpp lacks or would compute otherwise."""
    if c.family == "qwen2" and c.head_size * c.num_heads != c.hidden_size:
        raise ExportError(
            f"llama.cpp's qwen2 has heads of hidden_size / num_heads features, {c.hidden_size / c.num_heads:g}; "
            f"head_dim is {c.head_size}"
        )
    writer.add_vocab_size(c.vocab_size)
    writer.add_context_length(c.context_length)
    writer.add_embedding_length(c.hidden_size)
    writer.add_block_count(c.num_layers)
    writer.add_feed_forward_length(c.intermediate_size)
    writer.add_head_count(c.num_heads)
    writer.add_head_count_kv(c.kv_heads)
    if not c.rotary:
        writer.add_layer_norm_eps(c.norm_eps)
        return
    writer.add_layer_norm_rms_eps(c.norm_eps)
    writer.add_key_length(c.head_size)
    writer.add_value_length(c.head_size)
    writer.add_rope_dimension_count(c.head_size)
    writer.add_rope_freq_base(c.rope_theta)
    if c.rope_scaling is not None:
        _add_rope_scaling(writer, c)


def _add_rope_scaling(writer: Any, c: ModelConfig) -> None:
    scaling, types = c.rope_scaling, _gguf().RopeScalingType
    assert scaling is not None
    if scaling.kind == "llama3":  # as factors, in a tensor
        if ARCHITECTURES[c.family] != "llama":
            raise ExportError(f"llama.cpp has no RoPE scaling llama3 for {c.family}; it has linear and yarn")
        return
    writer.add_rope_scaling_factor(scaling.factor)
    if scaling.kind == "linear":
        writer.add_rope_scaling_type(types.LINEAR)
        return
    if not scaling.truncate:
        raise ExportError("llama.cpp rounds the dimensions of yarn's RoPE scaling; truncate is false, which it lacks")
    if scaling.factor < 1:
        raise ExportError(f"llama.cpp's yarn only stretches; the factor of the RoPE scaling is {scaling.factor}")
    writer.add_rope_scaling_type(types.YARN)
    writer.add_rope_scaling_orig_ctx_len(scaling.original_context)
    writer.add_rope_scaling_yarn_beta_fast(scaling.beta_fast)
    writer.add_rope_scaling_yarn_beta_slow(scaling.beta_slow)
    # llama.cpp multiplies by what YaRN's paper recommends.
    writer.add_rope_scaling_attn_factors(scaling.attention_factor / (0.1 * math.log(scaling.factor) + 1.0))


def _write(writer: Any, package: Package, draft: Path, weights: str) -> None:
    """The header, then each tensor; only one is in memory."""
    gguf, c = _gguf(), package.config
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH[ARCHITECTURES[c.family].upper()], c.num_layers)
    plan: dict[str, tuple[str, Any]] = {}
    """Published name -> GGUF's, and the type in the file."""
    factors = _rope_factors(c)
    if factors is not None:
        writer.add_tensor_info("rope_freqs.weight", factors.shape, np.dtype(np.float32), factors.nbytes)
    for published, shape in tensor_shapes(c):
        stored = names.get_name(published, try_suffixes=(".weight", ".bias"))
        if stored is None:
            raise ExportError(f"llama.cpp has no place for the tensor {published}")
        shape = shape[::-1] if is_transposed(published) else shape
        kind = gguf.GGMLQuantizationType[_type(stored, shape, weights, bool(c.tie_embeddings))]
        block, size = gguf.GGML_QUANT_SIZES[kind]
        plan[published] = stored, kind
        writer.add_tensor_info(stored, shape, np.dtype(np.float32), math.prod(shape) // block * size, raw_dtype=kind)
    try:
        writer.write_header_to_file(draft)
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        if factors is not None:
            writer.write_tensor_data(factors)
        with doing(f"writing {len(plan)} tensors") as task:
            for i, (published, tensor) in enumerate(package.published_tensors(dtype=None)):
                stored, kind = plan[published]
                writer.write_tensor_data(_values(_arranged(tensor, published, stored, c), kind))
                task.at(i + 1, len(plan))
    finally:
        writer.close()


def _type(stored: str, shape: tuple[int, ...], weights: str, tied: bool) -> str:
    """The type of a tensor: vectors and positions stay in fp32, and q4_0 has its head in q8_0."""
    if weights == "f32" or len(shape) == 1 or stored == "position_embd.weight":
        return "F32"
    if weights in ("q8_0", "q4_0") and shape[-1] % 32:  # they are blocks of 32
        return "BF16"
    head = stored == ("token_embd.weight" if tied else "output.weight")
    return WEIGHTS["q8_0" if head and weights == "q4_0" else weights]


def _arranged(tensor: Tensor, published: str, stored: str, c: ModelConfig) -> Tensor:
    """The tensor as llama.cpp lays it out: rows of outputs, and for llama the two of a rotated pair side by side."""
    if is_transposed(published):
        return tensor.t()
    if ARCHITECTURES[c.family] == "llama" and re.search(r"attn_[qk]\.weight$", stored):
        return tensor.unflatten(0, (-1, 2, c.head_size // 2)).transpose(1, 2).flatten(0, 2)
    return tensor


def _values(tensor: Tensor, kind: Any) -> np.ndarray:
    gguf = _gguf()
    if kind.name == "BF16":
        return tensor.to(torch.bfloat16).contiguous().view(torch.int16).numpy()
    values: np.ndarray = gguf.quants.quantize(tensor.float().contiguous().numpy(), kind)
    return values


def _rope_factors(c: ModelConfig) -> np.ndarray | None:
    """By what llama.cpp divides each frequency of Llama 3's rotary embedding (D/2,), or None without this scaling."""
    if c.rope_scaling is None or c.rope_scaling.kind != "llama3":
        return None
    return (rotary_frequencies(replace(c, rope_scaling=None)) / rotary_frequencies(c)).numpy()


def _modelfile(package: Package, file: Path) -> str:
    lines = [f"FROM ./{file.name}"]
    if template_source(package.tokenizer) is None:  # Ollama knows the usual ones by the template in the file
        lines.append('TEMPLATE """{{ .Prompt }}"""')
    lines.append(f"PARAMETER num_ctx {min(package.config.context_length, OLLAMA_CONTEXT)}")
    return "\n".join(lines) + "\n"


def _name(model: str, package: Package) -> str:
    """A short name for people: of hf:ORG/NAME and models:/NAME@ALIAS the NAME, else the folder's."""
    found = re.match(r"hf:(?:[^/]+/)?([^/]+)$|models:/([^/@]+)", model)
    if found:
        return next(filter(None, found.groups()))
    return str(package.info.get("training", {}).get("run", package.path.name))  # all runs' folders are called alike


def _lines(made: Export, weights: str) -> Iterator[str]:
    yield f"wrote {made.file}: {gib(made.file.stat().st_size)} GiB, {weights}"
    if made.kept:
        yield f"kept {made.modelfile}, which was there"
    else:
        command = shlex.join(["ollama", "create", made.file.stem.replace(" ", "-"), "-f", str(made.modelfile)])
        yield f"wrote {made.modelfile}: {command}"
    yield from (f"note: {note}" for note in made.notes)


def main(argv: list[str] | None = None) -> int:
    """Writes the files and returns the exit code."""
    parser = Parser(prog="python -m gptcore.export", description=__doc__.splitlines()[0], allow_abbrev=False)
    parser.add_argument("model", metavar="PACKAGE_OR_URI", help=KINDS)
    parser.add_argument("file", type=Path, metavar="FILE.gguf", help="where to write it; an earlier file is replaced")
    parser.add_argument(
        "--weights", default="bf16", metavar="TYPE", help=f"{', '.join(WEIGHTS)} for the matrices (%(default)s)"
    )
    try:
        given = parser.parse_args(argv)
        package = open_package(resolve(given.model))
        made = export(package, given.file, given.weights, _name(given.model, package))
    except FoundryError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print("\n".join(_lines(made, given.weights)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
