"""gptq: rounding under the Gram matrix of the layer's inputs."""

from dataclasses import dataclass

import torch
from torch import Tensor

from gpu_poor import ops
from gpu_poor.formats import Format
from gpu_poor.ops.common import correction_dtype
from gpu_poor.strategies.base import Inputs, Numbers, Rounding, register


@register
@dataclass
class Gptq(Rounding):
    """GPTQ (Frantar et al. 2022) and what has been learnt since; docs/methods.md has the figures.

    Before rounding, the weight is moved to where it answers as the float layer does although its
    inputs have drifted: ``W (1 + correction * drift H^-1)`` (GPTAQ, Li et al. 2025; QEP, Arai and
    Ichikawa 2025). Afterwards coordinate descent revises it (QuantEase, Behdin et al. 2023).

    Args:
        damp: of the mean diagonal, added to the diagonal of the Gram matrix.
        sweeps: of coordinate descent.
        correction: of the drift, 0 to 1.
    """

    name = "gptq"
    needs_inputs = True
    needs_gram = True
    needs_drift = True
    damp: float = 0.01
    sweeps: int = 3
    correction: float = 1.0

    def __post_init__(self):
        if not (0 < self.damp < 1 and self.sweeps >= 0 and 0 <= self.correction <= 1):
            raise ValueError(
                f"gptq needs 0 < damp < 1, sweeps >= 0 and 0 <= correction <= 1, got {self}"
            )

    def quantize(self, rows: Tensor, form: Format, inputs: Inputs | None = None) -> Numbers:
        if form.levels is None:
            return Numbers(*form.quantize(rows))
        gram, factor = self._factor(inputs)
        target = rows.float()
        if self.correction:  # H^-1 = U^T U
            dtype = correction_dtype()
            u, shift = factor.to(dtype), target.to(dtype) @ inputs.drift.to(dtype)
            target = target + self.correction * (shift @ u.T @ u).float()
        levels, scale = ops.gptq(
            target.contiguous(),
            gram,
            factor,
            form.group or max(1, rows.shape[1]),
            form.levels,
            form.asymmetric,
            half_scales=form.group is not None,
            sweeps=self.sweeps,
        )
        if not bool(rows.isfinite().all()):  # the correction has spread it; say so as others do
            scale = torch.full_like(scale, torch.nan)
        return Numbers(*form.encode(levels, scale))

    def _factor(self, inputs: Inputs) -> tuple[Tensor, Tensor]:
        """The damped Gram matrix H, and U, upper triangular, with ``U^T U = H^-1``.

        Kept with the inputs, which several linears share.
        """
        if self.damp in inputs.factored:
            return inputs.factored[self.damp]
        if not bool(inputs.gram.isfinite().all()):
            raise ValueError("its inputs hold a NaN or an infinity")
        mean = inputs.gram.diagonal().mean()
        if not mean > 0:
            raise ValueError("its inputs are all zero: the Gram matrix is singular")
        damped = inputs.gram.clone()
        # A channel that is always zero asks for nothing, but must not divide by nothing.
        damped.diagonal().add_(self.damp * mean)
        # With rows and columns reversed, L L^T = H is R R^T = H, R upper triangular, and U = R^-1:
        # one factorization and one solution in place of an inverse between two factorizations.
        # Both overwrite what they are given, for these are the largest matrices of a calibration;
        # LAPACK counts columns first, and H is symmetric.
        lower, failed = damped.flip(0, 1).t(), torch.empty((), dtype=torch.int32)
        torch.linalg.cholesky_ex(lower, out=(lower, failed))
        if not int(failed):
            factor = torch.eye(len(lower)).t()
            torch.linalg.solve_triangular(lower, factor, upper=False, out=factor)
            del lower
            factor = factor.flip(0, 1)
        if int(failed) or not bool(factor.isfinite().all()):
            raise ValueError(
                f"the Gram matrix of its inputs is singular even with damp={self.damp:g}: use more "
                "calibration data or a larger damp"
            )
        inputs.factored[self.damp] = damped, factor
        return damped, factor
