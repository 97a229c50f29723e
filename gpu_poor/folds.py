"""Norms and the linears that alone read them: where a factor can move without changing the model.

    linear(norm(x)) = (W diag(f)) (gain / f * n(x))        and a bias of the norm alike

Found by running a copy of the model without data (on the meta device) and watching every operator
that touches a norm's output, so that no table of architectures is needed: a norm counts if only
linears that will be quantized read it. How a norm uses its weight, as a gain or as a gain minus
one (Gemma), is tried out on a small copy.
"""

import copy
from collections.abc import Iterator
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from gpu_poor.chains import Chain
from gpu_poor.modules import hooked
from gpu_poor.nn.base import Stored
from gpu_poor.plan import Plan
from gpu_poor.strategies import Recipe


@dataclass
class Fold:
    """A norm, how it uses its weight, and the linears that read it."""

    norm: str
    #: The gain is the weight plus this: 0, or 1 for Gemma.
    offset: float
    linears: tuple[str, ...]

    def gain(self, weight: Tensor) -> Tensor:
        """Float32 ``[K]`` of the norm's weight."""
        return weight.detach().float() + self.offset

    def apply(self, norm: nn.Module, factors: Tensor) -> None:
        """Divide a norm's output by ``factors``. Its parameters are replaced, not written to."""
        new = {"weight": self.gain(norm.weight) / factors - self.offset}
        if getattr(norm, "bias", None) is not None:
            new["bias"] = norm.bias.detach().float() / factors
        for name, value in new.items():
            old = getattr(norm, name)
            setattr(norm, name, nn.Parameter(value.to(old.dtype), old.requires_grad))


@dataclass
class Decided:
    """What was decided before any weight is swapped; nothing of it is in the model yet."""

    #: ``{memory.identity(weight): what it is stored as}``, by calibration.
    stored: dict[tuple, Stored] = field(default_factory=dict)
    #: ``{norm name: what its output is divided by}``.
    norms: dict[str, tuple[Fold, Tensor]] = field(default_factory=dict)
    #: ``{linear name: what its output is divided by}``: so are its rows in ``stored`` already.
    sources: dict[str, tuple[Chain, Tensor]] = field(default_factory=dict)
    #: ``{linear name: what its columns are multiplied by}``, of the linears not in ``stored``.
    factors: dict[str, Tensor] = field(default_factory=dict)
    #: Linears in the blocks that no calibration text reached: rounded without.
    unreached: list[str] = field(default_factory=list)
    #: Modules in the blocks that are no linears, such as experts: rounded without, too.
    uncalibrated: list[str] = field(default_factory=list)
    #: Why smoothing was not tried.
    unsmoothed: str = ""
    #: Calibration tokens that the strategies have looked at.
    n_tokens: int = 0
    #: Blocks that an earlier run has calibrated.
    resumed: int = 0

    def apply_norms(self, model: nn.Module) -> None:
        """Fold the norms of a model, which has its weights by now, and the biases of sources."""
        for name, (fold, factors) in (*self.norms.items(), *self.sources.items()):
            fold.apply(model.get_submodule(name), factors)

    def remarks(self, how: Recipe) -> list[str]:
        """For the receipt."""
        lines = [f"numbers chosen by {' and '.join(how.names)}"]
        if self.n_tokens and how.needs_inputs:
            lines[0] += f" on {self.n_tokens:,} tokens"
        if self.norms:
            lines[0] += f": {len(self.norms)} norms folded"
        if self.sources:
            lines[0] += f", {len(self.sources)} linears divided for the next"
        if n_kept := sum(stored.input_scale is not None for stored in self.stored.values()):
            lines[0] += f", {n_kept} linears with an input scale"
        if self.resumed:
            lines.append(f"blocks calibrated by an earlier run, in work_folder: {self.resumed}")
        if self.unreached:
            lines.append(
                f"no calibration text reached {len(self.unreached)} linears, e.g. "
                f"{self.unreached[0]}: rounded without"
            )
        if self.uncalibrated:
            lines.append(
                f"{len(self.uncalibrated)} modules in the blocks are no linears, e.g. "
                f"{self.uncalibrated[0]}: rounded without calibration"
            )
        if self.unsmoothed:
            lines.append(self.unsmoothed)
        return lines


