"""The engines that ours is measured beside, each with the same weights: a contestant of `bench.turns` per module.

A module imports its library only when opened, so that one that is not installed is reported and not needed.
"""

from bench.peers.ctranslate2 import open_ctranslate2
from bench.peers.llama_cpp import open_llama_cpp
from bench.peers.transformers import open_transformers
from bench.turns import Contestant

TRANSFORMERS = ("transformers",)
CTRANSLATE2 = ("ctranslate2", "transformers")
LLAMA_CPP = ("llama_cpp", "gguf")

PEERS = [
    Contestant("transformers", "bfloat16", open_transformers, TRANSFORMERS),
    Contestant("transformers", "float32", open_transformers, TRANSFORMERS),
    Contestant("CTranslate2", "bfloat16", open_ctranslate2, CTRANSLATE2),
    Contestant("CTranslate2", "float32", open_ctranslate2, CTRANSLATE2),
    Contestant("CTranslate2", "int8", open_ctranslate2, CTRANSLATE2),
    Contestant("llama.cpp", "bfloat16", open_llama_cpp, LLAMA_CPP),
]
"""At every precision that they are measured in."""

REFERENCES = [
    Contestant("transformers", "float32", open_transformers, TRANSFORMERS),
    Contestant("CTranslate2", "float32", open_ctranslate2, CTRANSLATE2),
    Contestant("llama.cpp", "float32", open_llama_cpp, LLAMA_CPP),
]
"""In fp32, where greedy text must agree if the weights are the same."""
