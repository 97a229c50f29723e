"""The search of csrc/grouped_quantize_template.h for the scales of groups, in plain torch."""

import torch
from torch import Tensor

#: Where the grids put the largest magnitude, and the ranges, as (width, place) of the whole one.
SIDES = {
    bits: [side * (first + step * i) for side in (-1, 1) for i in range(33)]
    for bits, first, step in ((4, 5, 1 / 8), (8, 120, 9 / 32))
}
RANGES = {
    bits: [(1 - 0.64 / 2**bits * i, j / 4) for i in range(11) for j in range(5) if i or not j]
    for bits in (4, 8)
}
REFITS = 4


def _ratio(a: Tensor, b: Tensor) -> Tensor:
    return torch.where(b > 0, a / b, 0.0)


def search_symmetric(x: Tensor, h: Tensor, bits: int) -> Tensor:
    """Scales ``[...]`` of least weighted squared error for groups ``[..., G]``."""
    extreme = torch.where(x.amax(-1) > -x.amin(-1), x.amax(-1), x.amin(-1))
    zero = 2 ** (bits - 1)

    def fit(inverse: Tensor) -> tuple[Tensor, Tensor]:
        q = (x * inverse[..., None]).round().clamp(-zero, zero - 1)
        xq, qq = (h * q * x).sum(-1), (h * q * q).sum(-1)
        return _ratio(xq, qq), xq * _ratio(xq, qq)

    best, scale = torch.full_like(extreme, -1.0), extreme / -zero
    for side in SIDES[bits]:
        fitted, gain = fit(torch.where(extreme != 0, side / extreme, 0.0))
        better = gain > best
        best, scale = torch.where(better, gain, best), torch.where(better, fitted, scale)
    for _ in range(REFITS):
        fitted, gain = fit(torch.where(scale != 0, 1 / scale, 0.0))
        better = gain > best
        best, scale = torch.where(better, gain, best), torch.where(better, fitted, scale)
    return scale


def search_asymmetric(x: Tensor, h: Tensor, valid: Tensor, bits: int) -> tuple[Tensor, Tensor]:
    """Scales and minima of least weighted squared error; ``valid``: not beyond the group's end."""
    low = torch.where(valid, x, float("inf")).amin(-1)
    high = torch.where(valid, x, float("-inf")).amax(-1)
    centre = low + (high - low) / 2
    x, low, high = x - centre[..., None], low - centre, high - centre
    n, sx, sxx = h.sum(-1), (h * x).sum(-1), (h * x * x).sum(-1)
    top = 2**bits - 1

    def fit(minimum: Tensor, inverse: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        q = ((x - minimum[..., None]) * inverse[..., None]).round().clamp(0, top)
        sq, sxq, sqq = (h * q).sum(-1), (h * q * x).sum(-1), (h * q * q).sum(-1)
        det = n * sqq - sq * sq
        scale = _ratio(n * sxq - sx * sq, det)
        m = torch.where(det > 0, (sx - scale * sq) / n, sx / n)
        return scale, m, sxx - scale * sxq - m * sx

    span = high - low
    scale, m = span / top, low
    best = torch.full_like(low, float("inf"))
    candidates = [
        (low + (span - span * width) * at, torch.where(span > 0, top / (span * width), 0.0))
        for width, at in RANGES[bits]
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
    return scale, m + centre
