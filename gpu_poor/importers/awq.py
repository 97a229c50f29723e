"""AWQ checkpoints (AutoAWQ's "gemm"): ``w = scale * (q - zero)`` in groups of columns.

    qweight  int32   [K, N / 8]       eight rows to a word, in the order of ORDER
    qzeros   int32   [groups, N / 8]  the same
    scales   float16 [groups, N]

The minimum ``-zero * scale`` is rounded to float16; where all zeros are 8 there is none.
"""

import torch
from torch import Tensor

from gpu_poor.importers.base import FolderSource, Piece, register
from gpu_poor.importers.grids import Grid, nibbles, symmetric
from gpu_poor.ops import FLOATS

#: Row i of eight is the nibble ORDER[i] of a word.
ORDER = (0, 4, 1, 5, 2, 6, 3, 7)


@register
class Awq(FolderSource):
    """Folders with quant_method "awq", version "gemm", of 4 bits."""

    name = "awq"

    def check_settings(self) -> None:
        key = "w_bit" if "w_bit" in self.settings else "bits"
        self.setting(key, (4,))
        fallback = self.settings.get("format", "gemm")
        if str(self.settings.get("version", fallback)).lower() != "gemm":
            raise self.error(f"version {self.settings.get('version')!r} is not supported, gemm is")
        key = "q_group_size" if "q_group_size" in self.settings else "group_size"
        self.group = self.columns_setting(key, 128)

    def is_packed(self, module: str) -> bool:
        return f"{module}.qweight" in self.tensors

    def unpack(self, module: str, n: int, k: int) -> Piece:
        group = k if self.group == -1 else self.group
        groups = -(-k // group)
        if n % 8:
            raise self.error(f"{module}: {n} rows are no multiple of 8")
        take = self.tensors.take
        q = ordered(take(f"{module}.qweight", torch.int32, (k, n // 8))).t().contiguous()
        zeros = ordered(take(f"{module}.qzeros", torch.int32, (groups, n // 8))).t()
        scales = take(f"{module}.scales", FLOATS, (groups, n)).t().contiguous()
        grid = Grid(q, scales, symmetric(zeros), None, group, 4)
        return Piece(grid, f"awq 4 bit, group {self.group}", "int4_g64_asym")


def ordered(packed: Tensor) -> Tensor:
    """uint8 ``[..., 8 C]`` of int32 ``[..., C]``."""
    return nibbles(packed).unflatten(-1, (-1, 8))[..., ORDER].flatten(-2)
