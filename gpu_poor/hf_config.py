"""``GpuPoorConfig``: how a model is quantized, as ``from_pretrained`` is told and config.json says.

config.json of a quantized model has

    "quantization_config": {"quant_method": "gpu-poor", "version": 1, "bits": 8,
                            "activation": "a16", "modules": {name: kind},
                            "formats": {name: format}, "ties": {name: owner},
                            "input_scales": [name]}

``modules`` says exactly what is quantized, ``formats`` to what if not to int8, and ``input_scales``
which linears multiply their inputs by a buffer of that name; nothing is worked out by rule on load.
Names, kinds and formats are only ever looked up, in the model, in :data:`gpu_poor.nn.KINDS` and
:data:`gpu_poor.formats.FORMATS`: nothing in a config is imported or executed.
"""

import copy
from collections.abc import Callable
from pathlib import Path

from transformers.quantizers.auto import register_quantization_config
from transformers.utils.quantization_config import QuantizationConfigMixin

from gpu_poor import ops
from gpu_poor.formats import FORMATS
from gpu_poor.hf_data import Data
from gpu_poor.hf_load import METHOD
from gpu_poor.metrics_input import Text
from gpu_poor.nn import KINDS, QuantizedLinear
from gpu_poor.plan import Overrides, Patterns
from gpu_poor.quantize import check_options
from gpu_poor.receipt import check_saved
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
