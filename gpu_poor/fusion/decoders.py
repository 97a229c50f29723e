"""A step of few tokens through all of a model's blocks in one C call.

What a block's own fused forward (gpu_poor/fusion/blocks.py) leaves to Python, and transformers
does around the blocks, takes longer than the arithmetic when there is one token. So if every block
is fused and the cache is in pages, the model's forward embeds the tokens, calls one operator, and
norms what comes. In all other cases it is the model's own, which calls the blocks.
"""

import functools
import math
import sys

import torch
from torch import Tensor, nn

from gpu_poor import ops
from gpu_poor.fusion.architectures import DECODERS, Architecture
from gpu_poor.fusion.binding import Binding, NotFused, Watch, entry_of, hooks_of, original
from gpu_poor.fusion.blocks import (
    LAST,
    binding_of,
    captured,
    forward_like,
    kept,
    parameters_after,
    refusal,
    subclass,
)

#: New tokens of a sequence up to which a call is a step: beyond, torch's flash kernel is faster
#: than ours, which reads the pages again for each.
FEW_TOKENS = 8
#: Tokens to a page of the cache that generate makes.
PAGE_SIZE = 64
#: Arguments that a step knows.
_KNOWN = {
    "input_ids",
    "inputs_embeds",
    "past_key_values",
    "attention_mask",
    "position_ids",
    "use_cache",
    "cache_position",
}
#: Arguments that change nothing if they are so.
_HARMLESS = {"return_dict": True, "output_attentions": False, "output_hidden_states": False}


def decoder_of(model: nn.Module) -> Architecture | None:
    """The entry for a model that consists of known blocks, by its class."""
    return entry_of(type(model), DECODERS)


def bind_decoder(model: nn.Module) -> Binding:
    """All blocks of a model as one binding; ``reason`` says why there is none."""
    watch = Watch()
    try:
        return _bind(model, decoder_of(model), watch)
    except NotFused as error:
        return Binding(watch, str(error))


def _bind(model: nn.Module, entry: Architecture, watch: Watch) -> Binding:
    blocks = watch.read(model._modules, entry.decoder.blocks)
    config = model.config
    key = config.attribute_map.get("num_hidden_layers", "num_hidden_layers")
    if len(blocks) != watch.read(vars(config), key):  # an early exit has it changed for a while
        raise NotFused(f"it has {len(blocks)} blocks, its config says otherwise")
    joined = Binding(watch)
    rows = []
    for i in range(len(blocks)):
        block = watch.read(blocks._modules, str(i))
        binding = binding_of(block)
        watch.join(binding.watch)
        watch.hooks += hooks_of(block)
        if original(type(block)) is type(block):
            raise NotFused(f"block {i} is not fused")
        if binding.reason:
            raise NotFused(f"block {i}: {binding.reason}")
        if binding.attention.layer_idx != i:
            raise NotFused(f"block {i} is layer {binding.attention.layer_idx} of the cache")
        joined.tensors += binding.tensors
        rows.append(binding)
    joined.layout = torch.cat([row.layout for row in rows])
    joined.numbers = torch.cat([row.numbers for row in rows])
    return joined


def decoder_binding_of(model: nn.Module) -> Binding:
    return kept(model, bind_decoder)


def forward(self: nn.Module, *args, **kwargs):
    """The model's forward: a step where it can be one."""
    base = original(type(self)).forward
    if torch.compiler.is_compiling():
        return base(self, *args, **kwargs)
    call = dict(zip(type(self)._gp_arguments, args, strict=False)) | kwargs
    y = _step(self, call)
    if isinstance(y, Tensor):
        self.__dict__[LAST] = None
        outputs = sys.modules["transformers.modeling_outputs"]
        output = getattr(outputs, type(self)._gp_entry.decoder.output)
        return output(last_hidden_state=y, past_key_values=call["past_key_values"])
    self.__dict__[LAST] = y
    return base(self, *args, **kwargs)


def _step(model: nn.Module, call: dict) -> Tensor | str:
    """The last hidden states, or why this call is no step."""
    cache, ids, x = (call.get(n) for n in ("past_key_values", "input_ids", "inputs_embeds"))
    if (ids is None) == (x is None):
        return "neither or both of input_ids and inputs_embeds"
    shape = (ids if x is None else x).shape
    if len(shape) != (2 if x is None else 3):
        return f"an input of shape {tuple(shape)}"
    batch, tokens = shape[:2]
    if tokens > FEW_TOKENS:
        return f"more than {FEW_TOKENS} tokens at a time: block by block"
    if reason := _unsuitable(model, cache, call):
        return reason
    binding = decoder_binding_of(model)
    if binding.reason:
        return binding.reason
    past = cache.layers[0].stored
    mask = call.get("attention_mask")
    starts = None
    if mask is not None:
        starts = _starts(mask, (batch, past + tokens))
        if isinstance(starts, str):
            return starts
    names = type(model)._gp_entry.decoder
    if x is None:
        x = getattr(model, names.embedding)(ids)
    if reason := refusal(binding, x):
        return reason
    if wanted := captured():
        return f"output_{min(wanted)}"
    position = call.get("position_ids")
    if position is None:
        position = torch.arange(past, past + tokens)[None]
    cos = sin = None
    if names.positions:
        x = x + getattr(model, names.positions)(position)
    if names.rotary:
        cos, sin = getattr(model, names.rotary)(x, position_ids=position)
    cache.reserve(tokens, batch)
    cache.starts = starts
    y = ops.decoder_step(
        x,
        binding.tensors,
        binding.layout,
        binding.numbers,
        cos,
        sin,
        cache.pool.arena,
        cache.pool.scales,
        cache.pool.shift,
        cache.block_table,
        cache.lengths,
        starts,
    )
    cache.advance(tokens)
    return getattr(model, names.norm)(y)


