"""GGUF files of the benchmark shapes with random weights, by the gguf package.

Tensor names, orders and types are those convert_hf_to_gguf.py gives: matrices F16, Q8_0 or Q4_0,
norms, biases and position embeddings F32, a tied lm_head left out. No tokenizer: llama-bench needs
none.
"""

from pathlib import Path

import numpy as np

from benchmarks import shapes


def _tensors(config) -> list[tuple[str, tuple[int, ...]]]:
    """(name, shape) in numpy order, [out features, in features]."""
    if config.model_type == "gpt2":
        d, vocabulary = config.n_embd, config.vocab_size
        out = [("token_embd.weight", (vocabulary, d)), ("position_embd.weight", (1024, d))]
        for i in range(config.n_layer):
            matrices = {"attn_qkv": (3 * d, d), "attn_output": (d, d), "ffn_up": (4 * d, d),
                        "ffn_down": (d, 4 * d)}  # fmt: skip
            for name in ("attn_norm", "ffn_norm"):
                out += [(f"blk.{i}.{name}.weight", (d,)), (f"blk.{i}.{name}.bias", (d,))]
            for name, shape in matrices.items():
                out += [(f"blk.{i}.{name}.weight", shape), (f"blk.{i}.{name}.bias", shape[:1])]
        return [*out, ("output_norm.weight", (d,)), ("output_norm.bias", (d,))]
    d, ff, vocabulary = config.hidden_size, config.intermediate_size, config.vocab_size
    kv = d * config.num_key_value_heads // config.num_attention_heads
    out = [("token_embd.weight", (vocabulary, d))]
    for i in range(config.num_hidden_layers):
        matrices = {"attn_q": (d, d), "attn_k": (kv, d), "attn_v": (kv, d), "attn_output": (d, d),
                    "ffn_gate": (ff, d), "ffn_up": (ff, d), "ffn_down": (d, ff),
                    "attn_norm": (d,), "ffn_norm": (d,)}  # fmt: skip
        out += [(f"blk.{i}.{name}.weight", shape) for name, shape in matrices.items()]
    return [*out, ("output_norm.weight", (d,)), ("output.weight", (vocabulary, d))]


def _metadata(writer, config) -> None:
    gpt2 = config.model_type == "gpt2"
    width = config.n_embd if gpt2 else config.hidden_size
    heads = config.n_head if gpt2 else config.num_attention_heads
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(width)
    writer.add_block_count(config.n_layer if gpt2 else config.num_hidden_layers)
    writer.add_feed_forward_length(4 * width if gpt2 else config.intermediate_size)
    writer.add_head_count(heads)
    writer.add_vocab_size(config.vocab_size)
    writer.add_tokenizer_model("none")
    if gpt2:
        writer.add_layer_norm_eps(config.layer_norm_epsilon)
    else:
        writer.add_layer_norm_rms_eps(config.rms_norm_eps)
        writer.add_head_count_kv(config.num_key_value_heads)
        writer.add_rope_dimension_count(width // heads)


def _pool(kind) -> np.ndarray:
    """Bytes of random weights in a type.

    One encoded pool, cut to size for every tensor: encoding them all would take minutes.
    """
    import gguf

    if kind == gguf.GGMLQuantizationType.Q6_K:  # the package only decodes it
        blocks = np.random.default_rng(0).integers(0, 256, (1 << 14, 210), dtype=np.uint8)
        blocks[:, 208:] = np.array([1e-4], np.float16).view(np.uint8)
        return blocks.reshape(-1)
    block = shapes.random_block()[: 1 << 22].numpy()
    return gguf.quants.quantize(block.reshape(-1, 32), kind).reshape(-1).view(np.uint8)


def write(shape: str, variant: str, path: Path) -> None:
    """Write ``path``: the shape's random weights as ``f16``, ``q8_0`` or ``q4_0``.

    The matrix before the logits of Q4_0 is Q6_K, as llama-quantize has it.
    """
    import gguf

    config = shapes.config(shape)
    types = gguf.GGMLQuantizationType
    kind = {"f16": types.F16, "q8_0": types.Q8_0, "q4_0": types.Q4_0}[variant]
    tensors = _tensors(config)
    last = "output.weight" if "output.weight" in dict(tensors) else "token_embd.weight"
    kinds = {last: types.Q6_K} if variant == "q4_0" else {}
    pools = {k: _pool(k) for k in {kind, *kinds.values()}}
    architecture = {"gpt2": "gpt2", "llama": "llama"}[config.model_type]
    writer = gguf.GGUFWriter(path, architecture)
    _metadata(writer, config)
    for name, dims in tensors:
        if len(dims) == 1 or name.startswith("position"):
            fill = 0.0 if name.endswith("bias") else 1.0
            writer.add_tensor(name, np.full(dims, fill, np.float32))
            continue
        stored = kinds.get(name, kind)
        weights, size = gguf.GGML_QUANT_SIZES[stored]
        rows, columns = dims
        data = np.resize(pools[stored], (rows, columns // weights * size))
        writer.add_tensor(name, data.view(np.float16) if variant == "f16" else data,
                          raw_dtype=stored)  # fmt: skip
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def size(path: Path) -> tuple[int, int]:
    """Bytes of the tensors in a file, and the number of their elements."""
    import gguf

    tensors = gguf.GGUFReader(path).tensors
    return sum(int(t.n_bytes) for t in tensors), sum(int(t.n_elements) for t in tensors)
