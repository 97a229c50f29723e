"""Weights as others store them, integers on a grid, and what they become here.

A format of ours takes a grid as it is where it can: the same integers, the same scales. Where it
cannot, the values are quantized again. Which of the two it was is measured on every weight, not
concluded from the names: :class:`gpu_poor.receipt.Imported`.
"""

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from gpu_poor import formats, ops
from gpu_poor.formats import Format
from gpu_poor.nn.base import Stored, empty, quantize_rows
from gpu_poor.receipt import Imported

#: Elements that are float at one time, whatever the size of the weight.
CHUNK = 1 << 18
#: Chunks begin at multiples of this many rows, so that panels stay whole.
ROWS = 16


class Grid(NamedTuple):
    """``w = scale * (q - zero)``, or ``scale * q + minimum``, of a weight ``[N, K]``.

    Args:
        q: uint8 ``[N, K]``.
        scale: float ``[N, ceil(K / group)]``.
        zero: an integer, or int16 of scale's shape.
        minimum: float of scale's shape, or None; zero is 0 then.
        group: columns that share a scale; K or more for all of a row.
        bits: of q.
    """

    q: Tensor
    scale: Tensor
    zero: int | Tensor
    minimum: Tensor | None
    group: int
    bits: int

    @property
    def shape(self) -> tuple[int, int]:
        return tuple(self.q.shape)

    def rows(self, which: slice | Tensor) -> "Grid":
        """Some of its rows: a slice, or their numbers in any order."""
        parts = (part[which] if isinstance(part, Tensor) else part for part in self[:4])
        return Grid(*parts, *self[4:])

    def values(self) -> Tensor:
        """float32 ``[N, K]``: what its author means, rounded once or not at all."""
        if self.minimum is not None:
            return self.q.float().mul_(self._spread(self.scale)).add_(self._spread(self.minimum))
        zero = self.zero if isinstance(self.zero, int) else self._spread(self.zero)
        return (self.q.short() - zero).float().mul_(self._spread(self.scale))

    def _spread(self, groups: Tensor) -> Tensor:
        """One number for each column instead of each group."""
        groups = groups if groups.dtype == torch.int16 else groups.float()
        return groups.repeat_interleave(min(self.group, self.q.shape[1]), 1)[:, : self.q.shape[1]]


def symmetric(zero: Tensor) -> int | Tensor:
    """Zero points ``[N, groups]`` as one integer if they are all the same."""
    first = int(zero.reshape(-1)[0])
    return first if bool((zero == first).all()) else zero.to(torch.int16)


def from_int8(q: Tensor, scale: Tensor, group: int) -> Grid:
    """A grid of int8 ``[N, K]`` around 0."""
    return Grid(q.contiguous().view(torch.uint8) ^ 128, scale, 128, None, group, 8)


def form_of(grid: Grid) -> Format | None:
    """The format that has the integers of a grid, or None: then it has to be quantized again."""
    whole_row = grid.group >= grid.shape[1]
    group = next((g for g in (128, 64, 32) if whole_row or grid.group % g == 0), None)
    bits = 4 if grid.bits == 4 else 8
    if grid.minimum is None and isinstance(grid.zero, int):
        middle = 1 << (bits - 1)
        if bits == 4 and grid.zero == middle or bits == 8 and _fits(grid):
            by_row = bits == 8 and whole_row
            return formats.INT8 if by_row else group and formats.find(f"int{bits}_g{group}")
    if bits == 8 and whole_row:
        return formats.find("int8_asym")
    return group and formats.find(f"int{bits}_g{group}_asym")


def _fits(grid: Grid) -> bool:
    """Whether q - zero is an int8, whatever q."""
    return grid.zero <= 128 and (1 << grid.bits) - 1 - grid.zero <= 127


