"""From a source to a model: skeleton, one parameter at a time, then transformers' own loading."""

import torch
from torch import nn

from gpu_poor import formats, memory
from gpu_poor.formats import Format
from gpu_poor.hf_load import tie_skeleton
from gpu_poor.importers.base import Piece, Source, short
from gpu_poor.importers.grids import Grid, form_of, store
from gpu_poor.nn.base import Stored
from gpu_poor.plan import Target, formats_of, kinds_of, make_plan, share_scales, ties_of
from gpu_poor.quantize import check_options, swap
from gpu_poor.receipt import Imported, make_receipt

#: Give freed memory back each time this many bytes of float values have been handled.
TRIM_BYTES = 1 << 26


@torch.no_grad()
def assemble(
    source: Source,
    activation: str = "a16",
    dtype: torch.dtype | None = None,
    requantize: str | None = None,
    rest: str | None = None,
) -> nn.Module:
    """The model of a source, its packed weights in our formats; see :func:`gpu_poor.load`."""
    from gpu_poor.hf import saved_class
    from gpu_poor.hf_attach import keep_receipt
    from gpu_poor.hf_config import GpuPoorConfig

    check_options(8, activation)
    requantize, rest = (None if name is None else formats.find(name) for name in (requantize, rest))
    cls = saved_class(source.config)
    try:
        skeleton = make_skeleton(cls, source.config)
    except Exception as error:  # whatever transformers does not like about the config
        raise source.error(f"transformers makes no model of its config: {error!r:.300}") from error
    source.prefix = skeleton.base_model_prefix
    tie_skeleton(skeleton, None)
    records = fill(skeleton, source, activation, requantize, rest)
    config = source.config
    if not (modules := kinds_of(skeleton)):
        raise source.error("no weight in it is quantized: load it with from_pretrained")
    names = dict(modules=modules, formats=formats_of(skeleton) or None, ties=ties_of(skeleton))
    config.quantization_config = GpuPoorConfig(activation=activation, **names).to_dict()
    dtype = dtype or getattr(config, "dtype", None) or torch.float32
    state, cls = skeleton.state_dict(), type(skeleton)
    for name in skeleton.all_tied_weights_keys:  # as in a file: transformers ties them again
        state.pop(name, None)
    if empty := [name for name, tensor in state.items() if tensor.device.type == "meta"]:
        raise source.error(f"{empty[0]} is a buffer that is not in the checkpoint")
    model, info = cls.from_pretrained(
        None, config=config, state_dict=state, dtype=dtype, output_loading_info=True
    )
    if bad := {key: names for key, names in info.items() if names}:
        raise source.error(f"transformers did not take all of it: {bad!r:.300}")
    del skeleton, state
    before = memory.by_class(model, as_float=model.dtype)
    model.gpu_poor_receipt = make_receipt(model, before)
    model.gpu_poor_receipt.imported = records
    keep_receipt(model, model.gpu_poor_receipt)
    memory.trim()
    return model


def make_skeleton(cls: type, config) -> nn.Module:
    """A model without data."""
    with torch.device("meta"):
        return (cls.from_config if hasattr(cls, "from_config") else cls)(config)


def fill(
    skeleton: nn.Module,
    source: Source,
    activation: str,
    requantize: Format | None,
    rest: Format | None,
) -> list[Imported]:
    """Read every parameter, and put quantized modules where a weight is packed.

    Raises:
        ValueError: the source lacks a parameter, has one that the model does not, or both of two
            that are one in the model; or what the source raises.
    """
    names: dict[int, list[str]] = {}
    for name, parameter in skeleton.named_parameters(remove_duplicate=False):
        names.setdefault(id(parameter), []).append(name)
    users: dict[int, list[Target]] = {}
    for target in make_plan(skeleton).targets:
        for weight in target.weights().values():
            users.setdefault(id(weight), []).append(target)
    parameters = {id(p): p for p in skeleton.parameters()}
    missing = [aliases[0] for aliases in names.values() if not any(map(source.has, aliases))]
    if missing:
        raise source.error(f"{missing[0]} is missing, as are {len(missing) - 1} more parameters")
    records: list[Imported] = []
    quantized: dict[int, Stored] = {}
    read_bytes = 0
    for key, aliases in names.items():
        parameter, targets = parameters[key], users.get(key, [])
        found = [name for name in aliases if source.has(name)]
        if len(found) > 1:
            raise source.error(f"{' and '.join(found)} are one weight by the config, two here")
        rows = tuple(as_rows(targets, found[0], parameter).shape)
        piece = source.read(found[0], tuple(parameter.shape), rows)
        stored, record = convert(found[0], piece, source, targets, requantize, rest)
        if targets or piece.form is not None:
            records.append(record)
        if isinstance(stored, Stored):
            weight = nn.Parameter(stored.weight, requires_grad=False)
            quantized[key] = stored._replace(weight=weight)
        else:
            put_parameter(skeleton, aliases, stored)
        read_bytes += 4 * parameter.numel()
        if read_bytes > TRIM_BYTES:
            read_bytes = 0
            memory.trim()
    if unread := source.unread():
        raise source.error(f"the model has no place for {unread[0]} and {len(unread) - 1} more")
    targets = {id(target): target for key in quantized for target in users[key]}
    swap(skeleton, list(targets.values()), quantized, activation)
    share_scales(skeleton)
    return records


def as_rows(targets: list[Target], name: str, value: torch.Tensor) -> torch.Tensor:
    """A view of a parameter as rows ``[..., N, K]``: Conv1D has its weight the other way round."""
    leaf = name.rpartition(".")[2]
    return targets[0].kind.to_rows(targets[0].module, leaf, value) if targets else value


def convert(
    name: str,
    piece: Piece,
    source: Source,
    targets: list[Target],
    requantize: Format | None,
    rest: Format | None,
) -> tuple[Stored | torch.Tensor, Imported]:
    """What becomes of one parameter, of the modules in targets, and the record of it."""
    values = piece.values
    packed = isinstance(values, Grid) or piece.form is not None
    if not packed and not (targets and rest is not None):
        return values, Imported(name, piece.source, short(values.dtype), "float")
    if not targets:
        raise source.error(f"{name} is {piece.source}, but is no weight that can be quantized here")
    if not packed:
        return store(name, piece.source, as_rows(targets, name, values), rest)
    if isinstance(values, Grid) and form_of(values) is not None:
        return store(name, piece.source, values, None)
    if piece.reason is not None and requantize is None:
        raise source.error(
            f"{name}: {piece.reason}; requantize='int8' (or another format) has it quantized again"
        )
    return store(name, piece.source, values, requantize or formats.find(piece.form))


def put_parameter(model: nn.Module, names: list[str], value: torch.Tensor) -> None:
    """Give the parameter of some names its data; they stay one object."""
    parameter = nn.Parameter(value, requires_grad=value.is_floating_point())
    for name in names:
        module, _, leaf = name.rpartition(".")
        setattr(model.get_submodule(module), leaf, parameter)
