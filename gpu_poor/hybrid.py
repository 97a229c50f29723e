"""``make_it_work_hybrid(model)``: calibrate, smooth, plan for the memory there is, quantize."""

from collections.abc import Callable

from torch import nn

from gpu_poor.memory_plan import MemoryPlan
from gpu_poor.metrics_input import Text
from gpu_poor.plan import Patterns
from gpu_poor.planner import plan_memory
from gpu_poor.quantize import check_data, quantize
from gpu_poor.samples import SampleInputs
from gpu_poor.strategies import Strategies
from gpu_poor.strategies.gptq import Gptq
from gpu_poor.strategies.smoothquant import SmoothQuant


def make_it_work_hybrid(
    model: nn.Module,
    sample_inputs: SampleInputs | None = None,
    quantize_embeddings: bool = True,
    smoothing_alpha: float | None = 0.3,
    memory_target: float | int | str | None = 0.4,
    bits: int | None = None,
    *,
    context: int | None = None,
    tokenizer: Callable | None = None,
    strategy: Strategies = None,
    critical_layers: Patterns = None,
    include: Patterns = None,
    exclude: Patterns = None,
    activation: str = "a16",
    evaluate_on: Text | None = None,
    max_kl: float | None = None,
    plan_path: str | None = None,
    work_folder: str | None = None,
    progress: bool | None = None,
    verbose: bool = True,
) -> nn.Module:
    """Make a model fit, in place: each layer gets the bits that its sensitivity asks for.

    The sensitivity of every layer to every format is predicted (docs/planning.md), the plan of
    least predicted loss within the memory target is printed, and saved if asked, before anything
    is touched; then the model is quantized by it, with calibration if there is data. All of it
    succeeds or the model is left as it was.

    Args:
        model: a causal language model with float weights.
        sample_inputs: texts like those the model is for, or token ids, see
            :func:`gpu_poor.samples.token_rows`. Without them everything is done by the weights, and
            by text that the model writes itself.
        quantize_embeddings: False keeps embeddings, and heads tied to them, in float.
        smoothing_alpha: of SmoothQuant, with sample_inputs, folded into norms and linears; None
            leaves only outlying gains to be evened out ("equalize").
        memory_target: a fraction of the original size, bytes, or "6GB"; with ``context`` the KV
            cache of so many tokens counts too.
        bits: 4, 8 or 16 for all layers (with 4, the head and small tables still 8) instead of a
            plan; ``memory_target`` is then not used.
        strategy: instead of smoothing_alpha, as for :func:`gpu_poor.quantize`.
        critical_layers, include, exclude, activation, evaluate_on, max_kl, work_folder, progress,
            tokenizer: as for :func:`gpu_poor.quantize`.
        plan_path: save the plan there as JSON.
        verbose: print plan and receipt.

    Returns:
        The same model; ``model.gpu_poor_plan`` is the plan, with what was then measured in it. A
        model that fits as it is stays as it is, in float: the plan says so.

    Raises:
        ValueError: what :func:`gpu_poor.plan_memory` and :func:`gpu_poor.quantize` raise.
    """
    if strategy is None and sample_inputs is not None and smoothing_alpha is not None:
        # Without input scales: with 16-bit activations they gain nothing (docs/methods.md).
        strategy = [SmoothQuant(smoothing_alpha, keep=False), Gptq()]
    check_data(
        strategy, sample_inputs, work_folder, evaluate_on, max_kl
    )  # before minutes of planning
    if sample_inputs is not None and not isinstance(sample_inputs, str | dict | list | tuple):
        sample_inputs = _read_once(sample_inputs)
    common = dict(
        strategy=strategy, sample_inputs=sample_inputs, tokenizer=tokenizer, progress=progress
    )
    options = common | dict(
        activation=activation,
        evaluate_on=evaluate_on,
        max_kl=max_kl,
        work_folder=work_folder,
        verbose=verbose,
    )
    patterns = dict(include=include, exclude=exclude, critical_layers=critical_layers)
    if bits is not None:
        if not quantize_embeddings:
            raise ValueError("bits and quantize_embeddings=False: use quantize(exclude=...)")
        for name, value in (("context", context), ("plan_path", plan_path)):
            if value is not None:
                raise ValueError(f"{name} belongs to a plan, and with bits there is none")
        return quantize(model, bits, **patterns, **options)
    if memory_target is None:
        raise ValueError("needs a memory_target or bits")
    found = plan_memory(
        model,
        memory_target,
        context=context,
        quantize_embeddings=quantize_embeddings,
        **patterns,
        **common,
    )
    if plan_path is not None:
        found.save(plan_path)
    if verbose:
        print(found)
    if found.overrides:
        quantize(model, **found.options, **options)
    quality = model.gpu_poor_receipt.quality if found.overrides else "unmeasured"
    found.measure(model, None if isinstance(quality, str) else quality["kl_mean"])
    model.gpu_poor_plan: MemoryPlan = found
    if plan_path is not None:
        found.save(plan_path)
    return model


def _read_once(sample_inputs: SampleInputs) -> SampleInputs:
    """An iterator is read twice, by the plan and by calibration."""
    one = hasattr(sample_inputs, "shape") or hasattr(sample_inputs, "keys")
    return sample_inputs if one else list(sample_inputs)
