"""WHAT is stored: the forms that a weight ``[..., N, K]`` can take, in one registry.

A form stores a weight as ``weight`` and, if it has scales, ``weight_scale``; how the scales are
chosen is not its business. Everything that depends on the form goes through its :class:`Format`:
modules, plans, files. Adding one is one ``register`` here.
"""

import math
from dataclasses import dataclass
from itertools import product
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from gpu_poor import ops

Storage = tuple[tuple[int, ...], torch.dtype]


class Format(Protocol):
    """How a weight ``[..., N, K]`` is stored and used. Leading dimensions are those of experts."""

    name: str
    #: Of a weight, without what belongs to its groups.
    bits: int
    #: Whether what is stored as the scale may be negative: grids have one value more on one side,
    #: and minima are stored there too.
    signed: bool
    #: The integers of a weight; None where it is stored as floats, which leave nothing to choose.
    levels: tuple[int, int] | None
    #: Columns that share a scale; None: the whole row.
    group: int | None
    #: Whether a scale has a minimum beside it, which stands for the integer 0.
    asymmetric: bool

    def storage(self, *shape: int) -> tuple[Storage, Storage | None]:
        """Shape and dtype of the stored weight and of its scale, for a weight ``[..., N, K]``.

        None in place of the scale says that there is none; then it is None everywhere below too.
        """

    def quantize(self, rows: Tensor) -> tuple[Tensor, Tensor | None]:
        """The stored weight and scale of contiguous float rows ``[..., N, K]``.

        What is not finite in the rows, or out of range, is not finite in the scale, or, where
        there is none, in the weight. The weight may be the rows themselves.
        """

    def encode(self, levels: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
        """The stored weight and scale of numbers chosen elsewhere; not where ``levels`` is None.

        Args:
            levels: of an integer dtype, ``[N, K]``, within :attr:`levels`.
            scale: float32 ``[N, groups, 1 or 2]``: scales, and minima if asymmetric.
        """

    def dequantize(self, weight: Tensor, scale: Tensor | None, shape, dtype: torch.dtype) -> Tensor:
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


def tensors(form: Format, name: str, shape: tuple[int, ...]) -> dict[str, Storage]:
    """``{tensor name: shape and dtype}`` of what stores the weight ``name``, ``[..., N, K]``."""
    stored = zip((name, f"{name}_scale"), form.storage(*shape), strict=True)
    return {key: storage for key, storage in stored if storage is not None}


def stored_bytes(form: Format, *shape: int) -> int:
    """Bytes of a weight ``[..., N, K]``: padding and scales included."""
    stored = tensors(form, "weight", shape).values()
    return sum(math.prod(sizes) * dtype.itemsize for sizes, dtype in stored)


@dataclass(frozen=True)
class Int8:
    """int8 ``[..., N, K]`` with a float32 scale for each row; asymmetric: and an offset."""

    name: str = "int8"
    asymmetric: bool = False
    bits: int = 8
    group: None = None

    @property
    def levels(self) -> tuple[int, int]:
        return (-128, 127) if self.asymmetric else (-127, 127)

    @property
    def signed(self) -> bool:
        return self.asymmetric  # its offsets

    def storage(self, *shape: int) -> tuple[Storage, Storage]:
        *leading, n, _ = shape
        scale = (*leading, 2, n) if self.asymmetric else (*leading, n)
        return (tuple(shape), torch.int8), (scale, torch.float32)

    def quantize(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        return ops.int8_quantize(rows, self.asymmetric)

    def encode(self, levels: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
        scale = scale[:, 0].t() if self.asymmetric else scale[:, 0, 0]
        return levels.to(torch.int8).contiguous(), scale.contiguous()

    def dequantize(self, weight: Tensor, scale: Tensor, shape, dtype: torch.dtype) -> Tensor:
        return ops.int8_dequantize(weight, scale, dtype)

    def linear(self, x, weight, scale, bias, n: int, activation_bits: int) -> Tensor:
        return ops.int8_linear(x, weight, scale, bias, activation_bits)

    def embedding(self, indices, weight, scale, shape, dtype: torch.dtype) -> Tensor:
        return ops.int8_embedding(indices, weight, scale, dtype)


@dataclass(frozen=True)
class Grouped:
    """4 or 8 bits in groups of columns, in panels (gpu_poor/ops/grouped.py), with float16 scales.

    Args:
        group: columns that share a scale: 32, 64, 96 or 128.
        asymmetric: a group has a minimum too.
    """

    name: str
    bits: int
    group: int
    asymmetric: bool
    signed: bool = True

    @property
    def levels(self) -> tuple[int, int]:
        lowest = 0 if self.asymmetric else -(2 ** (self.bits - 1))
        return lowest, lowest + 2**self.bits - 1

    def storage(self, *shape: int) -> tuple[Storage, Storage]:
        *leading, n, k = shape
        weight, scale = ops.grouped_shapes(n, k, self.bits, self.group, self.asymmetric)
        return ((*leading, *weight), torch.int8), ((*leading, *scale), torch.float16)

    def quantize(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        if rows.dim() == 2:
            return ops.grouped_quantize(rows, self.group, self.asymmetric, bits=self.bits)
        pairs = [self.quantize(matrix) for matrix in rows]
        return tuple(torch.stack(part) for part in zip(*pairs, strict=True))

    def encode(self, levels: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
        q = (levels - self.levels[0]).to(torch.uint8)
        minimum = scale[..., 1].half() if self.asymmetric else None
        return ops.grouped_pack(q, scale[..., 0].half(), minimum, self.bits)

    def rescale(self, scale: Tensor, factors: Tensor) -> Tensor:
        """The stored scales once row n of the weight is multiplied by factor n, ``[N]``."""
        per_row = F.pad(factors, (0, -len(factors) % 16), value=1.0).view(-1, 1, 1, 16)
        return (scale.float() * per_row).half()

    def dequantize(self, weight: Tensor, scale: Tensor, shape, dtype: torch.dtype) -> Tensor:
        if len(shape) == 2:
            return ops.grouped_dequantize(weight, scale, self.group, *shape, dtype)
        each = zip(weight, scale, strict=True)
        return torch.stack([self.dequantize(w, s, shape[1:], dtype) for w, s in each])

    def linear(self, x, weight, scale, bias, n: int, activation_bits: int) -> Tensor:
        return ops.grouped_linear(x, weight, scale, bias, self.group, n, activation_bits)

    def embedding(self, indices, weight, scale, shape, dtype: torch.dtype) -> Tensor:
        return ops.grouped_embedding(indices, weight, scale, self.group, *shape, dtype)


@dataclass(frozen=True)
class Half:
    """16-bit floats as they are: no scales, and float activations whatever the mode."""

    name: str
    dtype: torch.dtype
    bits: int = 16
    signed: bool = False
    levels: None = None
    group: None = None
    asymmetric: bool = False

    def storage(self, *shape: int) -> tuple[Storage, None]:
        return (tuple(shape), self.dtype), None

    def quantize(self, rows: Tensor) -> tuple[Tensor, None]:
        return rows.to(self.dtype), None

    def dequantize(self, weight: Tensor, scale: None, shape, dtype: torch.dtype) -> Tensor:
        return weight.to(dtype)

    def linear(self, x, weight, scale, bias, n: int, activation_bits: int) -> Tensor:
        return ops.half_linear(x, weight, bias)

    def embedding(self, indices, weight, scale, shape, dtype: torch.dtype) -> Tensor:
        return F.embedding(indices, weight).to(dtype)


INT8 = register(Int8())
register(Int8("int8_asym", asymmetric=True))
for _bits, _group in product((4, 8), (32, 64, 128)):
    register(Grouped(f"int{_bits}_g{_group}", _bits, _group, asymmetric=False))
    register(Grouped(f"int{_bits}_g{_group}_asym", _bits, _group, asymmetric=True))
register(Half("bf16", torch.bfloat16))
register(Half("fp16", torch.float16))

#: ``{bits: (format of a matrix, format where few bits cost most)}``; the latter is the head, whose
#: four bits made the KL divergence a quarter to four times larger (docs/kernels.md).
DEFAULTS = {16: ("bf16", "bf16"), 8: ("int8", "int8"), 4: ("int4_g64_asym", "int8")}
#: What an override says of a module that is to stay as it is.
FLOAT = (32, "fp32")


def default(bits: int, sensitive: bool) -> Format:
    """What ``bits`` stands for."""
    return FORMATS[DEFAULTS[bits][sensitive]]


def named(wanted: int | str) -> Format | None:
    """What an override means by bits or a name; None: stay in float."""
    if wanted in FLOAT:
        return None
    return FORMATS[wanted] if isinstance(wanted, str) else default(wanted, sensitive=False)
