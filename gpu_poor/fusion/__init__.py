"""``fuse(model)``: decoder blocks of known families run as a few C calls, in place.

Modules, parameters, their names and the state_dict stay as they are: a fused block is an object of
a subclass of its class (gpu_poor/fusion/blocks.py). Whatever the C calls don't do, training, hooks,
``output_attentions``, another device, runs as it was written, on the same quantized weights.
:func:`explain` says which path each block takes, and why. See docs/fusion.md.
"""

from dataclasses import dataclass, field
from itertools import groupby

from torch import nn

from gpu_poor.fusion.architectures import ARCHITECTURES, DECODERS
from gpu_poor.fusion.binding import architecture_of, original
from gpu_poor.fusion.blocks import BINDING, LAST, binding_of, fused_class
from gpu_poor.fusion.decoders import (
    decoder_binding_of,
    decoder_class,
    decoder_of,
)
from gpu_poor.memory import KV_POOL
from gpu_poor.modules import checked

__all__ = ["ARCHITECTURES", "Explanation", "Path", "explain", "fuse", "unfuse"]


def fused_type(cls: type) -> type:
    """What an object of a class of transformers becomes: itself if there is nothing to fuse."""
    if cls.__name__ in ARCHITECTURES:
        return fused_class(cls)
    if cls.__name__ in DECODERS:
        return decoder_class(cls)
    from gpu_poor.kv_cache.generating import generating_class

    return generating_class(cls)


def fuse(model: nn.Module) -> nn.Module:
    """Let the decoder blocks of a quantized model run as fused C calls, in place.

    GPT-2, Llama, Mistral, Qwen2, Qwen3, GPT-NeoX and Phi, told by the classes of their blocks and
    verified module by module; of others nothing is changed. ``quantize`` does this by default, and
    so does loading a quantized model. Also makes a cache in pages of the model's own dtype the
    default of ``generate``, which one call for all blocks needs.

    Returns:
        The same model. :func:`explain` says what came of it, :func:`unfuse` undoes it.
    """
    inner = checked(model, "fuse")
    blocks = [m for m in inner.modules() if architecture_of(m) is not None]
    for module in inner.modules():
        cls = type(module)
        if original(cls) is not cls:
            continue
        generates = blocks and hasattr(cls, "_prepare_cache_for_generation")
        if architecture_of(module) or decoder_of(module) or generates:
            module.__class__ = fused_type(cls)
    return model


def unfuse(model: nn.Module) -> nn.Module:
    """Let all blocks run as they were written; in place. Not fused: nothing happens.

    A cache that ``use_paged_kv_cache_if_available`` has set up stays.
    """
    for module in checked(model, "unfuse").modules():
        if original(type(module)) is not type(module) and KV_POOL not in module.__dict__:
            module.__class__ = original(type(module))
            for name in (BINDING, LAST):
                module.__dict__.pop(name, None)
    return model


@dataclass
class Path:
    """How a block, or the model around all of them, runs."""

    name: str
    module_class: str
    fused: bool
    #: Why not, of a block that can't be fused as the model is now.
    reason: str | None = None
    #: Why the last call was not, of one that can be; None too if there was no call.
    last_call: str | None = None

    def __str__(self) -> str:
        if not self.fused:
            return f"eager: {self.reason}"
        return "fused" if self.last_call is None else f"fused, but the last call: {self.last_call}"


@dataclass
class Explanation:
    """Which path the blocks of a model take, and why; prints as a table."""

    model: str
    blocks: list[Path] = field(default_factory=list)
    #: Steps through all blocks in one call, of each decoder in the model.
    steps: list[Path] = field(default_factory=list)

    def __str__(self) -> str:
        fused = sum(block.fused for block in self.blocks)
        lines = [f"{self.model}: {fused} of {len(self.blocks)} known decoder blocks fused"]
        for _, group in groupby(self.blocks, key=lambda b: (b.module_class, str(b))):
            same = list(group)
            names = same[0].name if len(same) == 1 else f"{same[0].name} to {same[-1].name}"
            lines.append(f"  {names}: {same[0]}")
        for step in self.steps:
            how = "one call for all blocks, on a cache in pages" if step.fused else step
            last = f"; the last call: {step.last_call}" if step.fused and step.last_call else ""
            lines.append(f"  steps of {step.name or 'the model'}: {how}{last}")
        if not self.blocks:
            known = ", ".join(ARCHITECTURES)
            lines.append(f"  no module is one of {known}")
        return "\n".join(lines)


def explain(model: nn.Module) -> Explanation:
    """Which path each known decoder block takes now, and why; with what the last call met."""
    model = checked(model, "explain")
    result = Explanation(original(type(model)).__name__)
    for name, module in model.named_modules():
        if architecture_of(module) is not None:
            result.blocks.append(_path(name, module, binding_of))
        elif decoder_of(module) is not None:
            result.steps.append(_path(name, module, decoder_binding_of))
    return result


def _path(name: str, module: nn.Module, bound) -> Path:
    cls = original(type(module))
    if cls is type(module):
        return Path(name, cls.__name__, False, "not asked for: gpu_poor.fuse(model)")
    module.__dict__.pop(BINDING, None)  # behind a hook, what was bound may be out of date
    reason = bound(module).reason
    return Path(name, cls.__name__, reason is None, reason, module.__dict__.get(LAST))
