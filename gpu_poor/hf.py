"""The quantizer "gpu-poor" for transformers: saving, loading, quantizing while loading.

A quantized model is saved as ordinary safetensors with the weights and scales of its formats under
their module's names, and in config.json

    "quantization_config": {"quant_method": "gpu-poor", "version": 1, "bits": 8,
                            "activation": "a16", "modules": {name: kind},
                            "formats": {name: format}, "ties": {name: owner},
                            "input_scales": [name]}

``modules`` says exactly what is quantized, ``formats`` to what if not to int8, and ``input_scales``
which linears multiply their inputs by a buffer of that name; nothing is worked out by rule on load.
Names, kinds and formats are only ever looked up, in the model, in :data:`gpu_poor.nn.KINDS` and
:data:`gpu_poor.formats.FORMATS`: nothing in a config is imported or executed. Before a weight is
loaded the headers of the files are checked against that list.
"""

import copy
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors import SafetensorError
from torch import nn
from transformers.configuration_utils import PreTrainedConfig
from transformers.quantizers.auto import register_quantization_config, register_quantizer
from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from gpu_poor import hf_data, memory, ops
from gpu_poor.files import is_missing
from gpu_poor.folds import smooth
from gpu_poor.formats import FORMATS
from gpu_poor.fusion import fuse
from gpu_poor.hf_data import Data
from gpu_poor.hf_load import (
    IGNORED,
    METHOD,
    add_missing_ties,
    candidates,
    check_complete,
    check_device_map,
    check_files,
    check_loaded,
    expect_no_scales,
    float_parameters,
    keep_stored_dtypes,
    norm_weights,
    read_headers,
    saved_targets,
    swap_skeleton,
    tie_skeleton,
)
from gpu_poor.hf_stream import Incoming, Quantize, is_quantized_weight, merge_later
from gpu_poor.metrics_input import Text
from gpu_poor.nn import KINDS, QuantizedLinear, QuantizedModule
from gpu_poor.plan import (
    Overrides,
    Patterns,
    check_reduction,
    formats_of,
    kinds_of,
    make_plan,
    ties_of,
)
from gpu_poor.quantize import check_options, dequantize
from gpu_poor.receipt import Receipt, check_saved, make_receipt, restore
from gpu_poor.samples import SampleInputs
from gpu_poor.strategies import recipe

#: Of the saved form; a reader refuses any it does not know.
VERSION = 1


