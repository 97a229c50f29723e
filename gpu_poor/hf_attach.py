"""What a quantized model of transformers carries, so that ``save_pretrained`` can save it."""

import copy

import torch
from torch import nn
from transformers.configuration_utils import PreTrainedConfig
from transformers.quantizers.base import HfQuantizer

from gpu_poor.hf_config import GpuPoorConfig
from gpu_poor.hf_load import METHOD
from gpu_poor.nn import QuantizedModule
from gpu_poor.plan import formats_of, kinds_of, ties_of
from gpu_poor.receipt import Receipt


def own_configs(model: nn.Module) -> None:
    """Copy a model's configs, which another model may have been made from too."""
    memo = {}  # one copy of each config, however many modules have it or a part of it
    for module in model.modules():
        for name, value in list(vars(module).items()):
            if isinstance(value, PreTrainedConfig):
                setattr(module, name, copy.deepcopy(value, memo))


def keep_receipt(model: nn.Module, receipt: Receipt) -> None:
    """Have a model saved with its receipt."""
    model.hf_quantizer.quantization_config.receipt = receipt.saved()


def attach_quantizer(model: nn.Module, quantizer: HfQuantizer) -> None:
    """Make a quantized model one that ``save_pretrained`` knows how to save.

    Also the models inside, each with a config that has its own names: it may be saved alone.
    """
    for inner in _models(model):
        if inner is not model:
            _attach_one(inner, copy.deepcopy(quantizer))
    _attach_one(model, quantizer)  # last: the models inside may share its config


def _models(model: nn.Module) -> list[nn.Module]:
    from transformers import PreTrainedModel  # its module is what imports this one

    return [module for module in model.modules() if isinstance(module, PreTrainedModel)]


def _attach_one(model: nn.Module, quantizer: HfQuantizer) -> None:
    config = quantizer.quantization_config
    describe(model, config)
    model.config.quantization_config = config if config.modules else None
    model.hf_quantizer = quantizer
    model.quantization_method = METHOD
    # Only a bar to .half() and .float() in transformers, and ours take both.
    model.is_quantized = False
    # Tensors are saved under their names in the model: splitting fused experts into one file
    # entry per expert would double the memory of a load, which has to merge them again.
    model._weight_conversions = []
    model.resize_token_embeddings = refuse_resize
    _tell_dtype(model)


#: The name of an :class:`EmptyFloat` in a model.
FLOAT = "gpu_poor_float"


def _tell_dtype(model: nn.Module) -> None:
    """See that the first float parameter of a model, which ``model.dtype`` is taken from, is right.

    It may be a 16-bit weight, or there may be none: OLMo's norms and linears have no others.
    """
    quantized = [m for m in model.modules() if isinstance(m, QuantizedModule)]
    weights = {id(getattr(m, name)) for m in quantized for name in m.weight_names}
    first = next((p for p in model.parameters() if p.is_floating_point()), None)
    if quantized and (first is None or id(first) in weights):
        device = getattr(quantized[0], quantized[0].weight_names[0]).device
        children = dict(model._modules)
        model._modules.clear()
        model.add_module(FLOAT, EmptyFloat(quantized[0].dtype, device))
        model._modules.update(children)


class EmptyFloat(nn.Module):
    """A float parameter without elements, that a model has its dtype from. In no state_dict."""

    def __init__(self, dtype: torch.dtype, device: torch.device):
        super().__init__()
        empty = torch.empty(0, dtype=dtype, device=device)
        self.empty = nn.Parameter(empty, requires_grad=False)

    def _save_to_state_dict(self, *args):
        pass

    def _load_from_state_dict(self, *args):
        pass


def detach(model: nn.Module) -> None:
    """Undo :func:`attach_quantizer` after the weights have become float again."""
    added = "hf_quantizer", "quantization_method", "_weight_conversions", "resize_token_embeddings"
    for inner in _models(model):
        inner._modules.pop(FLOAT, None)
        inner.config.__dict__.pop("quantization_config", None)
        for name in added:
            inner.__dict__.pop(name, None)
        inner.is_quantized = False


def describe(model: nn.Module, config: GpuPoorConfig) -> None:
    """Write what is quantized in a model, and how, into its config."""
    config.modules = kinds_of(model)
    config.formats = formats_of(model) or None
    config.ties = ties_of(model)
    modules = {name: model.get_submodule(name) for name in config.modules}
    config.input_scales = [n for n, m in modules.items() if "input_scale" in m.storage()] or None
    modes = {name: module.activation for name, module in modules.items()}
    config.activations = {
        name: mode
        for name, mode in modes.items()
        if mode != config.activation and not config.modules[name].endswith("embedding")
    }


def refuse_resize(*args, **kwargs):
    """Stands in for ``resize_token_embeddings`` of a quantized model."""
    raise ValueError(
        "the token embeddings are quantized and cannot be resized: resize them before quantizing, "
        "or call gpu_poor.dequantize(model), resize, and quantize again"
    )
