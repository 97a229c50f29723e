"""What a fused block runs: its tensors and layout, and whether they still are the block's.

A binding is made on the first call, kept beside the block's own attributes, and checked on every
call: each place it was read from must still hold the same object. So a block whose modules are
replaced (LoRA, dequantize), moved or retrained is bound again, or runs as it was written.
"""

from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from gpu_poor import formats, isa
from gpu_poor.fusion.architectures import ACTIVATIONS, ARCHITECTURES, RMS_NORMS, Architecture
from gpu_poor.nn import QuantizedLinear
from gpu_poor.ops.decoder import Column, Gated, NormKind, Number, Qkv

#: What csrc/ops/decoder.cpp reads.
FORMATS = (formats.Int8, formats.Grouped, formats.Half)
#: Where transformers' hooks of ``output_attentions`` come from.
CAPTURING = "transformers.utils.output_capturing"
_HOOKS = (
    "_forward_hooks",
    "_forward_pre_hooks",
    "_backward_hooks",
    "_backward_pre_hooks",
)
#: Packages whose forwards do what their classes' names say.
_HOMES = ("transformers", "torch", "gpu_poor")


class NotFused(Exception):
    """Why a block runs as it was written."""


class Watch:
    """The places that something was read from, and what was there."""

    def __init__(self):
        self.places: tuple[list[dict], list[str], list] = ([], [], [])
        #: Of each module its hooks, and how many places lead there at most.
        self.hooks: list[dict] = []
        self.before: list[int] = []
        #: How many places lead to the first module with a hook; None: there is none.
        self.hooked: int | None = None
        #: Whether there were hooks at the last look, those of transformers included.
        self.any_hooks = False
        self._seen: set[int] = set()

    def read(self, mapping: dict, key: str):
        """What ``mapping`` has under ``key``, None if it has nothing; watched from now on."""
        value = mapping.get(key)
        for column, entry in zip(self.places, (mapping, key, value), strict=True):
            column.append(entry)
        return value

    def unchanged(self) -> bool:
        """Whether every place still holds the same object.

        With a hook inside nothing bound is used: then the places on the way to it are enough, to
        see that it still is inside.
        """
        self.look_for_hooks()
        if self.hooked is None:
            return isa.unchanged(*self.places)
        return isa.unchanged(*(column[: self.hooked] for column in self.places))

    def look_for_hooks(self) -> None:
        """Set ``hooked``."""
        self.hooked, self.any_hooks = None, any(self.hooks)
        if self.any_hooks:
            for hooks, n in zip(self.hooks, self.before, strict=True):
                if hooks and foreign(hooks):
                    self.hooked = n
                    return

    def watch_hooks(self, module: nn.Module) -> None:
        hooks = hooks_of(module)
        self.hooks += hooks
        self.before += [len(self.places[0])] * len(hooks)

    def join(self, other: "Watch") -> None:
        """Watch what ``other`` does, too."""
        before = len(self.places[0])
        for mine, more in zip(self.places, other.places, strict=True):
            mine.extend(more)
        self.hooks += other.hooks
        self.before += [before + n for n in other.before]

    def child(self, module: nn.Module, path: str) -> nn.Module:
        """The submodule at a path; it and those on the way must run as their classes say.

        Raises:
            NotFused: there is none, or it is patched or in training.
        """
        done = []
        for name in path.split("."):
            parent, module = module, self.read(module._modules, name)
            if module is None:
                raise NotFused(f"{type(parent).__name__} has no {name}")
            done.append(name)
            self.plain(module, ".".join(done), hooks=True)
        return module

    def plain(self, module: nn.Module, path: str, hooks: bool) -> None:
        """See that nothing comes between a call of the module and its forward."""
        if id(module) in self._seen:
            return
        self._seen.add(id(module))
        forward = original(type(module)).forward
        if not at_home(forward):
            of = forward.__module__ or ""
            raise NotFused(f"{path} is {type(module).__name__}, with a forward of {of}")
        patch = self.read(module.__dict__, "forward")
        if patch is not None and getattr(patch, "__func__", None) is not type(module).forward:
            raise NotFused(f"{path} has a forward of its own")
        if self.read(module.__dict__, "training"):
            raise NotFused("in training mode")
        if hooks:
            self.watch_hooks(module)

    def parameter(self, module: nn.Module, name: str) -> Tensor | None:
        return self.read(module._parameters, name)


