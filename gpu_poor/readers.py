"""Which layers have an owner that reads ``layer.weight`` itself, instead of calling the layer.

Such an owner would multiply with int8 values, or cast what it computes to int8. The owners are
found by reading the source of their methods, which nothing executes.
"""

import ast
import functools
import inspect
import re
from collections.abc import Iterator
from types import CodeType, FunctionType

from torch import nn

#: A way from an owner to a module below it, name by name; "*" is any one name.
Path = tuple[str, ...]

#: ``{class of the owner: ways}`` where another module does the reading, which no scan finds.
INDIRECT: dict[str, tuple[str, ...]] = {
    "DebertaForMaskedLM": ("deberta.embeddings.word_embeddings",),
    "DebertaV2ForMaskedLM": ("deberta.embeddings.word_embeddings",),
    "PerceiverForMaskedLM": ("perceiver.input_preprocessor.embeddings",),
}


def _bloom_slices(owner: nn.Module) -> bool:
    return owner.pretraining_tp > 1 and owner.slow_but_exact


def _not_if_given_ids(owner: nn.Module) -> bool:
    return False


#: When the owners of these classes read; all others always. Those for which it depends on how they
#: are called, Gemma 4 and its like, look up which ids ``inputs_embeds`` were made of if they get
#: no ids. They raise if no row matches, and so their largest matrix need not stay in float.
READS_WHEN = {
    "BloomAttention": _bloom_slices,
    "BloomMLP": _bloom_slices,
    "DebertaForMaskedLM": lambda owner: not owner.legacy,
    "DebertaV2ForMaskedLM": lambda owner: not owner.legacy,
    "Gemma4Model": _not_if_given_ids,
    "Gemma4TextModel": _not_if_given_ids,
    "Qwen4ExpTextModel": _not_if_given_ids,
}

#: Methods that are no part of a forward.
_NO_FORWARD = re.compile(
    r"__init__|_?init_.*|.*_weights|reset_parameters|.*resize.*|.*prune.*"
    r"|(get|set)_(in|out)put_embeddings"
)

#: Functions that use the weights they are given in training with CUDA kernels only.
_CUDA_ONLY = re.compile(r"(falcon_)?mamba_inner_fn|mamba2?_split_conv1d_scan_combined")

#: What may be asked of an int8 weight as of a float one.
_ASKED = {"shape", "size", "dim", "ndim", "numel", "device", "is_cuda", "is_meta", "requires_grad"}


def read_by_owner(model: nn.Module) -> set[int]:
    """The ids of the modules whose weight an owner reads."""
    found = set()
    for owner in model.modules():
        names = {cls.__name__ for cls in type(owner).__mro__}
        if not owner._modules or not all(READS_WHEN[n](owner) for n in names & set(READS_WHEN)):
            continue
        ways = {tuple(way.split(".")) for n in names & set(INDIRECT) for way in INDIRECT[n]}
        for way in ways | weight_reads(type(owner)):
            found |= {id(module) for module in _below(owner, way)}
    return found


def _below(owner: nn.Module, way: Path) -> list[nn.Module]:
    """The modules that a way leads to."""
    modules = [owner]
    for part in way:
        modules = [
            child
            for module in modules
            for name, child in module._modules.items()
            if child is not None and part in ("*", name)
        ]
    return modules


@functools.cache
def weight_reads(cls: type) -> frozenset[Path]:
    """The ways to modules whose ``weight`` the methods of a class read.

    A method without source, such as one typed into a console, counts as reading nothing.
    """
    found = set()
    for base in cls.__mro__:
        for name, member in vars(base).items():
            member = getattr(member, "fget", getattr(member, "__func__", member))
            if callable(member) and not _NO_FORWARD.fullmatch(name):
                function = inspect.unwrap(member)
                if isinstance(function, FunctionType) and _names_weight(function.__code__):
                    found |= _reads_of(function)
    return frozenset(found)


def _names_weight(code: CodeType) -> bool:
    """Whether a function speaks of any ``weight``: parsing all of them would take seconds."""
    inner = (const for const in code.co_consts if isinstance(const, CodeType))
    return "weight" in code.co_names or any(map(_names_weight, inner))


