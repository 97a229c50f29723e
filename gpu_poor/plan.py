"""Which modules of a model get quantized, which stay in float, and why. Nothing is changed here."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase

from torch import Tensor, nn

from gpu_poor import formats, memory, ops
from gpu_poor.formats import Format
from gpu_poor.nn import KINDS, QuantizedModule, kind_of
from gpu_poor.readers import read_by_owner

#: The least fraction of the bytes that must go, by the itemsize of the float weights: int8 takes
#: 75 % of float32 and 50 % of 16 bit minus the scales; a model that keeps more than this in float
#: is not what "quantized" promises.
LEAST_REDUCTION = {8: 0.70, 4: 0.70, 2: 0.40}
#: The same where 16 bits have been asked for: half of float32.
LEAST_REDUCTION_16 = {8: 0.70, 4: 0.45, 2: 0.0}

#: The reason that needs no explanation: norms and the like.
NO_MATRIX = "vectors, no matrix"

Patterns = str | Sequence[str] | None
#: ``{pattern: bits or name of a format; 32 or "fp32" for none}``; of several that match a module
#: the last one counts.
Overrides = dict[str, int | str] | None


@dataclass
class Target:
    """A module to quantize: all its names in the model, the first one first."""

    names: list[str]
    module: nn.Module
    kind: type[QuantizedModule]
    #: What its weights will be stored as.
    form: Format = formats.INT8

    @property
    def name(self) -> str:
        return self.names[0]

    @property
    def is_linear(self) -> bool:
        """Whether it multiplies by one matrix: nn.Linear or Conv1D."""
        return issubclass(self.kind, KINDS["linear"])

    def weights(self) -> dict[str, Tensor]:
        return {name: getattr(self.module, name) for name in self.kind.weights_of(self.module)}

    def rows(self) -> dict[str, Tensor]:
        """Views of the weights as ``[..., N, K]``."""
        return {n: self.kind.to_rows(self.module, n, w) for n, w in self.weights().items()}


@dataclass
class Kept:
    """Modules left in float for one reason; ``n_bytes`` are those of their own parameters."""

    reason: str
    module_class: str
    count: int
    n_bytes: int
    example: str


@dataclass
class Plan:
    """Targets, and ``{name: (module, reason)}`` of the modules with parameters that stay."""

    bits: int = 8
    targets: list[Target] = field(default_factory=list)
    kept: dict[str, tuple[nn.Module, str]] = field(default_factory=dict)

    def bytes_saved(self) -> int:
        """Bytes that go: shared weights once, scales counted against."""
        saved = {}
        for target in self.targets:
            for name, weight in target.weights().items():
                stored = formats.stored_bytes(target.form, *target.rows()[name].shape)
                saved[memory.identity(weight)] = weight.nbytes - stored
        return sum(saved.values())

    def kept_groups(self) -> list[Kept]:
        """The kept modules grouped by reason and class, the largest first."""
        groups: dict[tuple[str, str], Kept] = {}
        for name, (module, reason) in self.kept.items():
            key = (reason, type(module).__name__)
            group = groups.setdefault(key, Kept(*key, 0, 0, name))
            group.count += 1
            group.n_bytes += sum(p.nbytes for p in module._parameters.values() if p is not None)
        return sorted(groups.values(), key=lambda group: -group.n_bytes)


def as_patterns(value: Patterns) -> list[str]:
    """None, one pattern or several as a list.

    Raises:
        ValueError: something else.
    """
    patterns = [value] if isinstance(value, str) else list(value or ())
    if not all(isinstance(pattern, str) for pattern in patterns):
        raise ValueError(f"a pattern is a string, got {patterns!r:.80}")
    return patterns


def select(names: Iterable[str], patterns: list[str], what: str) -> set[str]:
    """The module names that a pattern names, and all modules below them.

    Raises:
        ValueError: a pattern matches no module at all.
    """
    names = list(names)
    chosen = set()
    for pattern in patterns:
        roots = {name for name in names if name and fnmatchcase(name, pattern)}
        if not roots:
            wider = f"*.{pattern}"
            hint = f"; {wider!r} does" if any(fnmatchcase(name, wider) for name in names) else ""
            raise ValueError(
                f"{what}: the pattern {pattern!r} matches no module of the model{hint}"
            )
        chosen |= roots
    below = set(chosen)
    for name in names:
        parts = name.split(".")
        if any(".".join(parts[:i]) in chosen for i in range(1, len(parts))):
            below.add(name)
    return below


def first_block(model: nn.Module) -> str:
    """The name of the first decoder block."""
    try:
        return block_list(model) + ".0"
    except ValueError as error:
        raise ValueError(f'critical_layers="first": {error}') from error


def block_list(model: nn.Module) -> str:
    """The name of the list of the decoder's blocks.

    It is the longest nn.ModuleList, of the decoder where there is one; lists inside of a list,
    such as experts, are no lists of blocks.

    Raises:
        ValueError: there is none.
    """
    lists = {n: m for n, m in model.named_modules() if isinstance(m, nn.ModuleList) and len(m)}
    lists = {n: m for n, m in lists.items() if not any(n.startswith(f"{o}.") for o in lists)}
    decoder = model.get_decoder() if hasattr(model, "get_decoder") else None
    inside = {id(m) for m in decoder.modules()} if isinstance(decoder, nn.Module) else set()
    lists = {n: m for n, m in lists.items() if id(m) in inside} or lists
    if not lists:
        raise ValueError(
            f"{type(model).__name__} has no list of blocks (nn.ModuleList), which sample_inputs "
            'and critical_layers="first" need'
        )
    return max(lists, key=lambda name: len(lists[name]))


def make_plan(
    model: nn.Module,
    include: Patterns = None,
    exclude: Patterns = None,
    critical_layers: Patterns = None,
    bits: int = 8,
    overrides: Overrides = None,
) -> Plan:
    """Match every module of the model; see :func:`gpu_poor.quantize` for the arguments."""
    modules: dict[int, tuple[nn.Module, list[str]]] = {}
    for name, module in model.named_modules(remove_duplicate=False):
        modules.setdefault(id(module), (module, []))[1].append(name)
    names = [name for _, aliases in modules.values() for name in aliases]
    critical = as_patterns(critical_layers)
    critical = [first_block(model) if p == "first" else p for p in critical]
    included = None if include is None else select(names, as_patterns(include), "include")
    if included is not None and not included:
        raise ValueError("include: an empty list leaves nothing to quantize; None takes everything")
    excluded = select(names, as_patterns(exclude), "exclude")
    critical_names = select(names, critical, "critical_layers")

    if kind_of(model) is not None:
        raise ValueError(
            f"{type(model).__name__} is itself a layer: put it into a container, for instance "
            "torch.nn.Sequential(layer), so that it can be replaced in place"
        )
    plan = Plan(bits)
    read = read_by_owner(model)
    for module, aliases in modules.values():
        if not any(p is not None for p in module._parameters.values()):
            continue
        kind = kind_of(module)
        if kind is None:
            reason = why_not(module)
        elif id(module) in read:
            reason = "its owner reads the weight itself"
        elif included is not None and not included & set(aliases):
            reason = "not in include"
        elif excluded & set(aliases):
            reason = "excluded"
        elif critical_names & set(aliases):
            reason = "critical layer"
        else:
            reason = unsupported_weight(module, kind)
        if reason is None:
            plan.targets.append(Target(aliases, module, kind))
        else:
            plan.kept[aliases[0]] = (module, reason)
    _keep_ties_whole(plan)
    _choose_formats(model, plan, bits, overrides)
    return plan


def check_formats(bits: int, overrides: Overrides) -> None:
    """Raise ValueError unless bits and what overrides ask for are known."""
    if type(bits) is not int or bits not in formats.DEFAULTS:  # 8.0 and True would be saved as such
        raise ValueError(f"bits must be {_known_bits()}, got {bits!r}")
    if not isinstance(overrides or {}, dict):
        raise ValueError(f"overrides must map patterns to bits or formats, got {overrides!r:.80}")
    for pattern, wanted in (overrides or {}).items():
        if not isinstance(pattern, str):
            raise ValueError(f"overrides: a pattern is a string, got {pattern!r:.80}")
        known = (*formats.DEFAULTS, *formats.FORMATS, *formats.FLOAT)
        if type(wanted) not in (int, str) or wanted not in known:
            raise ValueError(
                f"overrides: {pattern!r} asks for {wanted!r}; known are bits {_known_bits()}, 32 "
                f"and the formats {', '.join(formats.FORMATS)}, fp32"
            )


def _known_bits() -> str:
    *most, last = (str(bits) for bits in sorted(formats.DEFAULTS))
    return f"{', '.join(most)} or {last}"


def _choose_formats(model: nn.Module, plan: Plan, bits: int, overrides: Overrides) -> None:
    """Give every target its format; one that several share gets one for all.

    Raises:
        ValueError: an override names nothing that is quantized, or two formats for one weight.
    """
    check_formats(bits, overrides)
    tied: dict[tuple, list[Target]] = {}
    for target in plan.targets:
        for weight in target.weights().values():
            tied.setdefault(memory.identity(weight), []).append(target)
    sensitive = _sensitive(model, tied)
    for target in plan.targets:
        target.form = formats.default(bits, sensitive=id(target.module) in sensitive)
    asked_for = _asked_for(model, plan, overrides or {})
    for group in tied.values():
        asked = {asked_for[t.name]: t.name for t in group if t.name in asked_for}
        if len(asked) > 1:
            raise ValueError(f"overrides: {' and '.join(asked.values())} are one weight")
        for target in group:
            target.form = next(iter(asked), target.form)
    kept = [target for target in plan.targets if target.form is None]
    plan.kept |= {target.name: (target.module, "fp32 in overrides") for target in kept}
    plan.targets = [target for target in plan.targets if target.form is not None]


def _asked_for(
    model: nn.Module, plan: Plan, overrides: dict[str, int | str]
) -> dict[str, Format | None]:
    """``{name of a target: format, or None for float}`` for those that an override names."""
    every = [name for name, _ in model.named_modules(remove_duplicate=False)]
    found = {}
    for pattern, wanted in overrides.items():
        form = formats.named(wanted)
        matched = select(every, [pattern], "overrides")
        names = [target.name for target in plan.targets if matched & set(target.names)]
        if not names:
            raise ValueError(f"overrides: what {pattern!r} matches is not quantized")
        found |= dict.fromkeys(names, form)
    return found


def _sensitive(model: nn.Module, tied: dict[tuple, list[Target]]) -> set[int]:
    """The ids of the modules in which few bits cost most: the head, and small tables.

    An input embedding that is not tied to a head is no table of that kind: it is large.
    """
    found = set()
    head = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
    try:
        words = model.get_input_embeddings() if hasattr(model, "get_input_embeddings") else None
    except NotImplementedError:
        words = None
    for group in tied.values():
        kinds = {issubclass(target.kind, KINDS["embedding"]) for target in group}
        modules = {id(target.module) for target in group}
        if (
            id(head) in modules
            or kinds == {True, False}
            or (True in kinds and id(words) not in modules)
        ):
            found |= modules
    return found


def _keep_ties_whole(plan: Plan) -> None:
    """A weight that stays in float for one of its modules stays so for all: int8 would add to it.

    One that its modules read as different rows, such as a Linear and a Conv1D, has no int8 form
    for both.
    """
    readers: dict[tuple, dict[tuple, str]] = {}
    for target in plan.targets:
        for name, weight in target.weights().items():
            rows = target.kind.to_rows(target.module, name, weight)
            layouts = readers.setdefault(memory.address(weight), {})
            layouts.setdefault((rows.shape, rows.stride()), target.name)

    def split(target: Target) -> str | None:
        for weight in target.weights().values():
            address = memory.address(weight)
            if address in users:
                return f"tied to {users[address]}, which stays in float"
            if len(readers[address]) > 1:
                return f"tied in different layouts: {', '.join(readers[address].values())}"
        return None

    reasons = [""]
    while any(reason is not None for reason in reasons):
        users = {
            memory.address(parameter): name
            for name, (module, _) in reversed(plan.kept.items())
            for parameter in module._parameters.values()
            if parameter is not None
        }
        reasons = [split(target) for target in plan.targets]
        pairs = list(zip(plan.targets, reasons, strict=True))
        plan.kept |= {t.name: (t.module, reason) for t, reason in pairs if reason is not None}
        plan.targets = [target for target, reason in pairs if reason is None]


def unsupported_weight(module: nn.Module, kind: type[QuantizedModule]) -> str | None:
    """Why the weights of a module of a known kind cannot be quantized, or None."""
    for name in kind.weights_of(module):
        weight = getattr(module, name)
        if weight.dtype not in ops.FLOATS:
            return f"its {name} is {str(weight.dtype).removeprefix('torch.')}"
        if weight.numel() == 0:
            return f"its {name} is empty"
    return None


def why_not(module: nn.Module) -> str:
    """Why no kind takes a module."""
    if all(p is None or p.dim() < 2 for p in module._parameters.values()):
        return NO_MATRIX
    if "forward" in module.__dict__:
        return "its forward was replaced (a hook of accelerate or another library)"
    if hasattr(module, "parametrizations"):
        return "its weight is parametrized"
    if isinstance(module, nn.Embedding) and module.max_norm is not None:
        return "max_norm rewrites the rows it reads"
    return "gpu_poor knows no quantized form of this class"


def check_reduction(model: nn.Module, plan: Plan) -> None:
    """Refuse a plan that leaves too much of the model in float.

    Raises:
        ValueError: naming what stays, the largest first.
    """
    required = 0.0
    total = 0
    wide = [t for t in plan.targets if t.form.bits == 16]
    wide = {memory.identity(weight) for target in wide for weight in target.weights().values()}
    for *_, tensor in memory.persistent_tensors(model):
        total += tensor.nbytes
        if tensor.is_floating_point():
            least = plan.bits == 16 or memory.identity(tensor) in wide
            least = LEAST_REDUCTION_16 if least else LEAST_REDUCTION
            required += tensor.nbytes * least.get(tensor.dtype.itemsize, 0.0)
    saved = plan.bytes_saved()
    if plan.targets and saved >= required:
        return
    kept = [group for group in plan.kept_groups() if group.reason != NO_MATRIX]
    blame = (
        "".join(
            f"\n  {group.count} x {group.module_class} ({group.n_bytes / 1e6:.2f} MB, "
            f"e.g. {group.example}): {group.reason}"
            for group in kept[:10]
        )
        or "\n  its matrices are so narrow that scales, norms and biases outweigh them"
    )
    raise ValueError(
        f"quantizing would make {type(model).__name__} only {saved / max(1, total):.1%} smaller; "
        f"at least {required / max(1, total):.0%} is expected. What stays in float:{blame}\n"
        "The model is unchanged. Pass allow_partial=True to quantize the rest all the same."
    )


def kinds_of(model: nn.Module) -> dict[str, str]:
    """``{name: kind}`` of the quantized modules of a model, as saved in its config."""
    return {n: m.kind for n, m in model.named_modules() if isinstance(m, QuantizedModule)}


def formats_of(model: nn.Module) -> dict[str, str]:
    """``{name: format}`` of the quantized modules that are not int8."""
    modules = {n: m for n, m in model.named_modules() if isinstance(m, QuantizedModule)}
    return {n: m.format.name for n, m in modules.items() if m.format != formats.INT8}


def ties_of(model: nn.Module, scales: bool = True) -> dict[str, str]:
    """``{name: owner}`` of the quantized modules that use another one's int8 weight.

    The owner is the one that transformers saves, else an embedding, else the first. Modules with
    the same weight but scales of their own are not tied, unless ``scales`` is False.
    """
    sources = set(getattr(model, "all_tied_weights_keys", {}).values())
    groups: dict[tuple, list[tuple[bool, bool, str]]] = {}
    for name, module in model.named_modules():
        if isinstance(module, QuantizedModule) and module.weight_names == ("weight",):
            rank = (f"{name}.weight" not in sources, isinstance(module, KINDS["linear"]), name)
            scale = memory.identity(module.weight_scale) if scales else ()
            key = (memory.identity(module.weight), scale)
            groups.setdefault(key, []).append(rank)
    ties = {}
    for group in groups.values():
        owner = min(group, key=lambda rank: rank[:2])[2]
        ties |= {name: owner for *_, name in group if name != owner}
    return ties


def share_scales(model: nn.Module) -> dict[str, str]:
    """Make tied modules read their owner's scale; returns :func:`ties_of`."""
    ties = ties_of(model)
    for name, owner in ties.items():
        source = model.get_submodule(owner)
        source.own_scale("weight", source.weight_scale)
        model.get_submodule(name).share_scale("weight", source)
    return ties
