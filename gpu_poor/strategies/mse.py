"""mse: the scales of least squared error of the weights, without data."""

import torch
from torch import Tensor

from gpu_poor.formats import Format
from gpu_poor.ops.grouped import ROWS
from gpu_poor.strategies.base import Inputs, Numbers, Rounding, register

#: Weights that rows are unshrunk by at once: of a large embedding float32 copies would be too much.
CHUNK = 2**20
#: A row is made larger by this at most: beyond, its scales are too small for a half.
LIMIT = 1.25


@register
class Mse(Rounding):
    """A search over scales (and minima) in C, each refitted by least squares; then rows unshrunk.

    csrc/int8.c has the clips of a row, csrc/grouped_quantize_template.h the grids of a group.
    """

    name = "mse"

    def quantize(self, rows: Tensor, form: Format, inputs: Inputs | None = None) -> Numbers:
        weight, scale = form.quantize(rows)
        if form.bits == 4:  # with 8, what is lost is less than a half can say
            scale = unshrink(rows, weight, scale, form)
        return Numbers(weight, scale)


def unshrink(rows: Tensor, weight: Tensor, scale: Tensor, form: Format) -> Tensor:
    """Scales for which the rounded row d has ``<w, d> = <w, w>``.

    Least squares leaves ``<w, d> = <d, d> < <w, w>``: every row of every layer answers a little too
    weakly, and what is systematic adds up where the rest averages out (docs/methods.md).
    """
    parts = []
    step = max(1, CHUNK // rows.shape[1] // ROWS)  # panels: what is stored has no other rows
    for first in range(0, len(scale), step):
        part = slice(first, first + step)
        w = rows[first * ROWS : (first + step) * ROWS].float()
        rounded = form.dequantize(weight[part], scale[part], w.shape, torch.float32)
        have = (w * rounded).sum(-1, dtype=torch.float64)
        factors = w.square().sum(-1, dtype=torch.float64) / have
        factors = torch.where((factors >= 1) & (factors <= LIMIT), factors, 1.0)
        unshrunk = form.rescale(scale[part], factors.float())
        parts.append(torch.where(unshrunk.isfinite(), unshrunk, scale[part]))
    return torch.cat(parts)


MSE = Mse()