@dataclass
class Binding:
    """A block as the operators take it, or the reason why it cannot be one."""

    watch: Watch
    reason: str | None = None
    tensors: list[Tensor] = field(default_factory=list)
    layout: Tensor | None = None
    numbers: Tensor | None = None
    #: Of a decoder: kind and epsilon of its last norm, whose tensors are the last.
    norm: tuple[int, float] = (NormKind.ABSENT, 0.0)
    #: Of the layout: H, G, D.
    heads: tuple[int, int, int] = (0, 0, 0)
    softmax_scale: float = 1.0
    window: int = 0
    #: The block's attention module.
    attention: nn.Module | None = None

    def requires_grad(self) -> bool:
        return any(tensor.requires_grad for tensor in self.tensors)


def at_home(forward) -> bool:
    """Whether a forward does what its class's name says."""
    return (forward.__module__ or "").partition(".")[0] in _HOMES


def hooks_of(module: nn.Module) -> list[dict]:
    """Where a module keeps what is called around its forward."""
    return [module.__dict__[name] for name in _HOOKS]


def foreign(hooks: dict) -> bool:
    """Whether there is one that transformers has not left behind for ``output_attentions``.

    Those do nothing in other calls.
    """
    for hook in hooks.values():
        if getattr(hook, "__module__", None) != CAPTURING:
            return True
    return False


def original(cls: type) -> type:
    """The class of transformers that a fused one was made from."""
    return vars(cls).get("_gp_original", cls)


def bind(block: nn.Module) -> Binding:
    """The binding of a block whose class, or one of its bases, has an entry."""
    watch = Watch()
    try:
        return _bind(block, architecture_of(block), watch)
    except NotFused as error:
        return Binding(watch, str(error))


def architecture_of(block: nn.Module) -> Architecture | None:
    """The entry for a block of transformers, by its class; a subclass computes something else."""
    return entry_of(type(block), ARCHITECTURES)


def entry_of(cls: type, entries: dict[str, Architecture]) -> Architecture | None:
    """The entry for a class of transformers, or for the fused one made from it."""
    cls = original(cls)
    known = cls.__module__.startswith("transformers.models.")
    return entries.get(cls.__name__) if known else None


