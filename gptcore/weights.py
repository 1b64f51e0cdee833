"""The weights of a package folder: which files hold them, what their headers promise, and the tensors themselves.

In come a folder and a `ModelConfig`; out come `StoredTensor` places and, one at a time, tensors. A header is held against
the config before anything is allocated or a module is made, so that a config which promises more than the files hold
costs nothing. safetensors itself checks that a header fits its file.
"""

import math
import re
from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from gptcore.config import ModelConfig
from gptcore.documents import read_json, require_regular
from gptcore.errors import PackageError, did_you_mean, excerpt
from gptcore.hf_format import published_name, tensor_shapes

WEIGHTS = "model.safetensors"
INDEX = f"{WEIGHTS}.index.json"
"""Says which file holds which tensor, where the weights are in several."""
INDEX_BYTES = 1 << 26
DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
"""What weights may be stored as, in safetensors' names."""
UNUSED = re.compile(r"transformer\.h\.\d+\.attn\.(masked_)?bias")
"""GPT-2 as published carries its causal masks along."""
HEAD = "lm_head.weight"


@dataclass(frozen=True)
class StoredTensor:
    """Where a tensor lies, and what its file's header says of it."""

    file: Path
    name: str
    """In the file; its published name may have a prefix besides."""
    dtype: str
    shape: tuple[int, ...]

    @property
    def itemsize(self) -> int:
        """Bytes of one value, if it is one of DTYPES."""
        return DTYPES[self.dtype].itemsize


def weight_files(folder: Path) -> list[Path]:
    """The files with a folder's weights: one, or those that its index names. Raises PackageError for a bad index."""
    if (folder / WEIGHTS).exists() or not (folder / INDEX).exists():
        return [folder / WEIGHTS]
    where = read_json(folder / INDEX, INDEX_BYTES).get("weight_map")
    names = sorted(set(map(str, where.values()))) if isinstance(where, dict) else []
    if not names or any(not name.endswith(".safetensors") or not is_plain(name) for name in names):
        raise PackageError(f"{folder / INDEX} is no index: its weight_map is to name .safetensors files beside it")
    return [folder / name for name in names]


MOST_TENSORS = 50_000
"""In a folder: a thousand layers of a model with a dozen in each have a quarter of that."""


def is_plain(name: object) -> bool:
    """Whether `name` is that of a file in the folder itself: no path, nothing that leads elsewhere."""
    return (
        isinstance(name, str)
        and 0 < len(name.encode(errors="surrogatepass")) <= 255
        and name not in (".", "..")
        and not set(name) & set("/\\\0")
    )


def read_headers(folder: Path, family: str) -> dict[str, StoredTensor]:
    """Every tensor in the folder by its published name. Raises PackageError for a file that is no safetensors."""
    found: dict[str, StoredTensor] = {}
    for file in weight_files(folder):
        require_regular(file)
        try:
            with safe_open(file, framework="pt") as opened:
                for name in opened.keys():  # noqa: SIM118
                    if name in found:
                        raise PackageError(f"{excerpt(name)} is in two files, {found[name].file.name} and {file.name}")
                    if len(found) == MOST_TENSORS:
                        raise PackageError(f"{file} has more than {MOST_TENSORS:,} tensors; expected at most as many")
                    entry = opened.get_slice(name)
                    found[name] = StoredTensor(file, name, entry.get_dtype(), tuple(entry.get_shape()))
        except (OSError, ValueError, RuntimeError, SafetensorError) as error:
            raise PackageError(f"{file} cannot be used: {error}") from error
    if family == "gpt2" and not any(name.startswith("transformer.") for name in found):
        return {name if name == HEAD else f"transformer.{name}": stored for name, stored in found.items()}
    return found


