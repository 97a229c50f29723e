"""int4 weights in groups of G columns, symmetric or with a minimum, in panels of 16 rows.

    w[n, k] = scale[n, k // G] * (q[n, k] - 8)                        symmetric
    w[n, k] = scale[n, k // G] * q[n, k] + min[n, k // G]             asymmetric

stored as they are run (csrc/gpu_poor.h): ``weight`` int8 ``[P, B, 256]``, panels of 16 rows by
blocks of 32 columns, two to a byte, padded; ``scale`` float16 ``[P, groups, 1 or 2, 16]``, the
scales and, if asymmetric, the minima. N and K are the caller's to remember. The bytes are called
int8 and not uint8 because models ask for int8 before they cast activations to a weight's dtype
(T5).
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from gpu_poor import isa
from gpu_poor.ops import common
from gpu_poor.ops.common import check_float

GROUPS = (32, 64, 96, 128)
ROWS, BLOCK, PANEL_BLOCK = 16, 32, 256
#: The search of csrc/int4_quantize_template.h.
SIDES = [side * (5 + step / 8) for side in (-1, 1) for step in range(33)]
RANGES = [(1 - 0.04 * i, j / 4) for i in range(11) for j in range(5) if i or not j]
REFITS = 4


def _check_group(op: str, group: int) -> None:
    torch._check(group in GROUPS, lambda: f"{op}: group must be 32, 64, 96 or 128, got {group}")


def int4_shapes(n: int, k: int, group: int, asymmetric: bool) -> tuple[tuple, tuple]:
    """Of the stored weight and scale of a weight ``[n, k]``."""
    panels = -(-n // ROWS)
    return (panels, -(-k // BLOCK), PANEL_BLOCK), (panels, -(-k // group), 1 + asymmetric, ROWS)


def _check_weight(op: str, weight: Tensor, scale: Tensor, group: int, n: int, k: int) -> None:
    _check_group(op, group)
    asymmetric = scale.dim() == 4 and scale.shape[2] == 2
    shapes = int4_shapes(n, k, group, asymmetric)
    torch._check(
        n >= 0 and k >= 0 and weight.dtype == torch.int8 and weight.shape == shapes[0],
        lambda: (
            f"{op}: weight must be int8 {shapes[0]} for N = {n}, K = {k}, got {weight.dtype} "
            f"{tuple(weight.shape)}"
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
    torch._check(x.dim() >= 1, lambda: "int4_linear: x must be [..., K], got a scalar")
    _check_weight("int4_linear", weight, scale, group, n, x.shape[-1])
    common.check_linear("int4_linear", x, n, bias, activation_bits)


def _check_quantize(weight: Tensor, group: int, importance: Tensor | None) -> None:
    op = "int4_quantize"
    _check_group(op, group)
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


def _pack(q: Tensor) -> Tensor:
    """uint8 ``[16 P, 32 B]`` of values up to 15 as panels."""
    rows, columns = q.shape
    halves = q.view(rows // ROWS, ROWS, columns // BLOCK, 2, 4, 4).permute(0, 2, 3, 4, 1, 5)
    low, high = halves.unbind(2)
    panels = (low | high << 4).reshape(rows // ROWS, columns // BLOCK, PANEL_BLOCK)
    return panels.view(torch.int8)


def _unpack(weight: Tensor) -> Tensor:
    """The inverse of :func:`_pack`."""
    panels, blocks, _ = weight.shape
    lines = weight.contiguous().view(torch.uint8).view(panels, blocks, 4, ROWS, 4)
    halves = torch.stack((lines & 15, lines >> 4), 2)
    return halves.permute(0, 4, 1, 2, 3, 5).reshape(panels * ROWS, blocks * BLOCK)


def _dequantize_panels(weight: Tensor, scale: Tensor, group: int, k: int) -> Tensor:
    """float32 ``[16 P, K]``: padding rows included."""
    panels, groups, parts, _ = scale.shape
    values = scale.float().permute(2, 0, 3, 1).reshape(parts, panels * ROWS, groups)
    values = values.repeat_interleave(group, -1)[..., :k]
    q = _unpack(weight)[:, :k].float()
    return q * values[0] + values[1] if parts == 2 else (q - 8) * values[0]


def _ratio(a: Tensor, b: Tensor) -> Tensor:
    return torch.where(b > 0, a / b, 0.0)


def _search_symmetric(x: Tensor, h: Tensor) -> Tensor:
    """Scales ``[...]`` of least weighted squared error for groups ``[..., G]``."""
    extreme = torch.where(x.amax(-1) > -x.amin(-1), x.amax(-1), x.amin(-1))

    def fit(inverse: Tensor) -> tuple[Tensor, Tensor]:
        q = (x * inverse[..., None]).round().clamp(-8, 7)
        xq, qq = (h * q * x).sum(-1), (h * q * q).sum(-1)
        return _ratio(xq, qq), xq * _ratio(xq, qq)

    best, scale = torch.full_like(extreme, -1.0), extreme / -8
    for side in SIDES:
        fitted, gain = fit(torch.where(extreme != 0, side / extreme, 0.0))
        better = gain > best
        best, scale = torch.where(better, gain, best), torch.where(better, fitted, scale)
    for _ in range(REFITS):
        fitted, gain = fit(torch.where(scale != 0, 1 / scale, 0.0))
        better = gain > best
        best, scale = torch.where(better, gain, best), torch.where(better, fitted, scale)
    return scale


def _search_asymmetric(x: Tensor, h: Tensor, valid: Tensor) -> tuple[Tensor, Tensor]:
    """Scales and minima of least weighted squared error; ``valid``: not beyond the group's end."""
    low = torch.where(valid, x, float("inf")).amin(-1)
    high = torch.where(valid, x, float("-inf")).amax(-1)
    n, sx, sxx = h.sum(-1), (h * x).sum(-1), (h * x * x).sum(-1)

    def fit(minimum: Tensor, inverse: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        q = ((x - minimum[..., None]) * inverse[..., None]).round().clamp(0, 15)
        sq, sxq, sqq = (h * q).sum(-1), (h * q * x).sum(-1), (h * q * q).sum(-1)
        det = n * sqq - sq * sq
        scale = _ratio(n * sxq - sx * sq, det)
        m = torch.where(det > 0, (sx - scale * sq) / n, sx / n)
        return scale, m, sxx - scale * sxq - m * sx

    span = high - low
    scale, m = span / 15, low
    best = torch.full_like(low, float("inf"))
    candidates = [
        (low + (span - span * width) * at, torch.where(span > 0, 15 / (span * width), 0.0))
        for width, at in RANGES
    ]

    def keep(fitted: tuple[Tensor, Tensor, Tensor]) -> None:
        nonlocal scale, m, best
        better = fitted[2] < best
        scale, m, best = (
            torch.where(better, new, old) for new, old in zip(fitted, (scale, m, best), strict=True)
        )

    for candidate in candidates:
        first = fit(*candidate)
        keep(first)
        keep(fit(first[1], torch.where(first[0] != 0, 1 / first[0], 0.0)))
    for _ in range(REFITS):
        keep(fit(m, torch.where(scale != 0, 1 / scale, 0.0)))
    return scale, m


def _int4_quantize_torch(
    weight: Tensor, group: int, asymmetric: bool, search: bool, importance: Tensor | None
) -> tuple[Tensor, Tensor]:
    _check_quantize(weight, group, importance)
    n, k = weight.shape
    (panels, blocks, _), (_, groups, _, _) = int4_shapes(n, k, group, asymmetric)
    x = F.pad(weight.float(), (0, groups * group - k)).view(n, groups, group)
    valid = F.pad(torch.ones(k, device=weight.device), (0, groups * group - k)).view(groups, group)
    h = valid if importance is None else F.pad(importance, (0, groups * group - k)).view_as(valid)
    h = torch.where(h.sum(-1, keepdim=True) > 0, h, valid)
    finite = x.isfinite().all(-1)
    x = torch.where(finite[..., None], x, 0.0)
    zero = 0 if asymmetric else 8
    if not asymmetric:
        scale = _search_symmetric(x, h) if search else x.abs().amax(-1) / 7
        m = torch.zeros_like(scale)
    elif search:
        scale, m = _search_asymmetric(x, h, valid > 0)
    else:
        m = torch.where(valid > 0, x, float("inf")).amin(-1)
        scale = (torch.where(valid > 0, x, float("-inf")).amax(-1) - m) / 15
    half_scale, half_min = scale.half(), m.half()
    finite &= half_scale.isfinite() & half_min.isfinite()
    s, m = half_scale.float(), half_min.float()
    inverse = torch.where(s != 0, 1 / s, 0.0)
    q = ((x - m[..., None]) * inverse[..., None]).round().clamp(-zero, 15 - zero) + zero
    q = (
        torch.where((valid > 0) & finite[..., None], q, zero)
        .to(torch.uint8)
        .view(n, groups * group)
    )
    q = F.pad(q, (0, 0, 0, panels * ROWS - n), value=zero)
    q = q[:, : blocks * BLOCK].contiguous()
    half_scale = torch.where(finite, half_scale, float("nan"))
    stored = torch.stack((half_scale, half_min)[: 1 + asymmetric], -1)
    stored = F.pad(stored, (0, 0, 0, 0, 0, panels * ROWS - n))
    stored = stored.view(panels, ROWS, groups, 1 + asymmetric).permute(0, 2, 3, 1).contiguous()
    return _pack(q), stored


def _int4_dequantize_torch(
    weight: Tensor, scale: Tensor, group: int, n: int, k: int, dtype: torch.dtype
) -> Tensor:
    _check_weight("int4_dequantize", weight, scale, group, n, k)
    check_float("int4_dequantize", "dtype", dtype)
    return _dequantize_panels(weight, scale, group, k)[:n].to(dtype)


def _int4_linear_torch(
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


def _int4_embedding_torch(
    indices: Tensor, weight: Tensor, scale: Tensor, group: int, n: int, k: int, dtype: torch.dtype
) -> Tensor:
    _check_embedding(indices, weight, scale, group, n, k, dtype)
    common.check_range("int4_embedding", indices, n)
    panel, row = indices.long() // ROWS, indices.long() % ROWS
    rows = _dequantize_panels(weight[panel.view(-1)], scale[panel.view(-1)], group, k)
    rows = rows.view(-1, ROWS, k)[torch.arange(panel.numel(), device=row.device), row.view(-1)]
    return rows.view(*indices.shape, k).to(dtype)


def _check_embedding(indices, weight, scale, group, n, k, dtype) -> None:
    _check_weight("int4_embedding", weight, scale, group, n, k)
    common.check_indices("int4_embedding", indices)
    check_float("int4_embedding", "dtype", dtype)


common.register({
    "int4_quantize": _int4_quantize_torch,
    "int4_dequantize": _int4_dequantize_torch,
    "int4_linear": _int4_linear_torch,
    "int4_embedding": _int4_embedding_torch,
})  # fmt: skip


# -- fake kernels: shapes and dtypes only ------------------------------------------------------


@torch.library.register_fake("gpu_poor::int4_quantize")
def _(weight, group, asymmetric, search, importance):
    _check_quantize(weight, group, importance)
    panels, scales = int4_shapes(*weight.shape, group, asymmetric)
    return (
        weight.new_empty(panels, dtype=torch.int8),
        weight.new_empty(scales, dtype=torch.float16),
    )


@torch.library.register_fake("gpu_poor::int4_dequantize")
def _(weight, scale, group, n, k, dtype):
    _check_weight("int4_dequantize", weight, scale, group, n, k)
    check_float("int4_dequantize", "dtype", dtype)
    return weight.new_empty((n, k), dtype=dtype)


@torch.library.register_fake("gpu_poor::int4_linear")
def _(x, weight, scale, bias, group, n, activation_bits):
    _check_linear(x, weight, scale, bias, group, n, activation_bits)
    return x.new_empty((*x.shape[:-1], n))


@torch.library.register_fake("gpu_poor::int4_embedding")
def _(indices, weight, scale, group, n, k, dtype):
    _check_embedding(indices, weight, scale, group, n, k, dtype)
    return weight.new_empty((*indices.shape, k), dtype=dtype)


def _dequantize_for_grad(weight, scale, rest, k, dtype):
    group, n, _ = rest
    return torch.ops.gpu_poor.int4_dequantize(weight, scale, group, n, k, dtype)


common.register_linear("int4_linear", _dequantize_for_grad)


# -- the public wrappers -----------------------------------------------------------------------


def int4_quantize(
    weight: Tensor,
    group: int,
    asymmetric: bool = False,
    search: bool = True,
    importance: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Quantize groups of ``group`` columns of each row to 4 bits.

    Args:
        weight: float32, bfloat16 or float16 ``[N, K]``; any K, the last group may be short.
        group: 32, 64, 96 or 128.
        asymmetric: with a minimum for each group: half a bit more a weight for groups of 32.
        search: the scales of least squared error; else absmax / 7, or (max - min) / 15.
        importance: float32 ``[K]``, the weights of the squared errors; None: all the same.

    Returns:
        int8 and float16 as at the head of this file. A group with a NaN, an infinity or a value
        that no float16 scale reaches has scale NaN, which callers turn into an error.
    """
    if isa.uses_torch():
        return _int4_quantize_torch(weight, group, asymmetric, search, importance)
    return torch.ops.gpu_poor.int4_quantize(weight, group, asymmetric, search, importance)


def int4_encode(levels: Tensor, scale: Tensor, group: int) -> tuple[Tensor, Tensor]:
    """Numbers that were chosen elsewhere, as they are stored.

    Args:
        levels: ``[n, k]`` of an integer dtype: -8 to 7, or 0 to 15 if there is a minimum.
        scale: ``[n, groups, 1 or 2]`` of a float dtype: scales (and minima), rounded to float16.

    Raises:
        ValueError: a level is out of range.
    """
    n, k = levels.shape
    (panels, blocks, _), (_, groups, parts, _) = int4_shapes(n, k, group, scale.shape[2] == 2)
    if scale.shape != (n, groups, parts):
        raise ValueError(f"scale must be [{n}, {groups}, 1 or 2], got {tuple(scale.shape)}")
    zero = 0 if parts == 2 else 8
    q = levels.to(torch.int16) + zero
    if q.numel() and not (0 <= int(q.min()) and int(q.max()) <= 15):
        raise ValueError(f"levels must be {-zero} to {15 - zero}")
    padding = (0, blocks * BLOCK - k, 0, panels * ROWS - n)
    stored = F.pad(scale.half(), (0, 0, 0, 0, 0, panels * ROWS - n))
    stored = stored.view(panels, ROWS, groups, parts).permute(0, 2, 3, 1).contiguous()
    return _pack(F.pad(q.to(torch.uint8), padding, value=zero)), stored


def int4_dequantize(
    weight: Tensor, scale: Tensor, group: int, n: int, k: int, dtype: torch.dtype = torch.float32
) -> Tensor:
    """The weight ``[n, k]``, computed in float32 and rounded to ``dtype``."""
    if isa.uses_torch():
        return _int4_dequantize_torch(weight, scale, group, n, k, dtype)
    return torch.ops.gpu_poor.int4_dequantize(weight, scale, group, n, k, dtype)


def int4_linear(
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
        weight, scale: of :func:`int4_quantize` for ``[n, K]``.
        bias: ``[n]`` of a float dtype, or None.
        activation_bits: 8, 16 or 32: see :data:`gpu_poor.ops.ACTIVATIONS`.

    Returns:
        ``[..., n]`` of x's dtype; in every mode the same bits for every ISA, thread count and split
        of the tokens. A token with a NaN or an infinity gives a row of NaN in the integer modes.
    """
    common.refuse_tangent("int4_linear", x, bias)
    if isa.uses_torch():
        return _int4_linear_torch(x, weight, scale, bias, group, n, activation_bits)
    return torch.ops.gpu_poor.int4_linear(x, weight, scale, bias, group, n, activation_bits)


def int4_embedding(
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
        return _int4_embedding_torch(indices, weight, scale, group, n, k, dtype)
    return torch.ops.gpu_poor.int4_embedding(indices, weight, scale, group, n, k, dtype)
