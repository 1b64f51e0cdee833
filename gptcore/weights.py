"""Reads and writes the weights of a package folder: finds the files, checks headers against the config, loads tensors.

Headers are checked before anything is allocated, so a config that promises more than the files contain costs nothing.
safetensors itself checks that a header matches its file.
"""

import json
import math
import re
from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from itertools import chain, islice
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from gptcore.config import ModelConfig
from gptcore.documents import read_json, require_regular
from gptcore.errors import PackageError, did_you_mean, excerpt
from gptcore.hf_format import is_transposed, published_name, quantised_bits, tensor_shapes
from gptcore.quantised import Quantised, from_stored, stored_shapes

WEIGHTS = "model.safetensors"
INDEX = f"{WEIGHTS}.index.json"
"""Maps tensors to files if there are several weights files."""
INDEX_BYTES = 1 << 26
MAPPED_BYTES = 1 << 26
DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
"""Supported dtypes of stored weights, by safetensors' names."""
STORED = DTYPES | {"I8": torch.int8, "U8": torch.uint8}
"""And those of quantised weights' values."""
DTYPE_NAMES = {dtype: name for name, dtype in DTYPES.items()}
UNUSED = re.compile(r"transformer\.h\.\d+\.attn\.(masked_)?bias")
"""Causal masks, which the published GPT-2 files contain."""
HEAD = "lm_head.weight"


@dataclass(frozen=True)
class StoredTensor:
    """A tensor's file, and its header entry."""

    file: Path
    name: str
    """The name in the file; the published name may have an additional prefix."""
    dtype: str
    shape: tuple[int, ...]
    parts: tuple["StoredTensor", ...] = ()
    """Values and scales of a quantised matrix. The other fields are then those of the tensor that it stands for."""

    @property
    def itemsize(self) -> int:
        """Bytes per value, for a supported dtype."""
        return DTYPES[self.dtype].itemsize


def weight_files(folder: Path) -> list[Path]:
    """The weights files of a folder: one, or those in its index. Raises PackageError for an invalid index."""
    if (folder / WEIGHTS).exists() or not (folder / INDEX).exists():
        return [folder / WEIGHTS]
    where = read_json(folder / INDEX, INDEX_BYTES).get("weight_map")
    names = sorted(set(map(str, where.values()))) if isinstance(where, dict) else []
    if not names or any(not name.endswith(".safetensors") or not is_plain(name) for name in names):
        raise PackageError(
            f"{folder / INDEX} is invalid: its weight_map must name .safetensors files in the same folder"
        )
    return [folder / name for name in names]


MOST_TENSORS = 50_000
"""Limit per folder: four times that of a thousand layers with a dozen tensors each."""


def is_plain(name: object) -> bool:
    """Whether `name` is a plain file name, not a path."""
    return (
        isinstance(name, str)
        and 0 < len(name.encode(errors="surrogatepass")) <= 255
        and name not in (".", "..")
        and not set(name) & set("/\\\0")
    )


def read_headers(folder: Path, family: str) -> dict[str, StoredTensor]:
    """Every tensor in the folder, by its published name. Raises PackageError for an invalid safetensors file."""
    found: dict[str, StoredTensor] = {}
    for file in weight_files(folder):
        require_regular(file)
        try:
            with safe_open(file, framework="pt") as opened:
                for name in opened.keys():  # noqa: SIM118
                    if name in found:
                        raise PackageError(f"{excerpt(name)} is in two files, {found[name].file.name} and {file.name}")
                    if len(found) == MOST_TENSORS:
                        raise PackageError(f"{file} has more than {MOST_TENSORS:,} tensors, the limit")
                    entry = opened.get_slice(name)
                    found[name] = StoredTensor(file, name, entry.get_dtype(), tuple(entry.get_shape()))
        except (OSError, ValueError, RuntimeError, SafetensorError) as error:
            raise PackageError(f"{file} cannot be used: {error}") from error
    if family == "gpt2" and not any(name.startswith("transformer.") for name in found):
        return {name if name == HEAD else f"transformer.{name}": stored for name, stored in found.items()}
    return found


def match_config(config: ModelConfig, found: Mapping[str, StoredTensor], scheme: str = "") -> dict[str, StoredTensor]:
    """The stored tensors that the config requires, in the model's order, its matrices quantised by `scheme`.

    Raises PackageError, naming the tensor, if one is missing, unknown, or of another shape or type.
    """
    embedding, places = published_name("embed_tokens.weight", config.family), dict(found)
    if config.tie_embeddings:  # stored once, under either name
        head = places.pop(HEAD, None)
        if head is not None:
            places.setdefault(embedding, head)

    def take(name: str, shape: tuple[int, ...], kinds: Iterable[str]) -> StoredTensor:
        if name not in places:
            raise PackageError(f"the tensor {name} is missing{_layers_there(config, found, name)}")
        stored = places.pop(name)
        if stored.shape != shape:
            raise PackageError(f"{name} has shape {stored.shape}, expected {shape} according to config.json")
        if stored.dtype not in kinds:
            raise PackageError(f"{name} is of type {stored.dtype}; expected one of {', '.join(kinds)}")
        return stored

    wanted: dict[str, StoredTensor] = {}
    for name, shape in tensor_shapes(config):
        if bits := quantised_bits(config, name, shape, scheme):
            parts = [take(part, its, (kind,)) for part, its, kind in stored_shapes(name, by_outputs(name, shape), bits)]
            wanted[name] = StoredTensor(parts[0].file, name, "F32", shape, tuple(parts))
        else:
            wanted[name] = take(name, shape, DTYPES)
    stranger = next((name for name in places if not UNUSED.fullmatch(name)), None)
    if stranger is not None:
        raise PackageError(f"config.json has no place for the tensor {excerpt(stranger).strip(chr(39))}")
    return wanted


