"""``from_pretrained`` with data: to calibrate on, or to measure the quality on.

Both need the float model, which may be larger than memory. transformers loads it as it loads any,
and its weights stay in their files; those that it has to convert, from another dtype or from single
experts, go into temporary ones. Then :func:`gpu_poor.quantize` reads them block by block.
"""

import os
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn
from transformers.core_model_loading import ConversionOps

from gpu_poor import memory
from gpu_poor.metrics_input import Text
from gpu_poor.quantize import check_data, quantize
from gpu_poor.samples import SampleInputs
from gpu_poor.spill import temporary_folder

#: Smaller weights stay in memory.
SMALL = 2**20


@dataclass
class Data:
    """What :func:`gpu_poor.quantize` looks at beside the model; never saved with it."""

    sample_inputs: SampleInputs | None = None
    tokenizer: Callable | None = None
    work_folder: str | Path | None = None
    evaluate_on: Text | None = None
    max_kl: float | None = None

    def __bool__(self) -> bool:
        return any(value is not None for value in vars(self).values())

    def __deepcopy__(self, memo: dict) -> "Data":
        return self  # an iterator has no copy, and a config is copied often


def check(config) -> None:
    """Raise ValueError unless a :class:`gpu_poor.GpuPoorConfig` has the data that it needs."""
    data = config.data
    check_data(config.strategy, data.sample_inputs, data.work_folder, data.evaluate_on, data.max_kl)


def quantize_loaded(model: nn.Module, config) -> None:
    """Quantize a float model that transformers has loaded, as a config says.

    Raises:
        ValueError: a weight was not in the checkpoint, or what :func:`gpu_poor.quantize` raises.
    """
    # transformers marks what it has loaded or tied, and makes up the rest.
    marked = {n: hasattr(p, "_is_hf_initialized") for n, p in model.named_parameters()}
    if any(marked.values()) and not all(marked.values()):
        name = next(name for name, loaded in marked.items() if not loaded)
        raise ValueError(f"{name} was not in the checkpoint")
    quantize(
        model,
        config.bits,
        overrides=config.overrides,
        strategy=config.strategy,
        **{name: getattr(config.data, name) for name in Data.__dataclass_fields__},
        include=config.include,
        exclude=config.exclude,
        activation=config.activation,
        critical_layers=config.critical_layers,
        allow_partial=config.allow_partial,
        verbose=False,
    )


def is_parameter(model: nn.Module, name: str) -> bool:
    """Whether a name of a checkpoint is that of a parameter, and not of a buffer."""
    try:
        model.get_parameter(name)
    except AttributeError:
        return False
    return True


class ToFile(ConversionOps):
    """Puts what transformers had to convert into temporary files."""

    def convert(self, input_dict, *args, full_layer_name=None, model=None, **kwargs):
        output = {}
        for name, value in input_dict.items():
            value = value[0] if isinstance(value, list) else value
            wanted = model.get_parameter(full_layer_name if len(input_dict) == 1 else name).dtype
            output[name] = to_file(value.to(wanted))
        return output


def to_file(tensor: Tensor) -> Tensor:
    """The same numbers in a temporary file of no name, mapped as a checkpoint is.

    A tensor that is in a file already, or small, is returned as it is; so is any on other systems
    than Linux.
    """
    if not sys.platform.startswith("linux") or tensor.nbytes < SMALL or memory.is_in_file(tensor):
        return tensor
    handle, path = tempfile.mkstemp(dir=temporary_folder())
    try:
        with open(handle, "wb") as file:
            file.write(memoryview(tensor.contiguous().view(-1).view(torch.uint8).numpy()))
        mapped = torch.from_file(path, shared=False, size=tensor.numel(), dtype=tensor.dtype)
    finally:
        os.unlink(path)  # the pages stay as long as they are mapped
    return mapped.view(tensor.shape)
