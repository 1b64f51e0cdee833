"""Chooses an engine's runner and its number of slots: the native kernel on a supported CPU, else torch."""

from dataclasses import replace

import torch

from gptcore.config import ModelConfig
from gptcore.devices import pick_device, pick_dtype
from gptcore.engine.interface import Runner
from gptcore.engine.native import NativeRunner, NativeUnavailable, packed_bytes
from gptcore.engine.settings import MOST_SLOTS, EngineSettings
from gptcore.engine.torch_runner import TorchRunner
from gptcore.errors import ConfigError, NoMemory
from gptcore.memory import free_memory, require_memory
from gptcore.package import Package

SEQUENCES = 4
"""A context is as long as memory holds for so many sequences."""
CONTEXT_STEP = 64
"""A context that memory limits is a multiple of so many tokens, and has at least so many."""
SHARE = 0.5
"""Share of the free memory for slots; activations, logits and other processes need the rest."""
PREFILL = {"cpu": 64, "cuda": 256, "mps": 64}
"""Prompt tokens that go through the network at once: enough to be limited by arithmetic."""


def make_runner(package: Package, settings: EngineSettings) -> Runner:
    """The fastest runner that `settings` allow here. Raises ConfigError if there is none, or NoMemory."""
    device = pick_device(settings.device)
    dtype = pick_dtype(settings.dtype, device)
    if settings.threads:
        torch.set_num_threads(settings.threads)
    native = device.type == "cpu" and not settings.compile
    if settings.backend == "native" and not native:
        raise ConfigError("backend is 'native', which needs device cpu and compile off", param="backend")
    if settings.weights and not native:
        raise ConfigError(
            f"weights is {settings.weights!r}, which only the native kernel on a CPU has, but device is {device}; set "
            "device to cpu, or leave out weights",
            param="weights",
        )
    weights = used_weights(package, settings, device)
    given, whole = package, package.config.context_length
    package = fit_context(given, settings, device, dtype)
    config = package.config
    note = context_note(config.context_length, whole, settings)
    if native and settings.backend != "torch":
        try:
            check_memory(package, device, dtype, native=True, weights=weights)
            packed = packed_bytes(config, dtype, weights)
            slots = count_slots(config, settings.slots, device, dtype, packed)
            parameters = package.stored_parameters()
            return NativeRunner(config, parameters, slots, dtype, settings.threads, note, weights)
        except NativeUnavailable as error:
            if settings.backend == "native":
                raise ConfigError(f"backend is 'native', but {error}", param="backend") from error
            if settings.weights:
                raise ConfigError(
                    f"weights is {settings.weights!r}, which only the native kernel has, but {error}; correct that, or "
                    "leave out weights",
                    param="weights",
                ) from error
            package = fit_context(given, replace(settings, backend="torch"), device, dtype)
            config = package.config
            context = context_note(config.context_length, whole, settings)
            note = "; ".join(filter(None, (f"not native: {error}", context)))
    check_memory(package, device, dtype, native=False)
    model = package.load_model(device, dtype)
    slots = count_slots(config, settings.slots, device, dtype)
    return TorchRunner(model, slots, min(settings.prefill_tokens, PREFILL[device.type]), settings.compile, note)


def used_weights(package: Package, settings: EngineSettings, device: torch.device) -> str:
    """How the native kernel will hold the matrices: as `settings` say, else as the package stores them.

    Empty for torch, which holds what quantised weights stand for. Raises ConfigError if the package stores others.
    """
    stored = package.weights
    if settings.weights and stored not in ("", settings.weights):
        raise ConfigError(
            f"weights is {settings.weights!r}, but the package {package.path} stores {stored}; leave out weights, or "
            "take the package that it was made from",
            param="weights",
        )
    native = device.type == "cpu" and not settings.compile and settings.backend != "torch"
    return settings.weights or (stored if native else "")


def slot_bytes(config: ModelConfig, dtype: torch.dtype) -> int:
    """Bytes of one slot: the keys and values of all layers for a full context."""
    return 2 * config.num_layers * config.kv_heads * config.head_size * config.context_length * dtype.itemsize


def fit_context(package: Package, settings: EngineSettings, device: torch.device, dtype: torch.dtype) -> Package:
    """`package` with a context of at most `max_context` tokens; if that is 0, what memory holds for all slots.

    Without a number of slots, SHARE of the free memory holds SEQUENCES of them.
    """
    config, slots = package.config, settings.slots
    if settings.max_context:
        return package.with_context(settings.max_context)
    free = free_memory(device) - packed_bytes(config, dtype, used_weights(package, settings, device))
    if slots and slots * slot_bytes(config, dtype) <= free:
        return package
    position = slot_bytes(config, dtype) / config.context_length
    fits = int(SHARE * free / (slots or SEQUENCES) / position)
    return package.with_context(max(CONTEXT_STEP, fits // CONTEXT_STEP * CONTEXT_STEP))


def context_note(context: int, whole: int, settings: EngineSettings) -> str:
    """Why a context is shorter than the model's; empty if it is not."""
    if context == whole:
        return ""
    why = "max_context" if settings.max_context else f"what memory holds for {settings.slots or SEQUENCES} sequences"
    return f"a context of {context:,} of {whole:,} tokens: {why}"


def check_memory(package: Package, device: torch.device, dtype: torch.dtype, native: bool, weights: str = "") -> None:
    """Raises NoMemory if the model, packed as `dtype` or quantised to `weights`, and one slot exceed the free memory.

    The native kernel packs weights as they are read; torch first loads all of them.
    """
    config = package.config
    needs = package.memory(dtype)
    if native:
        needs["weights"] = 0
    needs["packed weights"] = packed_bytes(config, dtype, weights)
    needs["one slot of keys and values"] = slot_bytes(config, dtype)
    require_memory(f"the model in {package.path}", needs, free_memory(device))


def count_slots(config: ModelConfig, asked: int, device: torch.device, dtype: torch.dtype, weights: int = 0) -> int:
    """`asked` slots, or if 0, as many as SHARE of the free memory holds, up to MOST_SLOTS.

    `weights` are the bytes of weights that are not in memory yet. Raises NoMemory if the slots do not fit, instead of
    letting the system kill the process.
    """
    free, size = free_memory(device) - weights, slot_bytes(config, dtype)
    slots = asked or max(1, min(MOST_SLOTS[device.type], int(free * SHARE) // size))
    if slots * size > free:
        raise NoMemory(
            f"slots is {slots}, which take {slots * size / 2**20:,.0f} MiB of keys and values, but only "
            f"{free / 2**20:,.0f} MiB of memory are free; {free // size} would fit",
            param="slots",
        )
    return slots
