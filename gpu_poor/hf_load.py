"""Loading a quantized folder with transformers, step by step: skeleton, files, data.

``config`` is a :class:`gpu_poor.hf.GpuPoorConfig` throughout. Nothing in it is imported or
executed: names are looked up in the model, kinds in :data:`gpu_poor.nn.KINDS`.
"""

import re
from collections.abc import Iterable

import torch
from safetensors import SafetensorError, safe_open
from torch import nn

from gpu_poor import formats
from gpu_poor.folds import norms
from gpu_poor.nn import KINDS, QuantizedModule, kind_of
from gpu_poor.nn.base import empty
from gpu_poor.nn.linear import INPUT_SCALE
from gpu_poor.plan import Target, share_scales, ties_of
from gpu_poor.quantize import check_finite, swap

METHOD = "gpu-poor"

#: What safetensors calls the dtypes that a format stores.
FILE_DTYPES = {
    torch.int8: "I8",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.float32: "F32",
}


def saved_targets(model: nn.Module, config) -> list[Target]:
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
        module = find(model, name)
        if module is None:
            continue
        if kind_of(module) is not KINDS[kind]:
            raise ValueError(
                f"{METHOD} config: {name} was saved as {kind}, the model has a "
                f"{type(module).__name__} there, which is none"
            )
        form = formats.find((config.formats or {}).get(name, formats.INT8.name))
        targets[id(module)] = Target(aliases[id(module)], module, KINDS[kind], form)
    return list(targets.values())


def add_missing_ties(model: nn.Module, config, header: dict) -> None:
    """List the modules that this model, but not the saved one, ties to a quantized module.

    A base model saved on its own lists no lm_head, and transformers ties one to it all the same.

    Args:
        header: of the files; a module whose weight they hold is not tied.

    Raises:
        ValueError: such a module is of no kind.
    """
    listed = set(config.modules or {})
    for name, source in model.all_tied_weights_keys.items():
        module, owner = name.removesuffix(".weight"), source.removesuffix(".weight")
        if (
            not listed.intersection(candidates(model, owner))
            or listed.intersection(candidates(model, module))
            or any(candidate in header for candidate in candidates(model, name))
        ):
            continue
        kind = kind_of(model.get_submodule(module)) if module != name else None
        if kind is None:
            raise ValueError(f"{METHOD} config: {name}, of no kind, is tied to {source}")
        config.modules[module] = kind.kind
        config.ties = (config.ties or {}) | {module: owner}
        for candidate in candidates(model, owner):
            if candidate in (config.formats or {}):
                config.formats[module] = config.formats[candidate]


def candidates(model: nn.Module, name: str) -> tuple[str, ...]:
    """The names that ``name`` may have where the base model is saved or loaded on its own."""
    prefix = f"{getattr(model, 'base_model_prefix', '')}."
    return (name, name.removeprefix(prefix), prefix + name)


def find(model: nn.Module, name: str) -> nn.Module | None:
    """The module a saved name means; None for a head that this class of model does not have."""
    for candidate in candidates(model, name):
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
        named = ties is None or any(c in ties for c in candidates(model, module_name))
        if named or leaf != "weight":
            setattr(model.get_submodule(module_name), leaf, model.get_parameter(source))


def swap_skeleton(model: nn.Module, targets: list[Target], config, stored_dtypes: bool) -> None:
    """Swap the modules of a skeleton without data for quantized ones without data.

    Args:
        stored_dtypes: the weights have the dtypes of their formats, else that of the float weight
            until the real ones come. Before 5.6 or so transformers casts what it reads to this,
            also what it will have quantized.
    """
    stored = {}
    scaled = {id(find(model, name)) for name in config.input_scales or ()}
    for target in targets:
        for name, weight in target.weights().items():
            shape = target.rows()[name].shape
            dtype = None if stored_dtypes else weight.dtype
            nothing = empty(target.form, shape, weight.device, dtype)
            if id(target.module) in scaled:
                input_scale = torch.empty(shape[-1], dtype=INPUT_SCALE, device=weight.device)
                nothing = nothing._replace(input_scale=input_scale)
            parameter = nn.Parameter(nothing.weight, requires_grad=False)
            stored.setdefault(id(weight), nothing._replace(weight=parameter))
    swap(model, targets, stored, config.activation)
    for name, mode in (config.activations or {}).items():
        if (module := find(model, name)) is not None:
            module.activation = mode
    share_scales(model)


def keep_stored_dtypes(model: nn.Module) -> None:
    """Exempt weights and scales from what a model wants in float32, such as T5's ``wo``.

    Early transformers casts by that list of name parts, whatever is in the file; later does not.
    """
    plan = getattr(model, "dtype_plan", None) or {}
    dtypes = {
        f"{name}.{key}$": dtype  # taken as a regular expression
        for name, module in model.named_modules()
        if isinstance(module, QuantizedModule)
        for key, (_, dtype) in module.storage().items()
    }
    if found := {name: dtypes[name] for name in dtypes if any(part in name for part in plan)}:
        model.dtype_plan = found | plan  # the first that matches


