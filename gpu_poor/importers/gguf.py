"""GGUF files (llama.cpp): block types in gguf_blocks.py, the file itself in gguf_file.py.

The model's config comes from the metadata, the names of its weights from the tables below: an
architecture is an entry in ARCHITECTURES. llama.cpp interleaves the rows of the query and key
projections of its "llama" architecture for its rotary embedding; they are put back in transformers'
order, which is exact for rows of any format.
"""

import math
import re
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from gpu_poor.importers.base import Piece, Source, register
from gpu_poor.importers.gguf_file import GgufFile
from gpu_poor.importers.grids import Grid

#: ``{name in GGUF: name in transformers}`` within a block ("blk.0." and "model.layers.0.").
LLAMA_BLOCK = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
LLAMA_NAMES = {
    "token_embd": "model.embed_tokens",
    "output_norm": "model.norm",
    "output": "lm_head",
}
GPT2_BLOCK = {
    "attn_norm": "ln_1",
    "attn_qkv": "attn.c_attn",
    "attn_output": "attn.c_proj",
    "ffn_norm": "ln_2",
    "ffn_up": "mlp.c_fc",
    "ffn_down": "mlp.c_proj",
}
GPT2_NAMES = {
    "token_embd": "transformer.wte",
    "position_embd": "transformer.wpe",
    "output_norm": "transformer.ln_f",
    "output": "lm_head",
}


@dataclass(frozen=True)
class Architecture:
    """How llama.cpp's name for an architecture becomes a transformers config and its names."""

    model_type: str
    config: Callable[["Gguf"], dict]
    blocks: str = "model.layers"
    block_names: dict[str, str] = field(default_factory=lambda: LLAMA_BLOCK)
    names: dict[str, str] = field(default_factory=lambda: LLAMA_NAMES)
    #: Whether the rows of query and key are interleaved.
    interleaved: bool = False


