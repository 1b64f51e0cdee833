"""Settings of one engine: batch size, device and precision; and how many requests at once keep its waits short."""

from dataclasses import dataclass

from gptcore.errors import ConfigError, did_you_mean

LEAST = {"slots": 0, "max_context": 0, "prefill_tokens": 1, "max_queue": 1, "threads": 0, "tensor_parallel": 1}
CHOICES = {
    "engine": ("foundry", "vllm"),
    "dtype": ("auto", "bfloat16", "float32"),
    "backend": ("auto", "native", "torch"),
    "weights": ("", "int8", "int4"),
}
MOST_SLOTS = {"cpu": 16, "cuda": 64, "mps": 16}
"""Most slots that an engine chooses by itself, by the kind of device. With few sequences, a step takes as long as
reading the weights. From about this many on, arithmetic or the cache is the bottleneck, and one more sequence only
slows down the others."""
UTILISATION = 0.7
"""The share of a replica's slots, on average, up to which waits for a slot stay short (bench/autoscaling.py)."""


@dataclass(frozen=True)
class EngineSettings:
    """Settings of one engine. Raises ConfigError for a value out of range."""

    engine: str = "foundry"
    """foundry, or vllm: vLLM behind the same interface, where it is installed."""
    slots: int = 0
    """Sequences decoded together; 0: as many as half the free memory holds, at most 16, or 64 on an NVIDIA GPU."""
    max_context: int = 0
    """Longest sequence, in tokens, if the model's context is longer; 0: what memory holds for all
    slots, or for four of them."""
    prefill_tokens: int = 256
    """Prompt tokens processed in each decoding step; the limit keeps long prompts from stalling other sequences."""
    max_queue: int = 64
    """Requests that may wait for a slot; further ones are refused."""
    dtype: str = "auto"
    """auto, bfloat16 or float32; auto: bfloat16 where the hardware supports it."""
    device: str = "auto"
    """auto, cpu, cuda, cuda:N or mps; auto: a GPU if there is one."""
    backend: str = "auto"
    """auto, native or torch; auto: the native kernel on a CPU where it can be compiled, else torch."""
    weights: str = ""
    """int8 or int4: quantise the matrices while they are loaded (native kernel only); empty: as `dtype`."""
    threads: int = 0
    """Compute threads; 0: one per core available to this process."""
    compile: bool = False
    """Use torch.compile (backend torch): slower startup, faster steps."""
    prefix_cache: bool = True
    """Reuse cached keys and values of prompts that start the same."""
    speculation: bool = True
    """Compute several tokens in a step where text repeats itself; the text is the same. Native kernel only; others
    ignore it."""
    tensor_parallel: int = 1
    """GPUs among which each matrix of the model is split (engine vllm)."""
    gpu_share: float = 0.45
    """Share of each GPU's memory for one version of one model (engine vllm)."""

    def __post_init__(self) -> None:
        for name, least in LEAST.items():
            value = getattr(self, name)
            if not value >= least:
                raise ConfigError(f"{name} is {value}; expected at least {least}", param=name)
        for name, known in CHOICES.items():
            value = getattr(self, name)
            if value not in known:
                raise ConfigError(
                    f"{name} is {value!r}; expected one of {', '.join(filter(None, known))}."
                    f"{did_you_mean(value, known)}",
                    param=name,
                )
        if not 0 < self.gpu_share <= 1:
            raise ConfigError(f"gpu_share is {self.gpu_share}; expected more than 0 and at most 1", param="gpu_share")
        torch_alone = {"engine": "vllm", "backend": "torch", "compile": True}
        other = next((name for name, value in torch_alone.items() if getattr(self, name) == value), None)
        if self.weights and other:
            raise ConfigError(
                f"weights is {self.weights!r}, but {other} is {getattr(self, other)!r}; only the native kernel "
                f"quantises weights: leave out {other} or weights",
                param="weights",
            )
        if self.engine == "vllm" and self.backend != "auto":
            raise ConfigError(f"backend is {self.backend!r}; expected auto, since engine is 'vllm'", param="backend")
        if self.engine != "vllm" and self.gpu_share != EngineSettings.gpu_share:
            raise ConfigError(
                f"gpu_share is {self.gpu_share}; expected none, since engine is {self.engine!r} and not vllm",
                param="gpu_share",
            )
        if self.engine != "vllm" and self.tensor_parallel > 1:
            raise ConfigError(
                f"tensor_parallel is {self.tensor_parallel}; expected 1, since engine is {self.engine!r}; "
                "only vllm splits a model",
                param="tensor_parallel",
            )


def target_ongoing_requests(slots: int) -> float:
    """Requests per replica, waiting or running, that autoscaling should aim for: `UTILISATION` of the slots.

    Up to its slots, a replica completes more requests the more it has, at nearly the same speed each. The rest of the
    slots is for chance, and for the time that another replica needs to start.
    """
    return round(UTILISATION * slots, 1)