@register_quantization_config(METHOD)
class GpuPoorConfig(QuantizationConfigMixin):
    """How to quantize a model, and in a saved folder what is quantized.

    Given to ``from_pretrained`` it quantizes while loading. That prints nothing: the receipt is
    ``gpu_poor.receipt(model)``.

    Args:
        bits, overrides, activation, include, exclude, critical_layers, allow_partial: as of
            :func:`gpu_poor.quantize`.
        strategy: names of strategies that need no data, or what a saved model was made with.
        modules: ``{module name: kind}``, the quantized modules of a saved model; None before.
        formats: ``{module name: format}`` of those that are not int8.
        ties: ``{module name: owner}``, modules whose weight is another one's.
        activations: ``{module name: mode}`` of the modules whose mode is not ``activation``.
        input_scales: names of the linears that multiply their inputs by a scale first.
        receipt: of a saved model: how it was made and what was measured then.
        version: of the saved form.
        sample_inputs, tokenizer, work_folder, evaluate_on, max_kl: as of :func:`gpu_poor.quantize`;
            for ``from_pretrained`` only, and never saved. With any of them the float model is read
            block by block from its files, as often as need be, and may be larger than memory.

    Raises:
        ValueError: anything unknown or malformed. The model's names are checked on load.
    """

    def __init__(
        self,
        bits: int = 8,
        overrides: Overrides = None,
        strategy: str | list[str] | None = None,
        activation: str = "a16",
        include: Patterns = None,
        exclude: Patterns = None,
        critical_layers: Patterns = None,
        allow_partial: bool = False,
        modules: dict[str, str] | None = None,
        formats: dict[str, str] | None = None,
        ties: dict[str, str] | None = None,
        activations: dict[str, str] | None = None,
        input_scales: list[str] | None = None,
        receipt: dict | None = None,
        version: int = VERSION,
        quant_method: str = METHOD,
        sample_inputs: SampleInputs | None = None,
        tokenizer: Callable | None = None,
        work_folder: str | Path | None = None,
        evaluate_on: Text | None = None,
        max_kl: float | None = None,
        **unknown,
    ):
        if unknown:
            raise ValueError(f"{METHOD} config: unknown keys {', '.join(sorted(unknown))}")
        if quant_method != METHOD:
            raise ValueError(f"quant_method must be {METHOD!r}, got {quant_method!r}")
        if version != VERSION or isinstance(version, bool):
            raise ValueError(
                f"{METHOD} config: version {version!r} is unknown, this gpu_poor reads {VERSION}; "
                "a newer gpu_poor may have saved the model"
            )
        check_options(bits, activation, overrides)
        self.quant_method = METHOD
        self.version = version
        self.bits = bits
        self.overrides = None if overrides is None else dict(overrides)
        self.strategy = _strategies(strategy)
        self.activation = activation
        self.include = _patterns("include", include)
        self.exclude = _patterns("exclude", exclude)
        self.critical_layers = _patterns("critical_layers", critical_layers)
        self.allow_partial = bool(allow_partial)
        self.modules = _names("modules", modules, KINDS)
        self.formats = _names("formats", formats, FORMATS)
        self.ties = _names("ties", ties, None)
        self.activations = _names("activations", activations, ops.ACTIVATIONS)
        self.input_scales = _scaled(input_scales, self.modules or {}, self.ties or {})
        try:
            self.receipt = receipt if receipt is None or check_saved(receipt) else None
        except ValueError as error:
            raise ValueError(f"{METHOD} config: {error}") from error
        self.data = Data(sample_inputs, tokenizer, work_folder, evaluate_on, max_kl)
        named = (self.formats, self.ties, self.activations)
        if stray := {name for each in named for name in each or ()} - set(self.modules or {}):
            raise ValueError(
                f"{METHOD} config: formats, ties or activations of no module: {sorted(stray)}"
            )

    def to_dict(self) -> dict:
        """What is saved: all but data, which is no property of a model."""
        return {k: copy.deepcopy(v) for k, v in vars(self).items() if k != "data"}

    def __iter__(self):
        yield from self.to_dict().items()


def _strategies(value: str | list[str] | None) -> list[str] | None:
    names = [value] if isinstance(value, str) else value
    if names is None:
        return None
    if not isinstance(names, list | tuple) or not all(isinstance(name, str) for name in names):
        raise ValueError(f"{METHOD} config: strategy must be a name or a list of names: {value!r}")
    recipe(names, calibrated=False)  # raises if one is unknown
    return list(names)


def _patterns(key: str, value: Patterns) -> Patterns:
    listed = [value] if isinstance(value, str) else value
    if listed is not None and not (
        isinstance(listed, list | tuple) and all(isinstance(item, str) for item in listed)
    ):
        raise ValueError(f"{METHOD} config: {key} must be a pattern or a list of them: {value!r}")
    return value if value is None or isinstance(value, str) else list(value)


def _names(key: str, value: dict | None, allowed: dict | None) -> dict | None:
    if value is None:
        return None
    if not isinstance(value, dict) or not all(
        isinstance(k, str) and isinstance(v, str) for k, v in value.items()
    ):
        raise ValueError(f"{METHOD} config: {key} must map names to strings, got {value!r:.80}")
    if allowed is not None and (unknown := set(value.values()) - set(allowed)):
        raise ValueError(
            f"{METHOD} config: {key} has unknown values {', '.join(sorted(unknown))}; "
            f"known are {', '.join(allowed)}"
        )
    return dict(value)