def match_config(config: ModelConfig, found: Mapping[str, StoredTensor]) -> dict[str, StoredTensor]:
    """The tensors that the config asks for, in the model's order; costs no more than there are tensors.

    Raises PackageError, naming the tensor, if one is missing, unknown, or of another shape or type.
    """
    embedding, places = published_name("embed_tokens.weight", config.family), dict(found)
    if config.tie_embeddings:  # stored once, under either name
        head = places.pop(HEAD, None)
        if head is not None:
            places.setdefault(embedding, head)
    wanted: dict[str, StoredTensor] = {}
    for name, shape in tensor_shapes(config):
        if name not in places:
            raise PackageError(f"the tensor {name} is missing{_layers_there(config, found, name)}")
        stored = wanted[name] = places.pop(name)
        if stored.shape != shape:
            raise PackageError(f"{name} has shape {stored.shape}, expected {shape} by config.json")
        if stored.dtype not in DTYPES:
            raise PackageError(f"{name} is of type {stored.dtype}; expected one of {', '.join(DTYPES)}")
    stranger = next((name for name in places if not UNUSED.fullmatch(name)), None)
    if stranger is not None:
        raise PackageError(f"config.json has no place for the tensor {excerpt(stranger).strip(chr(39))}")
    return wanted


def _layers_there(config: ModelConfig, found: Mapping[str, StoredTensor], missing: str) -> str:
    """What to say behind a missing tensor: how many layers there are if it is of one too many, else a similar name."""
    numbers = [int(layer[1]) for name in found if (layer := re.match(r"\w+\.(?:layers|h)\.(\d{1,9})\.", name))]
    layer = re.match(r"\w+\.(?:layers|h)\.(\d+)\.", missing)
    if layer and int(layer[1]) > max(numbers, default=-1):
        return f": config.json says {config.num_layers} layers, the weights have {len(set(numbers))}"
    near = did_you_mean(missing, (name for name in islice(found, 1000) if len(name) < 100))
    return f".{near}"


def has_untied_head(config: ModelConfig, found: Mapping[str, StoredTensor]) -> bool:
    """Whether a head is stored that differs from the embedding to which the config ties it.

    transformers then does not tie them. The two are read, as a header does not tell.
    """
    embedding = found.get(published_name("embed_tokens.weight", config.family))
    head = found.get(HEAD)
    if not config.tie_embeddings or embedding is None or head is None or head.dtype not in DTYPES:
        return False
    if embedding.shape != head.shape or embedding.dtype not in DTYPES:
        return embedding.shape != head.shape
    one, other = (tensor for _, tensor in read_tensors({"embedding": embedding, "head": head}))
    return not torch.equal(one, other.to(one.dtype))


def read_tensors(places: Mapping[str, StoredTensor]) -> Iterator[tuple[str, Tensor]]:
    """Name and tensor of each place, in order, mapped from its file rather than copied.

    Raises PackageError if a file has changed since its header was read.
    """
    with ExitStack() as stack:
        opened: dict[Path, Any] = {}
        for name, stored in places.items():
            try:
                if stored.file not in opened:
                    opened[stored.file] = stack.enter_context(safe_open(stored.file, framework="pt"))
                tensor = opened[stored.file].get_tensor(stored.name)
            except (OSError, SafetensorError) as error:
                raise PackageError(f"{stored.file} cannot be used: {error}") from error
            if tuple(tensor.shape) != stored.shape:
                raise PackageError(f"{stored.file} has changed while it was read")
            yield name, tensor


def require_finite(name: str, tensor: Tensor) -> None:
    """Raises PackageError if `tensor` holds NaN or infinity. One pass, and no copy."""
    least, most = tensor.aminmax()
    if not (math.isfinite(least) and math.isfinite(most)):
        raise PackageError(f"the tensor {name} holds values that are no finite numbers")


def copied_bytes(config: ModelConfig, places: Mapping[str, StoredTensor], dtype: torch.dtype) -> int:
    """Memory that weights in `dtype` take besides what is mapped: GPT-2's are transposed, others converted or not."""
    copied = (s for s in places.values() if config.family == "gpt2" or DTYPES[s.dtype] != dtype)
    return sum(math.prod(stored.shape) * dtype.itemsize for stored in copied)
