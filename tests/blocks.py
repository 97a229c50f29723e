"""A small decoder block as the operators take it, made by hand."""

import torch
from helpers import heavy_tailed, random_int8

from gpu_poor.ops.decoder import Activation, Column, Gated, NormKind, Number, Qkv

#: Hidden size, query and key heads, their size, and the network's.
E, H, G, D, INNER = 30, 4, 2, 8, 20


def block(blocks: int = 1) -> tuple[list[torch.Tensor], torch.Tensor, torch.Tensor]:
    """Tensors, layout and numbers of blocks with RMS norms, int8 linears and SiLU(gate) * up."""
    layout = torch.zeros(1, Column.COUNT, dtype=torch.int64)
    numbers = torch.zeros(1, Number.COUNT)
    settings = {
        Column.HEADS: H,
        Column.KV_HEADS: G,
        Column.HEAD_DIM: D,
        Column.QKV: Qkv.SEPARATE,
        Column.GATED: Gated.SEPARATE,
        Column.ACTIVATION: Activation.SILU,
    }
    for column, value in settings.items():
        layout[0, column] = int(value)
    tensors = []
    for i in range(2):
        layout[0, Column.NORMS + 2 * i] = NormKind.RMS
        tensors.append(1 + heavy_tailed(E, seed=i) / 10)
    shapes = [(H * D, E), (G * D, E), (G * D, E), (E, H * D), (INNER, E), (INNER, E), (E, INNER)]
    for i, (n, k) in enumerate(shapes):
        bias, scaled = i % 2, i // 3 % 2
        layout[0, Column.LINEARS + 5 * i :][:5] = torch.tensor([n, 0, 16, bias, scaled])
        tensors += [random_int8(n, k), torch.rand(n) / 1000, torch.randn(n)][: 2 + bias]
        tensors += [torch.rand(k).half() + 0.5] * scaled
    numbers[0, Number.ATTENTION_EPS] = numbers[0, Number.NETWORK_EPS] = 1e-5
    numbers[0, Number.SOFTMAX_SCALE] = D**-0.5
    return tensors * blocks, layout.repeat(blocks, 1), numbers.repeat(blocks, 1)


def angles(tokens: int, batch: int = 1) -> tuple[torch.Tensor, torch.Tensor]:
    """cos and sin of rotations of all dimensions of a head."""
    x = heavy_tailed(batch, tokens, D, seed=5)
    return x.cos(), x.sin()


def step(x: torch.Tensor, blocks: int = 2, int8: bool = False) -> tuple:
    """Arguments of decoder_step: 3 pages of 16 slots to a sequence, of which 17 are full."""
    batch, tokens, _ = x.shape
    shape = (3 * batch, blocks, 2, G, 16)
    arena = torch.zeros(*shape, D, dtype=torch.int8 if int8 else torch.float32)
    scales = torch.zeros(shape, dtype=torch.float16) if int8 else None
    table = torch.arange(3 * batch, dtype=torch.int32).view(batch, 3)
    lengths = torch.full((batch,), 17, dtype=torch.int32)
    starts = torch.arange(batch, dtype=torch.int32)
    shift = torch.randn(blocks, G, D) if int8 else None
    pages = arena, scales, shift
    return (x, *block(blocks), *angles(tokens, batch), *pages, table, lengths, starts)


def normed(arguments: tuple, kind: int) -> tuple:
    """Those of :func:`step` with a norm after the blocks: 1 RMS, 2 layer norm with a bias."""
    x, weights, *rest = arguments
    norm = [heavy_tailed(x.shape[2], seed=7 + i) for i in range(kind)]
    return (x, [*weights, *norm], *rest, kind, 1e-5)
