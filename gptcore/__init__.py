"""The model: config, network, tokenizer, model package, sampling and the inference engine.

Imports torch, numpy, tiktoken, tokenizers and safetensors; never Ray, MLflow or FastAPI.
"""

from gptcore import interpreter

interpreter.check()
