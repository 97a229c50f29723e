"""Fused decoder blocks: all of a block but attention, and a whole step (csrc/ops/decoder_ops.cpp).

What a block consists of is told by a row of ``layout`` and one of ``numbers``, whose columns are
:class:`Column` and :class:`Number` here and in csrc/ops/decoder.h; its tensors come in one list.
gpu_poor/fusion writes all three. Letters: B sequences, T tokens of each, E hidden size, H query
and G key heads of D.
"""

from enum import IntEnum, auto

import torch
from torch import Tensor


class Column(IntEnum):
    """A row of ``layout``, int64; csrc/ops/decoder.h says what the values mean."""

    HEADS = 0
    KV_HEADS = auto()
    HEAD_DIM = auto()
    QKV = auto()
    GATED = auto()
    ACTIVATION = auto()
    PARALLEL = auto()
    WINDOW = auto()
    #: Four norms: kind, whether it has a bias.
    NORMS = auto()
    #: Seven linears: N, group, activation bits, whether it has a bias, and an input scale.
    LINEARS = NORMS + 8
    COUNT = LINEARS + 35


class Number(IntEnum):
    """A row of ``numbers``, float32."""

    ATTENTION_EPS = 0
    NETWORK_EPS = auto()
    HEAD_EPS = auto()
    SOFTMAX_SCALE = auto()
    COUNT = auto()


class Qkv(IntEnum):
    """How queries, keys and values are projected: ``Column.QKV``."""

    SEPARATE = 0
    CONCATENATED = 1
    PER_HEAD = 2


class Gated(IntEnum):
    """What the network's linears are: ``Column.GATED``."""

    NO = 0
    SEPARATE = 1
    CONCATENATED = 2


class Activation(IntEnum):
    """``Column.ACTIVATION``: gp_activation in csrc/gpu_poor.h."""

    SILU = 0
    GELU = 1
    GELU_TANH = 2
    RELU = 3


class NormKind(IntEnum):
    """Of one of ``Column.NORMS``."""

    ABSENT = 0
    RMS = 1
    LAYER = 2


def _check(op: str, x: Tensor, layout: Tensor, numbers: Tensor) -> None:
    torch._check(
        x.dim() == 3 and x.shape[2] > 0,
        lambda: f"{op}: x must be [B, T, hidden], got {tuple(x.shape)}",
    )
    columns, per_block = int(Column.COUNT), int(Number.COUNT)  # symbolic sizes know no enums
    torch._check(
        layout.dim() == 2 and layout.shape[1] == columns and layout.dtype == torch.int64,
        lambda: f"{op}: layout must be int64 [blocks, {columns}], got {tuple(layout.shape)}",
    )
    torch._check(
        numbers.dim() == 2
        and numbers.shape[0] == layout.shape[0]
        and numbers.shape[1] == per_block
        and numbers.dtype == torch.float32,
        lambda: f"{op}: numbers must be float32 [blocks, {per_block}], got {tuple(numbers.shape)}",
    )


@torch.library.register_fake("gpu_poor::decoder_qkv")
def _(x, weights, layout, numbers, cos, sin, heads, kv_heads, head_dim):
    _check("decoder_qkv", x, layout, numbers)
    return tuple(x.new_empty(*x.shape[:2], n, head_dim) for n in (heads, kv_heads, kv_heads))


@torch.library.register_fake("gpu_poor::decoder_out")
def _(x, attention, weights, layout, numbers):
    _check("decoder_out", x, layout, numbers)
    return torch.empty_like(x, memory_format=torch.contiguous_format)


@torch.library.register_fake("gpu_poor::decoder_step")
def _(x, weights, layout, numbers, cos, sin, pages, scales, shift, block_table, lengths, starts,
      norm=0, norm_eps=0.0):  # fmt: skip
    _check("decoder_step", x, layout, numbers)
    return torch.empty_like(x, memory_format=torch.contiguous_format)


def decoder_qkv(
    x: Tensor,
    weights: list[Tensor],
    layout: Tensor,
    numbers: Tensor,
    cos: Tensor | None,
    sin: Tensor | None,
    heads: int,
    kv_heads: int,
    head_dim: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """Norm, query, key and value projections, norms of heads and rotation of one block.

    Args:
        x: ``[B, T, E]`` of a float dtype: the block's input.
        cos, sin: ``[1 or B, T, dims]`` for the first ``dims`` of a head, halves together; or None.
        heads, kv_heads, head_dim: H, G and D, as in ``layout``.

    Returns:
        q ``[B, T, H, D]``, k and v ``[B, T, G, D]`` of x's dtype, float32 inside.

    Raises:
        RuntimeError: tensors that layout does not describe.
    """
    return torch.ops.gpu_poor.decoder_qkv(
        x, weights, layout, numbers, cos, sin, heads, kv_heads, head_dim
    )


def decoder_out(
    x: Tensor, attention: Tensor, weights: list[Tensor], layout: Tensor, numbers: Tensor
) -> Tensor:
    """The rest of a block: projection of ``attention`` ``[B, T, H D]``, residuals, feed-forward."""
    return torch.ops.gpu_poor.decoder_out(x, attention, weights, layout, numbers)


def decoder_step(
    x: Tensor,
    weights: list[Tensor],
    layout: Tensor,
    numbers: Tensor,
    cos: Tensor | None,
    sin: Tensor | None,
    pages: Tensor,
    scales: Tensor | None,
    shift: Tensor | None,
    block_table: Tensor,
    lengths: Tensor,
    starts: Tensor | None,
    norm: int = NormKind.ABSENT,
    norm_eps: float = 0.0,
) -> Tensor:
    """One or more blocks in a row, attention and cache (gpu_poor/ops/attention.py) included.

    Args:
        x: ``[B, T, E]``, T new tokens of each sequence, few.
        pages: ``[n, blocks, 2, G, page_size, D]``, each page with what all blocks store of its
            tokens, contiguous. scales: float16 ``[n, blocks, 2, G, page_size]`` of int8 pages. The
            new keys and values are stored in them after ``lengths`` int32 ``[B]``.
        shift: float32 ``[blocks, G, D]`` that keys are stored less; None: 0.
        norm, norm_eps: of what comes out of the blocks, a :class:`NormKind` and its epsilon. Its
            weight, and its bias if it has one, are the last of ``weights``.

    Returns:
        ``[B, T, E]`` of x's dtype. All arguments are checked before anything is stored.
    """
    return torch.ops.gpu_poor.decoder_step(
        x, weights, layout, numbers, cos, sin, pages, scales, shift, block_table, lengths, starts,
        int(norm), norm_eps,
    )  # fmt: skip
