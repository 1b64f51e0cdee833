"""The README.md of a package: what the model is, and how to run it."""

from collections.abc import Mapping
from typing import Any

IN_TRANSFORMERS = """```python
from transformers import AutoModelForCausalLM, AutoTokenizer

tokenizer = AutoTokenizer.from_pretrained("FOLDER")
model = AutoModelForCausalLM.from_pretrained("FOLDER")
inputs = tokenizer("Once upon a time", return_tensors="pt")
print(tokenizer.decode(model.generate(**inputs, max_new_tokens=100)[0]))
```"""


def model_card(name: str, facts: str, training: Mapping[str, Any], weights: str) -> str:
    """The card of a model with a line for each of `facts`. `weights` is the scheme of quantised ones, else empty."""
    parent = training.get("parent")
    made = f"fine-tuned from {parent}" if parent else "trained from scratch"
    ability = (
        " It answers conversations that are formatted by its chat template."
        if training.get("objective") == "chat"
        else " It continues text; it does not follow instructions."
    )
    if weights and not training:  # by others
        made, ability = f"quantised to {weights}", ""
    listed = "\n".join(f"- {line}" for line in facts.splitlines())
    return f"""---
library_name: {"gptcore" if weights else "transformers"}
pipeline_tag: text-generation
tags: [gpt-foundry]
---
# {name}

A language model {made} with GPT Foundry.{ability}

{listed}

{f"Its {weights} weights are read by gptcore only." if weights else IN_TRANSFORMERS}

Here: `python -m gptcore.generate FOLDER --prompt "Once upon a time"`.
"""