def _llama(source: "Gguf") -> dict:
    heads = source.number("attention.head_count")
    hidden = source.number("embedding_length")
    if source.number("expert_count", 0):
        raise source.error("mixture of experts is not supported")
    head_dim = source.number("attention.key_length", hidden // heads)
    if head_dim < 2 or head_dim % 2:
        raise source.error(f"{heads} heads of {hidden} columns")
    for key in ("rope.dimension_count", "attention.value_length"):
        if source.number(key, head_dim) != head_dim:
            raise source.error(f"{key} {source.number(key)} is not the size of a head, {head_dim}")
    return {
        "hidden_size": hidden,
        "intermediate_size": source.number("feed_forward_length"),
        "num_hidden_layers": source.number("block_count"),
        "num_attention_heads": heads,
        "num_key_value_heads": source.number("attention.head_count_kv", heads),
        "head_dim": head_dim,
        "max_position_embeddings": source.number("context_length"),
        "rms_norm_eps": source.decimal("attention.layer_norm_rms_epsilon"),
        "rope_parameters": _rope(source, head_dim),
        "attention_bias": "blk.0.attn_q.bias" in source.file.tensors,
        "mlp_bias": "blk.0.ffn_up.bias" in source.file.tensors,
    }


#: Of Llama 3.1 and later; the factor differs, and a file has only what comes of it.
LLAMA3 = {
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}


def _rope(source: "Gguf", head_dim: int) -> dict:
    """transformers' rope_parameters.

    Raises:
        ValueError: the frequencies are scaled in another way than Llama 3's.
    """
    base = source.decimal("rope.freq_base", 10000.0)
    scaling = source.metadata.get(f"{source.architecture}.rope.scaling.type", "none")
    if scaling != "none":
        raise source.error(f"rotary frequencies scaled by {scaling!r} are not supported")
    name = "rope_freqs.weight"
    if name not in source.file.tensors:
        return {"rope_type": "default", "rope_theta": base}
    found = source.file.tensors[name]
    if found.shape != (head_dim // 2,) or found.type.name != "F32":
        raise source.error(f"{name} is {found.type.name} {list(found.shape)}")
    source.taken.add(name)
    divisors = source.file.blocks(name).view(torch.float32).view(-1)
    factor = float(divisors.max())
    wavelength = 2 * math.pi * base ** (torch.arange(0, head_dim, 2) / head_dim)
    low, high, context = LLAMA3.values()
    smooth = ((context / wavelength - low) / (high - low)).clamp(0, 1)
    if not torch.allclose(divisors, 1 / ((1 - smooth) / factor + smooth), rtol=1e-4):
        raise source.error(f"{name}: frequencies that are scaled, but not as Llama 3's")
    return {"rope_type": "llama3", "rope_theta": base, "factor": factor} | LLAMA3


def _gpt2(source: "Gguf") -> dict:
    return {
        "n_embd": source.number("embedding_length"),
        "n_inner": source.number("feed_forward_length"),
        "n_layer": source.number("block_count"),
        "n_head": source.number("attention.head_count"),
        "n_positions": source.number("context_length"),
        "layer_norm_epsilon": source.decimal("attention.layer_norm_epsilon"),
    }


ARCHITECTURES = {
    "llama": Architecture("llama", _llama, interleaved=True),
    "qwen2": Architecture("qwen2", _llama),
    "qwen3": Architecture("qwen3", _llama),
    "gpt2": Architecture("gpt2", _gpt2, "transformer.h", GPT2_BLOCK, GPT2_NAMES),
}


@register
class Gguf(Source):
    """A .gguf file of a supported architecture."""

    name = ".gguf"

    def __init__(self, path: Path):
        self.path = path
        self.file = GgufFile(path)
        self.metadata = self.file.metadata
        self.architecture = self.metadata.get("general.architecture")
        if self.architecture not in ARCHITECTURES:
            known = ", ".join(ARCHITECTURES)
            raise self.error(f"architecture {self.architecture!r} is not supported; known: {known}")
        if self.metadata.get("split.count", 1) not in (0, 1):
            raise self.error("a file in several parts: join them with llama-gguf-split --merge")
        self.kind = ARCHITECTURES[self.architecture]
        last = f"blk.{self.number('block_count') - 1}.attn_norm.weight"
        if last not in self.file.tensors:
            raise self.error(f"{last} is missing")
        self.taken: set[str] = set()
        self.config = self._config()

    def _config(self):
        from transformers import AutoConfig

        embedding = self.file.tensors.get("token_embd.weight")
        if embedding is None or len(embedding.shape) != 2:
            raise self.error("token_embd.weight, a matrix, is missing")
        special = ("bos", "eos", "padding")
        ids = {name: self.metadata.get(f"tokenizer.ggml.{name}_token_id") for name in special}
        ids = {name: i for name, i in ids.items() if type(i) is int and i < embedding.shape[0]}
        common = {
            "vocab_size": embedding.shape[0],
            "tie_word_embeddings": "output.weight" not in self.file.tensors,
            "bos_token_id": ids.get("bos"),
            "eos_token_id": ids.get("eos"),
            "pad_token_id": ids.get("padding"),
        }
        arguments = self.kind.config(self) | common
        try:
            return AutoConfig.for_model(self.kind.model_type, **arguments)
        except Exception as error:  # a class for each thing that it can find wrong
            raise self.error(f"transformers refuses its metadata: {error}") from error

    def number(self, key: str, default: int | None = None) -> int:
        """A whole number of the architecture's metadata.

        Raises:
            ValueError: there is none, or another type, or it is not in [0, 2^31).
        """
        value = self.metadata.get(f"{self.architecture}.{key}", default)
        if type(value) is not int or not 0 <= value < 1 << 31 or (not value and default != 0):
            raise self.error(f"{self.architecture}.{key} must be a whole number, got {value!r:.60}")
        return value

    def decimal(self, key: str, default: float | None = None) -> float:
        """A positive number of the architecture's metadata; errors as of :meth:`number`."""
        value = self.metadata.get(f"{self.architecture}.{key}", default)
        if not isinstance(value, float) or not 0 < value < float("inf"):
            raise self.error(f"{self.architecture}.{key} must be a number, got {value!r:.60}")
        return value

    # -- reading -------------------------------------------------------------------------------

    def name_of(self, parameter: str) -> str | None:
        """What llama.cpp calls a parameter; None if it has no name for it."""
        module, _, leaf = parameter.rpartition(".")
        for theirs, ours in self.kind.names.items():
            if module == ours:
                return f"{theirs}.{leaf}"
        inside = re.fullmatch(rf"{re.escape(self.kind.blocks)}\.(\d+)\.(.+)", module)
        for theirs, ours in self.kind.block_names.items():
            if inside and inside[2] == ours:
                return f"blk.{inside[1]}.{theirs}.{leaf}"
        return None

    def has(self, parameter: str) -> bool:
        return self.name_of(parameter) in self.file.tensors

    def read(self, parameter: str, shape: tuple[int, ...], rows: tuple[int, ...]) -> Piece:
        name = self.name_of(parameter)
        entry = self.file.tensors[name]
        if entry.shape != rows:
            raise self.error(f"{name} is {list(entry.shape)}, expected {list(rows)}")
        self.taken.add(name)
        n, k = (1, *entry.shape)[-2:]
        values = entry.type.read(self.file.blocks(name), n, k)
        if self.kind.interleaved and re.search(r"\.attn_[qk]\.", name):
            heads = "num_attention_heads" if ".attn_q." in name else "num_key_value_heads"
            values = _permuted(values, rows[0], getattr(self.config, heads))
        if isinstance(values, Grid):
            return Piece(values, entry.type.name, entry.type.near)
        if len(rows) == 2 and shape != rows:  # Conv1D, which has its weight the other way round
            values = values.t()
        return Piece(values.reshape(shape), entry.type.name)

    def unread(self) -> list[str]:
        return sorted(set(self.file.tensors) - self.taken)


def _permuted(values: Grid | Tensor, n: int, heads: int) -> Grid | Tensor:
    """Rows in transformers' order: the two halves of each head, from pairs of neighbours."""
    order = torch.arange(n).view(heads, -1, 2).transpose(1, 2).reshape(-1)
    if isinstance(values, Grid):
        return values.rows(order)
    return values.reshape(n, -1)[order]
