"""absmax: the largest value of a group gets the largest level. The baseline."""

import torch
from torch import Tensor

from gpu_poor.formats import Format
from gpu_poor.strategies.base import Inputs, Numbers, Rounding, register


@register
class Absmax(Rounding):
    """Round to nearest with scale ``max |x| / high``, or ``(max - min) / (high - low)``."""

    name = "absmax"

    def quantize(self, rows: Tensor, form: Format, inputs: Inputs | None = None) -> Numbers:
        if form.levels is None:
            return Numbers(*form.quantize(rows))
        return round_to(rows, grid_of(grouped(rows.float(), form.group), form), form)


def grid_of(groups: Tensor, form: Format) -> Tensor:
    """Scales (and minima) ``[N, groups, 1 or 2]`` that just span ``[N, groups, G]``."""
    low, high = form.levels
    if not form.asymmetric:
        return (groups.abs().amax(-1) / high)[..., None]
    bottom = groups.amin(-1)
    step = (groups.amax(-1) - bottom) / (high - low)
    return torch.stack((step, bottom - step * low), -1)


def grouped(rows: Tensor, group: int | None) -> Tensor:
    """``[N, groups, G]``; beyond the last column, that column again."""
    n, k = rows.shape
    group = group or max(1, k)
    last = rows[:, -1:].expand(n, -k % group)
    return torch.cat((rows, last), 1).view(n, -1, group)


def round_to(rows: Tensor, scale: Tensor, form: Format) -> Numbers:
    """Rows to the nearest levels of given scales ``[N, groups, 1 or 2]``, float32.

    A scale is NaN where its row is not finite, or no stored scale is large enough.
    """
    k = rows.shape[1]
    scale = stored(scale, form)
    per_column = scale.repeat_interleave(form.group or max(1, k), 1)[:, :k]
    minimum = per_column[..., 1] if form.asymmetric else 0.0
    step = per_column[..., 0]
    inverse = torch.where(step != 0, 1 / step, 0.0)
    q = ((rows.float() - minimum) * inverse).round().clamp(*form.levels)
    usable = scale.isfinite().all(-1, keepdim=True)
    scale = torch.where(usable, scale, torch.nan)
    return Numbers(*form.encode(q.nan_to_num(0.0).to(torch.int16), scale))


def stored(grid: Tensor, form: Format) -> Tensor:
    """Scales and minima as the format keeps them, in float32."""
    return grid if form.group is None else grid.half().float()
