"""WHAT is stored: the forms that a weight ``[..., N, K]`` can take, in one registry.

A form with fewer than 16 bits stores a weight in two tensors, ``weight`` and ``weight_scale``; how
the scales are chosen is not its business. Everything that depends on the form goes through its
:class:`Format`: modules, plans, files. Adding one is one ``register`` here.
"""

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from gpu_poor import ops

Storage = tuple[tuple[int, ...], torch.dtype]


class Format(Protocol):
    """How a weight ``[..., N, K]`` is stored and used. Leading dimensions are those of experts."""

    name: str
    #: Of a weight, without what belongs to its groups.
    bits: int
    #: Whether a scale may be negative: the grid of 16 values has one more on one side.
    signed: bool
    #: The integers of a weight; None where it is stored as floats, which leave nothing to choose.
    levels: tuple[int, int] | None
    #: Columns that share a scale; None: the whole row.
    group: int | None
    #: Whether a scale has a minimum beside it, which stands for the integer 0.
    asymmetric: bool

    def storage(self, *shape: int) -> tuple[Storage, Storage]:
        """Shape and dtype of the stored weight and of its scale, for a weight ``[..., N, K]``."""

    def quantize(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        """The stored weight and scale of contiguous float rows ``[..., N, K]``."""

    def encode(self, levels: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
        """The stored weight and scale of numbers chosen elsewhere.

        Args:
            levels: int8 ``[N, K]``.
            scale: float32 ``[N, groups, 1 or 2]``: scales, and minima if asymmetric.
        """

    def dequantize(self, weight: Tensor, scale: Tensor, shape, dtype: torch.dtype) -> Tensor:
        """The weight ``[..., N, K]``."""

    def linear(self, x, weight, scale, bias, n: int, activation_bits: int) -> Tensor:
        """``x @ w.T + bias`` for a weight ``[N, K]``."""

    def embedding(self, indices, weight, scale, shape, dtype: torch.dtype) -> Tensor:
        """Rows of a weight ``[N, K]`` by index."""


FORMATS: dict[str, Format] = {}


def register(form: Format) -> Format:
    """Make a format known under its name."""
    FORMATS[form.name] = form
    return form


def find(name: str) -> Format:
    """The format of a name.

    Raises:
        ValueError: there is none.
    """
    if name not in FORMATS:
        raise ValueError(f"format must be one of {', '.join(FORMATS)}, got {name!r}")
    return FORMATS[name]


def stored_bytes(form: Format, *shape: int) -> int:
    """Bytes of a weight ``[..., N, K]``: padding and scales included."""
    total = 0
    for sizes, dtype in form.storage(*shape):
        total += torch.Size(sizes).numel() * dtype.itemsize
    return total


@dataclass(frozen=True)
class Int8:
    """int8 ``[..., N, K]`` with a float32 scale for each row."""

    name: str = "int8"
    bits: int = 8
    signed: bool = False
    levels: tuple[int, int] = (-127, 127)
    group: None = None
    asymmetric: bool = False

    def storage(self, *shape: int) -> tuple[Storage, Storage]:
        return (tuple(shape), torch.int8), (tuple(shape[:-1]), torch.float32)

    def quantize(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        return ops.int8_quantize(rows)

    def encode(self, levels: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
        return levels.contiguous(), scale[:, 0, 0].contiguous()

    def dequantize(self, weight: Tensor, scale: Tensor, shape, dtype: torch.dtype) -> Tensor:
        return ops.int8_dequantize(weight, scale, dtype)

    def linear(self, x, weight, scale, bias, n: int, activation_bits: int) -> Tensor:
        return ops.int8_linear(x, weight, scale, bias, activation_bits)

    def embedding(self, indices, weight, scale, shape, dtype: torch.dtype) -> Tensor:
        return ops.int8_embedding(indices, weight, scale, dtype)


@dataclass(frozen=True)
class Int4:
    """4 bits in groups of columns, in panels (gpu_poor/ops/int4.py), with float16 scales.

    Args:
        group: columns that share a scale: 32, 64, 96 or 128.
        asymmetric: a group has a minimum too.
    """

    name: str
    group: int
    asymmetric: bool
    bits: int = 4
    signed: bool = True

    @property
    def levels(self) -> tuple[int, int]:
        return (0, 15) if self.asymmetric else (-8, 7)

    def storage(self, *shape: int) -> tuple[Storage, Storage]:
        *leading, n, k = shape
        weight, scale = ops.int4_shapes(n, k, self.group, self.asymmetric)
        return ((*leading, *weight), torch.int8), ((*leading, *scale), torch.float16)

    def quantize(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        if rows.dim() == 2:
            return ops.int4_quantize(rows, self.group, self.asymmetric)
        pairs = [self.quantize(matrix) for matrix in rows]
        return tuple(torch.stack(part) for part in zip(*pairs, strict=True))

    def encode(self, levels: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
        return ops.int4_encode(levels, scale, self.group)

    def dequantize(self, weight: Tensor, scale: Tensor, shape, dtype: torch.dtype) -> Tensor:
        if len(shape) == 2:
            return ops.int4_dequantize(weight, scale, self.group, *shape, dtype)
        each = zip(weight, scale, strict=True)
        return torch.stack([self.dequantize(w, s, shape[1:], dtype) for w, s in each])

    def linear(self, x, weight, scale, bias, n: int, activation_bits: int) -> Tensor:
        return ops.int4_linear(x, weight, scale, bias, self.group, n, activation_bits)

    def embedding(self, indices, weight, scale, shape, dtype: torch.dtype) -> Tensor:
        return ops.int4_embedding(indices, weight, scale, self.group, *shape, dtype)


INT8 = register(Int8())
for _group in (32, 64, 128):
    register(Int4(f"int4_g{_group}", _group, asymmetric=False))
    register(Int4(f"int4_g{_group}_asym", _group, asymmetric=True))

#: ``{bits: (format of a matrix, format where few bits cost most)}``; the latter is the head, whose
#: four bits made the KL divergence a quarter to four times larger (docs/kernels.md).
DEFAULTS = {8: ("int8", "int8"), 4: ("int4_g64_asym", "int8")}


def default(bits: int, sensitive: bool) -> Format:
    """What ``bits`` stands for."""
    return FORMATS[DEFAULTS[bits][sensitive]]
