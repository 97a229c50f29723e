"""Quantizing while transformers loads: what is done to each tensor it reads from a checkpoint.

transformers reads one target tensor at a time, so the float weight of one is all that is ever in
memory, next to the int8 ones so far. Experts come one by one from the files: transformers would
merge a layer's into one tensor, three times over; :func:`merge_later` has them quantized apart.
"""

import math
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from transformers.core_model_loading import Concatenate, ConversionOps, MergeModulelist

from gpu_poor import memory
from gpu_poor.folds import Decided
from gpu_poor.formats import Format
from gpu_poor.modules import not_finite
from gpu_poor.nn import QuantizedModule
from gpu_poor.nn.base import Stored, empty, quantize_rows
from gpu_poor.strategies import Recipe, recipe

#: Give freed memory back each time this many bytes of float weights have been quantized.
TRIM_BYTES = 1 << 29


def is_quantized_weight(model: nn.Module, name: str) -> bool:
    """Whether a parameter name is that of a quantized weight."""
    module_name, _, leaf = name.rpartition(".")
    try:
        module = model.get_submodule(module_name)
    except AttributeError:
        return False
    return isinstance(module, QuantizedModule) and leaf in module.weight_names


@dataclass
class Incoming:
    """What one load has brought so far."""

    #: How weights are rounded, and which of them are smoothed.
    how: Recipe = field(default_factory=lambda: recipe(None, calibrated=False))
    decided: Decided = field(default_factory=Decided)
    #: Scales of the weights that can be tied, by module name.
    scales: dict[str, Tensor] = field(default_factory=dict)
    #: Raised after loading: transformers would only log what is raised in between.
    errors: list[ValueError] = field(default_factory=list)
    bytes_since_trim: int = 0

    @torch.no_grad()
    def quantize(self, model: nn.Module, full_name: str, value: Tensor | list) -> dict:
        """``{name: Parameter, name_scale: buffer}`` of one weight.

        Args:
            value: the float weight, or the pieces of fused experts: a list per projection of a
                list per expert.
        """
        module_name, _, name = full_name.rpartition(".")
        module = model.get_submodule(module_name)
        form, shape = module.formats[name], module.shapes[name]
        factors = self.decided.factors.get(module_name)
        if isinstance(value, list):
            stored = self._pieces(full_name, value, form, shape)
        else:
            rows = module.to_rows(module, name, value)
            stored = self._whole(full_name, rows, form, shape, factors)
            memory.drop_file_pages(value)
        if name == "weight":  # the only name that is ever tied
            self.scales[module_name] = stored.scale
        self.bytes_since_trim += 4 * math.prod(shape)
        if self.bytes_since_trim > TRIM_BYTES:
            self.bytes_since_trim = 0
            memory.trim()
        found = {full_name: nn.Parameter(stored.weight, requires_grad=False)}
        if stored.scale is not None:
            found[f"{full_name}_scale"] = stored.scale
        return found

    def _whole(
        self,
        name: str,
        rows: Tensor,
        form: Format,
        shape: tuple[int, ...],
        factors: Tensor | None = None,
    ) -> Stored:
        if tuple(rows.shape) != tuple(shape):
            self.errors.append(
                ValueError(
                    f"{name} has shape {tuple(rows.shape)} in the checkpoint, expected "
                    f"{tuple(shape)} (as rows of the quantized weight)"
                )
            )
            return _zeros(form, shape)
        stored = quantize_rows(rows, form, None, self.how.rounding, None, factors)
        if not stored.is_finite():
            self.errors.append(not_finite(name))
        return stored

    def _pieces(self, name: str, value: list, form: Format, shape: tuple[int, ...]) -> Stored:
        experts = shape[0]
        if {len(projection) for projection in value} != {experts}:
            self.errors.append(
                ValueError(
                    f"{name}: the checkpoint has {[len(p) for p in value]} experts, the model "
                    f"has {experts}"
                )
            )
            return _zeros(form, shape)
        stored = _zeros(form, shape)
        for expert in range(experts):
            pieces = [projection[expert] for projection in value]
            for projection in value:  # let go of each once it is quantized
                projection[expert] = None
            rows = torch.cat(pieces) if len(pieces) > 1 else pieces[0]
            stored.put(expert, self._whole(f"{name}[{expert}]", rows, form, shape[1:]))
            for piece in pieces:
                memory.drop_file_pages(piece)
        return stored


def _zeros(form: Format, shape: tuple[int, ...]) -> Stored:
    stored = empty(form, shape, "cpu")
    for tensor in stored[:2]:
        if tensor is not None:
            tensor.zero_()
    return stored


class Quantize(ConversionOps):
    """Float weights in, quantized ones and scales out, under transformers' names."""

    def __init__(self, incoming: Incoming):
        self.incoming = incoming

    def convert(self, input_dict, *args, full_layer_name=None, model=None, **kwargs):
        output = {}
        for name, value in input_dict.items():  # several where a fused projection was split
            name = full_layer_name if len(input_dict) == 1 else name
            if isinstance(value, list) and isinstance(value[0], Tensor):
                value = value[0]
            if is_quantized_weight(model, name):
                output |= self.incoming.quantize(model, name, value)
            else:
                output[name] = value
        return output


class MergeLater(ConversionOps):
    """Hands on the pieces of experts that will be int8; merges others as transformers does."""

    def __init__(self, operations: list[ConversionOps]):
        self.operations = operations

    def convert(self, input_dict, *args, full_layer_name=None, model=None, **kwargs):
        if is_quantized_weight(model, full_layer_name):
            sources = [s for s in kwargs["source_patterns"] if s in input_dict]
            return {kwargs["target_patterns"][0]: [input_dict.pop(s) for s in sources]}
        kwargs |= {"full_layer_name": full_layer_name, "model": model}
        for operation in self.operations:
            input_dict = operation.convert(input_dict, *args, **kwargs)
        return input_dict


def merge_later(conversions: list) -> None:
    """Replace, in place, the merging of experts ``[N, K]`` into ``[E, sum of N, K]``."""
    for conversion in conversions:
        operations = getattr(conversion, "operations", [])
        kinds = [type(operation) for operation in operations]
        dims = [getattr(operation, "dim", None) for operation in operations]
        if (kinds, dims) in (
            ([MergeModulelist], [0]),
            ([MergeModulelist, Concatenate], [0, 1]),
        ):
            conversion.operations = [MergeLater(operations)]
