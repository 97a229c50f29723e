"""Quantized models as checkpoints of other libraries, for those who run them elsewhere.

compressed-tensors, "pack-quantized": the same integers and the same scales for every linear layer
whose format it has: ``int8`` (a channel each), symmetric groups, and groups whose minima are whole
multiples of their scales. Scales keep their dtype in the files. Embeddings, and a head tied to one,
are written as floats. There is no input scale in the format: such a weight is quantized again.
"""

import json
import shutil
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from gpu_poor import formats, memory, ops
from gpu_poor.formats import Format
from gpu_poor.nn import QuantizedModule
from gpu_poor.nn.base import Stored, quantize_rows
from gpu_poor.nn.embedding import QuantizedEmbedding
from gpu_poor.nn.linear import QuantizedConv1D, QuantizedLinear
from gpu_poor.plan import ties_of

#: A file of the checkpoint is closed once it has this many bytes: no more are held twice.
SHARD_BYTES = 1 << 30


def export(
    model: nn.Module,
    folder: str | Path,
    format: str = "compressed-tensors",
    requantize: str | None = None,
) -> Path:
    """Write a quantized transformers model in the form of another library.

    The model is not changed. Nothing is written unless all of it can be.

    Args:
        model: quantized by gpu_poor, or loaded.
        folder: that does not exist yet, or is empty.
        format: a name in :data:`EXPORTERS`.
        requantize: a format for the weights whose own has no exact form there, such as "int4_g32";
            by default they are an error, which says what to pass. Four bits by default (groups with
            a minimum) are of that kind. The error of the second rounding adds to the first.

    Returns:
        The folder. A tokenizer is saved by its own ``save_pretrained``.

    Raises:
        ValueError: an unknown format, a model that is not quantized, a folder with something in it,
            or modules that the format cannot express, by name.
    """
    if format not in EXPORTERS:
        raise ValueError(f"format must be one of {', '.join(EXPORTERS)}, got {format!r}")
    folder = Path(folder)
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise ValueError(f"{folder} exists and is not an empty folder")
    if not hasattr(model, "hf_quantizer") or not any(
        isinstance(module, QuantizedModule) for module in model.modules()
    ):
        raise ValueError(f"{type(model).__name__} is no transformers model quantized by gpu_poor")
    form = None if requantize is None else formats.find(requantize)
    settings, tensors = EXPORTERS[format](model, form)
    folder.parent.mkdir(parents=True, exist_ok=True)
    scratch = Path(tempfile.mkdtemp(dir=folder.parent, prefix=f".{folder.name}."))
    try:
        write(scratch, model, settings, tensors)
        if folder.exists():
            folder.rmdir()
        scratch.chmod(0o755)
        scratch.rename(folder)
    except BaseException:
        shutil.rmtree(scratch, ignore_errors=True)
        raise
    return folder


def write(
    folder: Path, model: nn.Module, settings: dict, tensors: Iterator[tuple[str, Tensor]]
) -> None:
    """The files of a checkpoint, one shard in memory at a time."""
    config = model.config.to_dict() | {"quantization_config": settings}
    config["architectures"] = [type(model).__name__]
    text = json.dumps(config, indent=2, sort_keys=True, default=str)
    (folder / "config.json").write_text(text + "\n", encoding="utf-8")
    if getattr(model, "generation_config", None) is not None:
        model.generation_config.save_pretrained(folder)
    shards: list[list[str]] = []
    waiting: dict[str, Tensor] = {}

    def close() -> None:
        shards.append(list(waiting))
        save_file(waiting, folder / f"{len(shards)}.part", metadata={"format": "pt"})
        waiting.clear()

    for name, tensor in tensors:
        waiting[name] = tensor.detach().cpu().contiguous()
        if sum(each.nbytes for each in waiting.values()) > SHARD_BYTES:
            close()
    if waiting:
        close()
    if len(shards) == 1:
        (folder / "1.part").rename(folder / "model.safetensors")
        return
    weight_map = {}
    for i, names in enumerate(shards, 1):
        file = f"model-{i:05}-of-{len(shards):05}.safetensors"
        (folder / f"{i}.part").rename(folder / file)
        weight_map |= dict.fromkeys(names, file)
    index = {"metadata": {}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2))