def take(grid: Grid, form: Format) -> Stored:
    """A grid in the format that :func:`form_of` names: the same integers."""
    if form is formats.INT8:
        weight = (grid.q.short() - grid.zero).to(torch.int8)
        return Stored(weight, grid.scale[:, 0].float().contiguous(), form, grid.shape)
    if isinstance(form, formats.Int8):  # scale and offset of rows, in float32
        scale, offset = grid.scale.float(), 128 - grid.zero
        offset = scale * offset if grid.minimum is None else scale * 128 + grid.minimum
        rows = torch.stack((scale[:, 0], offset[:, 0]))
        return Stored((grid.q ^ 128).view(torch.int8), rows, form, grid.shape)
    # A scale for each of our groups: theirs are as long, or multiples.
    groups = -(-grid.shape[1] // form.group)
    times = groups if grid.group >= grid.shape[1] else grid.group // form.group

    def ours(theirs: Tensor) -> Tensor:
        return theirs.repeat_interleave(times, 1)[:, :groups].half()

    q, minimum = grid.q, None
    if form.asymmetric:
        minimum = grid.scale.float() * -grid.zero if grid.minimum is None else grid.minimum
        minimum = ours(minimum)
    elif form.bits == 8 and grid.zero != 128:
        q = q + (128 - grid.zero)
    pair = ops.grouped_pack(q, ours(grid.scale), minimum, form.bits)
    return Stored(*pair, form, grid.shape)


def store(name: str, source: str, weight: Grid | Tensor, form: Format | None) -> tuple:
    """Store one weight, and compare what is stored with what its author means.

    Args:
        name, source: for the record, and for errors.
        weight: a grid, or float ``[N, K]``.
        form: quantize again, to this format; None takes the grid as it is.

    Returns:
        :class:`Stored` and :class:`Imported`.

    Raises:
        ValueError: a value is not finite, or no float16 scale reaches it.
    """
    taken = form is None
    form = form_of(weight) if taken else form
    n, k = weight.shape
    stored = empty(form, (n, k), "cpu")
    largest = square = total = 0.0
    equal = True
    for rows in _chunks(n, k):
        part = weight.rows(rows) if isinstance(weight, Grid) else weight[rows]
        values = part.values() if isinstance(part, Grid) else part.float()
        ours = take(part, form) if taken else quantize_rows(values.contiguous(), form)
        if not (bool(torch.isfinite(values).all()) and ours.is_finite()):
            raise ValueError(f"{name} is not finite: it holds a NaN, an infinity or a huge value")
        _put(stored, ours, rows.start)
        difference = form.dequantize(ours.weight, ours.scale, ours.shape, torch.float32)
        difference -= values
        equal = equal and not bool(difference.any())
        largest = max(largest, float(difference.abs().max()))
        square += float(difference.square().sum(dtype=torch.float64))
        total += float(values.square().sum(dtype=torch.float64))
    how = "exact" if equal else "rounded" if taken else "re-quantized"
    relative = (square / total) ** 0.5 if total else 0.0
    return stored, Imported(name, source, form.name, how, largest, relative)


def _put(stored: Stored, part: Stored, start: int) -> None:
    """Copy some rows to their place: from row ``start`` on, or from its panel."""
    n = stored.shape[0]
    at = start if len(stored.weight) == n else start // ROWS
    stored.weight[at : at + len(part.weight)] = part.weight
    if stored.scale is not None:  # int8 has its rows in the last dimension, panels are the first
        dim = -1 if isinstance(stored.form, formats.Int8) else 0
        stored.scale.narrow(dim, at, part.scale.shape[dim]).copy_(part.scale)


def _chunks(n: int, k: int) -> Iterator[slice]:
    step = max(1, CHUNK // max(1, k) // ROWS) * ROWS
    return (slice(start, min(start + step, n)) for start in range(0, n, step))


# -- integers of others, unpacked --------------------------------------------------------------


def nibbles(packed: Tensor) -> Tensor:
    """uint8 ``[..., 8 C]`` of int32 ``[..., C]``, the lowest four bits first."""
    data = packed.contiguous().view(torch.uint8)
    return torch.stack((data & 15, data >> 4), -1).flatten(-2)


def unpack(packed: Tensor, bits: int) -> Tensor:
    """uint8 ``[..., C * 32 / bits]`` of int32 ``[..., C]``; bits: 4 or 8."""
    return nibbles(packed) if bits == 4 else packed.contiguous().view(torch.uint8)
