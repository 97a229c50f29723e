"""The quantizer "gpu-poor" for transformers: saving, loading, quantizing while loading.

A quantized model is saved as ordinary safetensors with the weights and scales of its formats under
their module's names; config.json says which (gpu_poor/hf_config.py). Before a weight is loaded the
headers of the files are checked against that list.
"""

import copy
from pathlib import Path

import torch
from safetensors import SafetensorError
from torch import nn
from transformers.configuration_utils import PreTrainedConfig
from transformers.quantizers.auto import register_quantizer
from transformers.quantizers.base import HfQuantizer

from gpu_poor import hf_data, memory, ops
from gpu_poor.files import is_missing
from gpu_poor.folds import smooth
from gpu_poor.fusion import fuse
from gpu_poor.hf_attach import attach_quantizer, describe, own_configs
from gpu_poor.hf_config import GpuPoorConfig
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
from gpu_poor.plan import check_reduction, make_plan, ties_of
from gpu_poor.quantize import dequantize
from gpu_poor.receipt import make_receipt, restore
from gpu_poor.strategies import recipe


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
        attach_quantizer(model, self)
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


def attach(model: nn.Module, **options) -> None:
    """Make a model quantized in memory one that ``save_pretrained`` knows how to save.

    The config is copied before it tells of int8: a float model may have the same one.

    ``options`` are those of :class:`GpuPoorConfig`.
    """
    own_configs(model)
    attach_quantizer(model, GpuPoorQuantizer(GpuPoorConfig(**options), pre_quantized=True))


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
