"""16-bit weights ``[N, K]``, bfloat16 or float16: no scales, float activations in every mode."""

import torch
import torch.nn.functional as F
from torch import Tensor

from gpu_poor import isa
from gpu_poor.ops import common

HALVES = (torch.bfloat16, torch.float16)


def _check_linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> None:
    torch._check(
        weight.dtype in HALVES and weight.dim() == 2,
        lambda: (
            f"half_linear: weight must be bfloat16 or float16 [N, K], got {weight.dtype} "
            f"{tuple(weight.shape)}"
        ),
    )
    torch._check(
        x.dim() >= 1 and x.shape[-1] == weight.shape[1],
        lambda: (
            f"half_linear: x {tuple(x.shape)} does not end in K of weight [N, K] "
            f"{tuple(weight.shape)}"
        ),
    )
    common.check_linear("half_linear", x, weight.shape[0], bias, 32)


def _half_linear_torch(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    _check_linear(x, weight, bias)
    dtype = torch.promote_types(x.dtype, weight.dtype)
    y = F.linear(x.to(dtype), weight.to(dtype)).float()
    return (y if bias is None else y + bias.float()).to(x.dtype)


common.register({"half_linear": _half_linear_torch})


@torch.library.register_fake("gpu_poor::half_linear")
def _(x, weight, bias):
    _check_linear(x, weight, bias)
    return x.new_empty((*x.shape[:-1], weight.shape[0]))


common.register_linear(
    "half_linear", lambda weight, rest, k, dtype: weight.to(dtype), has_scale=False
)


def half_linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """``x @ weight.T + bias``, summed in float32: no activation is rounded.

    Args:
        x: float32, bfloat16 or float16 ``[..., K]``, any strides, possibly empty.
        weight: bfloat16 or float16 ``[N, K]``.
        bias: ``[N]`` of a float dtype, or None.

    Returns:
        ``[..., N]`` of x's dtype, within ``(K + 2) 2^-24 sum |x w|`` before it is rounded to that.
        The order of the sum depends on the ISA only, not on threads or the split of the tokens.
    """
    common.refuse_tangent("half_linear", x, bias)
    if isa.uses_torch():
        return _half_linear_torch(x, weight, bias)
    return torch.ops.gpu_poor.half_linear(x, weight, bias)