def _scaled(names: list | None, modules: dict[str, str], ties: dict[str, str]) -> list | None:
    listed = [] if names is None else names
    if not isinstance(listed, list) or not all(isinstance(name, str) for name in listed):
        raise ValueError(
            f"{METHOD} config: input_scales must be a list of names, got {names!r:.80}"
        )
    linears = {name for name, kind in modules.items() if issubclass(KINDS[kind], QuantizedLinear)}
    if stray := sorted(set(listed) - (linears - ties.keys() - set(ties.values()))):
        raise ValueError(
            f"{METHOD} config: input_scales of no linear with a weight of its own: {stray}"
        )
    return listed or None


# -- loading -----------------------------------------------------------------------------------


@register_quantizer(METHOD)
class GpuPoorQuantizer(HfQuantizer):
    """The hooks that ``from_pretrained`` and ``save_pretrained`` call."""

    requires_calibration = False

    def __init__(self, quantization_config: GpuPoorConfig, **kwargs):
        # A copy: the list of modules is written into it, and the caller may use theirs again.
        super().__init__(copy.deepcopy(quantization_config), **kwargs)
        self._incoming = Incoming()

    def update_dtype(self, dtype):
        if isinstance(dtype, torch.dtype) and dtype not in ops.FLOATS:
            known = ", ".join(str(known).removeprefix("torch.") for known in ops.FLOATS)
            raise ValueError(f"{METHOD}: dtype must be one of {known}, got {dtype}")
        return dtype

    def update_device_map(self, device_map):
        check_device_map(device_map)
        return device_map

    def _process_model_before_weight_loading(self, model, checkpoint_files=None, **kwargs):
        """Swap the modules of the skeleton, which is on the meta device."""
        config = self.quantization_config
        listed = list(config.modules or ()) if self.pre_quantized else []
        header = {}
        if self.pre_quantized:
            header = read_headers(checkpoint_files or ())
            add_missing_ties(model, config, header)
        else:
            read_headers(f for f in checkpoint_files or () if str(f).endswith(".safetensors"))
        tie_skeleton(model, config.ties if self.pre_quantized else None)
        if self.pre_quantized:
            targets = saved_targets(model, config)
        else:
            plan = make_plan(
                model,
                config.include,
                config.exclude,
                config.critical_layers,
                config.bits,
                config.overrides,
            )
            if not config.allow_partial or not plan.targets:
                check_reduction(model, plan)
            if config.data:
                hf_data.check(config)
                return model  # in float; see _process_model_after_weight_loading
            targets = plan.targets
            self._before, self._kept = memory.by_class(model), plan.kept_groups()
            self._incoming = self._prepare(model, plan, checkpoint_files or ())
        swap_skeleton(model, targets, config, stored_dtypes=self.pre_quantized)
        if not self.pre_quantized:
            expect_no_scales(model)
        if self.pre_quantized and checkpoint_files is not None:
            keep_stored_dtypes(model)
            check_files(model, header, listed)
        self._floats = float_parameters(model)
        return model

    def _prepare(self, model, plan, files) -> Incoming:
        """Decide what weights alone decide, before they come one by one."""
        how = recipe(self.quantization_config.strategy, calibrated=False)
        if how.needs_inputs:
            raise ValueError(
                f"{METHOD}: strategy {' and '.join(how.names)} needs calibration data: "
                "GpuPoorConfig(sample_inputs=...)"
            )
        self.quantization_config.strategy = how.names
        return Incoming(how, smooth(model, plan, how, norm_weights(model, files)))

    @property
    def quantized_element_size(self) -> float:
        return self.quantization_config.bits / 8  # bytes, for device maps

    def param_needs_quantization(self, model, param_name: str, **kwargs) -> bool:
        if self.quantization_config.data:
            return hf_data.is_parameter(model, param_name)
        return not self.pre_quantized and is_quantized_weight(model, param_name)

    def get_quantize_ops(self):
        return hf_data.ToFile() if self.quantization_config.data else Quantize(self._incoming)

    def update_weight_conversions(self, weight_conversions, *args):
        if not self.pre_quantized and not self.quantization_config.data:
            merge_later(weight_conversions)
        return weight_conversions

    def _process_model_after_weight_loading(self, model, **kwargs):
        if self.quantization_config.data and not self.pre_quantized:
            check_device_map(getattr(model, "hf_device_map", None))
            self.remove_quantization_config(model)  # it has none yet
            hf_data.quantize_loaded(model, self.quantization_config)
            return model
        try:
            if self._incoming.errors:
                raise self._incoming.errors[0]
            check_device_map(getattr(model, "hf_device_map", None))
            check_complete(model, scales=self.pre_quantized)
            self._restore_shared_scales(model)
            self._incoming.decided.apply_norms(model)
            remarks = self._incoming.decided.remarks(self._incoming.how)
            check_loaded(model, self._floats)
        finally:
            vars(model).pop(IGNORED, None)
            self._incoming = Incoming()
        if not self.pre_quantized:
            memory.leave_files(model)
            model.gpu_poor_receipt = make_receipt(model, self._before, self._kept, remarks)
            self.pre_quantized = True
            self.quantization_config.receipt = model.gpu_poor_receipt.saved()
        elif self.quantization_config.receipt is not None:
            restore(model, self.quantization_config.receipt)
        memory.trim()
        _attach(model, self)
        return fuse(model)

    def _restore_shared_scales(self, model) -> None:
        """Tied modules share a scale again, and modules that are not get their own back.

        transformers has filled what it takes for derived buffers with nothing. And it ties what
        has the same int8 weight, though rows that differ by a factor differ in the scale only.
        """
        scales = self._incoming.scales
        for name, scale in scales.items():
            model.get_submodule(name).own_scale("weight", scale)
        for name, owner in ties_of(model, scales=False).items():
            module, source = model.get_submodule(name), model.get_submodule(owner)
            if not self._is_tied(model, name, owner):
                module.weight = nn.Parameter(module.weight.clone(), requires_grad=False)
                model.all_tied_weights_keys.pop(f"{name}.weight", None)
                continue
            if name in scales and owner not in scales:  # the file has lm_head's name only
                source.own_scale("weight", scales[name])
            module.share_scale("weight", source)

    def _is_tied(self, model, name: str, owner: str) -> bool:
        if self.pre_quantized:
            ties = self.quantization_config.ties or {}
            return any(candidate in ties for candidate in candidates(model, name))
        scales = self._incoming.scales.get(name), self._incoming.scales.get(owner)
        return None in scales or torch.equal(*scales)

    # -- what the model can do ---------------------------------------------------------------

    def is_serializable(self, *args, **kwargs) -> bool:
        return True

    @property
    def is_trainable(self) -> bool:
        return True

    @property
    def is_compileable(self) -> bool:
        return True

    def get_state_dict_and_metadata(self, model, *args, **kwargs):
        """Called first by save_pretrained: bring the saved list up to date."""
        describe(model, self.quantization_config)
        modules = self.quantization_config.modules
        model.config.quantization_config = self.quantization_config if modules else None
        return None, {}

    def _dequantize(self, model, dtype=None):
        return dequantize(model, dtype)


