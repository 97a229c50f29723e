"""Rounding under the Gram matrix of a layer's inputs: csrc/gptq_template.h."""

import torch
from torch import Tensor

from gpu_poor.ops import common

#: Columns to a group at most where scales are searched for.
GROUP_MAX = 128


def _check_gptq(weight, gram, factor, group, low, high, half_scales, sweeps) -> None:
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
        low <= 0 and low < high and high - low <= 255,
        lambda: f"{op}: levels must be at most 256 and hold 0, got {low} to {high}",
    )
    torch._check(
        group >= 1 and (not half_scales or group <= GROUP_MAX),
        lambda: f"{op}: group must be >= 1, and <= {GROUP_MAX} with half_scales, got {group}",
    )
    torch._check(
        not half_scales or high - low in (15, 255),
        lambda: f"{op}: with half_scales there are 16 or 256 levels, got {low} to {high}",
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
    _check_gptq(weight, gram, factor, group, low, high, half_scales, sweeps)
    n, k = weight.shape
    groups = -(-k // group)
    return weight.new_empty((n, k), dtype=torch.int16), weight.new_empty(
        (n, groups, 1 + asymmetric)
    )


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
        group: columns that share a scale; at most 128 with half_scales.
        levels: the smallest and the largest q.
        asymmetric: with a minimum, which stands for q = 0.
        half_scales: scales (and minima) are searched for and rounded to float16; else they span
            the row's values.
        sweeps: passes of coordinate descent.

    Returns:
        int16 ``[N, K]`` and float32 ``[N, groups, 1 or 2]``; NaN where the weight is not finite.
    """
    low, high = levels
    return torch.ops.gpu_poor.gptq(
        weight, gram, factor, group, low, high, asymmetric, half_scales, sweeps
    )
