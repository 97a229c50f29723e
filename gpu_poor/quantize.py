"""``quantize(model)``: match the modules, quantize every weight, then swap. All or nothing."""

import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path
from queue import SimpleQueue
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from gpu_poor import memory, ops
from gpu_poor.calibrate import CALIBRATION_LENGTH, calibrate
from gpu_poor.folds import Decided, smooth
from gpu_poor.formats import Format
from gpu_poor.fusion import fuse as fuse_blocks
from gpu_poor.fusion import unfuse
from gpu_poor.metrics_input import Text
from gpu_poor.modules import not_finite, put
from gpu_poor.nn import QuantizedModule
from gpu_poor.nn.base import Stored, quantize_rows, take_hooks
from gpu_poor.plan import (
    Overrides,
    Patterns,
    Plan,
    Target,
    as_patterns,
    check_formats,
    check_reduction,
    make_plan,
    share_scales,
)
from gpu_poor.progress import bar
from gpu_poor.receipt import make_receipt
from gpu_poor.samples import SampleInputs, token_rows, warn_if_few
from gpu_poor.strategies import MSE, Recipe, Strategies, recipe

#: Pages of a mapped checkpoint are let go of each time this many bytes of it have been read.
READ_BYTES = 2**28

if TYPE_CHECKING:
    from gpu_poor.metrics import Recording


