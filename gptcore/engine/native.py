"""A Runner with a native CPU kernel: compiles native.cpp once for this machine and packs a model's weights for it.

The first use needs a C++ compiler (`$CXX`, c++, g++ or clang++); the library is cached under `home()`/.cache/native by
source, compiler and processor. If that fails, `NativeUnavailable` says why, and the engine runs on torch instead.

A token's logits depend on its prefix only, bit for bit, however it was batched or chunked (native.cpp explains how).
"""

import ctypes
import functools
import hashlib
import os
import platform
import shutil
import subprocess
import tempfile
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from gptcore.config import ModelConfig
from gptcore.cores import available_cores
from gptcore.devices import pick_dtype
from gptcore.engine.interface import Chunk
from gptcore.errors import FoundryError
from gptcore.hf_format import count_parameters, empty_model
from gptcore.home import home
from gptcore.quantised import BITS as SCHEMES
from gptcore.quantised import GROUP, Quantised, joined
from gptcore.rotary import rotary_tables
from gptcore.sampling import LEAST_TEMPERATURE, SamplingState, penalties, uniform

SOURCE = Path(__file__).with_name("native.cpp")
HEADERS = ("native_vectors.h", "native_quantised.h")
BITS = {"": (0, 0), **SCHEMES}
"""Setting -> bits of the layers' weights and of the head's, in groups that share a scale; 0: as the dtype."""
SCALE_BITS = 16 / GROUP
"""Of each weight: a group shares a scale of 16 bits."""
NUMBERS = {torch.bfloat16: "bf16", torch.float32: "float"}
"""dtype -> the kernel's type. Each is compiled for itself, when it is needed: that takes half as long as both."""
FLAGS = ("-O3", "-std=c++17", "-shared", "-fPIC", "-pthread", "-fno-math-errno")
EXTRA_FLAGS: tuple[str, ...] = ()
"""Added last; tests use them to compile for other processors."""
BUILD_SECONDS = 120
LANES = 16
"""The kernel handles sixteen features at a time: widths are multiples of it."""

# As in native.cpp's enum Weight.
NAMES = """
    embed positions cos sin final_gain final_bias head norm1_gain norm1_bias qkv qkv_bias q_norm k_norm
    out out_bias norm2_gain norm2_bias gate up up_bias down down_bias
"""
WEIGHTS = {name: number for number, name in enumerate(NAMES.split())}
PLACES = {
    "embed_tokens.weight": "embed",
    "embed_positions.weight": "positions",
    "norm.weight": "final_gain",
    "norm.bias": "final_bias",
    "lm_head.weight": "head",
    "input_layernorm.weight": "norm1_gain",
    "input_layernorm.bias": "norm1_bias",
    "self_attn.q_norm.weight": "q_norm",
    "self_attn.k_norm.weight": "k_norm",
    "self_attn.o_proj.weight": "out",
    "self_attn.o_proj.bias": "out_bias",
    "post_attention_layernorm.weight": "norm2_gain",
    "post_attention_layernorm.bias": "norm2_bias",
    "mlp.gate_proj.weight": "gate",
    "mlp.up_proj.weight": "up",
    "mlp.up_proj.bias": "up_bias",
    "mlp.down_proj.weight": "down",
    "mlp.down_proj.bias": "down_bias",
    # q, k and v, in this order, are one matrix
    **{f"self_attn.{part}_proj.weight": "qkv" for part in "qkv"},
    **{f"self_attn.{part}_proj.bias": "qkv_bias" for part in "qkv"},
}
"""The network's parameter -> the kernel's weight."""
MATRICES = ("qkv", "out", "gate", "up", "down")


class _Draw(ctypes.Structure):
    """The struct of the same name in native.cpp."""

    _fields_ = (
        ("point", ctypes.c_double),
        ("top_p", ctypes.c_double),
        ("min_p", ctypes.c_double),
        ("temperature", ctypes.c_float),
        ("top_k", ctypes.c_int32),
        ("changes", ctypes.c_int32),
    )


class NativeUnavailable(FoundryError):
    """The kernel cannot be built on this machine, or cannot run this model."""


