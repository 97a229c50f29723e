"""What every operator shares: types, modes, checks, and the quantized tokens of the torch paths.

The checks are those of the fakes and the plain torch paths; the C++ binding checks the same, with
the same words.
"""

import math

import torch
from torch import Tensor
from torch.autograd import forward_ad

FLOATS = (torch.float32, torch.bfloat16, torch.float16)

#: Activation modes: how many bits the activations of a linear carry (docs/kernels.md).
#: a8: one int8 plane per token; a16: two planes, q = 254 h + l; a32: float activations.
ACTIVATIONS = {"a8": 8, "a16": 16, "a32": 32}
#: Largest quantized magnitude of each integer mode. 32384 = 254 * 127 + 126: with 32385 the high
#: plane of the largest value would round to 128.
Q_MAX = {8: 127, 16: 32384}
#: Rows whose largest magnitude is below this are zero: its reciprocal would overflow.
TINY = 1e-30


def correction_dtype() -> torch.dtype:
    """For products that are small beside what they are added to: bfloat16 where it is native."""
    native = torch.ops.mkldnn._is_mkldnn_bf16_supported()
    return torch.bfloat16 if native else torch.float32


def check_float(op: str, argument: str, dtype: torch.dtype) -> None:
    torch._check(
        dtype in FLOATS,
        lambda: f"{op}: {argument} must be float32, bfloat16 or float16, got {dtype}",
    )


def check_rows(op: str, argument: str, x: Tensor) -> None:
    torch._check(x.dim() >= 1, lambda: f"{op}: {argument} must be [..., K], got a scalar")
    check_float(op, argument, x.dtype)


def check_linear(op: str, x: Tensor, n: int, bias: Tensor | None, activation_bits: int) -> None:
    """What is the same for every linear, whatever its weight [N, K] is stored as."""
    check_float(op, "x", x.dtype)
    torch._check(
        activation_bits in (8, 16, 32),
        lambda: f"{op}: activation_bits must be 8, 16 or 32, got {activation_bits}",
    )
    if bias is not None:
        torch._check(
            bias.shape == (n,),
            lambda: f"{op}: bias must be [N] with N = {n}, got {tuple(bias.shape)}",
        )
        check_float(op, "bias", bias.dtype)


def check_indices(op: str, indices: Tensor) -> None:
    torch._check(
        indices.dtype in (torch.int64, torch.int32),
        lambda: f"{op}: indices must be int64 or int32, got {indices.dtype}",
    )


def check_range(op: str, indices: Tensor, n: int) -> None:
    """Only on the CPU: elsewhere the gather itself refuses, and looking would wait."""
    if indices.device.type == "cpu":
        torch._check(
            not bool(((indices < 0) | (indices >= n)).any()),
            lambda: f"{op}: an index is out of range for {n} rows",
        )


def as_rows(x: Tensor) -> Tensor:
    """``[M, K]``; reshape(-1, K) cannot tell M where K is 0."""
    return x.reshape(math.prod(x.shape[:-1]), x.shape[-1])


def quantize_rows(x: Tensor, q_max: int) -> tuple[Tensor, Tensor]:
    """Symmetric absmax of each row: float32 integers in [-q_max, q_max] and float32 scales."""
    x = x.float()
    if x.shape[-1] == 0:
        return x, x.new_zeros(x.shape[:-1])
    absmax = x.abs().amax(-1)
    finite = absmax.isfinite()
    live = finite & (absmax > TINY)
    # Not q_max / absmax: torch turns that into a multiplication by the reciprocal.
    inverse = torch.where(live, torch.full_like(absmax, q_max) / absmax, 0.0)
    q = (x * inverse[..., None]).round().clamp(-q_max, q_max)
    q = torch.where(live[..., None], q, 0.0)
    scale = torch.where(live, absmax / q_max, 0.0)
    return q, torch.where(finite, scale, float("nan"))


def quantized_tokens(x: Tensor, activation_bits: int) -> Tensor:
    """float32 x as the integer modes see it."""
    x = x.float()
    if activation_bits == 32:
        return x
    q, scale = quantize_rows(x, Q_MAX[activation_bits])
    # Straight through, as the operators' own backward: rounding has no gradient of use.
    return x + (q * scale[..., None] - x).detach()


def register(functions: dict) -> None:
    """Plain torch functions by operator name, for every device but the CPU, whose key is ours."""
    for name, function in functions.items():
        torch.library.impl(f"gpu_poor::{name}", "CompositeExplicitAutograd")(function)


def register_linear(op: str, dequantize, has_scale: bool = True) -> None:
    """The gradient of a linear whose quantized weight is frozen: dX = dY W.

    Args:
        dequantize: W in a given dtype from the operator's arguments; only what it needs of them,
            the quantized tensors, is saved.
        has_scale: the arguments are x, weight, scale, bias...; else there is no scale.
    """
    stored = slice(1, 3 if has_scale else 2)

    def setup(ctx, inputs, output):
        ctx.save_for_backward(*inputs[stored])
        bias, *ctx.rest = inputs[stored.stop :]
        ctx.k = inputs[0].shape[-1]
        wanted = bias is not None and ctx.needs_input_grad[stored.stop]
        ctx.bias_dtype = bias.dtype if wanted else None

    def backward(ctx, grad):
        grad_x = grad_bias = None
        saved = ctx.saved_tensors  # once: a checkpoint gives them a single time
        if ctx.needs_input_grad[0]:
            grad_x = grad @ dequantize(*saved, ctx.rest, ctx.k, grad.dtype)
        if ctx.bias_dtype is not None:
            rows = grad.reshape(-1, grad.shape[-1])
            grad_bias = rows.sum(0, dtype=torch.float32).to(ctx.bias_dtype)
        frozen = (None for _ in saved)
        return grad_x, *frozen, grad_bias, *(None for _ in ctx.rest)

    torch.library.register_autograd(f"gpu_poor::{op}", backward, setup_context=setup)


def refuse_tangent(op: str, *tensors: Tensor | None) -> None:
    """torch would take a custom operator without a forward derivative for a constant."""
    if forward_ad._current_level < 0:
        return
    for tensor in tensors:
        if tensor is not None and forward_ad.unpack_dual(tensor).tangent is not None:
            raise NotImplementedError(f"{op} has no forward-mode derivative: use backward")
