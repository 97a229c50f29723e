"""``fuse(model)``: decoder blocks of known families run as a few C calls, in place."""

from dataclasses import dataclass

from torch import nn

from gpu_poor.fusion.binding import architecture_of, bind, original
from gpu_poor.fusion.blocks import BINDING, LAST, binding_of, fused_class

FUSED, EAGER = "fused", "eager"


def fused_type(cls: type) -> type:
    return fused_class(cls)


def fuse(model: nn.Module) -> nn.Module:
    for module in model.modules():
        if architecture_of(module) and type(module) is original(type(module)):
            module.__class__ = fused_type(type(module))
    return model


def unfuse(model: nn.Module) -> nn.Module:
    for module in model.modules():
        if type(module) is not original(type(module)):
            module.__class__ = original(type(module))
            for name in (BINDING, LAST):
                module.__dict__.pop(name, None)
    return model