# -- models in memory ----------------------------------------------------------------------------


def attach(model: nn.Module, **options) -> None:
    """Make a model quantized in memory one that ``save_pretrained`` knows how to save.

    The config is copied before it tells of int8: a float model may have the same one.

    ``options`` are those of :class:`GpuPoorConfig`.
    """
    own_configs(model)
    _attach(model, GpuPoorQuantizer(GpuPoorConfig(**options), pre_quantized=True))


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


def _attach(model: nn.Module, quantizer: GpuPoorQuantizer) -> None:
    """Also the models inside, each with a config that has its own names: it may be saved alone."""
    for inner in _models(model):
        if inner is not model:
            _attach_one(inner, copy.deepcopy(quantizer))
    _attach_one(model, quantizer)  # last: the models inside may share its config


def _models(model: nn.Module) -> list[nn.Module]:
    from transformers import PreTrainedModel  # its module is what imports this one

    return [module for module in model.modules() if isinstance(module, PreTrainedModel)]


def _attach_one(model: nn.Module, quantizer: GpuPoorQuantizer) -> None:
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
    """Undo :func:`attach` after the weights have become float again."""
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


#: The arguments of ``from_pretrained`` that say which files are meant.
HUB = (
    "cache_dir",
    "code_revision",
    "force_download",
    "local_files_only",
    "proxies",
    "revision",
    "subfolder",
    "token",
    "trust_remote_code",
)


