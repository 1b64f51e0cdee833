"""Writes a model package as a GGUF file, which llama.cpp reads, with the `gguf` package.

Prompts and answers are token ids, so the file has no vocabulary, only its size.
"""

from pathlib import Path

import numpy as np

from gptcore.package import WEIGHTS, open_package


def write_gguf(package: Path, file: Path, precision: str) -> None:
    """Writes `file` with the matrices in `precision` (bfloat16 or float32).

    Vectors and the table of positions stay in fp32, as in llama.cpp's own conversion.
    """
    import gguf
    from safetensors.torch import load_file

    config = open_package(package, verify=False).config
    architecture = {"gpt2": gguf.MODEL_ARCH.GPT2, "qwen3": gguf.MODEL_ARCH.QWEN3}[config.family]
    writer = gguf.GGUFWriter(file, gguf.MODEL_ARCH_NAMES[architecture])
    writer.add_context_length(config.context_length)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_layers)
    writer.add_feed_forward_length(config.intermediate_size or 0)
    writer.add_head_count(config.num_heads)
    writer.add_head_count_kv(config.kv_heads)
    if config.family == "gpt2":
        writer.add_layer_norm_eps(config.norm_eps or 0.0)
    else:
        writer.add_layer_norm_rms_eps(config.norm_eps or 0.0)
        writer.add_key_length(config.head_size)
        writer.add_value_length(config.head_size)
        writer.add_rope_freq_base(config.rope_theta)
    writer.add_tokenizer_model("none")
    writer.add_vocab_size(config.vocab_size)
    names = gguf.get_tensor_name_map(architecture, config.num_layers)
    for name, tensor in load_file(package / WEIGHTS).items():
        stored = names.get_name(name, try_suffixes=(".weight", ".bias"))
        if stored is None:
            raise ValueError(f"llama.cpp has no name for {name}")
        # GPT-2's `c_` matrices are transposed in the published layout.
        matrix = tensor.t() if config.family == "gpt2" and ".c_" in name and tensor.ndim == 2 else tensor
        lower = precision == "bfloat16" and tensor.ndim == 2 and not stored.startswith("position_embd")
        values = np.ascontiguousarray(matrix.float().numpy())
        kind = gguf.GGMLQuantizationType.BF16 if lower else gguf.GGMLQuantizationType.F32
        writer.add_tensor(stored, gguf.quants.quantize(values, kind), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
