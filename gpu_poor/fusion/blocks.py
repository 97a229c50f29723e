"""A block's forward through the fused operators, and when it must not take it.

A fused block is an object of a subclass made here of the class that it had. The subclass adds a
forward and nothing else: no modules, no parameters, no buffers. It has the name of the class it
was made from, which is what transformers knows classes by, and is pickled as that one.
"""

import functools
import inspect
import sys
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad

from gpu_poor import ops
from gpu_poor.fusion.architectures import ARCHITECTURES
from gpu_poor.fusion.binding import CAPTURING, Binding, at_home, bind, entry_of, original

#: Where a module keeps its binding, and why its last call was not fused: in no state_dict or copy.
BINDING, LAST = "_gp_binding", "_gp_last"
_GRADIENTS = "gradients are wanted: call it under torch.no_grad()"


def kept(module: nn.Module, bind: Callable[[nn.Module], Binding]) -> Binding:
    """The binding of a module as it is now: made again only where something has changed."""
    binding = module.__dict__.get(BINDING)
    if binding is None or not binding.watch.unchanged():
        binding = module.__dict__[BINDING] = bind(module)
        binding.watch.look_for_hooks()
    return binding


def binding_of(block: nn.Module) -> Binding:
    """The binding of a block as it is now."""
    return kept(block, bind)


def refusal(binding: Binding, x: Tensor) -> str | None:
    """Why what is bound can't take its fused path in this call."""
    return unable(binding) or unsuited(x)


def unsuited(x: Tensor) -> str | None:
    """Why no fused path takes these hidden states."""
    if type(x) is not Tensor or x.dim() != 3 or x.dtype not in ops.FLOATS or not x.is_cpu:
        return f"hidden states are {x.dtype} {tuple(x.shape)} on {x.device.type}"
    return _GRADIENTS if torch.is_grad_enabled() and x.requires_grad else None


def unable(binding: Binding) -> str | None:
    """:func:`refusal`, whatever the hidden states are."""
    if binding.reason:
        return binding.reason
    if torch.is_grad_enabled() and binding.requires_grad():
        return _GRADIENTS
    if torch.is_autocast_enabled("cpu"):
        return "autocast"
    if forward_ad._current_level >= 0 or torch._C._are_functorch_transforms_active():
        return "a transform of torch.func, or forward-mode derivatives"
    if torch.jit.is_tracing():
        return "torch.jit.trace"
    if binding.watch.hooked is not None:
        return "a module inside has a hook"
    if binding.watch.any_hooks and (wanted := captured() - {"hidden_states"}):
        return f"output_{min(wanted)}"
    return None


def captured() -> set[str]:
    """What transformers' hooks collect in the call that is running."""
    capturing = sys.modules.get(CAPTURING)
    collector = capturing and capturing._active_collector.get()
    return {name for name in collector or () if not name.startswith("_")}


def forward(self: nn.Module, hidden_states: Tensor, *args, **kwargs):
    """The block's forward: through the operators where it can be."""
    base = original(type(self)).forward
    if torch.compiler.is_compiling():
        return base(self, hidden_states, *args, **kwargs)
    call = dict(zip(type(self)._gp_arguments, args, strict=False)) | kwargs
    binding = binding_of(self)
    reason = refusal(binding, hidden_states)
    if reason is None and _has_gradient(call.get(type(self)._gp_entry.cache), binding):
        reason = "gradients are wanted of what the cache holds"
    if reason is None and call.get("encoder_hidden_states") is not None:
        reason = "cross attention"
    if reason is None and call.get("output_attentions"):
        reason = "output_attentions"
    self.__dict__[LAST] = reason
    if reason is not None:
        return base(self, hidden_states, *args, **kwargs)
    y = _run(self, binding, hidden_states, call)
    return (y,) if type(self)._gp_returns_tuple else y


def _has_gradient(cache, binding: Binding) -> bool:
    """Whether the keys or values that a cache holds want gradients, as of a trained prefix."""
    if cache is None or not torch.is_grad_enabled():
        return False
    cache = getattr(cache, "self_attention_cache", cache)
    (layer,) = getattr(cache, "layers", ())[binding.attention.layer_idx :][:1] or (None,)
    held = (getattr(layer, name, None) for name in ("keys", "values"))
    return any(tensor is not None and tensor.requires_grad for tensor in held)