def smooth(
    model: nn.Module, plan: Plan, how: Recipe, weights: dict[str, Tensor] | None = None
) -> Decided:
    """Fold by weights alone.

    Args:
        weights: ``{norm name: its weight}`` for a model without data, of which no other weight is
            there to be looked at.
    """
    done = Decided()
    if how.smoothing is None:
        return done
    if weights is None:
        weights = {name: norm.weight.detach() for name, norm in norms(model)}
        rows = {name: t.rows()["weight"] for t in plan.targets for name in t.names if t.is_linear}
    else:
        rows = {}
    # Whatever a norm adds to its weight: tracing a model takes longer than asking.
    if not any(
        how.smoothing.factors(weight.float() + offset, [], None, []) is not None
        for weight in weights.values()
        for offset in (0.0, 1.0)
    ):
        return done
    targets = {name: target for target in plan.targets for name in target.names}
    for fold in folds_for(model, plan, how, done):
        if fold.norm not in weights:
            continue
        factors = how.smoothing.factors(
            fold.gain(weights[fold.norm]),
            [rows[name] for name in fold.linears if rows],
            None,
            [targets[name].form for name in fold.linears],
        )
        if factors is not None:
            done.norms[fold.norm] = fold, factors
            every = (alias for name in fold.linears for alias in targets[name].names)
            done.factors |= dict.fromkeys(every, factors)
    return done


def folds_for(model: nn.Module, plan: Plan, how: Recipe, done: Decided) -> list[Fold]:
    """The folds that a recipe may use: before linears that are rounded to levels.

    None if it does not smooth, or, as ``done`` then says, if nothing is known of the model.
    """
    if how.smoothing is None:
        return []
    try:
        forms = {name: target.form for target in plan.targets for name in target.names}
        folds = find_folds(model, plan)
        return [fold for fold in folds if any(forms[name].levels for name in fold.linears)]
    except RuntimeError as error:
        done.unsmoothed = f"{how.smoothing.name} left the norms alone: {error}"
        return []


def find_folds(model: nn.Module, plan: Plan) -> list[Fold]:
    """The folds of a model, in the order in which its norms run.

    Raises:
        RuntimeError: the model cannot be run without data, so nothing is known of it.
    """
    linears = {name: target for target in plan.targets for name in target.names if target.is_linear}
    try:
        twin = without_data(model)
    except Exception as error:  # what a user has attached to it: a lock, an open file
        raise RuntimeError(f"{type(model).__name__} cannot be copied: {error}") from error
    found = dict(norms(twin))
    if not found or not linears:
        return []
    inputs = _token_inputs(model)
    watch = _Watch()
    handles = []
    for name, module in twin.named_modules():
        if name in found:
            handles.append(module.register_forward_hook(_after_norm(watch, name)))
        elif name in linears:
            handles.append(module.register_forward_pre_hook(_before_linear(watch, twin, name)))
            handles.append(module.register_forward_hook(_after_linear(watch)))
    try:
        with torch.no_grad(), watch, hooked(handles):
            twin.eval()(**inputs)
    except Exception as error:  # whatever a model does not like about tensors without data
        raise RuntimeError(f"{type(model).__name__} cannot be run without data: {error}") from error
    folds, barred = [], tied_modules(plan)
    barred |= _heads(model, plan)
    for name, readers in watch.readers.items():
        spoiled = name in watch.spoiled or not readers or watch.runs[name] != 1
        # A linear that reads something else as well, in another call, cannot be multiplied.
        spoiled |= any(watch.runs[r] != readers.count(r) for r in readers)
        if spoiled or any(id(linears[r].module) in barred for r in readers):
            continue
        if (offset := gain_offset(model.get_submodule(name))) is not None:
            folds.append(Fold(name, offset, tuple(dict.fromkeys(readers))))
    return folds


def without_data(module: nn.Module) -> nn.Module:
    """A bfloat16 copy on the meta device, where torch's matmul of experts takes nothing else."""
    tensors = [*module.parameters(), *module.buffers()]
    memo = {}
    for tensor in tensors:
        dtype = torch.bfloat16 if tensor.is_floating_point() else tensor.dtype
        empty = torch.empty_like(tensor, device="meta", dtype=dtype)
        is_parameter = isinstance(tensor, nn.Parameter)
        memo[id(tensor)] = nn.Parameter(empty, False) if is_parameter else empty
    return copy.deepcopy(module, memo)


def gain_offset(norm: nn.Module) -> float | None:
    """0 if a norm multiplies by its weight, 1 if by its weight plus one, None if by neither."""
    with torch.device("cpu"):  # while transformers builds a skeleton, the default is meta
        return _gain_offset(norm)


def _gain_offset(norm: nn.Module) -> float | None:
    exact = dict(dtype=torch.float32)  # while transformers loads, the default is the model's
    memo = {
        id(p): nn.Parameter(torch.rand(p.shape, **exact) + 0.5, False) for p in norm.parameters()
    }
    try:
        before = copy.deepcopy(norm, memo).to("cpu")
        k = before.weight.shape[0]
        x = torch.linspace(-2, 3, 2 * k, **exact).cos().view(2, k)
        factors = torch.arange(k).remainder(3).float().exp2()
        for offset in (0.0, 1.0):
            after = copy.deepcopy(before)
            Fold("", offset, ()).apply(after, factors)
            if torch.allclose(after(x) * factors, before(x), rtol=1e-4, atol=1e-5):
                return offset
    except Exception:  # a norm that takes more than x, or is none after all
        return None
    return None


