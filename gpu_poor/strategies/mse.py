"""mse: the scales of least squared error of the weights, without data."""

from torch import Tensor

from gpu_poor.formats import Format
from gpu_poor.strategies.base import Inputs, Numbers, Rounding, register


@register
class Mse(Rounding):
    """A search over scales (and minima) in C, each refitted by least squares.

    csrc/int8.c has the clips of a row, csrc/grouped_quantize_template.h the grids of a group.
    """

    name = "mse"

    def quantize(self, rows: Tensor, form: Format, inputs: Inputs | None = None) -> Numbers:
        return Numbers(*form.quantize(rows))


MSE = Mse()
