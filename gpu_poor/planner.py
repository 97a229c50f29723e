"""A plan for the memory you have: which format each module gets, before anything is touched.

    plan = gpu_poor.plan(model, "500MB", sample_inputs=text)   # prints it, changes nothing
    quantize(model, **plan.options)

Each module keeps its floats or takes one of the formats, tied modules together, so that the sum of
what they cost (gpu_poor/sensitivity.py) is the least that fits (gpu_poor/knapsack.py).
"""

import glob
import math
from collections.abc import Callable, Iterable
from numbers import Integral, Real
from pathlib import Path

from torch import nn

from gpu_poor import knapsack, memory
from gpu_poor.formats import FORMATS, Format, find, stored_bytes
from gpu_poor.memory_plan import MB, Decision, MemoryPlan
from gpu_poor.metrics_input import n_positions
from gpu_poor.nn import KINDS, kind_of
from gpu_poor.nn.linear import INPUT_SCALE
from gpu_poor.plan import Patterns, Plan, as_patterns, block_list, make_plan
from gpu_poor.quantize import check_finite, check_quantizable, quantize
from gpu_poor.samples import SampleInputs, token_rows
from gpu_poor.sensitivity import Fisher, RoundTrip, Unit, fisher, losses, nearest, own_text, units
from gpu_poor.strategies import Strategies, recipe

#: Of sample_inputs, tokens that are looked at: more change predictions by a few per cent.
N_TOKENS = 4096


def plan(
    model: nn.Module,
    memory_target: float | int | str,
    *,
    path: str | Path | None = None,
    dry_run: bool = True,
    verbose: bool = True,
    **options,
) -> MemoryPlan:
    """Plan for a target and print the plan; :func:`gpu_poor.planner.plan_memory` has the options.

    Args:
        path: save the plan here as JSON, before anything is touched.
        dry_run: False quantizes the model, in place, and notes the bytes that it then has.
        verbose: print the plan, and the receipt of what was quantized.
    """
    found = plan_memory(model, memory_target, **options)
    if path is not None:
        found.save(path)
    if verbose:
        print(found)
    if not dry_run:
        if found.overrides:
            quantize(model, **found.options, verbose=verbose)
        found.measure(model)
    return found


def plan_memory(
    model: nn.Module,
    memory_target: float | int | str,
    *,
    context: int | None = None,
    sample_inputs: SampleInputs | None = None,
    tokenizer: Callable | None = None,
    formats: Iterable[str] | None = None,
    quantize_embeddings: bool = True,
    include: Patterns = None,
    exclude: Patterns = None,
    critical_layers: Patterns = None,
    strategy: Strategies = None,
    n_tokens: int = N_TOKENS,
    round_trip: RoundTrip = nearest,
    progress: bool | None = None,
) -> MemoryPlan:
    """The formats of all modules that cost least within a target. The model is left as it was.

    Args:
        model: as for :func:`gpu_poor.quantize`.
        memory_target: a fraction of the original bytes (a float up to 1), bytes (an int), or
            "6GB", "500 MB", "6GiB", "40%".
        context: count the KV cache of so many tokens too, one sequence, in the model's dtype.
        sample_inputs: what the model is for, see :func:`gpu_poor.samples.token_rows`. Without it a
            language model is judged by text that it writes itself, any other one by its weights.
        tokenizer: for texts in sample_inputs.
        formats: names of those to choose from; default: all. Staying in float is always a choice.
        quantize_embeddings: False keeps embeddings, and heads tied to them, in float.
        include, exclude, critical_layers: as for :func:`gpu_poor.quantize`.
        strategy: the one that ``quantize`` will be given: input scales that it may keep count.
        n_tokens: look at no more of sample_inputs.
        round_trip: how weights will be rounded, if not to nearest.
        progress: show a bar while text is looked at; None shows it on a terminal.

    Raises:
        ValueError: a malformed target, or one that is smaller than anything possible, which the
            message then says; unknown formats; what quantize or token_rows refuse; activations
            that are not finite.
    """
    check_quantizable(model)
    original = memory.parameter_bytes(model)
    target_bytes = parse_target(memory_target, original)
    forms = [find(name) for name in (FORMATS if formats is None else formats)]
    kv_bytes = 0 if context is None else _kv_bytes(model, context)
    matched, asked = _match(model, quantize_embeddings, include, exclude, critical_layers)
    every = units(matched)
    keeps = recipe(strategy, calibrated=sample_inputs is not None).keeps
    scaled = f"{block_list(model)}." if keeps else None
    sizes = [_sizes(unit, forms, scaled) for unit in every]
    rest = original - sum(stored[None] for stored in sizes)
    least = rest + kv_bytes + sum(min(stored.values()) for stored in sizes)
    if least > target_bytes:
        cache = f", {kv_bytes:,} of them for the KV cache" if kv_bytes else ""
        share = math.ceil(1000 * least / original) / 10  # up: that much is possible
        among = "" if formats is None else f", with {', '.join(form.name for form in forms)}"
        raise ValueError(
            f"memory_target={memory_target!r} is {target_bytes:,} bytes, but the smallest possible "
            f"is {least:,} bytes ({least / MB:.2f} MB, {share} % of the model){cache}{among}"
        )
    check_finite((name, p.detach()) for name, p in model.named_parameters())
    rows, basis = _texts(model, sample_inputs, tokenizer, n_tokens)
    information = fisher(model, every, rows, progress) if rows else None
    options = [
        _options(unit, stored, information, round_trip)
        for unit, stored in zip(every, sizes, strict=True)
    ]
    best = knapsack.choose([list(o.values()) for o in options], target_bytes - kv_bytes - rest)
    decisions = []
    for unit, choices, i in zip(every, options, best.indices, strict=True):
        names = [name for target in unit.targets for name in target.names]
        form, (n_bytes, loss) = list(choices.items())[i]
        decisions.append(Decision(names, form, choices[None][0], n_bytes, loss))
    return MemoryPlan(
        model=type(model).__name__,
        memory_target=memory_target,
        target_bytes=target_bytes,
        context=context,
        kv_bytes=kv_bytes,
        original_bytes=original,
        predicted_bytes=rest + best.size,
        predicted_kl=best.loss if rows else None,
        gap=1 - best.bound / best.loss if best.loss else 0.0,
        basis=basis,
        n_tokens=sum(ids.numel() for ids in rows),
        decisions=decisions,
        asked=asked,
    )