def check_files(model: nn.Module, header: dict, listed: Iterable[str]) -> None:
    """Check that the files hold every quantized weight and scale of a skeleton, and no others.

    Args:
        header: of :func:`read_headers`.
        listed: the names of the modules that are quantized in the files.

    Raises:
        ValueError: a tensor is missing, or has another dtype or shape, or is of no listed module.
    """
    listed, modules = set(listed), dict(model.named_modules())
    for full, (dtype, _) in header.items():
        module_name, _, leaf = full.rpartition(".")
        names = candidates(model, module_name)
        known = not listed.isdisjoint(names)
        module = next((modules[name] for name in names if name in modules), None)
        is_scale = full.endswith("_scale") and full.removesuffix("_scale") in header
        is_scale |= known and leaf == "input_scale"
        if dtype != "I8" and not is_scale:
            continue
        if known and isinstance(module, QuantizedModule):
            known = leaf in module.storage()
        if not known:
            raise ValueError(f"{full} is {dtype} in the checkpoint, but the config lists no such")
    tied = set(ties_of(model))
    for module_name, module in model.named_modules():
        if not isinstance(module, QuantizedModule) or module_name in tied:
            continue
        for key, (shape, dtype) in module.storage().items():
            full = f"{module_name}.{key}"
            found = next((header[c] for c in candidates(model, full) if c in header), None)
            expected = FILE_DTYPES[dtype], shape
            if found is None:
                raise ValueError(f"{full} is missing from the checkpoint")
            if found != expected:
                raise ValueError(
                    f"{full} is {found[0]} {found[1]} in the checkpoint, expected "
                    f"{expected[0]} {expected[1]}"
                )


def check_device_map(device_map) -> None:
    """Raise ValueError if any module is to stay on the disk: nothing there can be int8."""
    places = device_map.values() if isinstance(device_map, dict) else [device_map]
    if out := {str(place) for place in places} & {"disk", "meta"}:
        raise ValueError(
            f"{METHOD}: the device_map leaves modules on {out.pop()!r}, but int8 weights have to "
            'be in memory: give device_map="cpu", or none'
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


def norm_weights(model: nn.Module, files: Iterable[str]) -> dict[str, torch.Tensor]:
    """``{module name: weight}`` of the norms of a skeleton, read ahead from its files."""
    found = {}
    wanted = {key: name for name, _ in norms(model) for key in candidates(model, f"{name}.weight")}
    for file in files:
        if str(file).endswith(".safetensors"):
            with safe_open(file, framework="pt") as opened:
                for key in wanted.keys() & set(opened.keys()):
                    found[wanted[key]] = opened.get_tensor(key).clone()
    return found


def check_complete(model: nn.Module, scales: bool) -> None:
    """Check that transformers has loaded every quantized weight (and scale) and filled in none.

    It marks the tensors that it has loaded. If it marks none, this check cannot tell.

    Raises:
        ValueError: naming the tensor.
    """
    found = {}
    for module_name, module in model.named_modules():
        if isinstance(module, QuantizedModule):
            hidden = module._non_persistent_buffers_set
            for name in module.storage():
                own = scales and module._buffers.get(name) is not None and name not in hidden
                if own or name in module.weight_names:
                    found[f"{module_name}.{name}"] = getattr(module, name)
    marked = {name for name, tensor in found.items() if hasattr(tensor, "_is_hf_initialized")}
    if marked and (lacking := sorted(set(found) - marked)):
        raise ValueError(f"{lacking[0]} was not in the checkpoint")


#: Where transformers looks for patterns of what may be missing from a checkpoint.
IGNORED = "_keys_to_ignore_on_load_missing"


def expect_no_scales(model: nn.Module) -> None:
    """Have transformers not report as missing the scales of weights it knows by a tied name.

    A float checkpoint has no scales. They come with the weights that are quantized, and where a
    file has lm_head's name only, the embedding gets its own afterwards.
    """
    names = [f"{name}_scale" for name in model.all_tied_weights_keys.values()]
    known = getattr(model, IGNORED) or []
    setattr(model, IGNORED, [*known, *(f"^{re.escape(name)}$" for name in names)])


def float_parameters(model: nn.Module) -> set[str]:
    """The names of the floating point parameters outside of the quantized modules."""
    return {
        f"{module_name}.{name}" if module_name else name
        for module_name, module in model.named_modules()
        for name, parameter in module._parameters.items()
        if parameter is not None and parameter.is_floating_point()
        if not isinstance(module, QuantizedModule) or name not in module.weight_names
    }


def check_loaded(model: nn.Module, floats: set[str]) -> None:
    """Check the data of a loaded model.

    Args:
        floats: the :func:`float_parameters` of its skeleton.

    Raises:
        ValueError: naming the tensor.
    """
    if stray := sorted(floats - float_parameters(model)):
        name = stray[0]
        dtype = getattr(dict(model.named_parameters(remove_duplicate=False)).get(name), "dtype", 0)
        raise ValueError(f"{name} is {dtype or 'gone'} after loading, expected floating point")
    for module_name, module in model.named_modules():
        if not isinstance(module, QuantizedModule):
            continue
        for key, (shape, dtype) in module.storage().items():
            tensor, full = getattr(module, key), f"{module_name}.{key}"
            if (tensor.dtype, tensor.shape) != (dtype, shape) or tensor.device.type == "meta":
                raise ValueError(
                    f"{full} is {tensor.dtype} {tuple(tensor.shape)} on {tensor.device}, "
                    f"expected {dtype} {shape}"
                )
            if key == "input_scale" and not bool((tensor > 0).all()):
                raise ValueError(f"{full} holds a number that is not above 0")
            unsigned = key.endswith("_scale") and not module.format.signed
            if unsigned and not bool((tensor >= 0).all()):
                raise ValueError(f"{full} holds a negative number or a NaN")
            if dtype.is_floating_point and not bool(torch.isfinite(tensor).all()):
                raise ValueError(f"{full} holds a NaN or an infinity")
    check_finite((n, p.detach()) for n, p in model.named_parameters() if p.device.type != "meta")