class NativeRunner:
    """A `gptcore.engine.interface.Runner` on the native kernel. Raises NativeUnavailable.

    `parameters` are the network's, taken one at a time, so that they need not fit into memory beside the packed ones.
    `dtype`, bfloat16 or float32, is that of packed weights and cache; sums, norms and the residual stream are in fp32.
    `weights`, one of BITS, quantises the matrices while they are packed, unless they are already.
    """

    invariant = True
    reuse_granularity = 1
    device = torch.device("cpu")

    def __init__(
        self,
        config: ModelConfig,
        parameters: Iterable[tuple[str, Tensor]] | Iterable[tuple[str, Tensor | Quantised]],
        slots: int,
        dtype: torch.dtype,
        threads: int = 0,
        note: str = "",
        weights: str = "",
    ) -> None:
        check_shape(config)
        self.note = note
        if dtype not in NUMBERS:
            raise NativeUnavailable(f"the native kernel computes in bfloat16 or float32, not in {dtype}")
        self.dtype, self.slots, self.context_length = dtype, slots, config.context_length
        self.weights = weights
        self._library = load_library(dtype)
        self.name = f"native {self._library.gpt_kernel(BITS[weights][0]).decode()}"
        shape = (
            config.rotary, config.num_layers, config.hidden_size, config.num_heads, config.kv_heads,
            config.head_size, config.intermediate_size or 0, config.vocab_size, config.context_length, slots,
            threads or available_cores(), *BITS[weights],
        )  # fmt: skip
        self._handle = self._library.gpt_create((ctypes.c_int32 * len(shape))(*map(int, shape)), config.norm_eps)
        if not self._handle:
            raise NativeUnavailable(f"there is not enough memory for {slots} slots of {config.context_length} tokens")
        self._pack(config, parameters)
        self.cache_bytes: int = self._library.gpt_cache_bytes(self._handle)
        self.vocab_size = config.vocab_size
        self._width = -(-config.vocab_size // 64) * 64
        self._logits = torch.empty(0, self._width)

    def forward(self, chunks: Sequence[Chunk]) -> Tensor:
        """See Runner. The next call overwrites the result."""
        tokens: list[int] = []
        slots: list[int] = []
        positions: list[int] = []
        rows: list[int] = []
        for chunk in chunks:
            length = len(chunk.tokens)
            tokens += chunk.tokens
            slots += [chunk.slot] * length
            positions += range(chunk.start, chunk.start + length)
            rows += range(len(tokens) - chunk.wanted, len(tokens))
        if len(rows) > len(self._logits):
            self._logits = torch.empty(len(rows), self._width)
        logits = self._logits[: len(rows)]
        self._library.gpt_forward(
            self._handle, len(tokens), _ints(tokens), _ints(slots), _ints(positions), len(rows), _ints(rows),
            logits.data_ptr(),
        )  # fmt: skip
        return logits[:, : self.vocab_size]

    def next_tokens(self, logits: Tensor, rows: Sequence[SamplingState]) -> list[int]:
        """See Runner."""
        draws, tokens = (_Draw * len(rows))(), (ctypes.c_int32 * len(rows))()
        ids: list[int] = []
        values: list[float] = []
        for i, (draw, row) in enumerate(zip(draws, rows, strict=True)):
            params = row.params
            # 0 means greedy in the kernel, so a tiny temperature must not be rounded to 0 in fp32.
            draw.temperature = 0.0 if params.greedy else max(params.temperature, LEAST_TEMPERATURE)
            draw.top_k, draw.top_p, draw.min_p = min(params.top_k, logits.size(1)), params.top_p, params.min_p
            draw.point = uniform(row.seed, len(row.tokens))
            if params.penalises:
                changed, to = penalties(logits[i], row)
                draw.changes = len(changed)
                ids += changed.tolist()
                values += to.tolist()
        self._library.gpt_choose(
            self._handle, len(rows), logits.data_ptr(), logits.stride(0), logits.size(1), draws, _ints(ids),
            (ctypes.c_float * len(values))(*values), tokens,
        )  # fmt: skip
        return list(tokens)

    def copy(self, source: int, target: int, length: int) -> None:
        """See Runner."""
        self._library.gpt_copy(self._handle, source, target, length)

    def close(self) -> None:
        """See Runner."""
        if self._handle:
            self._library.gpt_destroy(self._handle)
            self._handle = None

    def __del__(self) -> None:
        if getattr(self, "_handle", None):
            self.close()

    def _pack(
        self, config: ModelConfig, parameters: Iterable[tuple[str, Tensor]] | Iterable[tuple[str, Tensor | Quantised]]
    ) -> None:
        if config.rotary:
            for name, table in zip(("cos", "sin"), rotary_tables(config), strict=True):
                self._set(name, -1, table)
        waiting: dict[str, list[Any]] = {"qkv": [], "qkv_bias": []}
        for parameter, values in parameters:
            layer, place = _place(parameter)
            if place in waiting:
                waiting[place].append(values)
                if len(waiting[place]) < 3:
                    continue
                join = joined if isinstance(values, Quantised) else torch.cat
                values = join(waiting[place])  # ((H + 2K) D, C)
                waiting[place].clear()
            if place == "embed" and config.tie_embeddings:
                place = "head"  # of which the kernel takes the embeddings too
            self._set(place, layer, values)

    def _set(self, name: str, layer: int, weight: Tensor | Quantised) -> None:
        what = (self._handle, WEIGHTS[name], layer)
        if isinstance(weight, Quantised):
            values, scales = weight.values.contiguous(), weight.scales.contiguous()
            rows, groups = scales.shape
            self._library.gpt_set_quantised(*what, values.data_ptr(), scales.data_ptr(), rows, groups * GROUP)
            return
        values, half = _readable(weight)
        rows, columns = (values.shape[0], values.shape[1]) if values.ndim == 2 else (1, values.shape[0])
        self._library.gpt_set(*what, values.data_ptr(), half, rows, columns)


def quantise(matrix: Tensor, bits: int) -> Quantised:
    """A matrix (out, in) as NativeRunner rounds it while it is packed. Raises NativeUnavailable."""
    values, half = _readable(matrix)
    rows, columns = values.shape
    made = Quantised(
        torch.empty(rows, columns // GROUP, GROUP, dtype=torch.int8),
        torch.empty(rows, columns // GROUP, dtype=torch.bfloat16),
    )
    library = load_library(pick_dtype("auto", torch.device("cpu")))
    library.gpt_quantise(
        bits, values.data_ptr(), half, rows, columns, made.values.data_ptr(), made.scales.data_ptr()
    )  # fmt: skip
    return made


def _readable(values: Tensor) -> tuple[Tensor, bool]:
    """Values that the kernel can read, and whether they are in bfloat16; otherwise they are in float32."""
    values = values.detach().to("cpu")
    half = values.dtype == torch.bfloat16
    return (values if half else values.float()).contiguous(), half


def packed_bytes(config: ModelConfig, dtype: torch.dtype, weights: str = "") -> int:
    """Bytes of the parameters, in `dtype` or, for the matrices of `weights`, quantised."""
    if not weights:
        return count_parameters(config) * dtype.itemsize
    layers, head = BITS[weights]
    total = 0.0
    for name, values in empty_model(config).named_parameters():
        place = _place(name)[1]
        tied = place == "embed" and config.tie_embeddings
        bits = head if place == "head" or tied else layers if place in MATRICES else 0
        total += values.numel() * (bits + SCALE_BITS) / 8 if bits else values.numel() * dtype.itemsize
    return int(total)


def _place(parameter: str) -> tuple[int, str]:
    """The layer of a parameter, -1 if it is in none, and the kernel's name for it."""
    if not parameter.startswith("layers."):
        return -1, PLACES[parameter]
    _, layer, rest = parameter.split(".", 2)
    return int(layer), PLACES[rest]


def check_shape(config: ModelConfig) -> None:
    """Raises NativeUnavailable for widths that the kernel does not support."""
    widths = {
        "hidden_size": config.hidden_size,
        "head_dim": config.head_size,
        "intermediate_size": config.intermediate_size or 0,
    }
    for name, width in widths.items():
        if width % LANES:
            raise NativeUnavailable(f"{name} is {width}; the native kernel needs a multiple of {LANES}")


@functools.cache
def load_library(dtype: torch.dtype) -> ctypes.CDLL:
    """The kernel for this dtype, from the cache or compiled now. Raises NativeUnavailable."""
    compiler = find_compiler()
    target = "-mcpu=native" if platform.machine() in ("arm64", "aarch64") else "-march=native"
    command = [compiler, *FLAGS, f"-DNUMBER={NUMBERS[dtype]}", target, *EXTRA_FLAGS]
    library = home() / ".cache" / "native" / f"{_fingerprint(command)}.so"
    if not library.exists():
        _build([*command, str(SOURCE)], library)
    try:
        functions = ctypes.CDLL(str(library))
    except OSError as error:
        raise NativeUnavailable(f"the native kernel {library} cannot be loaded: {error}") from error
    pointer, integer = ctypes.c_void_p, ctypes.c_int
    functions.gpt_create.argtypes, functions.gpt_create.restype = [pointer, ctypes.c_float], pointer
    functions.gpt_set.argtypes = [pointer, integer, integer, pointer, integer, integer, integer]
    functions.gpt_set_quantised.argtypes = [pointer, integer, integer, pointer, pointer, integer, integer]
    functions.gpt_quantise.argtypes = [integer, pointer, integer, integer, integer, pointer, pointer]
    functions.gpt_forward.argtypes = [pointer, integer, pointer, pointer, pointer, integer, pointer, pointer]
    functions.gpt_choose.argtypes = [pointer, integer, pointer, integer, integer, pointer, pointer, pointer, pointer]
    functions.gpt_copy.argtypes = [pointer, integer, integer, integer]
    functions.gpt_cache_bytes.argtypes, functions.gpt_cache_bytes.restype = [pointer], ctypes.c_int64
    functions.gpt_destroy.argtypes = [pointer]
    functions.gpt_kernel.argtypes, functions.gpt_kernel.restype = [integer], ctypes.c_char_p
    return functions


def find_compiler() -> str:
    """The C++ compiler's path: $CXX, else the system's. Raises NativeUnavailable if there is none."""
    named = os.environ.get("CXX")
    for name in [named] if named else ["c++", "g++", "clang++"]:
        if path := shutil.which(name):
            return path
    raise NativeUnavailable(
        f"CXX is {named!r}, which is no program" if named else "there is no C++ compiler (c++, g++, clang++)"
    )


def _fingerprint(command: list[str]) -> str:
    """A hash of everything that affects the build: source, flags, compiler, processor."""
    sources = [SOURCE, *(SOURCE.with_name(name) for name in HEADERS)]
    parts = [*(file.read_text(encoding="utf-8") for file in sources), *command, platform.machine(), _processor()]
    parts.append(str(Path(command[0]).resolve().stat().st_mtime_ns))
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()[:16]


def _processor() -> str:
    """Model and features of the processor, since machines may share the cache's disk."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor()
    kept = {line.split(":")[0].strip(): line for line in lines if line.startswith(("model name", "flags", "Features"))}
    return "\n".join(kept.values())


def _build(command: list[str], library: Path) -> None:
    try:
        library.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=library.parent) as scratch:
            built = Path(scratch) / library.name
            subprocess.run([*command, "-o", str(built)], check=True, capture_output=True, timeout=BUILD_SECONDS)
            built.rename(library)  # atomic, for processes that compile at the same time
    except subprocess.CalledProcessError as error:
        last = error.stderr.decode(errors="replace").strip().splitlines()[-1:] or [""]
        raise NativeUnavailable(f"{command[0]} cannot build the native kernel: {last[0]}") from error
    except (OSError, subprocess.TimeoutExpired) as error:
        raise NativeUnavailable(f"the native kernel cannot be built: {error}") from error


def _ints(values: list[int]) -> ctypes.Array[ctypes.c_int32]:
    return (ctypes.c_int32 * len(values))(*values)
