"""compressed-tensors checkpoints (llm-compressor) of integer weights.

    pack-quantized  weight_packed      int32 [N, ceil(K * bits / 32)]   q + 2^(bits - 1)
                    weight_shape       int64 [2]                        N, K
                    weight_scale       float [N, 1] or [N, groups]
                    weight_zero_point  int32, packed along N; asymmetric ones only
    int-quantized   weight             int8  [N, K]
                    weight_scale       float [N, 1], [N] or [N, groups], or one number
                    weight_zero_point  int8 of its shape; asymmetric ones only

``w = scale * (q - zero)``. What the config says of activations is left aside: ours are quantized
token by token when they come (docs/kernels.md). Which modules are packed is seen by their tensors:
patterns in the config are not run.
"""

import torch
from torch import Tensor

from gpu_poor.importers.base import FolderSource, Piece, register
from gpu_poor.importers.grids import Grid, symmetric, unpack
from gpu_poor.ops import FLOATS

FORMATS = ("pack-quantized", "int-quantized", "naive-quantized")


@register
class CompressedTensors(FolderSource):
    """Folders with quant_method "compressed-tensors" and int weights of 4 or 8 bits."""

    name = "compressed-tensors"

    def check_settings(self) -> None:
        for key in ("sparsity_config", "transform_config", "kv_cache_scheme"):
            value = self.settings.get(key)
            if value and not (key == "sparsity_config" and value.get("format") == "dense"):
                raise self.error(f"{key} is not supported")
        groups = self.settings.get("config_groups")
        if not isinstance(groups, dict) or not groups:
            raise self.error("config_groups must map names to schemes")
        self.bits = set()
        for name, scheme in groups.items():
            weights = scheme.get("weights") if isinstance(scheme, dict) else None
            if not isinstance(weights, dict):
                raise self.error(f"config_groups.{name} has no weights")
            form = scheme.get("format") or self.settings.get("format")
            if form not in FORMATS:
                raise self.error(f"config_groups.{name}: format {form!r}; known: {FORMATS}")
            what = (weights.get("num_bits"), str(weights.get("type", "int")).lower())
            if what not in ((4, "int"), (8, "int")):
                raise self.error(f"config_groups.{name}: weights of {what[0]} bits, {what[1]}")
            if weights.get("strategy") not in ("group", "channel", "tensor"):
                raise self.error(f"config_groups.{name}: strategy {weights.get('strategy')!r}")
            self.bits.add(what[0])

    def is_packed(self, module: str) -> bool:
        return f"{module}.weight_packed" in self.tensors or f"{module}.weight_scale" in self.tensors

    def unpack(self, module: str, n: int, k: int) -> Piece:
        if f"{module}.weight_g_idx" in self.tensors:
            raise self.error(f"{module}: act-order (weight_g_idx) is not supported")
        for leaf in ("input_scale", "input_zero_point", "output_scale"):  # of activations
            self.tensors.taken.add(f"{module}.{leaf}")
        packed = f"{module}.weight_packed"
        if packed in self.tensors:
            bits = self._bits(packed, k)
            shape = self.tensors.take(f"{module}.weight_shape", torch.int64, (2,)).tolist()
            if shape != [n, k]:
                raise self.error(f"{module}.weight_shape is {shape}, expected {[n, k]}")
            q = self.tensors.take(packed, torch.int32, (n, -(-k * bits // 32)))
            q = unpack(q, bits)[:, :k].contiguous()
        else:
            bits = 8
            q = self.tensors.take(f"{module}.weight", torch.int8, (n, k)).view(torch.uint8) ^ 128
        scale = self._scale(module, n, k)
        groups = scale.shape[1]
        group = -(-k // groups)
        if groups > 1 and k % groups:
            raise self.error(f"{module}: {groups} groups of {k} columns: which is the short one?")
        zero = self._zero(module, n, groups, bits, packed in self.tensors)
        near = "int4_g64_asym" if bits == 4 else "int8"
        what = "channel" if groups == 1 else f"group {group}"
        source = f"compressed-tensors {bits} bit, {what}"
        return Piece(Grid(q, scale, zero, None, group, bits), source, near)

    def _bits(self, packed: str, k: int) -> int:
        """Of a packed weight, by its width; the config has groups of modules for it."""
        columns = self.tensors.shape(packed)[-1]
        found = [bits for bits in sorted(self.bits) if columns == -(-k * bits // 32)]
        if len(found) != 1:
            shape = list(self.tensors.shape(packed))
            raise self.error(f"{packed} is {shape}: no {sorted(self.bits)} bits for {k} columns")
        return found[0]

    def _scale(self, module: str, n: int, k: int) -> Tensor:
        """``[N, groups]``."""
        name = f"{module}.weight_scale"
        shape = self.tensors.shape(name) if name in self.tensors else ()
        if shape in ((), (1,)):  # one for all
            return self.tensors.take(name, FLOATS, shape).reshape(1, 1).expand(n, 1).contiguous()
        if shape == (n,):
            return self.tensors.take(name, FLOATS, (n,))[:, None]
        scale = self.tensors.take(name, FLOATS, (n, None))
        if not 1 <= scale.shape[1] <= k:
            raise self.error(f"{name}: {scale.shape[1]} groups of {k} columns")
        return scale

    def _zero(self, module: str, n: int, groups: int, bits: int, packed: bool) -> int | Tensor:
        """In terms of the unsigned q."""
        middle, name = 1 << (bits - 1), f"{module}.weight_zero_point"
        if name not in self.tensors:
            return middle
        if self.tensors.dtype(name) == torch.int32 and packed:
            zero = self.tensors.take(name, torch.int32, (-(-n * bits // 32), groups))
            return symmetric(unpack(zero.t(), bits)[:, :n].t())
        shape = self.tensors.shape(name)
        zero = self.tensors.take(name, (torch.int8, torch.int32, torch.int64), shape)
        if zero.numel() not in (1, n * groups):
            raise self.error(f"{name} is {list(shape)}, expected {[n, groups]}")
        zero = zero.reshape(-1, 1 if zero.numel() == 1 else groups).expand(n, groups)
        return symmetric(zero.to(torch.int16) + middle)