def _unsuitable(model: nn.Module, cache, call: dict) -> str | None:
    kv_cache = sys.modules.get("gpu_poor.kv_cache")
    if kv_cache is None or not isinstance(cache, kv_cache.PagedKVCache):
        found = "there is no cache" if cache is None else f"the cache is a {type(cache).__name__}"
        return f"{found}: pass past_key_values=PagedKVCache(model), or use generate"
    if not cache.layers[0].stored:
        return "the first tokens: block by block"
    if cache.layers[0].stored != cache.layers[-1].stored:
        return "the layers of the cache hold different numbers of tokens"
    for name, value in call.items():
        if name in _KNOWN or value is None or _HARMLESS.get(name) is value:
            continue
        return f"the argument {name}={value!r}"[:80]
    config = model.config
    for name in ("output_attentions", "output_hidden_states"):
        if call.get(name) is None and getattr(config, name, False):
            return name
    if call.get("use_cache") is False:
        return "use_cache=False"
    implementation = config._attn_implementation
    if implementation not in ("sdpa", "eager", "gpu_poor"):
        return f"attention {implementation!r}"
    return None


def _starts(mask, shape: tuple[int, int]) -> Tensor | str | None:
    """Where each sequence begins; None: nothing is hidden; or why that is not what a mask says."""
    if not isinstance(mask, Tensor) or mask.dim() != 2 or mask.shape != shape:
        return "a mask of another kind than [B, L]"
    if mask.all():
        return None
    from gpu_poor.attention import left_padding

    starts = left_padding(mask)
    return "a mask that hides more than padding on the left" if starts is None else starts


@functools.cache
def decoder_class(cls: type) -> type:
    """The subclass that a model of class ``cls`` becomes when its blocks are fused."""
    return subclass(
        cls,
        {
            "forward": forward_like(cls, forward),
            "_gp_arguments": parameters_after(cls.forward, 1),
            "_gp_entry": entry_of(cls, DECODERS),
        },
    )


# -- generate -------------------------------------------------------------------------------------


def _prepare_cache(
    self, generation_config, model_kwargs, generation_mode, batch_size, max_cache_length, *rest
):
    """In place of a dynamic cache one in pages, of the model's own dtype: exact."""
    base = original(type(self))._prepare_cache_for_generation
    given = model_kwargs.get("past_key_values") is not None
    args = generation_config, model_kwargs, generation_mode, batch_size, max_cache_length, *rest
    result = base(self, *args)
    if given or not generation_config.use_cache or generation_config.cache_implementation:
        return result
    copies = max(generation_config.num_beams or 1, generation_config.num_return_sequences or 1)
    made = model_kwargs.get("past_key_values")
    if (cache := _paged(self, made, batch_size * copies, max_cache_length)) is not None:
        model_kwargs["past_key_values"] = cache
    return result


def _paged(model: nn.Module, made, sequences: int, tokens: int):
    """A cache in pages for a model that would have the cache ``made``; None where that is to stay.

    Its arena is for the longest sequences the model was made for, so that a conversation may go on
    in it; memory that is not written to is not taken.
    """
    from transformers import DynamicCache

    from gpu_poor import attention, kv_cache, memory

    formats = {dtype: name for name, dtype in kv_cache.FORMATS.items()}
    # None: transformers before 5.10 leaves it to the model's forward to make one.
    usual = made is None or type(made) is DynamicCache
    if not usual or model.dtype not in formats or attention.unsuitable(model):
        return None
    config = model.config.get_text_config(decoder=True)
    room = int(kv_cache.SHARE_OF_AVAILABLE * memory.available())
    heads, head_dim = memory.kv_shape(config)
    token = len(memory.layer_windows(config)) * 2 * heads * head_dim * model.dtype.itemsize
    page = PAGE_SIZE * token
    pages = sequences * math.ceil(tokens / PAGE_SIZE)
    if not 0 < pages * page <= room:
        return None
    longest = max(tokens, getattr(config, "max_position_embeddings", None) or 0)
    wanted = sequences * math.ceil(longest / PAGE_SIZE) * page
    pool = kv_cache.PagePool(model, formats[model.dtype], min(wanted, room), PAGE_SIZE)
    return kv_cache.PagedKVCache(pool)


@functools.cache
def generating_class(cls: type) -> type:
    """The subclass that a model with ``generate`` becomes when it has fused blocks."""
    method = functools.wraps(cls._prepare_cache_for_generation)(_prepare_cache)
    return subclass(cls, {"_prepare_cache_for_generation": method})
