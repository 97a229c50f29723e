"""mse: the scales of least squared error of the weights, without data."""

from torch import Tensor

from gpu_poor.formats import Format
from gpu_poor.strategies.base import Inputs, Numbers, Rounding, register


@register
class Mse(Rounding):
    """A search over scales (and minima) in C, each refitted by least squares.

    For 8 bits a row's clip is searched; for 4 bits csrc/int4_quantize_template.h says what is.
    """

    name = "mse"

    def quantize(self, rows: Tensor, form: Format, inputs: Inputs | None = None) -> Numbers:
        return Numbers(*form.quantize(rows))


MSE = Mse()
