"""hqq: robust scales and minima by half-quadratic splitting, without data."""

from dataclasses import dataclass

import torch
from torch import Tensor

from gpu_poor.formats import Format
from gpu_poor.strategies.absmax import grid_of, grouped, round_to, stored
from gpu_poor.strategies.base import Inputs, Numbers, Rounding, register

#: Weights that are worked on at once, so that the temporaries stay small.
CHUNK = 2**20


@register
@dataclass
class Hqq(Rounding):
    """HQQ (Badri and Shaji 2023): few large errors are cheaper than many small ones.

    Minimises ``sum |w - d|^p`` over the minima of asymmetric groups, the scale being absmax's. The
    errors e are split off: ``|e|^p + beta / 2 |w - d - e|^2``, solved in turns for e (a shrinkage)
    and for the minimum (a mean). A symmetric group has no minimum: its scale is fitted instead.
    Of all rounds a group keeps its best, counted with scales as they are stored.

    Args:
        p: exponent of the error, 0 to 1.
        beta: weight of the splitting at first.
        kappa: what beta is multiplied by each round.
        rounds: at most.
    """

    name = "hqq"
    p: float = 0.7
    beta: float = 10.0
    kappa: float = 1.01
    rounds: int = 20

    def __post_init__(self):
        if not (0 < self.p <= 1 and self.beta > 0 and self.kappa >= 1 and self.rounds >= 0):
            raise ValueError(
                f"hqq needs 0 < p <= 1, beta > 0, kappa >= 1 and rounds >= 0, got {self}"
            )

    def quantize(self, rows: Tensor, form: Format, inputs: Inputs | None = None) -> Numbers:
        if form.levels is None:
            return Numbers(*form.quantize(rows))
        step = max(1, CHUNK // max(1, rows.shape[1]))
        scale = torch.cat([self._grid(part.float(), form) for part in rows.split(step)])
        return round_to(rows, scale, form)

    def _grid(self, rows: Tensor, form: Format) -> Tensor:
        """Scales (and minima) ``[N, groups, 1 or 2]`` of rows ``[N, K]``."""
        x, low, high = grouped(rows, form.group), *form.levels
        # The padding of a short last group counts for nothing.
        counts = (torch.arange(x[0].numel(), device=x.device) < rows.shape[1]).view(x[0].shape)
        grid = stored(grid_of(x, form), form)
        best, least = grid, torch.full(x.shape[:2], torch.inf, device=x.device)
        # A row of zeros, and one that is not finite, has nothing to be divided by.
        unit = x.abs().amax(-1, keepdim=True).nan_to_num(1.0, 1.0, 1.0).clamp_min(1e-30)
        beta = self.beta
        for _ in range(self.rounds + 1):
            scale, minimum = grid[..., :1], grid[..., 1:] if form.asymmetric else 0.0
            q = ((x - minimum) * torch.where(scale != 0, 1 / scale, 0.0)).round().clamp(low, high)
            e = (x - scale * q - minimum) / unit
            error = (e.abs().pow(self.p) * counts).sum(-1)
            better = error < least
            least = torch.where(better, error, least)
            best = torch.where(better[..., None], grid, best)
            # The shrinkage is that of values as large as 1: a group's unit is its largest weight.
            e = e.sign() * (e.abs() - e.abs().clamp_min(1e-12).pow(self.p - 1) / beta).clamp_min(0)
            target = (x - e * unit) * counts
            if form.asymmetric:
                minimum = (target - scale * q * counts).sum(-1, keepdim=True)
                grid = torch.cat((scale, minimum / counts.sum(-1)[:, None]), -1)
            else:
                qq = (q * q * counts).sum(-1, keepdim=True)
                grid = torch.where(qq > 0, (target * q).sum(-1, keepdim=True) / qq, scale)
            grid = stored(grid, form)
            beta *= self.kappa
        return best