@torch.inference_mode(False)  # what is made in that mode would have no gradient through it
def quantize(
    model: nn.Module,
    bits: int = 8,
    *,
    overrides: Overrides = None,
    strategy: Strategies = None,
    sample_inputs: SampleInputs | None = None,
    tokenizer: Callable | None = None,
    work_folder: str | Path | None = None,
    evaluate_on: Text | None = None,
    max_kl: float | None = None,
    include: Patterns = None,
    exclude: Patterns = None,
    activation: str = "a16",
    critical_layers: Patterns = None,
    allow_partial: bool = False,
    fuse: bool = True,
    progress: bool | None = None,
    verbose: bool = True,
) -> nn.Module:
    """Replace the matrices of a model by ones of 8, 4 or 16 bits, in place.

    Linear layers, GPT-2's Conv1D, embeddings and transformers' fused experts are taken; a weight
    tied between an embedding and lm_head is stored once. Everything else stays as it is and is
    listed in the receipt, which is printed and kept as ``model.gpu_poor_receipt``. Either all of
    it succeeds or the model is left as it was: until the last weight is done, both the float
    model and the quantized one are there. The float one need not be in memory: where its weights
    lie in mapped files, as ``from_pretrained`` leaves them unless it has to convert them to another
    dtype, they are read block by block and let go of, and the model may be larger than memory.

    Args:
        model: any torch module with float32, bfloat16 or float16 weights.
        bits: 8, or 4: groups of 64 columns with a scale and a minimum each, 4.5 bits a weight, and
            8 bits for the head and small tables; or 16: bfloat16.
        overrides: ``{pattern: 16, 8, 4 or a name in gpu_poor.formats.FORMATS}`` for parts of the
            model, 32 or "fp32" to keep one in float; of several that match a module the last one
            counts.
        strategy: how the numbers are chosen: a name in gpu_poor.strategies.STRATEGIES, a configured
            instance, or one that rounds and one that smooths. By default ("equalize", "mse"),
            which need no data, and ("equalize", "gptq") with sample_inputs.
        sample_inputs: texts like those the model is for, or token ids (gpu_poor.samples): the
            decoder's blocks are calibrated on them, on all of them. Thousands of tokens; below
            about 1000 the result may be worse than without, and there is a warning.
        tokenizer: for sample_inputs and evaluate_on; default: the one saved with the model.
        work_folder: calibration keeps its finished blocks there, and goes on after them if it was
            killed and is started again with the same model, data and options; the receipt says so.
            It also holds hidden states, 2 x tokens x hidden size numbers: delete it when done.
        evaluate_on: text to measure the quality on, for the receipt; no calibration text. The float
            model's answers are recorded first (gpu_poor.metrics.record).
        max_kl: refuse to return a model whose mean KL divergence is larger, in nats.
        include: fnmatch patterns over module names; only these modules, and what is below them.
        exclude: the same, to leave out.
        activation: "a16" (default), "a8" or "a32": how activations enter the integer products.
        critical_layers: patterns of modules to keep in float, or "first" for the first block.
        allow_partial: accept a model of which much stays in float.
        fuse: let the decoder blocks of known families run as fused C calls (gpu_poor.fuse).
        progress: show a bar; None shows it on a terminal when the work takes more than a second.
        verbose: print the receipt.

    Returns:
        The same model. A transformers model can be saved with ``save_pretrained`` and loaded by
        plain ``from_pretrained`` after ``import gpu_poor``.

    Raises:
        ValueError: bits, a strategy or activation are unknown; a pattern matches nothing; the model
            is quantized already or has no data (meta device); a parameter, or what a layer reads
            of the calibration data, is not finite (the error names it); max_kl is exceeded; or
            its bytes would fall by less than 70 % (40 % for 16-bit models; 45 % to 16 bits, which
            spare a 16-bit model nothing) and allow_partial is False. The model is unchanged.
    """
    started = time.perf_counter()
    check_options(bits, activation, overrides)
    how = check_data(strategy, sample_inputs, work_folder, evaluate_on, max_kl)
    check_quantizable(model)
    options = dict(include=include, exclude=exclude, critical_layers=critical_layers)
    options = {
        name: None if value is None else as_patterns(value) for name, value in options.items()
    }
    plan = make_plan(model, **options, bits=bits, overrides=overrides)
    if not allow_partial or not plan.targets:
        check_reduction(model, plan)
    check_finite(target_free_parameters(model, plan))
    before, kept = memory.by_class(model), plan.kept_groups()
    recording = None
    if evaluate_on is not None:
        recording = _record(model, evaluate_on, tokenizer, progress)
    if sample_inputs is None:
        done = smooth(model, plan, how)
    else:
        rows = token_rows(model, sample_inputs, tokenizer, length=CALIBRATION_LENGTH)
        if how.needs_inputs:
            warn_if_few(rows)
        done = calibrate(model, plan, how, rows, activation, progress, work_folder)
    quantized = quantize_weights(plan, how, done, progress)
    with restoring(model):
        swap(model, plan.targets, quantized, activation)
        done.apply_norms(model)
        share_scales(model)
        if _is_transformers_model(model):
            from gpu_poor import hf, hf_attach

            options |= dict(bits=bits, overrides=overrides, strategy=how.names)
            options |= dict(activation=activation, allow_partial=allow_partial)
            hf.attach(model, **options)
        if fuse:  # before it is measured: as it will run
            fuse_blocks(model)
        receipt = make_receipt(model, before, kept, done.remarks(how))
        if recording is not None:
            receipt.quality = _measure(model, recording, max_kl, progress)
        if _is_transformers_model(model):
            hf_attach.keep_receipt(model, receipt)
        model.gpu_poor_receipt = receipt
    del plan, quantized, done  # the last reference to the float weights
    with suppress(Exception):  # memory that is not given back is no reason to fail now
        memory.leave_files(model)
        memory.trim()
    receipt.seconds = time.perf_counter() - started
    if verbose:
        print(receipt)
    return model


def _record(model: nn.Module, text: Text, tokenizer, progress: bool | None) -> "Recording":
    from gpu_poor import metrics  # needs transformers, as its models do

    return metrics.record(model, text, tokenizer, progress=progress)


def _measure(
    model: nn.Module, recording: "Recording", max_kl: float | None, progress: bool | None
) -> dict:
    """The quality of the quantized model.

    Raises:
        ValueError: it is worse than max_kl allows.
    """
    from gpu_poor import metrics

    quality = metrics.evaluate(model, recording, progress=progress)
    if max_kl is not None and not quality.kl_mean <= max_kl:
        raise ValueError(
            f"mean KL divergence {quality.kl_mean:.3g} is above max_kl={max_kl:g}; the model is "
            "unchanged. Use more bits, calibration data (sample_inputs) or critical_layers"
        )
    return quality.to_dict()