def _bind(block: nn.Module, entry: Architecture, watch: Watch) -> Binding:
    for path in entry.refuse:
        if _attribute(block, path, None):
            raise NotFused(f"the block has {path}")
    watch.plain(block, type(block).__name__, hooks=False)
    attention = watch.child(block, entry.attention)
    head_dim = getattr(attention, entry.head_dim)
    layout, numbers = [0] * Column.COUNT, [0.0] * Number.COUNT
    binding = Binding(watch, attention=attention)

    network_norm = entry.network_norm and watch.child(block, entry.network_norm)
    head_norms = [watch.child(attention, name) for name in entry.head_norms or ()] or [None, None]
    norms = [watch.child(block, entry.attention_norm), network_norm, *head_norms]
    columns = (Number.ATTENTION_EPS, Number.NETWORK_EPS, Number.HEAD_EPS, Number.HEAD_EPS)
    for i, (norm, number) in enumerate(zip(norms, columns, strict=True)):
        if norm is not None:
            at = Column.NORMS + 2 * i
            layout[at : at + 2], numbers[number] = norm_of(norm, binding)

    qkv = [watch.child(attention, name) for name in entry.qkv] + [None] * (3 - len(entry.qkv))
    output = watch.child(attention, entry.output)
    first, *rest = (watch.child(block, path) for path in entry.network)
    up, down = rest if len(rest) == 2 else (None, *rest)
    linears = [*qkv, output, first, up, down]
    names = [*entry.qkv, *["v"] * (3 - len(entry.qkv)), entry.output, entry.network[0]]
    names += [entry.network[len(rest) - 1], entry.network[-1]]
    for i, (name, linear) in enumerate(zip(names, linears, strict=True)):
        if linear is not None:
            at = Column.LINEARS + 5 * i
            layout[at : at + 5] = _linear(name, linear, binding)

    heads = output.in_features // head_dim
    if len(entry.qkv) == 3:
        kv_heads = qkv[1].out_features // head_dim
    else:
        kv_heads = (qkv[0].out_features // head_dim - heads) // 2
    binding.heads = heads, kv_heads, head_dim
    window = entry.window and _attribute(attention, entry.window)
    activation = watch.child(block, entry.activation)
    if type(activation).__name__ not in ACTIVATIONS:
        raise NotFused(f"unknown activation {type(activation).__name__}")
    parallel = entry.parallel
    if isinstance(parallel, str):
        parallel = watch.read(block.__dict__, parallel)
    binding.softmax_scale = _scaling(attention, head_dim, watch)
    binding.window = window or 0
    settings = {
        Column.HEADS: heads,
        Column.KV_HEADS: kv_heads,
        Column.HEAD_DIM: head_dim,
        Column.QKV: Qkv.SEPARATE if len(entry.qkv) == 3 else entry.layout,
        Column.GATED: Gated.NO if up is None else Gated.SEPARATE,
        Column.ACTIVATION: ACTIVATIONS[type(activation).__name__],
        Column.PARALLEL: int(parallel),
        Column.WINDOW: binding.window,
    }
    for column, value in settings.items():
        layout[column] = int(value)
    numbers[Number.SOFTMAX_SCALE] = binding.softmax_scale
    binding.layout, binding.numbers = torch.tensor([layout]), torch.tensor([numbers])
    devices = {tensor.device.type for tensor in binding.tensors}
    if devices != {"cpu"}:
        raise NotFused(f"on {' and '.join(sorted(devices))}: fused blocks run on the CPU")
    if isa.uses_torch():
        raise NotFused("GPU_POOR_ISA=torch: no kernels")
    return binding


def _scaling(attention: nn.Module, head_dim: int, watch: Watch) -> float:
    """What scores are multiplied by; transformers before 5.10 does not say so for GPT-2."""
    if (scaling := watch.read(vars(attention), "scaling")) is not None:
        return scaling
    if not attention.scale_attn_weights or attention.scale_attn_by_inverse_layer_idx:
        raise NotFused("its scores are scaled in an unusual way")
    return head_dim**-0.5


def norm_of(norm: nn.Module, binding: Binding) -> tuple[tuple[int, int], float]:
    """Kind, whether there is a bias, epsilon; its tensors go into the binding."""
    name, watch = type(norm).__name__, binding.watch
    if type(norm) is nn.LayerNorm:
        kind, eps = NormKind.LAYER, watch.read(vars(norm), "eps")
    elif name in RMS_NORMS and type(norm).__module__.startswith("transformers.models."):
        kind, eps = NormKind.RMS, watch.read(vars(norm), "variance_epsilon")
    else:
        raise NotFused(f"unknown norm {name}")
    weight, bias = (watch.parameter(norm, part) for part in ("weight", "bias"))
    if weight is None:
        raise NotFused(f"a {name} without a weight of its own")
    binding.tensors += [weight] if bias is None else [weight, bias]
    return (kind, int(bias is not None)), eps


def _linear(name: str, linear: nn.Module, binding: Binding) -> tuple[int, ...]:
    """N, group, activation bits, whether there are a bias and an input scale.

    Its tensors go into the binding.
    """
    watch = binding.watch
    if not isinstance(linear, QuantizedLinear):
        raise NotFused(f"{name} is {type(linear).__name__}, not quantized")
    form = linear.format
    if not isinstance(form, FORMATS):
        raise NotFused(f"{name} is stored as {form.name}")
    # Another format comes with another weight, and a scale of its own is None once it is shared:
    # what need not be watched is not, for each dict costs a third of a microsecond a token.
    owner = linear
    if linear._scale_owners:
        owner = watch.read(linear._scale_owners, "weight_scale")
    weight, bias = watch.parameter(linear, "weight"), watch.parameter(linear, "bias")
    scale = watch.read(owner._buffers, "weight_scale")
    inputs = watch.read(linear._buffers, "input_scale")
    bits = watch.read(linear.__dict__, "_activation_bits")
    binding.tensors += [t for t in (weight, scale, bias, inputs) if t is not None]
    has = int(bias is not None), int(inputs is not None)
    return linear.out_features, form.group or 0, bits, *has


def _attribute(module: nn.Module, path: str, *default):
    for name in path.split("."):
        module = getattr(module, name, *default)
    return module
