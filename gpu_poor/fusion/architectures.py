"""The decoder blocks that can be fused: one entry for each family, found by the block's class.

An entry says where the parts of a block are; that they are what it says is verified on each model
(gpu_poor/fusion/binding.py), so that an entry is no promise about a class that has changed. Adding
a family is one entry, and a line in tests/test_fusion.py.
"""

from dataclasses import dataclass

from gpu_poor.ops.decoder import Activation, Qkv


@dataclass(frozen=True)
class Decoder:
    """Where a model that consists of such blocks has its parts: names of its children."""

    name: str
    blocks: str
    embedding: str
    norm: str
    #: Learned positions that are added to the embedding.
    positions: str | None = None
    #: What makes ``position_embeddings``.
    rotary: str | None = None
    #: What its forward returns, of transformers.modeling_outputs.
    output: str = "BaseModelOutputWithPast"


@dataclass(frozen=True)
class Architecture:
    """Names of what a block consists of, as paths from the block."""

    attention: str
    attention_norm: str
    #: Before the feed-forward network; None: it reads what attention's norm made.
    network_norm: str | None
    #: Three linears or one, from the attention module.
    qkv: tuple[str, ...]
    output: str
    #: The feed-forward network's linears: gate, up, down; or the first and the second.
    network: tuple[str, ...]
    activation: str
    decoder: Decoder
    #: How the one linear of q, k and v is divided.
    layout: Qkv = Qkv.CONCATENATED
    head_norms: tuple[str, str] | None = None
    #: Attributes of the attention module.
    head_dim: str = "head_dim"
    window: str | None = None
    #: Whether queries and keys are rotated by ``position_embeddings``.
    rotary: bool = True
    #: Whether attention and network read the same input; or the block's attribute that says so.
    parallel: bool | str = False
    #: The argument that is the cache.
    cache: str = "past_key_values"
    #: Children and flags that, where a block has them, make it another kind of block: paths.
    refuse: tuple[str, ...] = ()


_NEOX = ("layers", "embed_in", "final_layer_norm")
_PHI = ("layers", "embed_tokens", "final_layernorm")
_MLP = ("mlp.gate_proj", "mlp.up_proj", "mlp.down_proj")


def _llama(name: str, **changes) -> Architecture:
    parts = dict(
        attention="self_attn",
        attention_norm="input_layernorm",
        network_norm="post_attention_layernorm",
        qkv=("q_proj", "k_proj", "v_proj"),
        output="o_proj",
        network=_MLP,
        activation="mlp.act_fn",
        decoder=Decoder(name, "layers", "embed_tokens", "norm", rotary="rotary_emb"),
    )
    return Architecture(**parts | changes)


#: ``{name of a block's class in transformers: what it consists of}``.
ARCHITECTURES: dict[str, Architecture] = {
    "GPT2Block": Architecture(
        attention="attn",
        attention_norm="ln_1",
        network_norm="ln_2",
        qkv=("c_attn",),
        output="c_proj",
        network=("mlp.c_fc", "mlp.c_proj"),
        activation="mlp.act",
        decoder=Decoder(
            "GPT2Model",
            "h",
            "wte",
            "ln_f",
            positions="wpe",
            output="BaseModelOutputWithPastAndCrossAttentions",
        ),
        rotary=False,
        refuse=("crossattention", "attn.reorder_and_upcast_attn"),
    ),
    "LlamaDecoderLayer": _llama("LlamaModel"),
    "MistralDecoderLayer": _llama("MistralModel", window="config.sliding_window"),
    "Qwen2DecoderLayer": _llama("Qwen2Model", window="sliding_window"),
    "Qwen3DecoderLayer": _llama(
        "Qwen3Model", window="sliding_window", head_norms=("q_norm", "k_norm")
    ),
    "GPTNeoXLayer": Architecture(
        attention="attention",
        attention_norm="input_layernorm",
        network_norm="post_attention_layernorm",
        qkv=("query_key_value",),
        output="dense",
        network=("mlp.dense_h_to_4h", "mlp.dense_4h_to_h"),
        activation="mlp.act",
        decoder=Decoder(
            "GPTNeoXModel", "layers", "embed_in", "final_layer_norm", rotary="rotary_emb"
        ),
        layout=Qkv.PER_HEAD,
        head_dim="head_size",
        parallel="use_parallel_residual",
        cache="layer_past",
    ),
    "PhiDecoderLayer": Architecture(
        attention="self_attn",
        attention_norm="input_layernorm",
        network_norm=None,
        qkv=("q_proj", "k_proj", "v_proj"),
        output="dense",
        network=("mlp.fc1", "mlp.fc2"),
        activation="mlp.activation_fn",
        decoder=Decoder(
            "PhiModel", "layers", "embed_tokens", "final_layernorm", rotary="rotary_emb"
        ),
        parallel=True,
        refuse=("self_attn.q_layernorm",),
    ),
}

#: Norms of transformers that compute ``weight * x / sqrt(mean(x^2) + variance_epsilon)``.
RMS_NORMS = {f"{family}RMSNorm" for family in ("Llama", "Mistral", "Qwen2", "Qwen3")}

#: ``{class: what it computes}``.
ACTIVATIONS = {
    "SiLU": Activation.SILU,
    "SiLUActivation": Activation.SILU,
    "GELUActivation": Activation.GELU,
    "NewGELUActivation": Activation.GELU_TANH,
    "GELUTanh": Activation.GELU_TANH,
    "PytorchGELUTanh": Activation.GELU_TANH,
    "FastGELUActivation": Activation.GELU_TANH,
    "ReLU": Activation.RELU,
}

#: ``{name of a causal language model's class: what its forward returns}``, of those whose forward
#: is the decoder's, ``lm_head`` and nothing else.
HEADS = {
    f"{family}ForCausalLM": "CausalLMOutputWithPast"
    for family in ("Llama", "Mistral", "Qwen2", "Qwen3", "GPTNeoX", "Phi")
} | {"GPT2LMHeadModel": "CausalLMOutputWithCrossAttentions"}

#: ``{name of a model's class: its blocks' entry}``.
DECODERS = {entry.decoder.name: entry for entry in ARCHITECTURES.values()}
