"""Fewer key/value heads: a model with multi-head attention becomes one with grouped queries.

The heads of a group are averaged, weights and biases:

    W[g] = mean of W[h] over the heads h = g * size ... (g + 1) * size - 1

which was better than keeping one of them or starting anew (Ainslie et al. 2023, GQA: Training
Generalized Multi-Query Transformer Models from Multi-Head Checkpoints, figure 4). The KV cache
shrinks with the number of heads. Unless the heads of each group are equal, the model is another
one, and a much worse one until it has been trained on: the paper takes 5 % of pre-training.
"""

import copy
from collections.abc import Callable

import torch
from torch import Tensor, nn

from gpu_poor import _needs_transformers, metrics
from gpu_poor.metrics_input import Text
from gpu_poor.modules import unwrap
from gpu_poor.nn import QuantizedModule

with _needs_transformers("convert_to_multi_query"):
    from transformers import (
        GPT2LMHeadModel,
        GPTBigCodeConfig,
        GPTBigCodeForCausalLM,
        PreTrainedConfig,
        PreTrainedModel,
    )

    from gpu_poor.hf_attach import own_configs

#: Projections that can be pooled, and how many of the keys and values their rows end with.
PROJECTIONS = {"k_proj": 1, "v_proj": 1, "qkv_proj": 2}

#: What a GPT-2 may have that a GPTBigCode cannot.
GPT2_ONLY = ("scale_attn_by_inverse_layer_idx", "add_cross_attention")


def convert_to_multi_query(
    model: nn.Module,
    kv_heads: int = 1,
    *,
    text: Text | None = None,
    tokenizer: Callable | None = None,
    verbose: bool = True,
) -> nn.Module:
    """Give a float model fewer key/value heads, each the mean of a group; up-train it afterwards.

    Models with k_proj and v_proj (Llama, Mistral, Qwen, Gemma and kin) or Phi-3's qkv_proj are
    changed in place, and their config with them. GPT-2's code cannot have fewer heads, but
    GPTBigCode is a GPT-2 with a single one: with ``kv_heads=1`` a new GPTBigCodeForCausalLM is
    returned, and the GPT-2 left as it was. Both are saved and loaded by plain transformers.
    Convert before :func:`gpu_poor.quantize`.

    Args:
        model: a float transformers model.
        kv_heads: key/value heads afterwards, a divisor of those it has; 1 is multi-query.
        text: to measure the perplexity on, before and after: no text it is trained on.
        tokenizer: for text; default: the one saved with the model.
        verbose: print what changed.

    Returns:
        The model to use from now on.

    Raises:
        TypeError: no transformers model.
        ValueError: a quantized model, one whose code has no grouped heads, or kv_heads that do not
            divide its heads or are as many. The model is left as it was.
    """
    model = unwrap(model)
    if not isinstance(model, PreTrainedModel):
        raise TypeError(f"convert_to_multi_query takes a model of transformers: {type(model)}")
    if any(isinstance(module, QuantizedModule) for module in model.modules()):
        raise ValueError(
            "the model is quantized, and heads are averaged in float: convert the float model, "
            "then quantize it; or gpu_poor.dequantize(model) first"
        )
    if any(parameter.is_meta for parameter in model.parameters()):
        raise ValueError("the model has no data (meta device)")
    convert = _gpt2 if isinstance(model, GPT2LMHeadModel) else _in_place
    heads = _kv_heads(model.config, type(model).__name__, kv_heads)
    before = None if text is None else metrics.perplexity(model, text, tokenizer)
    model = convert(model, heads, kv_heads)
    after = None if text is None else metrics.perplexity(model, text, tokenizer)
    if verbose:
        print(_report(type(model).__name__, heads, kv_heads, before, after))
    return model


def _report(name: str, heads: int, kv_heads: int, before: float | None, after: float | None) -> str:
    lines = [
        f"{name}: {heads} key/value heads are {kv_heads} now, the KV cache {heads / kv_heads:g} "
        "times smaller"
    ]
    if before is not None:
        lines.append(f"  perplexity {before:.4f} before, {after:.4f} now")
    lines.append("  it needs up-training before use: the paper takes 5 % of pre-training")
    return "\n".join(lines)


