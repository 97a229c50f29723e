"""Fixtures for all tests: every instruction set of this CPU, and tiny random models to quantize."""

import os

# Before transformers is imported: no test may wait for a network.
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import pytest  # noqa: E402
import torch  # noqa: E402
from helpers import assert_equal  # noqa: E402

import gpu_poor  # noqa: E402
from gpu_poor import assets  # noqa: E402
from gpu_poor.nn import QuantizedModule  # noqa: E402


@pytest.fixture(autouse=True)
def _seed():
    """The same random weights and inputs in every run, whatever ran before."""
    torch.manual_seed(0)


@pytest.fixture(params=gpu_poor.isa.available())
def isa(request):
    """Every implementation this CPU has, "torch" (plain torch operators) among them."""
    with gpu_poor.isa.cap(request.param):
        yield request.param


VOCAB = 384

#: Hidden sizes are not multiples of 64 throughout, so that kernels meet tails.
SIZES = {
    "vocab_size": VOCAB,
    "hidden_size": 128,
    "intermediate_size": 208,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
_LLAMA = SIZES | {"num_key_value_heads": 2}
_MOE = _LLAMA | {"intermediate_size": 96, "num_experts_per_tok": 2}

#: name: (model class, config class, config arguments). One row per architecture we promise.
MODELS = {
    "gpt2": (
        "GPT2LMHeadModel",
        "GPT2Config",
        {
            "vocab_size": VOCAB,
            "n_embd": 120,
            "n_layer": 2,
            "n_head": 4,
            "n_positions": 64,
            "bos_token_id": 1,
            "eos_token_id": 2,
        },
    ),
    "llama-tied": ("LlamaForCausalLM", "LlamaConfig", _LLAMA | {"tie_word_embeddings": True}),
    "llama": ("LlamaForCausalLM", "LlamaConfig", _LLAMA | {"tie_word_embeddings": False}),
    "qwen3": ("Qwen3ForCausalLM", "Qwen3Config", _LLAMA | {"head_dim": 32}),
    "qwen3-moe": (
        "Qwen3MoeForCausalLM",
        "Qwen3MoeConfig",
        _MOE | {"head_dim": 32, "num_experts": 4, "moe_intermediate_size": 96},
    ),
    "mixtral": ("MixtralForCausalLM", "MixtralConfig", _MOE | {"num_local_experts": 4}),
    "opt": (
        "OPTForCausalLM",
        "OPTConfig",
        {
            "vocab_size": VOCAB,
            "hidden_size": 128,
            "ffn_dim": 200,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "max_position_embeddings": 64,
            "word_embed_proj_dim": 128,
            "pad_token_id": 1,
        },
    ),
    "gpt-neox": (
        "GPTNeoXForCausalLM",
        "GPTNeoXConfig",
        {k: v for k, v in _LLAMA.items() if k != "num_key_value_heads"},
    ),
    "olmo": (  # not one float parameter remains
        "OlmoForCausalLM",
        "OlmoConfig",
        _LLAMA | {"num_key_value_heads": 4},
    ),
    "gemma2": ("Gemma2ForCausalLM", "Gemma2Config", _LLAMA | {"head_dim": 32}),
    "phi3": ("Phi3ForCausalLM", "Phi3Config", _LLAMA),
    "falcon": (
        "FalconForCausalLM",
        "FalconConfig",
        {
            "vocab_size": VOCAB,
            "hidden_size": 128,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "bos_token_id": 1,
            "eos_token_id": 2,
        },
    ),
    "bloom": (
        "BloomForCausalLM",
        "BloomConfig",
        {"vocab_size": VOCAB, "hidden_size": 128, "n_layer": 2, "n_head": 4},
    ),
    "bert": (
        "BertLMHeadModel",
        "BertConfig",
        {
            "vocab_size": VOCAB,
            "hidden_size": 128,
            "intermediate_size": 208,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "max_position_embeddings": 64,
            "is_decoder": True,
        },
    ),
    "bart": (
        "BartForCausalLM",
        "BartConfig",
        {
            "vocab_size": VOCAB,
            "d_model": 128,
            "decoder_layers": 2,
            "decoder_ffn_dim": 208,
            "decoder_attention_heads": 4,
            "max_position_embeddings": 64,
            "scale_embedding": True,
            "is_decoder": True,
            "is_encoder_decoder": False,
        },
    ),
}


def make_model(name: str, **changes) -> torch.nn.Module:
    """A random model of :data:`MODELS` in eval mode; ``changes`` go into its config."""
    transformers = pytest.importorskip("transformers")
    model_class, config_class, arguments = MODELS[name]
    config = getattr(transformers, config_class)(**(arguments | changes))
    torch.manual_seed(0)
    return getattr(transformers, model_class)(config).eval()


def tokens(batch: int = 2, length: int = 17) -> torch.Tensor:
    """Random token ids ``[batch, length]``, none of them a padding id."""
    return torch.randint(3, VOCAB, (batch, length), generator=torch.Generator().manual_seed(1))


@torch.no_grad()
def logits(model: torch.nn.Module, ids: torch.Tensor | None = None) -> torch.Tensor:
    """Logits ``[batch, length, vocabulary]`` of a model on :func:`tokens`."""
    ids = tokens() if ids is None else ids
    return model(ids, attention_mask=torch.ones_like(ids)).logits


@pytest.fixture(params=MODELS)
def model_name(request) -> str:
    """Each architecture in turn."""
    return request.param


def state(model):
    """What :func:`assert_untouched` compares with."""
    return {name: value.clone() for name, value in model.state_dict().items()}


def assert_untouched(model, before):
    """Float, with the values it had, and without hooks."""
    assert not any(isinstance(module, QuantizedModule) for module in model.modules())
    after = model.state_dict()
    assert after.keys() == before.keys()
    for name, value in before.items():
        assert_equal(after[name], value)
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


@pytest.fixture(scope="module")
def stories():
    """The small model in the package, and its tokenizer."""
    transformers = pytest.importorskip("transformers")
    model = transformers.AutoModelForCausalLM.from_pretrained(assets.STORIES260K)
    return model, transformers.AutoTokenizer.from_pretrained(assets.STORIES260K)
