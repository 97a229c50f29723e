"""The attention function "gpu_poor" of transformers models: exact, and it never expands heads.

On a cache in pages (gpu_poor/kv_cache/) it is our kernel, which reads the pages where they lie;
everything else is torch's flash kernel, without a mask where the order of the tokens says it all,
and with grouped heads as they are.
"""

import warnings

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gpu_poor import _needs_transformers, memory
from gpu_poor.attention.interface import Call, attention_function
from gpu_poor.attention.lsh import use_lsh_attention
from gpu_poor.attention.multi_query import convert_to_multi_query
from gpu_poor.modules import checked, evaluating

with _needs_transformers("gpu_poor.attention"):
    from transformers import PreTrainedModel
    from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, causal_mask_function

__all__ = [
    "convert_to_multi_query",
    "use_flash_attention_if_available",
    "use_lsh_attention",
]

NAME = "gpu_poor"


def left_padding(mask: Tensor | None) -> Tensor | None:
    """Where the tokens of a mask ``[B, L]`` (True or 1: a token) begin, int32 ``[B]``.

    None where there is padding after a token: then no number says what is hidden.
    """
    if mask is None:
        return None
    mask = mask.bool()
    starts = (~mask).sum(1)
    if not torch.equal(mask, torch.arange(mask.shape[1], device=mask.device) >= starts[:, None]):
        return None
    return starts.int()


def _last_is_newest(
    kv_length: int,
    kv_offset: int = 0,
    q_length: int = 0,
    q_offset: int | Tensor = 0,
    cache_position: Tensor | None = None,  # in place of both before transformers 5.6
    **_,
) -> bool:
    """Whether the last key is the last query's: a static cache has empty slots behind it."""
    if isinstance(q_offset, Tensor):  # what only static caches have
        return False
    end = q_offset + q_length if cache_position is None else int(cache_position[-1]) + 1
    return kv_offset + kv_length == end


def _mask(*args, attention_mask=None, **options) -> Tensor | None:
    """None where the tokens' order, and the window of a layer, say it all; else SDPA's mask.

    That one carries the padding of causal sequences as ``_gp_starts``, if padding is all it hides.
    """
    sdpa_mask = ALL_MASK_ATTENTION_FUNCTIONS["sdpa"]
    local = options.get("local_size")
    causal = options.get("allow_is_causal_skip", True) and (
        options.get("mask_function", causal_mask_function) is causal_mask_function
        if local is None
        else local == getattr(options.get("config"), "sliding_window", None)
    )
    if not causal:
        return sdpa_mask(*args, attention_mask=attention_mask, **options)
    if not _last_is_newest(**options):
        options["allow_is_causal_skip"] = False
        return sdpa_mask(*args, attention_mask=attention_mask, **options)
    if attention_mask is None or bool(attention_mask.all()):
        return None
    options["allow_is_causal_skip"] = False
    mask = sdpa_mask(*args, attention_mask=attention_mask, **options)
    mask._gp_starts = left_padding(attention_mask)
    return mask


def _causal(tokens: int, length: int, window: int) -> Tensor:
    """bool ``[T, L]``: what the last T of L tokens see."""
    query = torch.arange(length - tokens, length)[:, None]
    key = torch.arange(length)
    seen = key <= query
    return seen & (key > query - window) if window else seen


@attention_function(NAME, _mask)
def attend(call: Call) -> Tensor:
    """Exact attention: on pages where they lie, else torch's."""
    key, value, mask, window = call.key, call.value, call.mask, call.sliding_window
    layer, starts = getattr(key, "_gp_layer", None), getattr(mask, "_gp_starts", None)
    if layer is not None:
        layer.sequences.handed_out = None
        layer.sequences.starts = starts
        known = mask is None or starts is not None
        wants_gradient = torch.is_grad_enabled() and call.query.requires_grad
        if known and not call.dropout and not wants_gradient:
            return layer.attend(call.query, starts, call.scaling)
        key, value = layer.gather(call.query.dtype, shifted=True)
        window = layer.window
    tokens, length, window = call.query.shape[2], key.shape[2], window or 0
    is_causal = call.is_causal and mask is None
    if is_causal and (tokens < length or 0 < window < length):
        if tokens > 1 or 0 < window < length:
            mask = _causal(tokens, length, window)
        is_causal = False
    y = F.scaled_dot_product_attention(
        call.query,
        key,
        value,
        attn_mask=mask,
        dropout_p=call.dropout,
        is_causal=is_causal,
        scale=call.scaling,
        enable_gqa=call.query.shape[1] != key.shape[1],
    )
    return y.transpose(1, 2).contiguous()


def unsuitable(model: nn.Module) -> str | None:
    """Why a model can't have our cache or attention; None if nothing is known against it."""
    if not isinstance(model, PreTrainedModel) or not model.can_generate():
        return "it is no causal language model of transformers"
    if model.config.is_encoder_decoder:
        return "it has an encoder"
    if any(p.device.type != "cpu" for p in model.parameters()):
        return "it is not on the CPU"
    if not model._supports_default_dynamic_cache():
        return "it has a cache of a kind of its own"
    try:
        memory.layer_windows(model.config.get_text_config(decoder=True))
    except ValueError as error:
        return str(error)
    return None


@torch.no_grad()
def _answers(model: nn.Module, cache) -> Tensor:
    """Logits of three tokens, and then of one more."""
    ids = torch.arange(1, 5)[None] % model.config.get_text_config(decoder=True).vocab_size
    with evaluating(model):
        first = model(input_ids=ids[:, :3], past_key_values=cache, use_cache=True)
        second = model(input_ids=ids[:, 3:], past_key_values=first.past_key_values, use_cache=True)
    return torch.cat((first.logits, second.logits), 1).float()


def differs(model: nn.Module, cache, than: str, expected: Tensor | None = None) -> str | None:
    """Why a model's answers with a cache are not ``expected``: by default those with its own."""
    try:
        expected = _answers(model, None) if expected is None else expected
        found = _answers(model, cache)
    except (ValueError, RuntimeError, TypeError, IndexError, AttributeError) as error:
        return f"{type(error).__name__}: {error}"
    spread = float(expected.max() - expected.min())
    difference = float((found - expected).abs().max())
    if not difference <= 0.01 * spread:
        return f"its logits are {difference:.3g} away from those {than}"
    return None


def use_flash_attention_if_available(model: nn.Module) -> nn.Module:
    """Make "gpu_poor" the attention of a transformers model; the model itself is returned.

    Exact, and no head is ever expanded: torch's flash kernel, and on a cache in pages ours. Before
    it is kept its logits of four tokens are compared with the model's own.

    A model whose attention it can't be (softcapping, sinks, biases of positions) is returned as it
    was, with a warning that says why.
    """
    held, model = model, checked(model, "use_flash_attention_if_available")
    reason = unsuitable(model)
    if reason is None and model.config._attn_implementation != NAME:
        own = model.config._attn_implementation
        if not model._supports_sdpa:
            reason = "it has an attention of its own"
        else:
            expected = _answers(model, None)
            model.set_attn_implementation(NAME)
            reason = differs(model, None, f'of attention "{own}"', expected)
            if reason is not None:
                model.set_attn_implementation(own)
    if reason is not None:
        warnings.warn(f"{type(model).__name__} keeps its own attention: {reason}", stacklevel=2)
    return held
