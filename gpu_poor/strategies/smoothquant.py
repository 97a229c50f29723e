"""smoothquant: share the difficulty of massive activations between activations and weights."""

from dataclasses import dataclass

import torch
from torch import Tensor

from gpu_poor.formats import Format
from gpu_poor.strategies.base import Inputs, Smoothing, column_absmax, even_out, register


@register
@dataclass
class SmoothQuant(Smoothing):
    """``f = max |x|^alpha / max |w|^(1 - alpha)`` for each channel (Xiao et al. 2022, equation 4).

    Args:
        alpha: how much of the difficulty moves into the weights, 0 to 1.
        keep: factors that nothing before a layer can be divided by, as its input scale.
    """

    name = "smoothquant"
    needs_inputs = True
    alpha: float = 0.5
    keep: bool = True

    def __post_init__(self):
        if not 0 <= self.alpha <= 1:
            raise ValueError(f"smoothquant needs 0 <= alpha <= 1, got {self}")

    def factors(
        self, gain: Tensor, rows: list[Tensor], inputs: Inputs | None, forms: list[Format]
    ) -> Tensor | None:
        x, w = inputs.absmax.float(), column_absmax(rows)
        usable = (x > 0) & (w > 0)
        factors = torch.where(usable, x**self.alpha / w ** (1 - self.alpha), 1.0)
        return even_out(factors, usable)
