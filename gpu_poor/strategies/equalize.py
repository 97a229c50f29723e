"""equalize: undo the outliers of a norm's gain, without data."""

import torch
from torch import Tensor

from gpu_poor.formats import Format
from gpu_poor.strategies.base import Inputs, Smoothing, register

#: A gain this many times the median is an outlier. Folding all gains was worse (mean KL of
#: stories260k / tinystories-656k in groups of 64 with a minimum: 0.0918 / 0.0542 without, 0.114 /
#: 0.072 with; the root of gain over column norm 0.090 / 0.060), and so was folding small gains too
#: (0.0918 / 0.0606).
OUTLIER = 4.0
#: Factors are powers of two up to this: exact in every float dtype.
LIMIT = 2.0**10


@register
class Equalize(Smoothing):
    """Move gains far above the norm's median into the columns that read them.

    Behind a large gain training leaves small columns, which drown in the scale that they share
    with the others; the activations there are what is known as massive. The factor is the gain
    over the median, rounded to a power of two, so the float model computes the same bits. The
    idea is cross-layer equalization's (Nagel et al. 2019), chosen from gains alone so that a
    checkpoint can be streamed.
    """

    name = "equalize"

    def factors(
        self, gain: Tensor, rows: list[Tensor], inputs: Inputs | None, forms: list[Format]
    ) -> Tensor | None:
        gain = gain.abs()
        median = gain.median()
        ratio = gain / torch.where(median > 0, median, torch.inf)
        outlier = (ratio >= OUTLIER) & ratio.isfinite()
        if not bool(outlier.any()):
            return None
        return torch.where(outlier, ratio.clamp_max(LIMIT).log2().round().exp2(), 1.0)
