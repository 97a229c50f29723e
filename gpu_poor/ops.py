"""The torch operators ``gpu_poor::*``: typed wrappers, fake kernels, autograd, plain torch paths.

Nothing else in the package calls ``torch.ops.gpu_poor``. On a CPU tensor an operator runs the C
kernels of csrc/; on any other device, or under ``GPU_POOR_ISA=torch``, the plain torch function
written here, with the same result within float rounding.

Letters: M rows (tokens), N out features, K in features. Weights are ``int8 [N, K]`` with one
``float32 scale [N]``: ``w[n, k] ~ weight[n, k] * scale[n]``.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import forward_ad

from gpu_poor import isa

FLOATS = (torch.float32, torch.bfloat16, torch.float16)

#: Activation modes: how many bits the activations of a linear carry (docs/kernels.md).
#: a8: one int8 plane per token; a16: two planes, q = 254 h + l; a32: float activations.
ACTIVATIONS = {"a8": 8, "a16": 16, "a32": 32}
#: Largest quantized magnitude of each integer mode. 32384 = 254 * 127 + 126: with 32385 the high
#: plane of the largest value would round to 128.
Q_MAX = {8: 127, 16: 32384}
#: Weights are searched in 16-bit fixed point, with CLIPS ranges: csrc/int8.c.
FIXED_MAX, CLIPS = 32512, 16
#: Rows whose largest magnitude is below this are zero: its reciprocal would overflow.
TINY = 1e-30


# -- what every call must satisfy, checked by the fakes and the plain torch path (the C++ binding
# checks the same, with the same words) ---------------------------------------------------------


def _check_float(op: str, argument: str, dtype: torch.dtype) -> None:
    torch._check(
        dtype in FLOATS,
        lambda: f"{op}: {argument} must be float32, bfloat16 or float16, got {dtype}",
    )


def _check_rows(op: str, argument: str, x: Tensor) -> None:
    torch._check(x.dim() >= 1, lambda: f"{op}: {argument} must be [..., K], got a scalar")
    _check_float(op, argument, x.dtype)


def _check_weight(op: str, weight: Tensor, scale: Tensor) -> None:
    torch._check(
        weight.dtype == torch.int8 and weight.dim() >= 1,
        lambda: f"{op}: weight must be int8 [..., K], got {weight.dtype} {tuple(weight.shape)}",
    )
    torch._check(
        scale.dtype == torch.float32 and scale.shape == weight.shape[:-1],
        lambda: (
            f"{op}: scale must be float32 {tuple(weight.shape[:-1])}, one per weight row, "
            f"got {scale.dtype} {tuple(scale.shape)}"
        ),
    )


def _check_linear(
    x: Tensor, weight: Tensor, scale: Tensor, bias: Tensor | None, activation_bits: int
) -> None:
    _check_weight("int8_linear", weight, scale)
    torch._check(
        weight.dim() == 2 and x.dim() >= 1 and x.shape[-1] == weight.shape[1],
        lambda: (
            f"int8_linear: x {tuple(x.shape)} does not end in K of weight [N, K] "
            f"{tuple(weight.shape)}"
        ),
    )
    _check_float("int8_linear", "x", x.dtype)
    torch._check(
        activation_bits in (8, 16, 32),
        lambda: f"int8_linear: activation_bits must be 8, 16 or 32, got {activation_bits}",
    )
    if bias is not None:
        torch._check(
            bias.shape == weight.shape[:1],
            lambda: (
                f"int8_linear: bias must be [N] with N = {weight.shape[0]}, got {tuple(bias.shape)}"
            ),
        )
        _check_float("int8_linear", "bias", bias.dtype)


def _check_embedding(indices: Tensor, weight: Tensor, scale: Tensor, dtype: torch.dtype) -> None:
    _check_weight("int8_embedding", weight, scale)
    torch._check(
        weight.dim() == 2,
        lambda: f"int8_embedding: weight must be int8 [N, K], got shape {tuple(weight.shape)}",
    )
    torch._check(
        indices.dtype in (torch.int64, torch.int32),
        lambda: f"int8_embedding: indices must be int64 or int32, got {indices.dtype}",
    )
    _check_float("int8_embedding", "dtype", dtype)


def _check_gram(acc: Tensor, x: Tensor) -> None:
    _check_rows("gram_", "x", x)
    k = x.shape[-1]
    torch._check(
        acc.dtype == torch.float32 and acc.shape == (k, k) and acc.is_contiguous(),
        lambda: (
            f"gram_: acc must be a contiguous float32 [K, K] with K = {k}, "
            f"got {acc.dtype} {tuple(acc.shape)}"
        ),
    )


def _as_rows(x: Tensor) -> Tensor:
    """``[M, K]``; reshape(-1, K) cannot tell M where K is 0."""
    return x.reshape(math.prod(x.shape[:-1]), x.shape[-1])


# -- plain torch implementations: other devices, and the oracle in tests ----------------------


def _quantize_rows(x: Tensor, q_max: int) -> tuple[Tensor, Tensor]:
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


def _int8_quantize_torch(weight: Tensor) -> tuple[Tensor, Tensor]:
    """The search of csrc/int8.c, integer for integer, a block of rows at a time."""
    _check_rows("int8_quantize", "weight", weight)
    rows = _as_rows(weight)
    q = torch.empty(rows.shape, dtype=torch.int8, device=weight.device)
    scale = torch.empty(rows.shape[0], device=weight.device)
    step = max(1, 2**22 // max(1, rows.shape[1]))
    for i in range(0, rows.shape[0], step):
        q[i : i + step], scale[i : i + step] = _quantize_weight_rows(rows[i : i + step])
    return q.view(weight.shape), scale.view(weight.shape[:-1])


def _quantize_weight_rows(rows: Tensor) -> tuple[Tensor, Tensor]:
    fixed, step = _quantize_rows(rows, FIXED_MAX)
    fixed = fixed.int()
    best = torch.full_like(step, -1, dtype=torch.float64)
    ratio, q = torch.zeros_like(best), torch.zeros_like(fixed)
    for clip in range(CLIPS):
        candidate = ((fixed * (128 + clip) + 0x4000) >> 15).clamp(-127, 127)
        xq = (fixed * candidate).sum(-1).double()
        own = xq / candidate.square().sum(-1).double()
        better = own * xq > best
        best = torch.where(better, own * xq, best)
        ratio = torch.where(better, own, ratio)
        q = torch.where(better[..., None], candidate, q)
    absmax = rows.float().abs().amax(-1) if rows.shape[-1] else step
    scale = (ratio * absmax.double() / FIXED_MAX).float()
    return q.to(torch.int8), torch.where(step > 0, scale, step)


def _int8_dequantize_torch(weight: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    _check_weight("int8_dequantize", weight, scale)
    _check_float("int8_dequantize", "dtype", dtype)
    return (weight.float() * scale[..., None]).to(dtype)


def _int8_linear_torch(
    x: Tensor, weight: Tensor, scale: Tensor, bias: Tensor | None, activation_bits: int
) -> Tensor:
    _check_linear(x, weight, scale, bias, activation_bits)
    xf = x.float()
    if activation_bits != 32:
        q, x_scale = _quantize_rows(xf, Q_MAX[activation_bits])
        # Straight through, as the operator's own backward: rounding has no gradient of use.
        xf = xf + (q * x_scale[..., None] - xf).detach()
    if x.dtype == torch.float32:
        y = F.linear(xf, weight.float()) * scale
    else:  # half types keep their fast matmul; the scale goes into the weight against overflow
        y = F.linear(xf.to(x.dtype), _int8_dequantize_torch(weight, scale, x.dtype)).float()
    if bias is not None:
        y = y + bias.float()
    return y.to(x.dtype)


def _int8_embedding_torch(
    indices: Tensor, weight: Tensor, scale: Tensor, dtype: torch.dtype
) -> Tensor:
    _check_embedding(indices, weight, scale, dtype)
    n_rows = weight.shape[0]
    if indices.device.type == "cpu":  # elsewhere the gather itself refuses; looking would wait
        torch._check(
            not bool(((indices < 0) | (indices >= n_rows)).any()),
            lambda: f"int8_embedding: an index is out of range for {n_rows} rows",
        )
    indices = indices.long()
    return (F.embedding(indices, weight).float() * scale[indices][..., None]).to(dtype)


def _channel_stats_torch(x: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    _check_rows("channel_stats", "x", x)
    x = _as_rows(x).float()
    if x.shape[0] == 0:
        zero = x.new_zeros(x.shape[1])
        return zero, zero.clone(), zero.clone(), zero.clone()
    return x.abs().amax(0), x.amin(0), x.amax(0), x.double().square().mean(0).float()


def _gram_torch(acc: Tensor, x: Tensor) -> None:
    _check_gram(acc, x)
    x = _as_rows(x).float()
    acc.addmm_(x.T, x)


for _name, _function in (
    ("int8_quantize", _int8_quantize_torch),
    ("int8_dequantize", _int8_dequantize_torch),
    ("int8_linear", _int8_linear_torch),
    ("int8_embedding", _int8_embedding_torch),
    ("channel_stats", _channel_stats_torch),
    ("gram_", _gram_torch),
):
    # The extension owns the CPU key; every other device falls through to this one.
    torch.library.impl(f"gpu_poor::{_name}", "CompositeExplicitAutograd")(_function)


# -- fake kernels: shapes and dtypes only ------------------------------------------------------


@torch.library.register_fake("gpu_poor::int8_quantize")
def _(weight):
    _check_rows("int8_quantize", "weight", weight)
    return (
        weight.new_empty(weight.shape, dtype=torch.int8),
        weight.new_empty(weight.shape[:-1], dtype=torch.float32),
    )


@torch.library.register_fake("gpu_poor::int8_dequantize")
def _(weight, scale, dtype):
    _check_weight("int8_dequantize", weight, scale)
    _check_float("int8_dequantize", "dtype", dtype)
    return weight.new_empty(weight.shape, dtype=dtype)


@torch.library.register_fake("gpu_poor::int8_linear")
def _(x, weight, scale, bias, activation_bits):
    _check_linear(x, weight, scale, bias, activation_bits)
    return x.new_empty((*x.shape[:-1], weight.shape[0]))


@torch.library.register_fake("gpu_poor::int8_embedding")
def _(indices, weight, scale, dtype):
    _check_embedding(indices, weight, scale, dtype)
    return weight.new_empty((*indices.shape, weight.shape[1]), dtype=dtype)


@torch.library.register_fake("gpu_poor::channel_stats")
def _(x):
    _check_rows("channel_stats", "x", x)
    return tuple(x.new_empty(x.shape[-1:], dtype=torch.float32) for _ in range(4))


@torch.library.register_fake("gpu_poor::gram_")
def _(acc, x):
    _check_gram(acc, x)


# -- autograd: the quantized weight is frozen, gradients flow to the activations ---------------


def _linear_setup(ctx, inputs, output):
    x, weight, scale, bias, _ = inputs
    ctx.save_for_backward(weight, scale)
    ctx.bias_dtype = bias.dtype if bias is not None and ctx.needs_input_grad[3] else None


def _linear_backward(ctx, grad):
    """dX = dY W with W dequantized on the way; the saved tensors are the int8 ones only."""
    weight, scale = ctx.saved_tensors
    grad_x = grad_bias = None
    if ctx.needs_input_grad[0]:
        grad_x = grad @ torch.ops.gpu_poor.int8_dequantize(weight, scale, grad.dtype)
    if ctx.bias_dtype is not None:
        grad_bias = grad.reshape(-1, grad.shape[-1]).sum(0, dtype=torch.float32).to(ctx.bias_dtype)
    return grad_x, None, None, grad_bias, None


torch.library.register_autograd(
    "gpu_poor::int8_linear", _linear_backward, setup_context=_linear_setup
)


def _refuse_tangent(*tensors: Tensor | None) -> None:
    """torch would take a custom operator without a forward derivative for a constant."""
    for tensor in tensors:
        if tensor is not None and forward_ad.unpack_dual(tensor).tangent is not None:
            raise NotImplementedError("int8_linear has no forward-mode derivative: use backward")


# -- the public wrappers -----------------------------------------------------------------------


def int8_quantize(weight: Tensor) -> tuple[Tensor, Tensor]:
    """Quantize each row to int8 with the scale of least squared error.

    Of 16 ranges, 100 % to 89.5 % of the row's largest magnitude, the best, with the scale
    ``<w, q> / <q, q>``; q in [-127, 127]. The search is in integers: csrc/int8.c, docs/kernels.md.

    Args:
        weight: float32, bfloat16 or float16 ``[..., K]``.

    Returns:
        int8 ``[..., K]`` and float32 scales ``[...]``. A row of zeros has scale 0; a row with a
        NaN or an infinity has scale NaN, which callers turn into an error naming the tensor.
    """
    if isa.uses_torch():
        return _int8_quantize_torch(weight)
    return torch.ops.gpu_poor.int8_quantize(weight)


def int8_dequantize(weight: Tensor, scale: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """``weight * scale`` per row, computed in float32 and rounded to ``dtype``."""
    if isa.uses_torch():
        return _int8_dequantize_torch(weight, scale, dtype)
    return torch.ops.gpu_poor.int8_dequantize(weight, scale, dtype)


def int8_linear(
    x: Tensor,
    weight: Tensor,
    scale: Tensor,
    bias: Tensor | None = None,
    activation_bits: int = 16,
) -> Tensor:
    """``x @ (weight * scale).T + bias`` with integer dot products.

    Args:
        x: float32, bfloat16 or float16 ``[..., K]``, any strides, possibly empty.
        weight: int8 ``[N, K]``.
        scale: float32 ``[N]``.
        bias: ``[N]`` of a float dtype, or None.
        activation_bits: 8, 16 or 32: see :data:`ACTIVATIONS`.

    Returns:
        ``[..., N]`` of x's dtype. A token with a NaN or an infinity gives a row of NaN in the
        integer modes. Modes 8 and 16 give the same bits for every ISA, thread count and split of
        the tokens.
    """
    if forward_ad._current_level >= 0:
        _refuse_tangent(x, bias)
    if isa.uses_torch():
        return _int8_linear_torch(x, weight, scale, bias, activation_bits)
    return torch.ops.gpu_poor.int8_linear(x, weight, scale, bias, activation_bits)


def int8_embedding(
    indices: Tensor, weight: Tensor, scale: Tensor, dtype: torch.dtype = torch.float32
) -> Tensor:
    """Gather and dequantize rows: ``[*indices.shape, K]`` of ``dtype``.

    Args:
        indices: int64 or int32, each in [0, N); outside is an error.
        weight: int8 ``[N, K]``.
        scale: float32 ``[N]``.
    """
    if isa.uses_torch():
        return _int8_embedding_torch(indices, weight, scale, dtype)
    return torch.ops.gpu_poor.int8_embedding(indices, weight, scale, dtype)


def channel_stats(x: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Per-channel ``absmax, min, max, mean square`` of activations ``[..., K]``, float32 ``[K]``.

    Sums are kept in float64. NaN propagates; no rows give zeros.
    """
    if isa.uses_torch():
        return _channel_stats_torch(x)
    return torch.ops.gpu_poor.channel_stats(x)


def gram_(acc: Tensor, x: Tensor) -> Tensor:
    """``acc += x.T @ x`` in place: float32 ``[K, K]`` from activations ``[..., K]``."""
    if isa.uses_torch():
        _gram_torch(acc, x)
    else:
        torch.ops.gpu_poor.gram_(acc, x)
    return acc