def _run(block: nn.Module, binding: Binding, x: Tensor, call: dict) -> Tensor:
    entry = type(block)._gp_entry
    stored = binding.tensors, binding.layout, binding.numbers
    position = call.pop("position_embeddings", None)
    cos, sin = position if entry.rotary else (None, None)
    heads = ops.decoder_qkv(x, *stored, cos, sin, *binding.heads)
    q, k, v = (t.transpose(1, 2) for t in heads)
    cache, attention = call.pop(entry.cache, None), binding.attention
    if cache is not None:
        k, v = _update(cache, k, v, attention.layer_idx, call.get("cache_position"))
    mask = call.pop("attention_mask", None)
    for name in ("encoder_hidden_states", "encoder_attention_mask", "output_attentions"):
        call.pop(name, None)
    if entry.window:
        call["sliding_window"] = binding.window or None
    out, _ = attention_function(attention)(
        attention, q, k, v, mask, dropout=0.0, scaling=binding.softmax_scale, **call
    )
    return ops.decoder_out(x, out.reshape(*x.shape[:2], -1), *stored)


def _update(cache, k: Tensor, v: Tensor, layer: int, position: Tensor | None):
    if position is None:
        return cache.update(k, v, layer)
    return cache.update(k, v, layer, {"cache_position": position})  # transformers before 5.10


def attention_function(attention: nn.Module):
    """What the model's ``attn_implementation`` stands for.

    In place of "sdpa" ours, which is the same without masks and heads that it does not need.
    """
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    name = attention.config._attn_implementation
    if name == "sdpa":
        return _in_place_of_sdpa
    own = sys.modules[type(attention).__module__].eager_attention_forward
    return ALL_ATTENTION_FUNCTIONS.get(name, own)


def _in_place_of_sdpa(attention: nn.Module, q: Tensor, k: Tensor, v: Tensor, mask, **options):
    """Ours, told of the slots that SDPA's upper left causality leaves out without a mask.

    They are those of a static cache that are still empty when the first tokens come.
    """
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    from gpu_poor.attention import NAME

    tokens = q.shape[2]
    if mask is None and tokens > 1:
        k, v = k[:, :, :tokens], v[:, :, :tokens]
    return ALL_ATTENTION_FUNCTIONS[NAME](attention, q, k, v, mask, **options)


def parameters_after(method, skip: int) -> tuple[str, ...]:
    """Names of a method's positional parameters, self and more left out."""
    parameters = inspect.signature(method).parameters.values()
    return tuple(p.name for p in parameters if p.kind is not p.VAR_KEYWORD)[skip:]


@functools.cache
def fused_class(cls: type) -> type:
    """The subclass that a block of class ``cls`` becomes when it is fused."""
    names = parameters_after(cls.forward, 2)
    return subclass(
        cls,
        {
            "forward": forward_like(cls, forward),
            "_gp_arguments": names,
            "_gp_returns_tuple": "output_attentions" in names,
            "_gp_entry": entry_of(cls, ARCHITECTURES),
        },
    )


def forward_like(cls: type, function):
    """``function`` with the signature of the class's own forward."""

    @functools.wraps(cls.forward)
    def forward(self, *args, **kwargs):
        return function(self, *args, **kwargs)

    return forward


def replaced(cls: type) -> bool:
    """Whether a fused class was made from one whose forward is now another, or not its own."""
    own = original(cls).forward
    return getattr(cls.forward, "__wrapped__", None) is not own or not at_home(own)


def subclass(cls: type, body: dict) -> type:
    """A subclass that passes for ``cls`` wherever a name decides."""
    names = {name: getattr(cls, name) for name in ("__module__", "__qualname__", "__doc__")}
    return type(cls)(
        cls.__name__, (cls,), names | body | {"__reduce_ex__": _reduce, "_gp_original": cls}
    )


def _reduce(self: nn.Module, protocol: int):
    state = {name: value for name, value in vars(self).items() if name not in (BINDING, LAST)}
    return _restore, (original(type(self)),), state


def _restore(cls: type) -> nn.Module:
    """What copies and pickles begin as: fused as the object was."""
    from gpu_poor.fusion import fused_type

    return object.__new__(fused_type(cls))