def dequantize(model: nn.Module, dtype: torch.dtype | None = None) -> nn.Module:
    """Replace the quantized modules by float ones with the dequantized weights, in place.

    The result is an ordinary model that answers as the quantized one does, within rounding.

    Args:
        dtype: of the weights; by default the one the module answers in.
    """
    unfuse(model)
    shared: dict[tuple, nn.Parameter] = {}
    for name, module in list(model.named_modules(remove_duplicate=False)):
        if isinstance(module, QuantizedModule):
            float_module = module.to_float(dtype)
            take_hooks(float_module, module)
            for weight in module.weight_names:
                getattr(float_module, weight).requires_grad_(not module.frozen)
            if module.weight_names == ("weight",):
                key = tuple(memory.identity(getattr(module, name)) for name in module.storage())
                float_module.weight = shared.setdefault(key, float_module.weight)
            put(model, name, float_module)
    if hasattr(model, "gpu_poor_receipt"):
        del model.gpu_poor_receipt
    if _is_transformers_model(model):
        from gpu_poor import hf_attach

        hf_attach.detach(model)
    return model


# -- checks ------------------------------------------------------------------------------------


def check_options(bits: int, activation: str, overrides: Overrides = None) -> None:
    """Raise ValueError unless all are known."""
    check_formats(bits, overrides)
    if not isinstance(activation, str) or activation not in ops.ACTIVATIONS:
        modes = ", ".join(ops.ACTIVATIONS)
        raise ValueError(f"activation must be one of {modes}, got {activation!r}")


def check_data(strategy: Strategies, sample_inputs, work_folder, evaluate_on, max_kl) -> Recipe:
    """The recipe, if it has the data that it and the other options need.

    Raises:
        ValueError: it has not; or a strategy is unknown.
    """
    how = recipe(strategy, calibrated=sample_inputs is not None)
    if how.needs_inputs and sample_inputs is None:
        needy = [part.name for part in how if part is not None and part.needs_inputs]
        raise ValueError(f"strategy {' and '.join(needy)} needs sample_inputs")
    if work_folder is not None and sample_inputs is None:
        raise ValueError("work_folder is for calibration: it needs sample_inputs")
    if max_kl is not None and evaluate_on is None:
        raise ValueError("max_kl needs a text to measure on: evaluate_on")
    return how


def check_quantizable(model: nn.Module) -> None:
    """Raise unless the model is a float model with data."""
    if not isinstance(model, nn.Module):
        raise TypeError(f"quantize takes a torch.nn.Module, got {type(model).__name__}")
    for name, module in model.named_modules():
        if isinstance(module, QuantizedModule):
            raise ValueError(
                f"the model is already quantized by gpu_poor ({name or 'itself'}): load the float "
                "original to quantize it in another way"
            )
    method = getattr(model, "quantization_method", None)
    if getattr(model, "is_quantized", False) or method is not None:
        raise ValueError(f"the model is already quantized ({method or 'by another library'})")
    for name, parameter in model.named_parameters():
        if parameter.device.type == "meta":
            raise ValueError(
                f"{name} is on the meta device: there is nothing to quantize. If a device_map left "
                'it on the disk, load the model with device_map="cpu"'
            )
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        if tensor.layout is not torch.strided:
            raise ValueError(f"{name} is sparse: quantize takes models of dense tensors")


def check_finite(parameters: Iterator[tuple[str, Tensor]]) -> None:
    """Raise ValueError naming the first parameter with a NaN or an infinity."""
    for name, parameter in parameters:
        if not parameter.is_floating_point():
            continue
        if parameter.itemsize == 1:  # torch cannot ask a float8
            parameter = parameter.float()
        if not bool(torch.isfinite(parameter).all()):
            raise not_finite(name)


def target_free_parameters(model: nn.Module, plan: Plan) -> Iterator[tuple[str, Tensor]]:
    """The parameters that stay in float; the others are checked while they are quantized."""
    taken = {id(weight) for target in plan.targets for weight in target.weights().values()}
    return ((n, p.detach()) for n, p in model.named_parameters() if id(p) not in taken)


# -- the work ----------------------------------------------------------------------------------

Quantized = dict[int, Stored]


