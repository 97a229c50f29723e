"""GGUF's block types as grids: what each block of 32 or 256 values stores, and what it means.

A row is a whole number of blocks; d, m and dmin are float16. Source: ggml-common.h and
ggml-quants.c of ggml.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from gpu_poor.importers.grids import Grid


@dataclass(frozen=True)
class BlockType:
    """A type: values and bytes of a block, and what reads blocks ``[N * K / elements, bytes]``.

    ``near`` is the format to quantize to where the grid is none of ours; None for floats.
    """

    name: str
    elements: int
    n_bytes: int
    read: Callable[[Tensor, int, int], Grid | Tensor]
    near: str | None = None


#: By the number in files.
TYPES: dict[int, BlockType] = {}


def block_type(number: int, name: str, elements: int, n_bytes: int, near: str | None = None):
    """Decorator: a function(blocks, n, k) that reads the type."""

    def register(read):
        TYPES[number] = BlockType(name, elements, n_bytes, read, near)
        return read

    return register


def _half(blocks: Tensor, start: int) -> Tensor:
    """The float16 at a byte of every block, ``[blocks, 1]``."""
    return blocks[:, start : start + 2].contiguous().view(torch.float16)


def _split(data: Tensor) -> Tensor:
    """uint8 ``[blocks, bytes]``: all low halves, then all high halves."""
    return torch.cat((data & 15, data >> 4), 1)


def _rows(part: Tensor, n: int) -> Tensor:
    return part.reshape(n, -1)


def _floats(dtype: torch.dtype):
    def read(blocks: Tensor, n: int, k: int) -> Tensor:
        return blocks.view(-1).view(dtype).view(n, k)

    return read


block_type(0, "F32", 1, 4)(_floats(torch.float32))
block_type(1, "F16", 1, 2)(_floats(torch.float16))
block_type(30, "BF16", 1, 2)(_floats(torch.bfloat16))


@block_type(2, "Q4_0", 32, 18, "int4_g32")
def q4_0(blocks: Tensor, n: int, k: int) -> Grid:
    """d, 16 bytes: d * (q - 8)."""
    q = _split(blocks[:, 2:])
    return Grid(_rows(q, n), _rows(_half(blocks, 0), n), 8, None, 32, 4)


@block_type(3, "Q4_1", 32, 20, "int4_g32_asym")
def q4_1(blocks: Tensor, n: int, k: int) -> Grid:
    """d, m, 16 bytes: d * q + m."""
    q, d, m = _split(blocks[:, 4:]), _half(blocks, 0), _half(blocks, 2)
    return Grid(_rows(q, n), _rows(d, n), 0, _rows(m, n), 32, 4)


def _fifth_bits(data: Tensor) -> Tensor:
    """Bit i of 32 in four bytes as ``16 * bit``, uint8 ``[blocks, 32]``."""
    bits = data[:, :, None] >> torch.arange(8, dtype=torch.uint8)
    return (bits.flatten(1) & 1) << 4


@block_type(6, "Q5_0", 32, 22, "int8_g32")
def q5_0(blocks: Tensor, n: int, k: int) -> Grid:
    """d, the fifth bits, 16 bytes: d * (q - 16)."""
    q = _split(blocks[:, 6:]) | _fifth_bits(blocks[:, 2:6])
    return Grid(_rows(q, n), _rows(_half(blocks, 0), n), 16, None, 32, 5)


@block_type(7, "Q5_1", 32, 24, "int8_g32")
def q5_1(blocks: Tensor, n: int, k: int) -> Grid:
    """d, m, the fifth bits, 16 bytes: d * q + m."""
    q = _split(blocks[:, 8:]) | _fifth_bits(blocks[:, 4:8])
    d, m = _half(blocks, 0), _half(blocks, 2)
    return Grid(_rows(q, n), _rows(d, n), 0, _rows(m, n), 32, 5)


@block_type(8, "Q8_0", 32, 34, "int8_g32")
def q8_0(blocks: Tensor, n: int, k: int) -> Grid:
    """d, 32 int8: d * q."""
    q = blocks[:, 2:] ^ 128
    return Grid(_rows(q, n), _rows(_half(blocks, 0), n), 128, None, 32, 8)


def _scales(data: Tensor) -> tuple[Tensor, Tensor]:
    """Eight scales and eight minima of 6 bits in 12 bytes, as floats ``[blocks, 8]``."""
    a, b, c = data[:, 0:4], data[:, 4:8], data[:, 8:12]
    scale = torch.cat((a & 63, (c & 15) | (a >> 6 << 4)), 1)
    minimum = torch.cat((b & 63, (c >> 4) | (b >> 6 << 4)), 1)
    return scale.float(), minimum.float()


def _super(blocks: Tensor, q: Tensor, n: int, bits: int) -> Grid:
    """d, dmin, 12 bytes of scales: d * scale * q - dmin * minimum, in groups of 32."""
    scale, minimum = _scales(blocks[:, 4:16])
    scale *= _half(blocks, 0).float()
    minimum *= -_half(blocks, 2).float()
    return Grid(_rows(q, n), _rows(scale, n), 0, _rows(minimum, n), 32, bits)


@block_type(12, "Q4_K", 256, 144, "int4_g32_asym")
def q4_k(blocks: Tensor, n: int, k: int) -> Grid:
    """128 bytes: of each 32, first all low halves, then all high ones."""
    data = blocks[:, 16:].unflatten(1, (4, 1, 32))
    return _super(blocks, torch.cat((data & 15, data >> 4), 2), n, 4)


@block_type(13, "Q5_K", 256, 176, "int8_g32")
def q5_k(blocks: Tensor, n: int, k: int) -> Grid:
    """As Q4_K; bit g of 32 bytes more is the fifth one of group g."""
    data = blocks[:, 48:].unflatten(1, (4, 1, 32))
    q = torch.cat((data & 15, data >> 4), 2).view(-1, 8, 32)
    fifth = blocks[:, None, 16:48] >> torch.arange(8, dtype=torch.uint8)[:, None]
    return _super(blocks, q | (fifth & 1) << 4, n, 5)


@block_type(14, "Q6_K", 256, 210, "int8_g32")
def q6_k(blocks: Tensor, n: int, k: int) -> Grid:
    """128 bytes of low halves, 64 of high pairs, 16 int8 scales, d: d * scale * (q - 32)."""
    low = blocks[:, :128].unflatten(1, (2, 1, 64))
    low = torch.cat((low & 15, low >> 4), 2).view(-1, 2, 4, 32)
    shifts = torch.arange(0, 8, 2, dtype=torch.uint8)[:, None]
    high = blocks[:, 128:192].unflatten(1, (2, 1, 32)) >> shifts
    q = low | (high & 3) << 4
    scale = blocks[:, 192:208].contiguous().view(torch.int8).float() * _half(blocks, 208).float()
    return Grid(_rows(q, n), _rows(scale, n), 32, None, 16, 6)