def _kv_heads(config: PreTrainedConfig, name: str, wanted: int) -> int:
    """The key/value heads that a model has, if it can have ``wanted``. Raises ValueError."""
    config = config.get_text_config()
    heads = getattr(config, "num_key_value_heads", None)
    if config.model_type == "gpt2":
        heads = config.n_head
        if wanted != 1:
            raise ValueError(
                "GPT-2's code has as many key/value heads as heads, and GPTBigCode, the same with "
                f"fewer, has one: kv_heads must be 1, got {wanted!r}"
            )
        if stray := [option for option in GPT2_ONLY if getattr(config, option, False)]:
            raise ValueError(f"a GPTBigCode cannot have this GPT-2's {stray[0]}")
    if not isinstance(heads, int) or isinstance(heads, bool):
        raise ValueError(f"{name} has no num_key_value_heads: its code cannot have fewer heads")
    if heads == 1:
        raise ValueError(f"{name} has one key/value head: it cannot have fewer")
    if not isinstance(wanted, int) or isinstance(wanted, bool) or not 1 <= wanted < heads:
        raise ValueError(f"kv_heads must be from 1 to {heads - 1} for {name}, got {wanted!r}")
    if heads % wanted:
        raise ValueError(f"kv_heads={wanted} does not divide the {heads} key/value heads of {name}")
    return heads


def pool(tensor: Tensor, group: int, head_dim: int, first: int = 0) -> Tensor:
    """The mean over each ``group`` of heads; exact where they are equal.

    Args:
        tensor: ``[rows, ...]``, of which ``[first:]`` are heads of ``head_dim`` rows.
    """
    heads = tensor[first:].double().unflatten(0, (-1, group, head_dim))
    pooled = heads.mean(1).flatten(0, 1).to(tensor.dtype)
    return torch.cat([tensor[:first], pooled])


# -- models whose config has num_key_value_heads ------------------------------------------------


@torch.no_grad()
def _in_place(model: PreTrainedModel, heads: int, kv_heads: int) -> PreTrainedModel:
    """Pool what has another shape in a model without data that transformers makes of the config."""
    config = copy.deepcopy(model.config)
    config.get_text_config().num_key_value_heads = kv_heads
    with torch.device("meta"):
        target = type(model)(config)
    pooled = {}
    wanted = dict(target.named_parameters(remove_duplicate=False))
    for name, parameter in model.named_parameters(remove_duplicate=False):
        if name not in wanted:
            raise ValueError(f"{name} is not of {type(model).__name__} as transformers makes it")
        shape = tuple(wanted[name].shape)
        if shape == tuple(parameter.shape):
            continue
        n = PROJECTIONS.get(name.split(".")[-2])
        if n is None or len(shape) > 2 or shape[1:] != parameter.shape[1:]:
            raise ValueError(
                f"{type(model).__name__} cannot be converted: {name} depends on the number of "
                f"key/value heads, and only {', '.join(PROJECTIONS)} can be pooled"
            )
        head_dim = (len(parameter) - shape[0]) // (n * (heads - kv_heads))
        first = len(parameter) - n * heads * head_dim
        pooled[name] = pool(parameter, heads // kv_heads, head_dim, first)
    if not pooled:
        raise ValueError(f"{type(model).__name__} has no weights for key/value heads")
    for name, tensor in pooled.items():
        module_name, _, leaf = name.rpartition(".")
        module = model.get_submodule(module_name)
        requires_grad = getattr(module, leaf).requires_grad
        setattr(module, leaf, nn.Parameter(tensor, requires_grad))
        for owner in (module_name, module_name.rpartition(".")[0]):  # the linear, the attention
            _take_sizes(model.get_submodule(owner), target.get_submodule(owner))
    own_configs(model)
    model.config.get_text_config().num_key_value_heads = kv_heads
    return model


def _take_sizes(module: nn.Module, source: nn.Module) -> None:
    """out_features, num_key_value_groups and whatever else a class counts."""
    for key, value in vars(source).items():
        if isinstance(value, int) and not isinstance(value, bool) and key in vars(module):
            setattr(module, key, value)


# -- GPT-2 ---------------------------------------------------------------------------------------


@torch.no_grad()
def _gpt2(model: GPT2LMHeadModel, heads: int, kv_heads: int) -> GPTBigCodeForCausalLM:
    """The GPTBigCode with a pooled c_attn. Its names are GPT-2's; its matrices are transposed."""
    width = model.config.n_embd
    state = {}
    for name, parameter in model.named_parameters():  # a tied lm_head is tied again
        tensor = parameter.detach()
        if name.endswith((".c_attn.weight", ".c_fc.weight", ".c_proj.weight")):  # Conv1D's
            tensor = tensor.t().contiguous()
        if ".c_attn." in name:
            tensor = pool(tensor, heads, width // heads, width)
        state[name] = tensor
    known = set(vars(GPTBigCodeConfig())) - {"num_key_value_heads"}
    same = {key: value for key, value in model.config.to_dict().items() if key in known}
    for key in ("model_type", "architectures", "transformers_version", "_name_or_path"):
        same.pop(key, None)
    new = GPTBigCodeForCausalLM.from_pretrained(
        None, config=GPTBigCodeConfig(**same, multi_query=True), state_dict=state, dtype=model.dtype
    )
    new.generation_config = copy.deepcopy(model.generation_config)
    new.config._name_or_path = new.name_or_path = model.name_or_path  # where the tokenizer is
    return new.train(model.training).to(model.device)
