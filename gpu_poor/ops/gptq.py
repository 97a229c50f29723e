"""Rounding under the Gram matrix of a layer's inputs: csrc/gptq_template.h."""

import torch
from torch import Tensor

from gpu_poor.ops import common

#: Columns to a group at most, for the formats of 4 bits, whose scales are searched for.
GROUP_MAX = 128


def _check_gptq(weight, gram, factor, group, low, high, sweeps) -> None:
    op = "gptq"
    torch._check(
        weight.dim() == 2 and weight.dtype == torch.float32,
        lambda: f"{op}: weight must be float32 [N, K], got {weight.dtype} {tuple(weight.shape)}",
    )
    k = weight.shape[1]
    torch._check(
        all(m.dtype == torch.float32 and m.shape == (k, k) for m in (gram, factor)),
        lambda: (
            f"{op}: gram and factor must be float32 [K, K] with K = {k}, got {gram.dtype} "
            f"{tuple(gram.shape)} and {factor.dtype} {tuple(factor.shape)}"
        ),
    )
    torch._check(
        -128 <= low <= 0 < high <= 127,
        lambda: f"{op}: levels must be within [-128, 127] and hold 0, got {low} to {high}",
    )
    torch._check(
        group >= 1 and (high - low != 15 or group <= GROUP_MAX),
        lambda: f"{op}: group must be >= 1, and <= {GROUP_MAX} for 4 bits, got {group}",
    )
    torch._check(sweeps >= 0, lambda: f"{op}: sweeps must be >= 0, got {sweeps}")


def _gptq_elsewhere(weight, gram, factor, *options) -> tuple[Tensor, Tensor]:
    """Other devices hand the work to the CPU: it is done once, and column by column."""
    if weight.device.type == "cpu":
        raise NotImplementedError("gptq needs the compiled kernels")
    levels, scale = torch.ops.gpu_poor.gptq(weight.cpu(), gram.cpu(), factor.cpu(), *options)
    return levels.to(weight.device), scale.to(weight.device)


common.register({"gptq": _gptq_elsewhere})


@torch.library.register_fake("gpu_poor::gptq")
def _(weight, gram, factor, group, low, high, asymmetric, half_scales, sweeps):
    _check_gptq(weight, gram, factor, group, low, high, sweeps)
    n, k = weight.shape
    groups = -(-k // group)
    return weight.new_empty((n, k), dtype=torch.int8), weight.new_empty((n, groups, 1 + asymmetric))


def gptq(
    weight: Tensor,
    gram: Tensor,
    factor: Tensor,
    group: int,
    levels: tuple[int, int],
    asymmetric: bool,
    half_scales: bool,
    sweeps: int,
) -> tuple[Tensor, Tensor]:
    """Round a weight so that ``tr((w - d) H (w - d).T)`` is small; d = scale * q (+ minimum).

    GPTQ (Frantar et al. 2022), then coordinate descent that may revise it (QuantEase, Behdin et
    al. 2023) and refits the scales. The same bits for every ISA and thread count.

    Args:
        weight: float32 ``[N, K]``.
        gram: H, float32 ``[K, K]``, positive definite.
        factor: U, float32 ``[K, K]``, upper triangular with ``U.T @ U = H^-1``.
        group: columns that share a scale; at most 128 where there are 16 levels.
        levels: the smallest and the largest q.
        asymmetric: with a minimum, which stands for q = 0.
        half_scales: scales (and minima) are rounded to float16.
        sweeps: passes of coordinate descent.

    Returns:
        int8 ``[N, K]`` and float32 ``[N, groups, 1 or 2]``; NaN where the weight is not finite.
    """
    low, high = levels
    return torch.ops.gpu_poor.gptq(
        weight, gram, factor, group, low, high, asymmetric, half_scales, sweeps
    )