def load(path: str | Path, **kwargs) -> nn.Module:
    """Load a model that is quantized: by gpu_poor, or by another library.

    A folder (or hub repository) that was saved from a quantized model: the same as
    ``from_pretrained(path)`` of the class that was saved, but it says so when the folder is not
    quantized, instead of loading float weights, and when it lacks a weight, instead of making one
    up.

    A local folder of GPTQ, AWQ, compressed-tensors or bitsandbytes, or a GGUF file: the same
    integers in our layers where a format of ours has them, else quantized again; which of the two
    it was, and the error, is in ``gpu_poor.receipt(model).imported`` for each weight
    (docs/importers.md). One tensor at a time: peak memory is the quantized model and one tensor.

    **Import gpu_poor before any** ``from_pretrained`` **of such a folder.** Without it transformers
    only warns ("Unknown quantization type, got gpu-poor") and loads the quantized values, unscaled,
    into float layers: the model answers nonsense. It has no hook by which the folder could refuse.

    Args:
        path: what ``from_pretrained`` takes, or a .gguf file.
        **kwargs: further arguments of ``from_pretrained``. For another library's checkpoint:
            ``activation`` as of :func:`gpu_poor.quantize`; ``dtype`` of what stays in float;
            ``requantize``, a format for the weights that have to be quantized again, by default
            one of the nearest size; ``rest``, a format for matrices that are float in the
            checkpoint, by default left so.

    Raises:
        ValueError: no such folder, or none that is quantized, or a damaged one, or an unsupported
            variant.
    """
    from transformers import AutoConfig

    from gpu_poor import importers

    if is_missing(path):
        raise ValueError(f"{path}: there is no such file or folder")
    path = Path(path).expanduser() if str(path).startswith("~") else path
    if (source := importers.find(path)) is not None:
        return importers.load(source, **kwargs)
    hub = {name: kwargs[name] for name in HUB if name in kwargs}
    config = AutoConfig.from_pretrained(path, **hub)
    found = getattr(config, "quantization_config", None)
    method = found.get("quant_method") if isinstance(found, dict) else found and found.quant_method
    if method in importers.IMPORTERS:
        raise ValueError(f"{path} is {method}: download it, and give the folder")
    if method != METHOD:
        raise ValueError(
            f"{path} is not quantized by gpu_poor (quant_method {method!r}); load it with "
            "from_pretrained(path, quantization_config=GpuPoorConfig(bits=8)) to quantize it"
        )
    both = kwargs | {"output_loading_info": True}
    try:
        model, info = saved_class(config).from_pretrained(path, **both)
    except SafetensorError as error:
        raise ValueError(f"{path} is truncated or corrupted: {error}") from error
    if missing := sorted(info["missing_keys"]):
        raise ValueError(
            f"{path} has no {missing[0]}, which {type(model).__name__} needs: load it with "
            "from_pretrained of the class that you mean"
        )
    return (model, info) if kwargs.get("output_loading_info") else model


def saved_class(config: PreTrainedConfig) -> type:
    """The class of transformers that a config was saved from, else the Auto class that fits."""
    import transformers

    name = (getattr(config, "architectures", None) or [""])[0]
    cls = getattr(transformers, name, None)
    if isinstance(cls, type) and issubclass(cls, transformers.PreTrainedModel):
        if isinstance(config, cls.config_class or ()):
            return cls
    causal = type(config) in transformers.AutoModelForCausalLM._model_mapping
    return transformers.AutoModelForCausalLM if causal else transformers.AutoModel
