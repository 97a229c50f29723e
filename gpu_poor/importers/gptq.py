"""GPTQ checkpoints (AutoGPTQ, GPTQModel): ``w = scale * (q - zero)`` in groups of columns.

    qweight  int32   [K * bits / 32, N]       of K, the lowest bits first
    qzeros   int32   [groups, N * bits / 32]  zero, or zero - 1: checkpoint_format
    scales   float16 [groups, N]
    g_idx    int32   [K]                      the group of each column

checkpoint_format is "gptq_v2" for zero, "gptq" for zero - 1. Symmetric 4-bit ones have zero = 8
throughout and are ``int4_g*`` exactly. Others get the minimum ``-zero * scale``, which float16
rounds. With act-order (desc_act) neighbouring columns are of different groups: no format of ours
has that, and a permutation of the inputs before each such layer would cost every token a gather
and forbid one shared quantization of the activations for q, k and v. So these are refused, unless
the caller asks for their values to be quantized again.
"""

import torch
from torch import Tensor

from gpu_poor.importers.base import FolderSource, Piece, register
from gpu_poor.importers.grids import Grid, symmetric, unpack
from gpu_poor.ops import FLOATS


@register
class Gptq(FolderSource):
    """Folders with quant_method "gptq", of 4 or 8 bits."""

    name = "gptq"

    def check_settings(self) -> None:
        self.bits = self.setting("bits", (4, 8))
        fallback = self.settings.get("format", "gptq")
        self.format = self.setting("checkpoint_format", ("gptq", "gptq_v2"), fallback)
        self.setting("pack_dtype", ("int32",), "int32")
        if self.settings.get("dynamic"):
            raise self.error("dynamic: bits that differ by module are not supported")
        self.group = self.columns_setting("group_size", -1)

    def is_packed(self, module: str) -> bool:
        return f"{module}.qweight" in self.tensors

    def unpack(self, module: str, n: int, k: int) -> Piece:
        per_word = 32 // self.bits
        group = k if self.group == -1 else self.group
        groups = -(-k // group)
        if n % per_word or k % per_word:
            raise self.error(f"{module}: {n} x {k} is no multiple of {per_word}")
        take = self.tensors.take
        q = unpack(take(f"{module}.qweight", torch.int32, (k // per_word, n)), self.bits)
        q = q.view(k // per_word, n, per_word).permute(1, 0, 2).reshape(n, k)
        zeros = take(f"{module}.qzeros", torch.int32, (groups, n // per_word))
        zeros = unpack(zeros, self.bits).t()
        if self.format == "gptq":  # the sum wraps, as in the kernels that these are made for
            zeros = (zeros + 1) & (2**self.bits - 1)
        scales = take(f"{module}.scales", FLOATS, (groups, n)).t().contiguous()
        source = f"gptq {self.bits} bit, group {self.group}"
        grid = Grid(q, scales, symmetric(zeros), None, group, self.bits)
        near = "int4_g64_asym" if self.bits == 4 else "int8"
        if f"{module}.g_idx" in self.tensors:
            order = take(f"{module}.g_idx", torch.int32, (k,))
            if not torch.equal(order, torch.arange(k, dtype=torch.int32) // group):
                values = self._ordered(module, grid, order, groups)
                return Piece(values, f"{source}, act-order", near, "it is in act-order (desc_act)")
        return Piece(grid, source, near)

    def _ordered(self, module: str, grid: Grid, order: Tensor, groups: int) -> Tensor:
        """The values where column k is of group order[k]."""
        if int(order.min()) < 0 or int(order.max()) >= groups:
            raise self.error(f"{module}.g_idx: a group outside of [0, {groups})")
        order = order.long()
        zero = grid.zero if isinstance(grid.zero, int) else grid.zero[:, order]
        return (grid.q.short() - zero).float().mul_(grid.scale.float()[:, order])
