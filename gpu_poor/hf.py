"""The quantizer "gpu-poor" for transformers: saving, loading, quantizing while loading.

A quantized model is saved as ordinary safetensors with the int8 weights and float32 scales under
their module's names, and in config.json

    "quantization_config": {"quant_method": "gpu-poor", "version": 1, "bits": 8,
                            "activation": "a16", "modules": {name: kind}, "ties": {name: owner}}

``modules`` says exactly what is int8; nothing is worked out by rule on load. Names and kinds are
only ever looked up in the model and in :data:`gpu_poor.nn.KINDS`: nothing in a config is imported
or executed. Before a weight is loaded the headers of the files are checked against that list.
"""

import copy
from collections.abc import Iterable
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn
from transformers.quantizers.auto import register_quantization_config, register_quantizer
from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from gpu_poor import memory, ops
from gpu_poor.nn import KINDS, QuantizedModule, kind_of
from gpu_poor.nn.base import quantize_rows
from gpu_poor.plan import (
    Patterns,
    Target,
    check_reduction,
    kinds_of,
    make_plan,
    share_scales,
    ties_of,
)
from gpu_poor.quantize import check_finite, check_options, dequantize, not_finite, swap
from gpu_poor.receipt import make_receipt

METHOD = "gpu-poor"
#: Of the saved form; a reader refuses any it does not know.
VERSION = 1
#: Give freed memory back each time this many bytes of float weights have been quantized.
TRIM_BYTES = 1 << 29