def _layers_there(config: ModelConfig, found: Mapping[str, StoredTensor], missing: str) -> str:
    """Advice for a missing tensor: the number of layers if there are too few, else a similar name."""
    numbers = [int(layer[1]) for name in found if (layer := re.match(r"\w+\.(?:layers|h)\.(\d{1,9})\.", name))]
    layer = re.match(r"\w+\.(?:layers|h)\.(\d+)\.", missing)
    if layer and int(layer[1]) > max(numbers, default=-1):
        return f": config.json says {config.num_layers} layers, the weights have {len(set(numbers))}"
    near = did_you_mean(missing, (name for name in islice(found, 1000) if len(name) < 100))
    return f".{near}"


def has_untied_head(config: ModelConfig, found: Mapping[str, StoredTensor]) -> bool:
    """Whether the files contain a head that differs from the embedding although the config ties them.

    transformers does not tie them then. Both tensors must be read to compare them.
    """
    embedding = found.get(published_name("embed_tokens.weight", config.family))
    head = found.get(HEAD)
    if not config.tie_embeddings or embedding is None or head is None or head.dtype not in DTYPES:
        return False
    if embedding.shape != head.shape or embedding.dtype not in DTYPES:
        return embedding.shape != head.shape
    one, other = (tensor for _, tensor in read_tensors({"embedding": embedding, "head": head}))
    return not torch.equal(one, other.to(one.dtype))


def by_outputs(published: str, shape: tuple[int, ...]) -> tuple[int, int]:
    """The shape of a published matrix as (out, in)."""
    first, second = shape
    return (second, first) if is_transposed(published) else (first, second)


def read_tensors(places: Mapping[str, StoredTensor]) -> Iterator[tuple[str, Tensor]]:
    """The tensors, in order, memory-mapped rather than copied, except quantised ones, which are what they stand for.

    Raises PackageError if a file has changed since its header was read.
    """
    for name, stored in read_stored(places):
        yield name, full(name, stored)


def full(published: str, stored: Tensor | Quantised) -> Tensor:
    """A published tensor, or what a quantised one stands for."""
    if isinstance(stored, Tensor):
        return stored
    matrix = stored.dequantised()
    return matrix.t() if is_transposed(published) else matrix


def read_stored(places: Mapping[str, StoredTensor]) -> Iterator[tuple[str, Tensor | Quantised]]:
    """The tensors as they are stored, in order, memory-mapped rather than copied.

    Raises PackageError if a file has changed since its header was read.
    """
    tensors = _read(chain.from_iterable(stored.parts or (stored,) for stored in places.values()))
    for name, stored in places.items():
        tensor = next(tensors)
        yield name, Quantised(from_stored(tensor), next(tensors)) if stored.parts else tensor


def _read(places: Iterable[StoredTensor]) -> Iterator[Tensor]:
    """The tensors at these places.

    A file is mapped anew after each MAPPED_BYTES, since what has been read of a mapping counts as memory in use until
    the mapping is gone.
    """
    with ExitStack() as stack:
        opened: dict[Path, Any] = {}
        read = 0
        for stored in places:
            try:
                if read > MAPPED_BYTES:
                    stack.close()
                    opened.clear()
                    read = 0
                if stored.file not in opened:
                    opened[stored.file] = stack.enter_context(safe_open(stored.file, framework="pt"))
                tensor = opened[stored.file].get_tensor(stored.name)
                read += tensor.nbytes
            except (OSError, SafetensorError) as error:
                raise PackageError(f"{stored.file} cannot be used: {error}") from error
            if tuple(tensor.shape) != stored.shape or tensor.dtype != STORED[stored.dtype]:
                raise PackageError(f"{stored.file} has changed while it was read")
            yield tensor


def write_tensors(
    file: Path, shapes: Iterable[tuple[str, tuple[int, ...], str]], tensors: Iterable[tuple[str, Tensor]]
) -> None:
    """Writes a safetensors file a tensor at a time; safetensors itself needs all of them in memory.

    `shapes` has the name, shape and type of each of `tensors`, as which it is stored. Raises OSError.
    """
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, shape, kind in shapes:
        start, end = end, end + math.prod(shape) * STORED[kind].itemsize
        header[name] = {"dtype": kind, "shape": shape, "data_offsets": (start, end)}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with file.open("wb") as target:
        target.write(len(text).to_bytes(8, "little") + text)
        for name, tensor in tensors:
            target.seek(8 + len(text) + header[name]["data_offsets"][0])
            values = tensor.to(STORED[header[name]["dtype"]]).contiguous()
            target.write(values.view(-1).view(torch.uint8).numpy().data)


def require_finite(name: str, tensor: Tensor) -> None:
    """Raises PackageError if `tensor` holds NaN or infinity. One pass, and no copy."""
    least, most = tensor.aminmax()
    if not (math.isfinite(least) and math.isfinite(most)):
        raise PackageError(f"the tensor {name} contains values that are not finite")


def copied_bytes(config: ModelConfig, places: Mapping[str, StoredTensor], dtype: torch.dtype) -> int:
    """Bytes of weights in `dtype` that must be copied: GPT-2's are transposed, others only converted if needed."""
    copied = (s for s in places.values() if not config.rotary or s.parts or DTYPES[s.dtype] != dtype)
    return sum(math.prod(stored.shape) * dtype.itemsize for stored in copied)
