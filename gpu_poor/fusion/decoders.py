"""A step: new tokens through all of a model's blocks in one C call.

What a block's own fused forward (gpu_poor/fusion/blocks.py) leaves to Python, and transformers
does around the blocks, takes longer than the arithmetic when there is one token. So if every block
is fused and the cache is in pages, the model's forward embeds the tokens and calls one operator,
which norms what comes, too. In all other cases it is the model's own, which calls the blocks.
"""

import functools
import sys

import torch
from torch import Tensor, nn

from gpu_poor import ops
from gpu_poor.fusion.architectures import DECODERS, Architecture
from gpu_poor.fusion.binding import Binding, NotFused, Watch, entry_of, norm_of, original
from gpu_poor.fusion.blocks import (
    LAST,
    binding_of,
    captured,
    forward_like,
    kept,
    parameters_after,
    replaced,
    subclass,
    unable,
    unsuited,
)
from gpu_poor.fusion.company import follow

#: Tokens of all sequences that go through the blocks at a time: more cost memory, and an interrupt
#: has to wait for them. No bit depends on it. A prompt of 1000 tokens, GPT-2-large's shape: 2.76 s
#: with 256, 2.55 with 512, 2.56 with 1024.
SLICE = 512
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
        watch.watch_hooks(block)
        if original(type(block)) is type(block):
            raise NotFused(f"block {i} is not fused")
        if binding.reason:
            raise NotFused(f"block {i}: {binding.reason}")
        if binding.attention.layer_idx != i:
            raise NotFused(f"block {i} is layer {binding.attention.layer_idx} of the cache")
        joined.tensors += binding.tensors
        rows.append(binding)
    (kind, _), eps = norm_of(watch.child(model, entry.decoder.norm), joined)
    joined.norm = kind, eps
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
    follow()
    call = dict(zip(type(self)._gp_arguments, args, strict=False)) | kwargs
    y = step(self, call)
    if isinstance(y, Tensor):
        self.__dict__[LAST] = None
        outputs = sys.modules["transformers.modeling_outputs"]
        output = getattr(outputs, type(self)._gp_entry.decoder.output)
        return output(last_hidden_state=y, past_key_values=call["past_key_values"])
    self.__dict__[LAST] = y
    return base(self, *args, **kwargs)


def step(model: nn.Module, call: dict) -> Tensor | str:
    """The last hidden states, normed, or why this call is no step."""
    cache, ids, x = (call.get(n) for n in ("past_key_values", "input_ids", "inputs_embeds"))
    if (ids is None) == (x is None):
        return "neither or both of input_ids and inputs_embeds"
    shape = (ids if x is None else x).shape
    if len(shape) != (2 if x is None else 3):
        return f"an input of shape {tuple(shape)}"
    batch, tokens = shape[:2]
    if reason := _unsuitable(model, cache, call):
        return reason
    binding = decoder_binding_of(model)
    if reason := unable(binding):  # before the embedding, which the model's own calls again
        return reason
    if wanted := captured():
        return f"output_{min(wanted)}"
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
    if reason := unsuited(x):
        return reason
    if x.dtype != (dtype := binding.tensors[-1].dtype):
        return f"hidden states are {x.dtype}, the last norm's weight is {dtype}"
    position = call.get("position_ids")
    if position is None:
        position = torch.arange(past, past + tokens)[None]
    cos = sin = None
    if names.positions:
        x = x + getattr(model, names.positions)(position)
    if names.rotary:
        cos, sin = getattr(model, names.rotary)(x, position_ids=position)
    cache.reserve(tokens, batch)
    before, cache.starts = cache.starts, starts
    size, parts = max(1, SLICE // max(batch, 1)), []
    try:
        for begin in range(0, max(tokens, 1), size):
            given = x, cos, sin
            if tokens > size:
                given = (t if t is None else t[:, begin : begin + size] for t in given)
            parts.append(_run(binding, cache, *given))
            cache.advance(parts[-1].shape[1])
    except BaseException:  # an interrupt too, wherever it comes: as it was
        for layer in cache.layers:
            layer.stored = past
        cache.starts = before
        raise
    return parts[0] if len(parts) == 1 else torch.cat(parts, 1)


def _run(binding: Binding, cache, x: Tensor, cos: Tensor | None, sin: Tensor | None) -> Tensor:
    """What the blocks and the last norm make of the next tokens, whose pages are reserved."""
    starts = cache.starts
    if starts is not None:  # padding may go on after these
        starts = starts.clamp(max=cache.layers[0].stored + x.shape[1])
    return ops.decoder_step(
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
        *binding.norm,
    )


def _unsuitable(model: nn.Module, cache, call: dict) -> str | None:
    if replaced(type(model)):
        return "its class has another forward than transformers'"
    kv_cache = sys.modules.get("gpu_poor.kv_cache")
    if kv_cache is None or not isinstance(cache, kv_cache.PagedKVCache):
        found = "there is no cache" if cache is None else f"the cache is a {type(cache).__name__}"
        return f"{found}: pass past_key_values=PagedKVCache(model), or use generate"
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