@torch.no_grad()
def quantize_weights(plan: Plan, how: Recipe, done: Decided, progress: bool | None) -> Quantized:
    """``{id of the float weight: what it is stored as}``; the model is not touched.

    Args:
        how: a rounding that needs inputs is for what ``done`` has already; the rest is without.
        done: weights that calibration has rounded, and factors for the columns of others.
    """
    every = [(t, name, weight) for t in plan.targets for name, weight in t.weights().items()]
    weights = {}
    for target, name, weight in every:
        if memory.identity(weight) not in done.stored:
            weights.setdefault(memory.identity(weight), (target, name, weight))

    rounding = MSE if how.rounding.needs_inputs else how.rounding
    jobs = {
        key: (t.rows()[n].detach(), t.form, done.factors.get(t.name))
        for key, (t, n, _) in weights.items()
    }
    scratch = _scratch([rows for rows, *_ in jobs.values()])

    def work(job: tuple[Tensor, Format, Tensor | None]) -> Stored:
        rows, form, factors = job
        buffer = scratch.get()
        try:
            return quantize_rows(rows, form, buffer, rounding, None, factors)
        finally:
            scratch.put(buffer)

    finished, total = dict(done.stored), sum(weight.nbytes for *_, weight in weights.values())
    read: list[Tensor] = []
    counter = bar("quantizing", "B", progress, total)
    with counter, ThreadPoolExecutor(scratch.qsize()) as pool:
        for key, stored in zip(jobs, pool.map(work, jobs.values()), strict=True):
            target, name, weight = weights[key]
            if not stored.is_finite():
                pool.shutdown(wait=False, cancel_futures=True)
                raise not_finite(f"{target.name}.{name}")
            parameter = nn.Parameter(stored.weight, requires_grad=False)
            finished[key] = stored._replace(weight=parameter)
            counter.update(weight.nbytes)
            read.append(weight)
            if sum(each.nbytes for each in read) > READ_BYTES:
                memory.let_go(read)
                read.clear()
        memory.let_go(read)
    return {id(weight): finished[memory.identity(weight)] for *_, weight in every}


def _scratch(rows: list[Tensor]) -> SimpleQueue:
    """A buffer for each worker, large enough for the largest matrix that has to be transposed.

    torch transposes (Conv1D) on one core, so two workers take half the time. The buffers are
    made here, for glibc does not give back what threads of the past have freed.
    """
    strided = [m[0] if m.dim() == 3 else m for m in rows if not m.is_contiguous()]
    queue = SimpleQueue()
    for _ in range(min(2, torch.get_num_threads())):
        n_bytes = max((m.nbytes for m in strided), default=0)
        device = strided[0].device if strided else "cpu"
        queue.put(torch.empty(n_bytes, dtype=torch.uint8, device=device) if n_bytes else None)
    return queue


def swap(model: nn.Module, targets: list[Target], quantized: Quantized, activation: str) -> None:
    """Put quantized modules in the places of the float ones, under all of their names."""
    modules = []
    for target in targets:
        weights = {name: quantized[id(weight)] for name, weight in target.weights().items()}
        modules.append(target.kind.from_float(target.module, weights, activation))
        take_hooks(modules[-1], target.module)
        modules[-1].frozen = not any(w.requires_grad for w in target.weights().values())
    for target, module in zip(targets, modules, strict=True):
        for name in target.names:
            put(model, name, module)


@contextmanager
def restoring(model: nn.Module) -> Iterator[None]:
    """Put modules, attributes and classes of a model back if what is done meanwhile fails."""
    before = [
        (
            m,
            type(m),
            dict(vars(m)),
            (m._modules, dict(m._modules)),
            (m._parameters, dict(m._parameters)),
        )
        for m in model.modules()
    ]
    try:
        yield
    except BaseException:
        for module, cls, attributes, *tables in before:
            # Not setattr, which may be what has failed.
            object.__setattr__(module, "__class__", cls)
            _refill(vars(module), attributes)
            for table in tables:
                _refill(*table)
        raise


def _refill(mapping: dict, before: dict) -> None:
    mapping.clear()
    mapping.update(before)


def _is_transformers_model(model: nn.Module) -> bool:
    """A PreTrainedModel, without importing transformers for models that cannot be one."""
    modeling = sys.modules.get("transformers.modeling_utils")
    return modeling is not None and isinstance(model, modeling.PreTrainedModel)