def parse_target(memory_target: float | int | str, original: int) -> int:
    """A target in bytes; fractions are of ``original``.

    Raises:
        ValueError: it is not of a known form, or not above 0.
    """
    value, known = memory_target, True
    if isinstance(value, str):
        value = memory.size_of(value, memory.UNITS | {"%": original / 100})
        known = value is not None
    elif isinstance(value, bool) or not isinstance(value, Real):
        known = False
    elif not isinstance(value, Integral):
        known = 0 < value <= 1
        value = value * original if known else 0
    if not known:
        raise ValueError(
            "memory_target must be a fraction of the original (0.4), bytes (an int) or a size like "
            f'"6GB", "500MB", "6GiB" or "40%"; got {memory_target!r}'
        )
    if value < 1:
        raise ValueError(f"memory_target must be above 0, got {memory_target!r}")
    if value > memory.LARGEST:
        raise ValueError(
            f"memory_target must be at most {memory.LARGEST} bytes: give what there is"
        )
    return int(value)


def _match(
    model: nn.Module,
    quantize_embeddings: bool,
    include: Patterns,
    exclude: Patterns,
    critical_layers: Patterns,
) -> tuple[Plan, list[str]]:
    """The modules to decide on, and patterns of those that were asked to stay in float."""
    asked = as_patterns(exclude)
    matched = make_plan(model, include, asked, critical_layers)
    if not quantize_embeddings:
        tables = [t.name for t in matched.targets if issubclass(t.kind, KINDS["embedding"])]
        asked += map(glob.escape, tables)
        matched = make_plan(model, include, asked, critical_layers)
    kept = [name for name, (module, _) in matched.kept.items() if kind_of(module) is not None]
    return matched, list(dict.fromkeys([*asked, *map(glob.escape, kept)]))


def _sizes(unit: Unit, forms: list[Format], scaled: str | None) -> dict[str | None, int]:
    """The bytes of a unit in float (None), and in the formats that make it smaller.

    Args:
        scaled: what the names of linears begin with that may keep an input scale. Calibration
            gives one to a few of them, but which depends on it, and on what stays in float.
    """
    weights = [weight.rows for weight in unit.weights.values()]
    before = sum(rows.nbytes for rows in weights)
    stored = {form.name: sum(stored_bytes(form, *rows.shape) for rows in weights) for form in forms}
    if scaled and any(t.is_linear and t.name.startswith(scaled) for t in unit.targets):
        columns = sum(rows.shape[-1] for rows in weights)
        for form in forms:
            stored[form.name] += INPUT_SCALE.itemsize * columns * (form.levels is not None)
    return {None: before} | {name: n_bytes for name, n_bytes in stored.items() if n_bytes < before}


def _options(
    unit: Unit,
    stored: dict[str | None, int],
    information: dict[tuple, Fisher] | None,
    round_trip: RoundTrip,
) -> dict[str | None, knapsack.Option]:
    """``{format: (bytes, loss)}`` of those that can hold the weights of a unit."""
    names = [name for name in stored if name is not None]
    found = losses(unit, [find(name) for name in names], information, round_trip)
    lost = {None: 0.0} | dict(zip(names, found, strict=True))
    # A weight may be too large for the float16 of a format: then its loss is not finite.
    return {name: (stored[name], loss) for name, loss in lost.items() if math.isfinite(loss)}


def _texts(model: nn.Module, sample_inputs, tokenizer, n_tokens: int) -> tuple[list, str]:
    """What to look at, and the basis of the predictions."""
    causal = hasattr(model, "can_generate") and model.can_generate()
    if not causal or getattr(model.config, "is_encoder_decoder", False):
        if sample_inputs is not None:
            raise ValueError(
                f"{type(model).__name__} is no causal language model of transformers, which "
                "sample_inputs are for: leave them out"
            )
        return [], "weights"
    if sample_inputs is not None:
        return token_rows(model, sample_inputs, tokenizer, n_tokens=n_tokens), "samples"
    return own_text(model), "own text"


def _kv_bytes(model: nn.Module, context: int) -> int:
    if not isinstance(context, int) or isinstance(context, bool) or context < 1:
        raise ValueError(f"context must be a number of tokens, got {context!r}")
    if context > n_positions(model):
        raise ValueError(f"context={context}: the model takes at most {n_positions(model)} tokens")
    return memory.kv_cache_bytes(model, context)
