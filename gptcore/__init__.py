"""What a GPT is and how it speaks: config, network, tokenizer, model package, sampling.

Knows torch, numpy, tiktoken, tokenizers and safetensors; never Ray, MLflow or FastAPI.
"""

from gptcore import interpreter

interpreter.check()