# -- compressed-tensors --------------------------------------------------------------------------


def compressed_tensors(
    model: nn.Module, requantize: Format | None
) -> tuple[dict, Iterator[tuple[str, Tensor]]]:
    """The quantization_config, and the tensors by name.

    Raises:
        ValueError: naming the modules that have no exact form.
    """
    floats, packed = _split(model)
    groups: dict[str, dict] = {}
    problems, widths = [], {}
    for name, module in packed.items():
        n, k = module.shapes["weight"]
        form, problem = module.format, _problem(module)
        if problem is not None and requantize is not None:
            form, problem = requantize, _misfit(requantize, k)
        if problem is not None:
            problems.append(f"{name}: {problem}")
            widths[k] = max(widths.get(k, 0), module.format.bits)
            continue
        scheme = _scheme(form, k)
        key = "_".join(str(value) for value in scheme["weights"].values())
        groups.setdefault(key, scheme)["targets"].append(name)
    if problems:
        more = f"\n  and {len(problems) - 10} more" if len(problems) > 10 else ""
        raise ValueError(
            f"{len(problems)} modules have no exact form in compressed-tensors; "
            f"export(..., requantize={_fitting(widths)!r}) quantizes them again, which adds to "
            "their error:\n  " + "\n  ".join(problems[:10]) + more
        )
    settings = {
        "quant_method": "compressed-tensors",
        "format": "pack-quantized",
        "quantization_status": "compressed",
        "config_groups": {f"group_{i}": scheme for i, scheme in enumerate(groups.values())},
        "ignore": [],
    }
    return settings, _tensors(model, floats, packed, requantize)


def _split(model: nn.Module) -> tuple[dict, dict]:
    """The modules to write as floats and those to pack, by name.

    Raises:
        ValueError: a module is neither.
    """
    ties = ties_of(model)
    floats, packed = {}, {}
    for name, module in model.named_modules():
        if not isinstance(module, QuantizedModule):
            continue
        owner = model.get_submodule(ties.get(name, name))
        if isinstance(owner, QuantizedEmbedding):
            floats[name] = module
        elif isinstance(module, QuantizedLinear) and not isinstance(module, QuantizedConv1D):
            packed[name] = module
        else:
            raise ValueError(f"{name}: compressed-tensors has no {module.kind}")
    return floats, packed


def _problem(module: QuantizedModule) -> str | None:
    """Why the weight of a module has no exact form there, or None."""
    form, k = module.format, module.shapes["weight"][1]
    if module.input_scale is not None:
        return "it keeps an input scale"
    if not getattr(form, "asymmetric", False):
        return _misfit(form, k)
    _, scale, minimum = _grid(_stored(module))
    zero = _zero(scale, minimum)
    if bool(((zero * scale == -minimum) & (zero >= 0) & (zero < 1 << form.bits)).all()):
        return _misfit(form, k, asymmetric=True)
    return f"{form.name} has minima that are no whole multiples of the scales"


def _stored(module: QuantizedModule) -> Stored:
    weights = module.weight.detach(), module.scale("weight_scale")
    return Stored(*weights, module.format, module.shapes["weight"])


def _grid(stored: Stored) -> tuple[Tensor, Tensor, Tensor | None]:
    """uint8 q ``[N, K]``, scales and minima ``[N, groups]``: ``w = scale * q + minimum``.

    No minima: ``w = scale * (q - 2^(bits - 1))``.
    """
    if isinstance(stored.form, formats.Int8):
        q, scale = stored.weight.view(torch.uint8) ^ 128, stored.scale
        if not stored.form.asymmetric:
            return q, scale[:, None], None
        return q, scale[0][:, None], (scale[1] - 128 * scale[0])[:, None]
    parts = stored.scale.permute(2, 0, 3, 1).flatten(1, 2)[:, : stored.shape[0]]
    q = ops.grouped_unpack(stored.weight, *stored.shape)
    return q, parts[0], parts[1] if len(parts) == 2 else None


