"""Statistics of activations for calibration, per channel."""

import torch
from torch import Tensor

from gpu_poor import isa
from gpu_poor.ops import common
from gpu_poor.ops.common import as_rows, check_rows


def _check_gram(acc: Tensor, x: Tensor) -> None:
    check_rows("gram_", "x", x)
    k = x.shape[-1]
    torch._check(
        acc.dtype == torch.float32 and acc.shape == (k, k) and acc.is_contiguous(),
        lambda: (
            f"gram_: acc must be a contiguous float32 [K, K] with K = {k}, "
            f"got {acc.dtype} {tuple(acc.shape)}"
        ),
    )


def _channel_stats_torch(x: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    check_rows("channel_stats", "x", x)
    x = as_rows(x).float()
    if x.shape[0] == 0:
        zero = x.new_zeros(x.shape[1])
        return zero, zero.clone(), zero.clone(), zero.clone()
    return x.abs().amax(0), x.amin(0), x.amax(0), x.double().square().mean(0).float()


def _gram_torch(acc: Tensor, x: Tensor) -> None:
    _check_gram(acc, x)
    x = as_rows(x).float()
    acc.addmm_(x.T, x)


common.register({"channel_stats": _channel_stats_torch, "gram_": _gram_torch})


@torch.library.register_fake("gpu_poor::channel_stats")
def _(x):
    check_rows("channel_stats", "x", x)
    return tuple(x.new_empty(x.shape[-1:], dtype=torch.float32) for _ in range(4))


@torch.library.register_fake("gpu_poor::gram_")
def _(acc, x):
    _check_gram(acc, x)


def channel_stats(x: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Per-channel ``absmax, min, max, mean square`` of activations ``[..., K]``, float32 ``[K]``.

    Sums are kept in float64. NaN propagates; no rows give zeros.
    """
    if isa.uses_torch():
        return _channel_stats_torch(x)
    return torch.ops.gpu_poor.channel_stats(x)


def gram_(acc: Tensor, x: Tensor) -> Tensor:
    """``acc += x.T @ x`` in place: float32 ``[K, K]`` from activations ``[..., K]``."""
    if isa.uses_torch():
        _gram_torch(acc, x)
    else:
        torch.ops.gpu_poor.gram_(acc, x)
    return acc