@register_quantization_config(METHOD)
class GpuPoorConfig(QuantizationConfigMixin):
    """How to quantize a model, and in a saved folder what is quantized.

    Args:
        bits, activation, include, exclude, critical_layers, allow_partial: as of
            :func:`gpu_poor.quantize`.
        modules: ``{module name: kind}``, the int8 modules of a saved model; None before.
        ties: ``{module name: owner}``, modules whose int8 weight is another one's.
        activations: ``{module name: mode}`` of the modules whose mode is not ``activation``.
        version: of the saved form.

    Raises:
        ValueError: anything unknown or malformed. The model's names are checked on load.
    """

    def __init__(
        self,
        bits: int = 8,
        activation: str = "a16",
        include: Patterns = None,
        exclude: Patterns = None,
        critical_layers: Patterns = None,
        allow_partial: bool = False,
        modules: dict[str, str] | None = None,
        ties: dict[str, str] | None = None,
        activations: dict[str, str] | None = None,
        version: int = VERSION,
        quant_method: str = METHOD,
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
        check_options(bits, activation)
        self.quant_method = METHOD
        self.version = version
        self.bits = bits
        self.activation = activation
        self.include = _patterns("include", include)
        self.exclude = _patterns("exclude", exclude)
        self.critical_layers = _patterns("critical_layers", critical_layers)
        self.allow_partial = bool(allow_partial)
        self.modules = _names("modules", modules, KINDS)
        self.ties = _names("ties", ties, None)
        self.activations = _names("activations", activations, ops.ACTIVATIONS)
        if (stray := set(self.ties or {}) | set(self.activations or {})) - set(self.modules or {}):
            raise ValueError(f"{METHOD} config: ties or activations of no module: {sorted(stray)}")


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


# -- loading -----------------------------------------------------------------------------------


@register_quantizer(METHOD)
class GpuPoorQuantizer(HfQuantizer):
    """The hooks that ``from_pretrained`` and ``save_pretrained`` call."""

    requires_calibration = False

    def __init__(self, quantization_config: GpuPoorConfig, **kwargs):
        # A copy: the list of modules is written into it, and the caller may use theirs again.
        super().__init__(copy.deepcopy(quantization_config), **kwargs)
        self._scales: dict[str, Tensor] = {}  # of tied modules, by module name, while loading
        self._errors: list[ValueError] = []
        self._bytes_since_trim = 0

    def _process_model_before_weight_loading(self, model, checkpoint_files=None, **kwargs):
        """Swap the modules of the skeleton, which is on the meta device."""
        config = self.quantization_config
        tie_skeleton(model, config.ties if self.pre_quantized else None)
        if self.pre_quantized:
            targets = saved_targets(model, config)
        else:
            plan = make_plan(model, config.include, config.exclude, config.critical_layers)
            if not config.allow_partial or not plan.targets:
                check_reduction(model, plan)
            targets = plan.targets
            self._before, self._kept = memory.by_class(model), plan.kept_groups()
        swap_skeleton(model, targets, config, torch.int8 if self.pre_quantized else None)
        if self.pre_quantized and checkpoint_files is not None:
            check_files(model, checkpoint_files)
        else:
            read_headers(f for f in checkpoint_files or () if str(f).endswith(".safetensors"))
        return model

    @property
    def quantized_element_size(self) -> float:
        return 1.0  # bytes, for device maps

    def param_needs_quantization(self, model, param_name: str, **kwargs) -> bool:
        if self.pre_quantized:
            return False
        module_name, _, name = param_name.rpartition(".")
        try:
            module = model.get_submodule(module_name)
        except AttributeError:
            return False
        return isinstance(module, QuantizedModule) and name in module.weight_names

    def get_quantize_ops(self):
        from transformers.core_model_loading import ConversionOps

        class Int8Quantize(ConversionOps):
            """Float weight in, int8 weight and scale out, under transformers' names."""

            def convert(op, input_dict, *args, full_layer_name=None, model=None, **kwargs):
                ((_, tensor),) = input_dict.items()
                tensor = tensor[0] if isinstance(tensor, list) else tensor
                return quantizer._quantize(model, full_layer_name, tensor)

        quantizer = self
        return Int8Quantize()

    @torch.no_grad()
    def _quantize(self, model, full_name: str, tensor: Tensor) -> dict[str, Tensor]:
        """One weight. Errors are kept for the end: transformers would only log them here."""
        module_name, _, name = full_name.rpartition(".")
        module = model.get_submodule(module_name)
        expected = getattr(module, name)
        rows = module.to_rows(module, name, tensor)
        q = torch.zeros(expected.shape, dtype=torch.int8)
        scale = torch.zeros(expected.shape[:-1])
        if rows.shape != expected.shape:
            self._errors.append(
                ValueError(
                    f"{full_name} has shape {tuple(tensor.shape)} in the checkpoint, the model "
                    f"has {tuple(module.to_rows(module, name, expected).shape)}"
                )
            )
        else:
            q, scale = quantize_rows(rows)
            if not bool(torch.isfinite(scale).all()):
                self._errors.append(not_finite(full_name))
        if name == "weight":  # the only name that is ever tied
            self._scales[module_name] = scale
        self._bytes_since_trim += tensor.nbytes
        if self._bytes_since_trim > TRIM_BYTES:
            self._bytes_since_trim = 0
            memory.trim()
        return {full_name: nn.Parameter(q, requires_grad=False), f"{full_name}_scale": scale}

    def _process_model_after_weight_loading(self, model, **kwargs):
        try:
            if self._errors:
                raise self._errors[0]
            check_complete(model, scales=self.pre_quantized)
            self._restore_shared_scales(model)
            check_loaded(model)
        finally:
            self._scales.clear()
        memory.trim()
        if not self.pre_quantized:
            model.gpu_poor_receipt = make_receipt(model, self._before, self._kept)
            self.pre_quantized = True
        _attach(model, self)
        return model

    def _restore_shared_scales(self, model) -> None:
        """Tied modules share a scale again, and modules that are not get their own back.

        transformers has filled what it takes for derived buffers with nothing. And it ties what
        has the same int8 weight, though rows that differ by a factor differ in the scale only.
        """
        for name, scale in self._scales.items():
            model.get_submodule(name).own_scale("weight", scale)
        for name, owner in ties_of(model, scales=False).items():
            module, source = model.get_submodule(name), model.get_submodule(owner)
            if not self._is_tied(model, name, owner):
                module.weight = nn.Parameter(module.weight.clone(), requires_grad=False)
                model.all_tied_weights_keys.pop(f"{name}.weight", None)
                continue
            if name in self._scales and owner not in self._scales:  # the file has only lm_head's
                source.own_scale("weight", self._scales[name])
            module.share_scale("weight", source.weight_scale)

    def _is_tied(self, model, name: str, owner: str) -> bool:
        if self.pre_quantized:
            ties = self.quantization_config.ties or {}
            return any(candidate in ties for candidate in _candidates(model, name))
        scales = self._scales.get(name), self._scales.get(owner)
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
        model.config.quantization_config = self.quantization_config
        return None, {}

    def _dequantize(self, model, dtype=None):
        return dequantize(model, dtype)


# -- loading, step by step -----------------------------------------------------------------------


def saved_targets(model: nn.Module, config: GpuPoorConfig) -> list[Target]:
    """The modules of a float skeleton that a saved config lists.

    Raises:
        ValueError: the config lists none, or one that the model lacks or that is of another kind.
    """
    if not config.modules:
        raise ValueError(f"{METHOD} config of a saved model lists no modules")
    aliases: dict[int, list[str]] = {}
    for name, module in model.named_modules(remove_duplicate=False):
        aliases.setdefault(id(module), []).append(name)
    targets = {}
    for name, kind in config.modules.items():
        module = _find(model, name)
        if module is None:
            continue
        if kind_of(module) is not KINDS[kind]:
            raise ValueError(
                f"{METHOD} config: {name} was saved as {kind}, the model has a "
                f"{type(module).__name__} there, which is none"
            )
        targets[id(module)] = Target(aliases[id(module)], module, KINDS[kind])
    return list(targets.values())


def _candidates(model: nn.Module, name: str) -> tuple[str, ...]:
    """The names that ``name`` may have where the base model is saved or loaded on its own."""
    prefix = f"{getattr(model, 'base_model_prefix', '')}."
    return (name, name.removeprefix(prefix), prefix + name)


def _find(model: nn.Module, name: str) -> nn.Module | None:
    """The module a saved name means; None for a head that this class of model does not have."""
    for candidate in _candidates(model, name):
        try:
            return model.get_submodule(candidate)
        except AttributeError:
            pass
    saved_as = getattr(model.config, "architectures", None) or []
    base = getattr(model, "base_model_prefix", "")
    if type(model).__name__ not in saved_as and not name.startswith(f"{base}."):
        return None
    raise ValueError(f"{METHOD} config: the model has no module {name!r}")


def tie_skeleton(model: nn.Module, ties: dict[str, str] | None) -> None:
    """Make tied parameters one object, as they are in a model with data.

    While transformers builds a skeleton, its own ``tie_weights`` does nothing.

    Args:
        ties: those of a saved config, so that no others are made; None to make all.
    """
    for name, source in model.all_tied_weights_keys.items():
        module_name, _, leaf = name.rpartition(".")
        named = ties is None or any(c in ties for c in _candidates(model, module_name))
        if named or leaf != "weight":
            setattr(model.get_submodule(module_name), leaf, model.get_parameter(source))


def swap_skeleton(
    model: nn.Module, targets: list[Target], config: GpuPoorConfig, dtype: torch.dtype | None
) -> None:
    """Swap the modules of a skeleton without data for quantized ones without data.

    Args:
        dtype: of their weights until the real ones come; None keeps the float one. Before 5.6 or
            so transformers casts what it reads to this, also what it will have quantized.
    """
    empty = {}
    for target in targets:
        for name, weight in target.weights().items():
            rows = target.kind.to_rows(target.module, name, weight)
            q = torch.empty(rows.shape, dtype=dtype or weight.dtype, device=weight.device)
            scale = torch.empty(rows.shape[:-1], dtype=torch.float32, device=weight.device)
            empty.setdefault(id(weight), (nn.Parameter(q, requires_grad=False), scale))
    swap(model, targets, empty, config.activation)
    for name, mode in (config.activations or {}).items():
        if (module := _find(model, name)) is not None:
            module.activation = mode
    share_scales(model)


def check_files(model: nn.Module, files: list[str]) -> None:
    """Check by their headers that the files hold every int8 weight and scale of a skeleton.

    Raises:
        ValueError: a file is no safetensors, truncated or corrupted; a tensor is missing, or has
            another dtype or shape.
    """
    header = read_headers(files)
    tied = set(ties_of(model))
    for module_name, module in model.named_modules():
        if not isinstance(module, QuantizedModule) or module_name in tied:
            continue
        for name in module.weight_names:
            for key, dtype in ((name, "I8"), (f"{name}_scale", "F32")):
                full = f"{module_name}.{key}"
                found = next((header[c] for c in _candidates(model, full) if c in header), None)
                expected = (dtype, tuple(getattr(module, key).shape))
                if found is None:
                    raise ValueError(f"{full} is missing from the checkpoint")
                if found != expected:
                    raise ValueError(
                        f"{full} is {found[0]} {found[1]} in the checkpoint, expected "
                        f"{expected[0]} {expected[1]}"
                    )


def read_headers(files: Iterable[str]) -> dict[str, tuple[str, tuple[int, ...]]]:
    """``{tensor name: (dtype, shape)}`` of safetensors files, without reading their data."""
    header = {}
    for file in files:
        if not str(file).endswith(".safetensors"):
            raise ValueError(f"{file}: a {METHOD} model is saved as safetensors")
        try:
            with safe_open(file, framework="pt") as opened:
                for key in opened.keys():  # noqa: SIM118 - a safe_open is no dict
                    tensor = opened.get_slice(key)
                    header[key] = (tensor.get_dtype(), tuple(tensor.get_shape()))
        except SafetensorError as error:
            raise ValueError(f"{file} is truncated or corrupted: {error}") from error
    return header


def check_complete(model: nn.Module, scales: bool) -> None:
    """Check that transformers has loaded every int8 weight (and scale) and filled in none.

    It marks the tensors that it has loaded. If it marks none, this check cannot tell.

    Raises:
        ValueError: naming the tensor.
    """
    found = {}
    for module_name, module in model.named_modules():
        if isinstance(module, QuantizedModule):
            for name in module.weight_names:
                found[f"{module_name}.{name}"] = getattr(module, name)
                scale = f"{name}_scale"
                if scales and scale not in module._non_persistent_buffers_set:
                    found[f"{module_name}.{scale}"] = getattr(module, scale)
    marked = {name for name, tensor in found.items() if hasattr(tensor, "_is_hf_initialized")}
    if marked and (lacking := sorted(set(found) - marked)):
        raise ValueError(f"{lacking[0]} was not in the checkpoint")


def check_loaded(model: nn.Module) -> None:
    """Check the data of a loaded model.

    Raises:
        ValueError: naming the tensor.
    """
    for module_name, module in model.named_modules():
        if not isinstance(module, QuantizedModule):
            continue
        for name in module.weight_names:
            weight, scale = getattr(module, name), getattr(module, f"{name}_scale")
            full = f"{module_name}.{name}"
            if weight.dtype != torch.int8 or weight.device.type == "meta":
                raise ValueError(f"{full} is {weight.dtype} on {weight.device}, expected int8")
            if scale.dtype != torch.float32 or scale.shape != weight.shape[:-1]:
                raise ValueError(f"{full}_scale is {scale.dtype} {tuple(scale.shape)}")
            if not bool((scale >= 0).all()) or not bool(torch.isfinite(scale).all()):
                raise ValueError(f"{full}_scale holds a negative number, a NaN or an infinity")
    check_finite((n, p.detach()) for n, p in model.named_parameters() if p.device.type != "meta")


# -- models in memory ----------------------------------------------------------------------------


def attach(model: nn.Module, **options) -> None:
    """Make a model quantized in memory one that ``save_pretrained`` knows how to save.

    ``options`` are those of :class:`GpuPoorConfig`.
    """
    _attach(model, GpuPoorQuantizer(GpuPoorConfig(**options), pre_quantized=True))


def _attach(model: nn.Module, quantizer: GpuPoorQuantizer) -> None:
    config = quantizer.quantization_config
    describe(model, config)
    model.config.quantization_config = config
    model.hf_quantizer = quantizer
    model.quantization_method = METHOD
    # Only a bar to .half() and .float() in transformers, and ours take both.
    model.is_quantized = False
    # Tensors are saved under their names in the model: splitting fused experts into one file
    # entry per expert would double the memory of a load, which has to merge them again.
    model._weight_conversions = []
    model.resize_token_embeddings = refuse_resize


def detach(model: nn.Module) -> None:
    """Undo :func:`attach` after the weights have become float again."""
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config
    for name in ("hf_quantizer", "quantization_method", "_weight_conversions"):
        model.__dict__.pop(name, None)
    model.__dict__.pop("resize_token_embeddings", None)
    model.is_quantized = False


def describe(model: nn.Module, config: GpuPoorConfig) -> None:
    """Write what is quantized in a model, and how, into its config."""
    config.modules = kinds_of(model)
    config.ties = ties_of(model)
    modes = {name: model.get_submodule(name).activation for name in config.modules}
    config.activations = {
        name: mode
        for name, mode in modes.items()
        if mode != config.activation and not config.modules[name].endswith("embedding")
    }


def refuse_resize(*args, **kwargs):
    """Stands in for ``resize_token_embeddings`` of a quantized model."""
    raise ValueError(
        "the token embeddings are int8 and cannot be resized: resize them before quantizing, or "
        "call gpu_poor.dequantize(model), resize, and quantize again"
    )


def load(path: str | Path, **kwargs) -> nn.Module:
    """Load a folder (or hub repository) that was saved from a quantized model.

    The same as ``AutoModelForCausalLM.from_pretrained(path)``, but it says so when the folder is
    not quantized by gpu_poor instead of loading float weights.

    Args:
        path: what ``from_pretrained`` takes.
        **kwargs: further arguments of ``from_pretrained``.

    Raises:
        ValueError: not such a folder, or a damaged one.
    """
    from transformers import AutoConfig, AutoModel, AutoModelForCausalLM

    config = AutoConfig.from_pretrained(path)
    found = getattr(config, "quantization_config", None)
    method = found.get("quant_method") if isinstance(found, dict) else found and found.quant_method
    if method != METHOD:
        raise ValueError(
            f"{path} is not quantized by gpu_poor (quant_method {method!r}); load it with "
            "from_pretrained(path, quantization_config=GpuPoorConfig(bits=8)) to quantize it"
        )
    causal = type(config) in AutoModelForCausalLM._model_mapping
    try:
        return (AutoModelForCausalLM if causal else AutoModel).from_pretrained(path, **kwargs)
    except SafetensorError as error:
        raise ValueError(f"{path} is truncated or corrupted: {error}") from error