def _zero(scale: Tensor, minimum: Tensor) -> Tensor:
    """float32: the zero points of groups, if they are whole numbers."""
    ratio = -minimum.float() / scale.float()
    return torch.where(scale != 0, ratio.round(), 0.0)


def _fitting(widths: dict[int, int]) -> str:
    """A format of compressed-tensors for weights of ``{columns: bits}``, with no fewer bits."""
    every = (form for form in formats.FORMATS.values() if form.bits == max(widths.values()))
    fits = (form.name for form in every if all(_misfit(form, k) is None for k in widths))
    return next(fits, formats.INT8.name)


def _misfit(form: Format, k: int, asymmetric: bool = False) -> str | None:
    """Why rows of k columns in a format cannot be expressed, or None."""
    if isinstance(form, formats.Int8) and form.asymmetric == asymmetric:
        return None
    group = getattr(form, "group", None)
    if group is None or form.asymmetric != asymmetric:
        return f"{form.name} is neither int8 nor groups without minima"
    if k > group and k % group:
        return f"{form.name}: the last one of the groups of {k} columns is short"
    return None


def _scheme(form: Format, k: int) -> dict:
    weights = {"num_bits": form.bits, "type": "int", "dynamic": False}
    weights["symmetric"] = not getattr(form, "asymmetric", False)
    if isinstance(form, formats.Int8) or k <= form.group:
        weights["strategy"] = "channel"
    else:
        weights |= {"strategy": "group", "group_size": form.group}
    return {"targets": [], "weights": weights}


def _tensors(
    model: nn.Module, floats: dict, packed: dict, requantize: Format | None
) -> Iterator[tuple[str, Tensor]]:
    ties = ties_of(model)
    tied = {name for name in ties if ties[name] in floats}  # the owner alone is written
    seen = set()
    for name, tensor in model.state_dict().items():
        module, _, leaf = name.rpartition(".")
        if module in floats or module in packed:
            if leaf in model.get_submodule(module).storage():
                if leaf == "weight" and module not in tied:
                    yield from _weight(module, floats, packed, requantize)
                continue
        if memory.identity(tensor) not in seen:  # a head that is tied in float
            seen.add(memory.identity(tensor))
            yield name, tensor


def _weight(
    name: str, floats: dict, packed: dict, requantize: Format | None
) -> Iterator[tuple[str, Tensor]]:
    """The tensors of one quantized weight."""
    if name in floats:
        module = floats[name]
        yield f"{name}.weight", module.dequantize(torch.float32)
        return
    module = packed[name]
    stored = _stored(module)
    if _problem(module) is not None:
        stored = quantize_rows(module.dequantize(torch.float32), requantize)
    q, scale, minimum = _grid(stored)
    yield f"{name}.weight_packed", _words(q, stored.form.bits)
    yield f"{name}.weight_scale", scale
    yield f"{name}.weight_shape", torch.tensor(stored.shape)
    if minimum is not None:
        zero = _zero(scale, minimum).to(torch.uint8).t()
        yield f"{name}.weight_zero_point", _words(zero, stored.form.bits).t()


def _words(q: Tensor, bits: int) -> Tensor:
    """int32 ``[N, ceil(K * bits / 32)]`` of uint8 ``[N, K]``, the lowest bits first."""
    q = nn.functional.pad(q, (0, -q.shape[1] % (32 // bits)))
    if bits == 4:
        q = q[:, 0::2] | q[:, 1::2] << 4
    return q.reshape(-1).view(torch.int32).view(len(q), -1)


#: What can be written, by name: a function that gives the settings and the tensors.
EXPORTERS: dict[str, Callable] = {"compressed-tensors": compressed_tensors}
