"""bitsandbytes checkpoints: LLM.int8, and 4 bits in blocks (nf4, fp4).

    int8  weight        int8    [N, K]
          SCB           float32 [N]            w = q * SCB / 127
          weight_format uint8   []             0: rows
    4 bit weight        uint8   [N * K / 2, 1] two values to a byte, the first one in the high half
          weight.absmax         float32 [blocks], or uint8 where it is quantized itself
          weight.quant_map      float32 [16]   the codebook
          weight.nested_absmax, weight.nested_quant_map float32 [blocks of blocks], [256]
          weight.quant_state.bitsandbytes__nf4  uint8, the bytes of a JSON object

int8 is taken as it is. A codebook is no grid: 4-bit values are quantized again, to int4 groups by
default. Blocks run over the flat weight, as the file says; nothing is assumed of rows.
"""

import json

import torch
from torch import Tensor

from gpu_poor.importers.base import FolderSource, Piece, register
from gpu_poor.importers.grids import from_int8

STATE = "quant_state.bitsandbytes__"
#: float32 of 1 / 127, what bitsandbytes multiplies with.
INVERSE_127 = 7.874015718698502e-3


@register
class BitsAndBytes(FolderSource):
    """Folders with quant_method "bitsandbytes"."""

    name = "bitsandbytes"

    def check_settings(self) -> None:
        modes = [bool(self.settings.get(f"load_in_{bits}bit")) for bits in (4, 8)]
        if sum(modes) != 1:
            raise self.error("one of load_in_4bit and load_in_8bit must be true")
        storage = self.settings.get("bnb_4bit_quant_storage", "uint8")
        if modes[0] and storage != "uint8":
            raise self.error(f"bnb_4bit_quant_storage {storage!r} is not supported, uint8 is")

    def is_packed(self, module: str) -> bool:
        return f"{module}.SCB" in self.tensors or self._state_key(module) is not None

    def _state_key(self, module: str) -> str | None:
        keys = (f"{module}.weight.{STATE}{kind}" for kind in ("nf4", "fp4"))
        return next((key for key in keys if key in self.tensors), None)

    def unpack(self, module: str, n: int, k: int) -> Piece:
        if (key := self._state_key(module)) is not None:
            return Piece(self._blocks(module, key, n, k), key[-3:], "int4_g64_asym")
        take = self.tensors.take
        q = take(f"{module}.weight", torch.int8, (n, k))
        scale = take(f"{module}.SCB", torch.float32, (n,)) * INVERSE_127
        if f"{module}.weight_format" in self.tensors:
            layout = take(f"{module}.weight_format", torch.uint8, ())
            if int(layout) != 0:
                raise self.error(f"{module}.weight_format {int(layout)}: only rows (0) are known")
        return Piece(from_int8(q, scale[:, None], k), "bitsandbytes int8", "int8")

    def _blocks(self, module: str, key: str, n: int, k: int) -> Tensor:
        """float32 ``[N, K]`` of 4-bit values with a codebook."""
        take, weight = self.tensors.take, f"{module}.weight"
        state = self._state(key)
        if state.get("shape") != [n, k]:
            raise self.error(f"{key}: shape {state.get('shape')}, expected {[n, k]}")
        size = self._block_size(key, state, "blocksize")
        data = take(weight, torch.uint8, (-(-n * k // 2), 1)).view(-1)
        codes = self._codebook(f"{weight}.quant_map", 16)
        absmax = self._absmax(weight, key, state, -(-n * k // size))
        q = torch.stack((data >> 4, data & 15), 1).view(-1)[: n * k]
        values = torch.nn.functional.pad(codes[q.int()], (0, -n * k % size))
        return values.view(-1, size).mul_(absmax[:, None]).view(-1)[: n * k].view(n, k)

    def _absmax(self, weight: str, key: str, state: dict, blocks: int) -> Tensor:
        """float32 ``[blocks]``; it may be quantized itself, in blocks with an offset."""
        take = self.tensors.take
        if f"{weight}.nested_absmax" not in self.tensors:
            return take(f"{weight}.absmax", torch.float32, (blocks,))
        size = self._block_size(key, state, "nested_blocksize")
        offset = state.get("nested_offset")
        if not isinstance(offset, float):
            raise self.error(f"{key}: nested_offset {offset!r}")
        q = take(f"{weight}.absmax", torch.uint8, (blocks,))
        codes = self._codebook(f"{weight}.nested_quant_map", 256)
        outer = take(f"{weight}.nested_absmax", torch.float32, (-(-blocks // size),))
        return codes[q.int()] * outer.repeat_interleave(size)[:blocks] + offset

    def _codebook(self, name: str, size: int) -> Tensor:
        codes = self.tensors.take(name, torch.float32, (size,))
        if not bool((codes.abs() <= 1).all()):
            raise self.error(f"{name} holds a number outside of [-1, 1]")
        return codes

    def _state(self, key: str) -> dict:
        data = self.tensors.take(key, torch.uint8, (None,))
        try:
            state = json.loads(bytes(data.tolist()))
        except ValueError as error:
            raise self.error(f"{key} is no JSON: {error}") from error
        if not isinstance(state, dict):
            raise self.error(f"{key} is no JSON object")
        return state

    def _block_size(self, key: str, state: dict, name: str) -> int:
        size = state.get(name)
        if type(size) is not int or not 16 <= size <= 1 << 16:
            raise self.error(f"{key}: {name} {size!r}")
        return size