def norms(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Modules with a vector for a weight, and with no more than a bias beside it."""
    for name, module in model.named_modules():
        weight = module._parameters.get("weight")
        if (
            weight is not None
            and weight.dim() == 1
            and set(module._parameters) <= {"weight", "bias"}
            and not list(module.children())
        ):
            yield name, module


def tied_modules(plan: Plan) -> set[int]:
    """Ids of modules whose weight another has too: it may not be multiplied for one of them."""
    users: dict[int, list[int]] = {}
    for module in [t.module for t in plan.targets] + [m for m, _ in plan.kept.values()]:
        for parameter in module.parameters(recurse=False):
            users.setdefault(id(parameter), []).append(id(module))
    return {module for group in users.values() if len(group) > 1 for module in group}


def _heads(model: nn.Module, plan: Plan) -> set[int]:
    """Ids of modules that may read the model's hidden state, which is to stay what it is."""
    heads = set()
    if hasattr(model, "get_output_embeddings"):
        heads.add(id(model.get_output_embeddings()))
    base = getattr(model, "base_model", model)
    if base is not model:
        inside = {id(module) for module in base.modules()}
        heads |= {id(t.module) for t in plan.targets} - inside
    return heads


def _token_inputs(model: nn.Module) -> dict[str, Tensor]:
    """Arguments for one forward pass; empty for a module that is no transformers model."""
    config = getattr(model, "config", None)
    if config is None:
        raise RuntimeError(f"{type(model).__name__} has no config: its inputs are unknown")
    ids = torch.zeros(1, 8, dtype=torch.int64, device="meta")
    inputs = {"input_ids": ids, "use_cache": False}
    if getattr(config, "is_encoder_decoder", False):
        inputs["decoder_input_ids"] = ids
    return inputs


class _Watch(TorchDispatchMode):
    """Who reads the outputs of norms: linears are recorded, any other operator spoils."""

    def __init__(self):
        super().__init__()
        #: ``{storage: norm}``, and the tensors themselves, so that no storage is used again.
        self.outputs: dict[int, str] = {}
        self.alive: list[Tensor] = []
        self.readers: dict[str, list[str]] = {}
        #: How often each norm and each linear has run.
        self.runs: dict[str, int] = {}
        self.spoiled: set[str] = set()
        self.inside: str | None = None

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func is torch.ops.aten._local_scalar_dense.default:
            # A model asks what its mask or its positions are like: nothing out of the ordinary.
            return False if args[0].dtype == torch.bool else 0
        out = func(*args, **(kwargs or {}))
        for value, argument in zip(args, func._schema.arguments, strict=False):
            if argument.alias_info is not None and argument.alias_info.is_write:
                self.spoiled.add(self.outputs.get(_storage(value), ""))
        read = {self.outputs.get(_storage(t)) for t in tree_leaves((args, kwargs))} - {None}
        for norm in read - {self.inside}:
            if any(self.outputs.get(_storage(t)) != norm for t in tree_leaves(out)):
                self.spoiled.add(norm)
        return out


def _storage(value) -> int | None:
    return value.untyped_storage()._cdata if isinstance(value, Tensor) else None


def _has_channels_of(module: nn.Module, tensor: Tensor) -> bool:
    """Whether the last dimension is all of a norm's channels, and no view has moved them."""
    k = module.weight.shape[0]
    steps = [s for s, n in zip(tensor.stride()[:-1], tensor.shape, strict=False) if n > 1]
    aligned = all(step % k == 0 for step in (tensor.storage_offset(), *steps))
    return tensor.shape[-1] == k and tensor.stride(-1) == 1 and aligned


def _after_norm(watch: _Watch, name: str):
    def hook(module, args, output):
        watch.runs[name] = watch.runs.get(name, 0) + 1
        if isinstance(output, Tensor) and _has_channels_of(module, output):
            watch.outputs[_storage(output)] = name
            watch.alive.append(output)
            watch.readers.setdefault(name, [])

    return hook


def _before_linear(watch: _Watch, twin: nn.Module, name: str):
    def hook(module, args):
        watch.runs[name] = watch.runs.get(name, 0) + 1
        norm = watch.outputs.get(_storage(args[0])) if args else None
        if norm is not None and _has_channels_of(twin.get_submodule(norm), args[0]):
            watch.readers[norm].append(name)
            watch.inside = norm

    return hook


def _after_linear(watch: _Watch):
    def hook(module, args, output):
        watch.inside = None

    return hook