def _reads_of(function: FunctionType) -> set[Path]:
    try:
        source = inspect.getsource(function)
        # An indented method needs something to be in; dedent would trip over its docstring.
        tree = ast.parse(f"if 1:\n{source}" if source[0].isspace() else source)
    except (OSError, TypeError, SyntaxError):
        return set()
    parents = {child: node for node in ast.walk(tree) for child in ast.iter_child_nodes(node)}
    aliases = _aliases(tree, function.__code__.co_varnames[:1])
    reads = [
        (way, node)
        for node in ast.walk(tree)
        if isinstance(node, ast.Attribute) and node.attr == "weight"
        for way in _ways(node.value, aliases)
        if way  # the empty one is the owner's own weight
    ]
    guarded = {way for way, node in reads if _guards(node, parents)}
    return {way for way, node in reads if _is_read(node, parents, way in guarded)}


def _aliases(tree: ast.AST, first: tuple[str, ...]) -> dict[str, set[Path]]:
    """What the names in a method stand for: ``self``, and those of modules below it."""
    aliases = {name: {()} for name in first}
    for node in ast.walk(tree):
        if isinstance(node, ast.Assign) and len(node.targets) == 1:
            pairs = [(node.targets[0], _ways(node.value, aliases))]
        elif isinstance(node, ast.For | ast.comprehension):
            pairs = _loops(node.target, node.iter, aliases)
        else:
            continue
        for target, ways in pairs:
            if isinstance(target, ast.Name) and ways:
                aliases[target.id] = aliases.get(target.id, set()) | ways
    return aliases


def _loops(
    target: ast.AST, over: ast.AST, aliases: dict[str, set[Path]]
) -> Iterator[tuple[ast.AST, set[Path]]]:
    """``for i, layer in enumerate(self.layers)`` and the like: names and what they stand for."""
    targets, sources = [target], [over]
    if isinstance(over, ast.Call) and isinstance(over.func, ast.Name) and over.args:
        targets = getattr(target, "elts", targets)
        sources = [None, over.args[0]] if over.func.id == "enumerate" else over.args
    for name, source in zip(targets, sources, strict=False):
        yield name, {(*way, "*") for way in _ways(source, aliases)}


def _ways(node: ast.AST | None, aliases: dict[str, set[Path]]) -> set[Path]:
    """The modules an expression may stand for, as ways from ``self``."""
    if isinstance(node, ast.Name):
        return aliases.get(node.id, set())
    if isinstance(node, ast.Attribute):
        return {(*way, node.attr) for way in _ways(node.value, aliases)}
    if isinstance(node, ast.Subscript):
        key = getattr(node.slice, "value", None)
        one = str(key) if isinstance(key, str | int) else "*"
        step = () if isinstance(node.slice, ast.Slice) else (one,)
        return {way + step for way in _ways(node.value, aliases)}
    if isinstance(node, ast.IfExp):
        return _ways(node.body, aliases) | _ways(node.orelse, aliases)
    return set()


def _guards(weight: ast.AST, parents: dict[ast.AST, ast.AST]) -> bool:
    """Whether a dtype is asked for int8 or for a float: its method knows of quantized weights."""
    asked = parents[parents[weight]]
    if isinstance(asked, ast.NamedExpr):
        asked = parents[asked]
    text = ast.unparse(asked)
    return text.endswith(".is_floating_point") or isinstance(asked, ast.Compare) and "int8" in text


def _is_read(weight: ast.AST, parents: dict[ast.AST, ast.AST], guarded: bool) -> bool:
    """Whether ``x.weight`` is used for its values or, unless guarded, to cast to its dtype."""
    user = parents[weight]
    if isinstance(user, ast.keyword):
        user = parents[user]
    if isinstance(user, ast.Attribute):
        if user.attr == "dtype":
            return not guarded and not isinstance(parents[user], ast.Compare)
        return user.attr not in _ASKED
    if isinstance(user, ast.Compare):
        return not all(isinstance(op, ast.Is | ast.IsNot) for op in user.ops)
    if isinstance(user, ast.Call):
        called = ast.unparse(user.func)
        return called not in ("isinstance", "hasattr") and not _CUDA_ONLY.fullmatch(called)
    return not isinstance(user, ast.Assign) or weight not in user.targets  # tying is no reading
