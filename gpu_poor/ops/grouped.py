"""4 and 8-bit weights in groups of G columns, symmetric or with a minimum, in panels of 16 rows.

    w[n, k] = scale[n, k // G] * (q[n, k] - 2^(bits - 1))             symmetric
    w[n, k] = scale[n, k // G] * q[n, k] + min[n, k // G]             asymmetric

with q in [0, 2^bits), stored as they are run (csrc/gpu_poor.h): ``weight`` int8 ``[P, B, 64 bits]``
of panels of 16 rows by blocks of 32 columns, padded; ``scale`` float16 ``[P, groups, 1 or 2, 16]``
of the scales and, if asymmetric, the minima. The shapes say the bits and whether there are minima;
N and K are the caller's to remember. The bytes are called int8 and not uint8 because models ask
for int8 before they cast activations to a weight's dtype (T5).
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from gpu_poor import isa
from gpu_poor.ops import common
from gpu_poor.ops.common import check_float
from gpu_poor.ops.grouped_search import search_asymmetric, search_symmetric

GROUPS = (32, 64, 96, 128)
BITS = (4, 8)
ROWS, BLOCK = 16, 32


def _check_group(op: str, group: int) -> None:
    torch._check(group in GROUPS, lambda: f"{op}: group must be 32, 64, 96 or 128, got {group}")


def grouped_shapes(n: int, k: int, bits: int, group: int, asymmetric: bool) -> tuple[tuple, tuple]:
    """Of the stored weight and scale of a weight ``[n, k]``."""
    panels = -(-n // ROWS)
    return (panels, -(-k // BLOCK), 64 * bits), (panels, -(-k // group), 1 + asymmetric, ROWS)


def _bits_of(weight: Tensor) -> int:
    return weight.shape[2] // 64


def _check_weight(op: str, weight: Tensor, scale: Tensor, group: int, n: int, k: int) -> None:
    _check_group(op, group)
    asymmetric = scale.dim() == 4 and scale.shape[2] == 2
    bits = 8 if weight.dim() == 3 and weight.shape[2] == 512 else 4
    shapes = grouped_shapes(n, k, bits, group, asymmetric)
    torch._check(
        n >= 0 and k >= 0 and weight.dtype == torch.int8 and weight.shape == shapes[0],
        lambda: (
            f"{op}: weight must be int8 {shapes[0][:2]} + (256 or 512,) for N = {n}, K = {k}, got "
            f"{weight.dtype} {tuple(weight.shape)}"
        ),
    )
    torch._check(
        scale.dtype == torch.float16 and scale.shape == shapes[1],
        lambda: (
            f"{op}: scale must be float16 {shapes[1][:2]} + (1 or 2, 16) for groups of {group}, "
            f"got {scale.dtype} {tuple(scale.shape)}"
        ),
    )


def _check_linear(x, weight, scale, bias, group, n, activation_bits) -> None:
    torch._check(x.dim() >= 1, lambda: "grouped_linear: x must be [..., K], got a scalar")
    _check_weight("grouped_linear", weight, scale, group, n, x.shape[-1])
    common.check_linear("grouped_linear", x, n, bias, activation_bits)


def _check_quantize(weight: Tensor, group: int, importance: Tensor | None, bits: int) -> None:
    op = "grouped_quantize"
    _check_group(op, group)
    torch._check(bits in BITS, lambda: f"{op}: bits must be 4 or 8, got {bits}")
    shape = tuple(weight.shape)
    torch._check(weight.dim() == 2, lambda: f"{op}: weight must be [N, K], got shape {shape}")
    check_float(op, "weight", weight.dtype)
    if importance is not None:
        torch._check(
            importance.dtype == torch.float32 and importance.shape == weight.shape[1:],
            lambda: (
                f"{op}: importance must be float32 [K] with K = {weight.shape[1]}, got "
                f"{importance.dtype} {tuple(importance.shape)}"
            ),
        )


# -- plain torch: other devices, and what the kernels are compared with ------------------------


def grouped_pack(
    q: Tensor, scale: Tensor, minimum: Tensor | None, bits: int
) -> tuple[Tensor, Tensor]:
    """The stored form of numbers that were chosen elsewhere.

    Args:
        q: uint8 ``[N, K]``, below 2^bits.
        scale, minimum: float16 ``[N, groups]``; no minimum: symmetric.

    Returns:
        weight and scale as at the head of this file.
    """
    n, k = q.shape
    panels, blocks = -(-n // ROWS), -(-k // BLOCK)
    padding = (0, blocks * BLOCK - k, 0, panels * ROWS - n)
    q = F.pad(q, padding, value=2 ** (bits - 1) if minimum is None else 0)
    lines = q.view(panels, ROWS, blocks, 8, 4).permute(0, 2, 3, 1, 4)
    if bits == 4:
        lines = lines[:, :, :4] | lines[:, :, 4:] << 4
    parts = torch.stack((scale,) if minimum is None else (scale, minimum), -1)
    parts = F.pad(parts, (0, 0, 0, 0, 0, panels * ROWS - n))
    parts = parts.view(panels, ROWS, *parts.shape[1:]).permute(0, 2, 3, 1)
    return lines.reshape(panels, blocks, 64 * bits).view(torch.int8), parts.contiguous()


def grouped_unpack(weight: Tensor, n: int, k: int) -> Tensor:
    """The q of a stored weight: uint8 ``[n, k]``."""
    panels, blocks, _ = weight.shape
    lines = weight.contiguous().view(torch.uint8).view(panels, blocks, _bits_of(weight), ROWS, 4)
    if _bits_of(weight) == 4:
        lines = torch.cat((lines & 15, lines >> 4), 2)
    return lines.permute(0, 3, 1, 2, 4).reshape(panels * ROWS, blocks * BLOCK)[:n, :k]


def _dequantize_panels(weight: Tensor, scale: Tensor, group: int, k: int) -> Tensor:
    """float32 ``[16 P, K]``: padding rows included."""
    panels, groups, parts, _ = scale.shape
    values = scale.float().permute(2, 0, 3, 1).reshape(parts, panels * ROWS, groups)
    values = values.repeat_interleave(group, -1)[..., :k]
    q = grouped_unpack(weight, panels * ROWS, k).float()
    zero = 2 ** (_bits_of(weight) - 1)
    return q * values[0] + values[1] if parts == 2 else (q - zero) * values[0]


def _grouped_quantize_torch(
    weight: Tensor,
    group: int,
    asymmetric: bool,
    search: bool,
    importance: Tensor | None,
    bits: int,
) -> tuple[Tensor, Tensor]:
    _check_quantize(weight, group, importance, bits)
    n, k = weight.shape
    groups = -(-k // group)
    x = F.pad(weight.float(), (0, groups * group - k)).view(n, groups, group)
    valid = F.pad(torch.ones(k, device=weight.device), (0, groups * group - k)).view(groups, group)
    h = valid if importance is None else F.pad(importance, (0, groups * group - k)).view_as(valid)
    h = torch.where(h.sum(-1, keepdim=True) > 0, h, valid)
    finite = x.isfinite().all(-1)
    x = torch.where(finite[..., None], x, 0.0)
    top = 2**bits - 1
    zero = 0 if asymmetric else 2 ** (bits - 1)
    if not asymmetric:
        scale = search_symmetric(x, h, bits) if search else x.abs().amax(-1) / (zero - 1)
        m = torch.zeros_like(scale)
    elif search:
        scale, m = search_asymmetric(x, h, valid > 0, bits)
    else:
        m = torch.where(valid > 0, x, float("inf")).amin(-1)
        scale = (torch.where(valid > 0, x, float("-inf")).amax(-1) - m) / top
    half_scale, half_min = scale.half(), m.half()
    finite &= half_scale.isfinite() & half_min.isfinite()
    s, m = half_scale.float(), half_min.float()
    inverse = torch.where(s != 0, 1 / s, 0.0)
    q = ((x - m[..., None]) * inverse[..., None]).round().clamp(-zero, top - zero) + zero
    q = torch.where(finite[..., None], q, zero).to(torch.uint8).view(n, groups * group)
    half_scale = torch.where(finite, half_scale, float("nan"))
    return grouped_pack(q[:, :k], half_scale, half_min if asymmetric else None, bits)


def _grouped_dequantize_torch(
    weight: Tensor, scale: Tensor, group: int, n: int, k: int, dtype: torch.dtype
) -> Tensor:
    _check_weight("grouped_dequantize", weight, scale, group, n, k)
    check_float("grouped_dequantize", "dtype", dtype)
    return _dequantize_panels(weight, scale, group, k)[:n].to(dtype)


def _grouped_linear_torch(
    x: Tensor,
    weight: Tensor,
    scale: Tensor,
    bias: Tensor | None,
    group: int,
    n: int,
    activation_bits: int,
) -> Tensor:
    _check_linear(x, weight, scale, bias, group, n, activation_bits)
    xf = common.quantized_tokens(x, activation_bits).to(x.dtype)
    dense = _dequantize_panels(weight, scale, group, x.shape[-1])[:n].to(x.dtype)
    y = F.linear(xf, dense).float()
    return (y if bias is None else y + bias.float()).to(x.dtype)


def _grouped_embedding_torch(
    indices: Tensor, weight: Tensor, scale: Tensor, group: int, n: int, k: int, dtype: torch.dtype
) -> Tensor:
    _check_embedding(indices, weight, scale, group, n, k, dtype)
    common.check_range("grouped_embedding", indices, n)
    panel, row = indices.long() // ROWS, indices.long() % ROWS
    rows = _dequantize_panels(weight[panel.view(-1)], scale[panel.view(-1)], group, k)
    rows = rows.view(-1, ROWS, k)[torch.arange(panel.numel(), device=row.device), row.view(-1)]
    return rows.view(*indices.shape, k).to(dtype)


def _check_embedding(indices, weight, scale, group, n, k, dtype) -> None:
    _check_weight("grouped_embedding", weight, scale, group, n, k)
    common.check_indices("grouped_embedding", indices)
    check_float("grouped_embedding", "dtype", dtype)


common.register({
    "grouped_quantize": _grouped_quantize_torch,
    "grouped_dequantize": _grouped_dequantize_torch,
    "grouped_linear": _grouped_linear_torch,
    "grouped_embedding": _grouped_embedding_torch,
})  # fmt: skip


# -- fake kernels: shapes and dtypes only ------------------------------------------------------


@torch.library.register_fake("gpu_poor::grouped_quantize")
def _(weight, group, asymmetric, search, importance, bits):
    _check_quantize(weight, group, importance, bits)
    panels, scales = grouped_shapes(*weight.shape, bits, group, asymmetric)
    return (
        weight.new_empty(panels, dtype=torch.int8),
        weight.new_empty(scales, dtype=torch.float16),
    )


@torch.library.register_fake("gpu_poor::grouped_dequantize")
def _(weight, scale, group, n, k, dtype):
    _check_weight("grouped_dequantize", weight, scale, group, n, k)
    check_float("grouped_dequantize", "dtype", dtype)
    return weight.new_empty((n, k), dtype=dtype)


@torch.library.register_fake("gpu_poor::grouped_linear")
def _(x, weight, scale, bias, group, n, activation_bits):
    _check_linear(x, weight, scale, bias, group, n, activation_bits)
    return x.new_empty((*x.shape[:-1], n))


@torch.library.register_fake("gpu_poor::grouped_embedding")
def _(indices, weight, scale, group, n, k, dtype):
    _check_embedding(indices, weight, scale, group, n, k, dtype)
    return weight.new_empty((*indices.shape, k), dtype=dtype)


def _dequantize_for_grad(weight, scale, rest, k, dtype):
    group, n, _ = rest
    return torch.ops.gpu_poor.grouped_dequantize(weight, scale, group, n, k, dtype)


common.register_linear("grouped_linear", _dequantize_for_grad)


# -- the public wrappers -----------------------------------------------------------------------


def grouped_quantize(
    weight: Tensor,
    group: int,
    asymmetric: bool = False,
    search: bool = True,
    importance: Tensor | None = None,
    bits: int = 4,
) -> tuple[Tensor, Tensor]:
    """Quantize groups of ``group`` columns of each row to 4 or 8 bits.

    Args:
        weight: float32, bfloat16 or float16 ``[N, K]``; any K, the last group may be short.
        group: 32, 64, 96 or 128.
        asymmetric: with a minimum for each group: half a bit more a weight for groups of 32.
        search: the scales of least squared error; else absmax / 7, or (max - min) / 15; of 8 bits
            absmax / 127, or (max - min) / 255.
        importance: float32 ``[K]``, the weights of the squared errors; None: all the same.
        bits: 4 or 8.

    Returns:
        int8 and float16 as at the head of this file. A group with a NaN, an infinity or a value
        that no float16 scale reaches has scale NaN, which callers turn into an error.
    """
    if isa.uses_torch():
        return _grouped_quantize_torch(weight, group, asymmetric, search, importance, bits)
    return torch.ops.gpu_poor.grouped_quantize(weight, group, asymmetric, search, importance, bits)


def grouped_dequantize(
    weight: Tensor, scale: Tensor, group: int, n: int, k: int, dtype: torch.dtype = torch.float32
) -> Tensor:
    """The weight ``[n, k]``, computed in float32 and rounded to ``dtype``."""
    if isa.uses_torch():
        return _grouped_dequantize_torch(weight, scale, group, n, k, dtype)
    return torch.ops.gpu_poor.grouped_dequantize(weight, scale, group, n, k, dtype)


def grouped_linear(
    x: Tensor,
    weight: Tensor,
    scale: Tensor,
    bias: Tensor | None,
    group: int,
    n: int,
    activation_bits: int = 16,
) -> Tensor:
    """``x @ w.T + bias`` with integer dot products within each group.

    Args:
        x: float32, bfloat16 or float16 ``[..., K]``, any strides, possibly empty.
        weight, scale: of :func:`grouped_quantize` for ``[n, K]``.
        bias: ``[n]`` of a float dtype, or None.
        activation_bits: 8, 16 or 32: see :data:`gpu_poor.ops.ACTIVATIONS`.

    Returns:
        ``[..., n]`` of x's dtype; in every mode the same bits for every ISA, thread count and split
        of the tokens. A token with a NaN or an infinity gives a row of NaN in the integer modes.
    """
    common.refuse_tangent("grouped_linear", x, bias)
    if isa.uses_torch():
        return _grouped_linear_torch(x, weight, scale, bias, group, n, activation_bits)
    return torch.ops.gpu_poor.grouped_linear(x, weight, scale, bias, group, n, activation_bits)


def grouped_embedding(
    indices: Tensor,
    weight: Tensor,
    scale: Tensor,
    group: int,
    n: int,
    k: int,
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """Gather and dequantize rows of a weight ``[n, k]``: ``[*indices.shape, k]`` of ``dtype``.

    Args:
        indices: int64 or int32, each in [0, n); outside is an error.
    """
    if isa.uses_torch():
        return _grouped_embedding_torch(indices, weight, scale, group, n, k, dtype)
    return torch.ops.gpu_poor.grouped_embedding(indices, weight, scale, group, n, k, dtype)
