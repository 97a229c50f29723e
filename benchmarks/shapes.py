"""Models of published shapes, random weights: right for speed and memory, worthless for quality.

No hub is needed. The numbers below are those of each model's published config.json.
"""

import torch
from transformers import AutoModelForCausalLM, GPT2Config, LlamaConfig, PreTrainedModel
from transformers.initialization import no_init_weights


def _gpt2(layers: int, width: int, heads: int) -> dict:
    return {"config": GPT2Config, "n_layer": layers, "n_embd": width, "n_head": heads,
            "n_positions": 1024, "vocab_size": 50257}  # fmt: skip


SHAPES = {
    "distilgpt2": _gpt2(6, 768, 12),
    "gpt2": _gpt2(12, 768, 12),
    "gpt2-medium": _gpt2(24, 1024, 16),
    "gpt2-large": _gpt2(36, 1280, 20),
    "tinyllama-1.1b": {
        "config": LlamaConfig, "hidden_size": 2048, "intermediate_size": 5632,
        "num_hidden_layers": 22, "num_attention_heads": 32, "num_key_value_heads": 4,
        "vocab_size": 32000, "max_position_embeddings": 2048, "tie_word_embeddings": False,
    },
    "llama-7b": {
        "config": LlamaConfig, "hidden_size": 4096, "intermediate_size": 11008,
        "num_hidden_layers": 32, "num_attention_heads": 32, "num_key_value_heads": 32,
        "vocab_size": 32000, "max_position_embeddings": 4096, "tie_word_embeddings": False,
    },
    # For --quick runs and the tests of the benchmarks themselves.
    "tiny-gpt2": _gpt2(2, 128, 4) | {"vocab_size": 1000},
    "tiny-llama": {
        "config": LlamaConfig, "hidden_size": 128, "intermediate_size": 352,
        "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
        "vocab_size": 1000, "max_position_embeddings": 2048, "tie_word_embeddings": False,
    },
}  # fmt: skip


def config(name: str):
    """The transformers configuration of a shape, without an end-of-text token to stop at."""
    fields = dict(SHAPES[name])
    kind = fields.pop("config")
    return kind(**fields, bos_token_id=None, eos_token_id=None, pad_token_id=0)


def fill(tensor: torch.Tensor, block: torch.Tensor, offset: int) -> None:
    """Copy random numbers out of one block, from an offset on: 20 x faster than drawing them."""
    flat = tensor.view(-1)
    done = 0
    while done < flat.numel():
        start = (offset + done) % block.numel()
        n = min(block.numel() - start, flat.numel() - done)
        flat[done : done + n].copy_(block[start : start + n])
        done += n


def random_block(dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """16 M numbers N(0, 0.02), the spread both families are initialised with."""
    generator = torch.Generator().manual_seed(0)
    return (torch.randn(1 << 24, generator=generator) * 0.02).to(dtype)


def build(name: str, dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    """The model of a shape with random weights: matrices N(0, 0.02), norms 1, biases 0."""
    with no_init_weights():
        model = AutoModelForCausalLM.from_config(config(name), dtype=dtype)
    model.tie_weights()
    block = random_block(dtype)
    with torch.no_grad():
        for i, (key, parameter) in enumerate(model.named_parameters()):
            if parameter.dim() > 1:
                fill(parameter, block, i * 7919)
            elif key.endswith("bias"):
                parameter.zero_()
            else:
                parameter.fill_(1.0)
    return model.eval()
