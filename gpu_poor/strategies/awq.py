"""awq: larger columns for the channels that matter, as much larger as pays."""

from dataclasses import dataclass

import torch
from torch import Tensor

from gpu_poor.formats import Format
from gpu_poor.strategies.base import Inputs, Smoothing, even_out, register
from gpu_poor.strategies.mse import MSE

#: Rows of each weight that an exponent is tried on, evenly spread.
ROWS = 512


@register
@dataclass
class Awq(Smoothing):
    """AWQ (Lin et al. 2023): ``f = m^t``, m the size of a channel's activations.

    t is searched on a grid of [0, 1]: the one whose rounded weights leave the smallest output
    error ``tr(dW H dW^T)``, H the Gram matrix, in the formats that the weights will have. m is
    the root mean square here, which H has on its diagonal, where the paper takes the mean of |x|;
    the clip that the paper searches afterwards is the rounding's own.

    Args:
        steps: of the grid.
        keep: factors that nothing before a layer can be divided by, as its input scale; not with
            gptq, which gains nothing by it.
    """

    name = "awq"
    needs_inputs = True
    needs_gram = True
    steps: int = 20
    keep: bool = True

    def __post_init__(self):
        if not (isinstance(self.steps, int) and self.steps >= 1):
            raise ValueError(f"awq needs steps >= 1, got {self}")

    def factors(
        self, gain: Tensor, rows: list[Tensor], inputs: Inputs | None, forms: list[Format]
    ) -> Tensor | None:
        pairs = [
            (spread(matrix), form)
            for matrix, form in zip(rows, forms, strict=True)
            if form.levels is not None
        ]
        size = inputs.gram.diagonal().clamp_min(0).sqrt()
        usable = size > 0
        best, least = None, sum(output_error(w, form, inputs.gram) for w, form in pairs)
        for step in range(1, self.steps + 1):
            factors = even_out(torch.where(usable, size ** (step / self.steps), 1.0), usable)
            error = sum(output_error(w, form, inputs.gram, factors) for w, form in pairs)
            if error < least:
                best, least = factors, error
        return best


def output_error(rows: Tensor, form: Format, gram: Tensor, factors: Tensor | float = 1.0) -> float:
    """``tr(dW H dW^T)`` of rows ``[N, K]`` that are rounded after columns are multiplied."""
    weight, scale = MSE.quantize((rows * factors).contiguous(), form)
    delta = rows - form.dequantize(weight, scale, rows.shape, torch.float32) / factors
    return float(((delta @ gram) * delta).sum())


def spread(rows: Tensor) -> Tensor:
    """At most :data:`ROWS` of the rows, in float32."""
    return rows[:: -(-len(rows) // ROWS)].float()
