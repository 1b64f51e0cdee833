"""The values that a run starts with: those of its preset, and what another kind of run has instead."""

from typing import Any

_GPT2_ADAMW = dict(optimizer="adamw", tokenizer="gpt2", beta1=0.9, schedule="cosine", min_lr_fraction=0.1)

LORA: dict[str, Any] = dict(optimizer="adamw", learning_rate=2e-4, weight_decay=0.0, beta1=0.9, schedule="cosine")
"""The recipe of adapters, over the preset's: a small rate, since they change a model that is good already."""
CHAT: dict[str, Any] = dict(data="builtin-chat", register_as="gpt-chat", sample_prompts=("Hello!",))
"""What a run for chat starts with instead of the preset's."""

PRESETS: dict[str, dict[str, Any]] = {
    "quick": dict(max_epochs=3, max_steps=600, learning_rate=6e-3, cooldown_fraction=0.45, eval_interval=50),
    "chat": dict(tokenizer="bytes", max_steps=1000, learning_rate=8e-3, eval_interval=250, val_fraction=0.02),
    "gpt2-124m": _GPT2_ADAMW
    | dict(batch_size=480, micro_batch_size=16, learning_rate=6e-4, warmup_steps=700, max_tokens=10_000_000_000)
    | dict(eval_interval=1000),
    "foundry-124m": dict(
        tokenizer="gpt2",
        batch_size=512,
        micro_batch_size=16,
        warmup_steps=200,
        max_tokens=2_500_000_000,
        eval_interval=500,
    ),
    # The published settings of this project's predecessors.
    "tiny": _GPT2_ADAMW | dict(batch_size=16, learning_rate=1e-3, max_steps=500),
    "shakespeare": _GPT2_ADAMW
    | dict(data="shakespeare", batch_size=16, sequence_length=128, learning_rate=3e-4, max_epochs=10),
    "story": _GPT2_ADAMW
    | dict(batch_size=2, learning_rate=4e-4, stride=128, max_epochs=10, warmup_steps=0, eval_interval=50),
    "mini": _GPT2_ADAMW | dict(batch_size=16, learning_rate=1e-3, max_epochs=5),
}
