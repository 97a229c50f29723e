"""int8 weights ``[N, K]`` with a float32 scale, and maybe an offset, for each row.

w[n, k] = weight[n, k] * scale[n]                    scale [N]
w[n, k] = weight[n, k] * scale[0, n] + scale[1, n]   scale [2, N]: asymmetric
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from gpu_poor import isa
from gpu_poor.ops import common
from gpu_poor.ops.common import as_rows, check_float, check_rows

#: Weights are searched in 16-bit fixed point, with CLIPS ranges: csrc/int8.c.
FIXED_MAX, CLIPS = 32512, 16


def _check_weight(op: str, weight: Tensor, scale: Tensor) -> None:
    torch._check(
        weight.dtype == torch.int8 and weight.dim() >= 1,
        lambda: f"{op}: weight must be int8 [..., K], got {weight.dtype} {tuple(weight.shape)}",
    )
    rows = weight.shape[:-1]
    both = (*rows[:-1], 2, *rows[-1:])
    torch._check(
        scale.dtype == torch.float32 and (scale.shape == rows or tuple(scale.shape) == both),
        lambda: (
            f"{op}: scale must be float32 {tuple(rows)}, one per weight row, or {both}, one and an "
            f"offset, got {scale.dtype} {tuple(scale.shape)}"
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
    common.check_linear("int8_linear", x, weight.shape[0], bias, activation_bits)


def _check_embedding(indices: Tensor, weight: Tensor, scale: Tensor, dtype: torch.dtype) -> None:
    _check_weight("int8_embedding", weight, scale)
    torch._check(
        weight.dim() == 2,
        lambda: f"int8_embedding: weight must be int8 [N, K], got shape {tuple(weight.shape)}",
    )
    common.check_indices("int8_embedding", indices)
    check_float("int8_embedding", "dtype", dtype)


# -- plain torch: other devices, and what the kernels are compared with ------------------------


def _int8_quantize_torch(weight: Tensor) -> tuple[Tensor, Tensor]:
    """The search of csrc/int8.c, integer for integer, a block of rows at a time."""
    check_rows("int8_quantize", "weight", weight)
    rows = as_rows(weight)
    q = torch.empty(rows.shape, dtype=torch.int8, device=weight.device)
    scale = torch.empty(rows.shape[0], device=weight.device)
    step = max(1, 2**22 // max(1, rows.shape[1]))
    for i in range(0, rows.shape[0], step):
        q[i : i + step], scale[i : i + step] = _quantize_weight_rows(rows[i : i + step])
    return q.view(weight.shape), scale.view(weight.shape[:-1])


def _quantize_weight_rows(rows: Tensor) -> tuple[Tensor, Tensor]:
    fixed, step = common.quantize_rows(rows, FIXED_MAX)
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


def _quantize_asymmetric(weight: Tensor) -> tuple[Tensor, Tensor]:
    """The range of each row in 255 steps; float operations that every device rounds alike."""
    check_rows("int8_quantize", "weight", weight)
    torch._check(weight.dim() >= 2, lambda: "int8_quantize: asymmetric takes [..., N, K]")
    rows = as_rows(weight)
    q = torch.empty(rows.shape, dtype=torch.int8, device=weight.device)
    stored = torch.zeros(2, rows.shape[0], device=weight.device)
    step = max(1, 2**20 // max(1, rows.shape[1]))
    for i in range(0, rows.shape[0] if rows.shape[1] else 0, step):
        x = rows[i : i + step].float()
        low, span = x.amin(-1), x.amax(-1) - x.amin(-1)
        live = span > common.TINY
        inverse = torch.where(live, torch.full_like(span, 255) / span, 0.0)
        scale = torch.where(span.isfinite(), torch.where(live, span / 255, 0.0), float("nan"))
        steps = ((x - low[:, None]) * inverse[:, None]).nan_to_num(0, 0, 0)
        q[i : i + step] = steps.round().clamp(0, 255).sub(128)
        stored[:, i : i + step] = torch.stack((scale, low + 128 * scale))
    matrices = stored.view(2, -1, weight.shape[-2]).transpose(0, 1)
    return q.view(weight.shape), matrices.reshape(*weight.shape[:-2], 2, -1)


def _split(weight: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
    """The scale of each row, and its offset, 0 where there are none, ``[..., N, 1]``."""
    if scale.dim() < weight.dim():
        return scale[..., None], scale.new_zeros(())
    return scale[..., 0, :, None], scale[..., 1, :, None]


def _int8_dequantize_torch(weight: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    _check_weight("int8_dequantize", weight, scale)
    check_float("int8_dequantize", "dtype", dtype)
    scale, offset = _split(weight, scale)
    return torch.addcmul(offset, weight.float(), scale).to(dtype)


def _int8_linear_torch(
    x: Tensor, weight: Tensor, scale: Tensor, bias: Tensor | None, activation_bits: int
) -> Tensor:
    _check_linear(x, weight, scale, bias, activation_bits)
    xf = common.quantized_tokens(x, activation_bits)
    if x.dtype == torch.float32 and scale.dim() == 1:
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
    common.check_range("int8_embedding", indices, weight.shape[0])
    indices = indices.long()
    scale, offset = (part.expand(weight.shape[0], 1) for part in _split(weight, scale))
    q = F.embedding(indices, weight).float()
    return torch.addcmul(offset[indices], q, scale[indices]).to(dtype)


common.register({
    "int8_quantize": _int8_quantize_torch,
    "int8_dequantize": _int8_dequantize_torch,
    "int8_linear": _int8_linear_torch,
    "int8_embedding": _int8_embedding_torch,
})  # fmt: skip


# -- fake kernels: shapes and dtypes only ------------------------------------------------------


@torch.library.register_fake("gpu_poor::int8_quantize")
def _(weight):
    check_rows("int8_quantize", "weight", weight)
    return (
        weight.new_empty(weight.shape, dtype=torch.int8),
        weight.new_empty(weight.shape[:-1], dtype=torch.float32),
    )


@torch.library.register_fake("gpu_poor::int8_dequantize")
def _(weight, scale, dtype):
    _check_weight("int8_dequantize", weight, scale)
    check_float("int8_dequantize", "dtype", dtype)
    return weight.new_empty(weight.shape, dtype=dtype)


@torch.library.register_fake("gpu_poor::int8_linear")
def _(x, weight, scale, bias, activation_bits):
    _check_linear(x, weight, scale, bias, activation_bits)
    return x.new_empty((*x.shape[:-1], weight.shape[0]))


@torch.library.register_fake("gpu_poor::int8_embedding")
def _(indices, weight, scale, dtype):
    _check_embedding(indices, weight, scale, dtype)
    return weight.new_empty((*indices.shape, weight.shape[1]), dtype=dtype)


# The weight is frozen: gradients flow to the activations.
common.register_linear(
    "int8_linear",
    lambda weight, scale, rest, k, dtype: torch.ops.gpu_poor.int8_dequantize(weight, scale, dtype),
)


# -- the public wrappers -----------------------------------------------------------------------


def int8_quantize(weight: Tensor, asymmetric: bool = False) -> tuple[Tensor, Tensor]:
    """Quantize each row to int8 with the scale of least squared error.

    Of 16 ranges, 100 % to 89.5 % of the row's largest magnitude, the best, with the scale
    ``<w, q> / <q, q>``; q in [-127, 127]. The search is in integers: csrc/int8.c, docs/kernels.md.

    Args:
        weight: float32, bfloat16 or float16 ``[..., K]``.
        asymmetric: instead, the range of each row in 255 steps, for ``[..., N, K]``.

    Returns:
        int8 ``[..., K]`` and float32 scales ``[...]``, asymmetric scales and offsets
        ``[..., 2, N]``. A row of zeros has scale 0; a row with a NaN or an infinity has scale NaN,
        which callers turn into an error naming the tensor.
    """
    if asymmetric:
        return _quantize_asymmetric(weight)
    if isa.uses_torch():
        return _int8_quantize_torch(weight)
    return torch.ops.gpu_poor.int8_quantize(weight)


def int8_dequantize(weight: Tensor, scale: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """``weight * scale + offset`` per row, computed in float32 and rounded to ``dtype``."""
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
    """``x @ (weight * scale + offset).T + bias`` with integer dot products.

    Args:
        x: float32, bfloat16 or float16 ``[..., K]``, any strides, possibly empty.
        weight: int8 ``[N, K]``.
        scale: float32 ``[N]``, or ``[2, N]`` with offsets.
        bias: ``[N]`` of a float dtype, or None.
        activation_bits: 8, 16 or 32: see :data:`ACTIVATIONS`.

    Returns:
        ``[..., N]`` of x's dtype. A token with a NaN or an infinity gives a row of NaN in the
        integer modes. Modes 8 and 16 give the same bits for every ISA, thread count and split of
        the tokens.
    """
    common.refuse_tangent("int8_linear", x, bias)
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
        scale: float32 ``[N]``, or ``[2, N]`` with offsets.
    """
    if isa.uses_torch():
        return _int8_embedding_torch(indices, weight, scale, dtype)
    return torch.ops.gpu_poor.int8_embedding(indices, weight, scale, dtype)
