"""The engines that ours is compared with, on the same weights. Each module has one contestant of `bench.turns`.

A module imports its library only when the contestant is opened. So a library that is not installed is only reported.
"""

from bench.peers.ctranslate2 import open_ctranslate2
from bench.peers.llama_cpp import open_llama_cpp
from bench.peers.transformers import open_transformers
from bench.peers.vllm import open_vllm
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
    Contestant("vLLM", "bfloat16", open_vllm),
]
"""Every engine in every precision that it is measured in."""

QUANTISED = [
    Contestant("CTranslate2", "int8", open_ctranslate2, CTRANSLATE2),
    Contestant("llama.cpp", "int8", open_llama_cpp, LLAMA_CPP),
    Contestant("llama.cpp", "int4", open_llama_cpp, LLAMA_CPP),
]
"""Those with quantised weights; llama.cpp's are q8_0 and q4_0."""

REFERENCES = [
    Contestant("transformers", "float32", open_transformers, TRANSFORMERS),
    Contestant("CTranslate2", "float32", open_ctranslate2, CTRANSLATE2),
    Contestant("llama.cpp", "float32", open_llama_cpp, LLAMA_CPP),
    Contestant("vLLM", "float32", open_vllm),
]
"""The engines in fp32: if the weights are the same, their greedy text must agree."""
