"""How an engine is set up: how much it does at once, on what, and in which precision."""

from dataclasses import dataclass

from gptcore.errors import ConfigError, did_you_mean

CHOICES = {"dtype": ("auto", "bfloat16", "float32"), "backend": ("auto", "native", "torch")}


@dataclass(frozen=True)
class EngineSettings:
    """Settings of one engine. Raises ConfigError for a value out of range."""

    slots: int = 0
    """Sequences decoded together; 0: as many as half the free memory holds, at most 16, on an NVIDIA GPU 64."""
    prefill_tokens: int = 256
    """Prompt tokens computed per step beside the decodes, so that a long prompt does not stall the others."""
    max_queue: int = 64
    """Requests that may wait for a slot; one more is refused."""
    dtype: str = "auto"
    """auto, bfloat16 or float32; auto: bfloat16 where the hardware computes in it."""
    device: str = "auto"
    """auto, cpu, cuda, cuda:N or mps; auto: a GPU if there is one."""
    backend: str = "auto"
    """auto, native or torch; auto: the native kernels on a CPU where they can be built, else torch."""
    threads: int = 0
    """CPU threads that compute; 0: one per core available to this process."""
    compile: bool = False
    """Have torch.compile fuse the network (backend torch): a slower start, faster steps."""
    prefix_cache: bool = True
    """Reuse what was computed for a prompt that begins alike."""

    def __post_init__(self) -> None:
        for name, least in (("slots", 0), ("prefill_tokens", 1), ("max_queue", 1), ("threads", 0)):
            value = getattr(self, name)
            if not value >= least:
                raise ConfigError(f"{name} is {value}; expected at least {least}", param=name)
        for name, known in CHOICES.items():
            value = getattr(self, name)
            if value not in known:
                raise ConfigError(
                    f"{name} is {value!r}; expected one of {', '.join(known)}.{did_you_mean(value, known)}", param=name
                )
