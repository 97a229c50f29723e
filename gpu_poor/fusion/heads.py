"""A causal language model's forward where its decoder takes a step: step, head, one output.

The model's own does the same, but the two forwards around a step, and the output of the inner one,
take 0.3 ms a token: a step reads all weights, and after it none of their code is in the caches.
"""

import sys

import torch
from torch import Tensor, nn
from torch.nn.modules.module import _has_any_global_hook

from gpu_poor.fusion.architectures import HEADS
from gpu_poor.fusion.binding import hooks_of, original
from gpu_poor.fusion.blocks import LAST, forward_like, replaced
from gpu_poor.fusion.company import follow
from gpu_poor.fusion.decoders import decoder_of, step


def forward(self: nn.Module, *args, **kwargs):
    """The model's forward: through the short way where it takes a step."""
    if not (args or torch.compiler.is_compiling() or replaced(type(self))):
        output = _stepped(self, kwargs)
        if output is not None:
            return output
    return original(type(self)).forward(self, *args, **kwargs)


def _stepped(model: nn.Module, call: dict):
    """The model's output, or None: this call is not one of a step as ``generate`` makes it."""
    decoder, head = (model._modules.get(name) for name in type(model)._gp_parts)
    if head is None or not _direct(decoder):
        return None
    call = dict(call)
    keep = call.pop("logits_to_keep", 0)
    if call.pop("return_dict", None) is not True or call.pop("labels", None) is not None:
        return None
    if not isinstance(keep, int) or keep < 0:
        return None
    follow()
    y = step(decoder, call)
    if not isinstance(y, Tensor):
        return None
    decoder.__dict__[LAST] = None
    output = getattr(sys.modules["transformers.modeling_outputs"], type(model)._gp_output)
    logits = head(y[:, -keep:] if 0 < keep < y.shape[1] else y)
    return output(logits=logits, past_key_values=call["past_key_values"])


def _direct(decoder: nn.Module | None) -> bool:
    """Whether a call of this module would be its fused forward, and nothing else."""
    if decoder is None or decoder_of(decoder) is None or original(type(decoder)) is type(decoder):
        return False
    called = "forward", "_compiled_call_impl"
    patched = any(decoder.__dict__.get(name) is not None for name in called)
    return not (patched or any(hooks_of(decoder)) or _has_any_global_hook())


def head_methods(cls: type) -> dict:
    """What the subclass of a causal language model has in addition; of an unknown one nothing."""
    output = HEADS.get(cls.__name__)
    if output is None or not cls.__module__.startswith("transformers.models."):
        return {}
    parts = cls.base_model_prefix, "lm_head"
    return {"forward": forward_like(cls, forward), "_gp_parts": parts, "_gp_output": output}
