"""What storing a weight in a format costs: the KL divergence from the float model, predicted.

A small change dW of the weights moves the next-token distributions p of a text by, to second order,

    KL = 1/2 E_y [ <G, dW>^2 ],   G = the gradient of sum_t log p(y_t),

over labels y drawn from p itself: the Fisher information. The rounding errors of different weights
are nearly independent and of mean zero, so that only its diagonal counts, and that is taken as a
product of rows and columns, as Adafactor does (Shazeer and Stern, 2018):

    KL = 1/2 sum_ij dW_ij^2 R_i C_j / S,   R_i = E sum_j G_ij^2, C_j = E sum_i G_ij^2, S = sum R

So one backward pass over a few thousand tokens serves every format, and two vectors a matrix are
all that is kept of it. How well that does: docs/planning.md.
"""

import itertools
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from torch.utils.hooks import RemovableHandle

from gpu_poor import memory
from gpu_poor.formats import Format
from gpu_poor.metrics_input import n_positions
from gpu_poor.modules import evaluating, forwards, hooked
from gpu_poor.plan import Plan, Target, first_block
from gpu_poor.progress import bar
from gpu_poor.samples import vocabulary

#: Elements of a matrix that are rounded to see what a format costs; of a larger one a sample.
TRIED = 2**20
#: Of the labels, and of a text that a model writes itself.
SEED = 0

#: ``(float rows [N, K], format)`` -> float32 ``[N, K]``, the rows as the format gives them back.
RoundTrip = Callable[[Tensor, Format], Tensor]


def nearest(rows: Tensor, form: Format) -> Tensor:
    """The :data:`RoundTrip` of ``gpu_poor.quantize``."""
    return form.dequantize(*form.quantize(rows), tuple(rows.shape), torch.float32)


class Weight(NamedTuple):
    """A parameter of a target."""

    target: Target
    name: str

    @property
    def parameter(self) -> nn.Parameter:
        return getattr(self.target.module, self.name)

    @property
    def rows(self) -> Tensor:
        """``[..., N, K]``"""
        return self.as_rows(self.parameter.detach())

    def as_rows(self, tensor: Tensor) -> Tensor:
        """The parameter, or what has its shape, as ``[..., N, K]``."""
        return self.target.kind.to_rows(self.target.module, self.name, tensor)


@dataclass
class Unit:
    """Targets that share weights and so have one format, and the weights by their memory."""

    targets: list[Target]
    weights: dict[tuple, Weight]

    @property
    def name(self) -> str:
        return self.targets[0].name


def units(plan: Plan) -> list[Unit]:
    """The targets of a plan, tied ones together."""
    found: list[Unit] = []
    for target in plan.targets:
        unit = Unit(
            [target], {memory.identity(w): Weight(target, n) for n, w in target.weights().items()}
        )
        for tied in [other for other in found if other.weights.keys() & unit.weights.keys()]:
            found.remove(tied)
            unit = Unit(tied.targets + unit.targets, unit.weights | tied.weights)
        found.append(unit)
    return found


# -- the Fisher information ---------------------------------------------------------------------


class Fisher:
    """``R`` and ``C`` of one weight ``[..., N, K]``: float64 ``[..., N]`` and ``[..., K]``."""

    def __init__(self, shape: tuple[int, ...], device: torch.device):
        self.rows = torch.zeros(shape[:-1], dtype=torch.float64, device=device)
        self.columns = torch.zeros((*shape[:-2], shape[-1]), dtype=torch.float64, device=device)

    @property
    def factors(self) -> tuple[Tensor, Tensor]:
        return self.rows, self.columns

    def add(self, gradient: Tensor) -> None:
        """Add the gradient ``[..., N, K]`` of one text."""
        for total, dim in zip(self.factors, (-1, -2), strict=True):
            total += torch.linalg.vector_norm(gradient, dim=dim, dtype=torch.float32).square()


@torch.inference_mode(False)  # whatever mode the caller is in
def fisher(
    model: nn.Module, every: list[Unit], rows: list[Tensor], progress: bool | None = None
) -> dict[tuple, Fisher]:
    """The Fisher information per token of all weights, by their memory.

    Args:
        model: a causal language model; in the end it is as it was.
        rows: int64 ``[1, T]`` each, from :func:`gpu_poor.samples.token_rows`.
        progress: show a bar; None: on a terminal.

    Raises:
        ValueError: logits or gradients are not finite; the message says where.
    """
    weights = {key: weight for unit in every for key, weight in unit.weights.items()}
    found = {key: Fisher(tuple(w.rows.shape), w.rows.device) for key, w in weights.items()}
    generator = torch.Generator().manual_seed(SEED)
    counted = bar("looking at text", " sequences", progress, over=rows)
    with counted, _differentiating(model, every, found):
        for i, ids in enumerate(counted):
            ids = ids.clone()  # what was made in inference mode has no gradient
            log_p = log_probabilities(model, ids, f"sequence {i} of sample_inputs")
            labels = torch.multinomial(log_p.detach().exp().cpu(), 1, generator=generator)
            log_p.gather(-1, labels.to(log_p.device)).sum().backward()
    n_tokens = sum(ids.numel() for ids in rows)
    for key, sums in found.items():
        if not bool(torch.isfinite(sums.rows).all() and torch.isfinite(sums.columns).all()):
            weight = weights[key]
            raise ValueError(
                f"the gradient of {weight.target.name}.{weight.name} is not finite: load the model "
                "in float32 or bfloat16, which overflow less easily than float16"
            )
        sums.rows /= n_tokens
        sums.columns /= n_tokens
    _assume_average(found)
    return found


def _assume_average(found: dict[tuple, Fisher]) -> None:
    """What no token has reached, such as an expert, is not free to spoil: it counts as the rest."""
    seen = [sums for sums in found.values() if bool(sums.rows.any())]
    numel = sum(sums.rows.numel() * sums.columns.shape[-1] for sums in seen)
    mean = sum(float(sums.rows.sum()) for sums in seen) / max(1, numel)
    for sums in found.values():
        if not bool(sums.rows.any()):
            sums.rows += mean * sums.columns.shape[-1]
            sums.columns += mean * sums.rows.shape[-1]


@contextmanager
def _differentiating(
    model: nn.Module, every: list[Unit], into: dict[tuple, Fisher]
) -> Iterator[None]:
    """Collect what backward passes say of the weights; afterwards the model is as it was.

    A gradient is used and freed as soon as it is there, and the blocks are computed again when
    they are differentiated, so that no more is held than one block needs.
    """
    parameters = [(p, p.requires_grad, p.grad) for p in model.parameters()]

    def collect(weight: Weight, sums: Fisher, parameter: Tensor) -> None:
        gradient = parameter.grad.to_dense() if parameter.grad.is_sparse else parameter.grad
        sums.add(weight.as_rows(gradient))
        parameter.grad = None

    def hooks() -> Iterator[RemovableHandle]:
        for unit in every:
            for target in unit.targets:
                for name, parameter in target.weights().items():
                    if not parameter.requires_grad:  # tied ones meet here once
                        parameter.requires_grad_(True)
                        hook = partial(
                            collect, Weight(target, name), into[memory.identity(parameter)]
                        )
                        yield parameter.register_post_accumulate_grad_hook(hook)

    try:
        for parameter, *_ in parameters:
            parameter.requires_grad_(False)
            parameter.grad = None
        with hooked(hooks()), torch.enable_grad(), evaluating(model), _recomputing(model):
            yield
    finally:
        for parameter, requires_grad, grad in parameters:
            parameter.requires_grad_(requires_grad)
            parameter.grad = grad


def _recomputing(model: nn.Module) -> AbstractContextManager[None]:
    """The blocks of a model keep nothing for the backward pass but their inputs."""
    try:
        blocks = model.get_submodule(first_block(model).rpartition(".")[0])
    except ValueError:  # no list of blocks: nothing to save
        blocks = []
    return forwards({b: partial(checkpoint, b.forward, use_reentrant=False) for b in blocks})


# -- what the model says ------------------------------------------------------------------------


def log_probabilities(model: nn.Module, ids: Tensor, what: str) -> Tensor:
    """float32 ``[T, V]`` of the tokens that follow in one sequence ``[1, T]``.

    Raises:
        ValueError: they are not finite; the message names the module where that begins.
    """
    ids = ids.to(next(model.parameters()).device)
    logits = model(input_ids=ids, use_cache=False).logits[0].float()
    check_logits(model, logits, ids, what)
    return logits.log_softmax(-1)


def check_logits(model: nn.Module, logits: Tensor, ids: Tensor, what: str) -> None:
    """Raise ValueError if logits are NaN or +inf; -inf rules a token out."""
    if logits.isnan().any() or logits.isposinf().any():
        begins = _first_not_finite(model, ids)
        raise ValueError(f"{what}: the activations of {begins} are not finite")


@torch.no_grad()
def _first_not_finite(model: nn.Module, ids: Tensor) -> str:
    """The name of the first module that answers a NaN or an infinity."""
    found = []

    def look(name: str, module: nn.Module, args: tuple, output: object) -> None:
        for each in output if isinstance(output, tuple | list) else (output,):
            if isinstance(each, Tensor) and not bool(torch.isfinite(each).all()):
                found.append(name)

    with hooked(m.register_forward_hook(partial(look, n)) for n, m in model.named_modules() if n):
        model(input_ids=ids, use_cache=False)
    return found[0] if found else type(model).__name__


@torch.no_grad()
def own_text(model: nn.Module, n_rows: int = 16, length: int = 128) -> list[Tensor]:
    """Text that a causal language model writes itself, drawn token by token: ``[1, length]`` each.

    Where there is no text this is what the model knows best. Always the same for a model.

    Raises:
        ValueError: its logits are not finite.
    """
    length, n_vocab = min(length, n_positions(model)), vocabulary(model)
    generator = torch.Generator().manual_seed(SEED)
    first = getattr(model.config, "bos_token_id", None)
    if isinstance(first, int) and 0 <= first < n_vocab:
        ids = torch.full((n_rows, 1), first)
    else:
        ids = torch.randint(n_vocab, (n_rows, 1), generator=generator)
    device = next(model.parameters()).device
    past, new = None, ids
    with evaluating(model):
        while ids.shape[1] < length:
            output = model(input_ids=new.to(device), past_key_values=past, use_cache=True)
            logits = output.logits[:, -1].float()
            check_logits(model, logits, ids.to(device), "a text of the model's own")
            new = torch.multinomial(logits.softmax(-1).cpu(), 1, generator=generator)
            ids, past = torch.cat([ids, new], 1), output.past_key_values
    return list(ids.split(1))


# -- predictions --------------------------------------------------------------------------------


@torch.no_grad()
def losses(
    unit: Unit,
    forms: list[Format],
    information: dict[tuple, Fisher] | None = None,
    round_trip: RoundTrip = nearest,
) -> list[float]:
    """What each format costs one unit, in nats of KL per token.

    Without information: the squared error relative to the squared weights, which is no KL, and
    ranks formats of one weight better than weights.
    """
    total = [0.0] * len(forms)
    for key, weight in unit.weights.items():
        size = float(torch.linalg.vector_norm(weight.rows, dtype=torch.float32)) ** 2
        for matrix in itertools.product(*map(range, weight.rows.shape[:-2])):
            rows = weight.rows[matrix]
            if information is None:
                of_rows = torch.full(rows.shape[:1], 2 / max(size, 1e-300), dtype=torch.float64)
                share = torch.ones(rows.shape[1])
            else:
                of_rows, columns = (x[matrix] for x in information[key].factors)
                share = (columns / columns.sum().clamp_min(1e-300)).float()
            rows, of_rows = _tried(rows, of_rows.to(rows.device))
            for i, form in enumerate(forms):
                error = round_trip(rows, form) - rows.float()
                total[i] += 0.5 * float(of_rows @ (error.square() @ share.to(rows.device)).double())
    return total


def _tried(rows: Tensor, of_rows: Tensor) -> tuple[Tensor, Tensor]:
    """The rows ``[N, K]`` to round and what an error of each counts: all, or an unbiased sample.

    Rows are sampled at even steps of what they count. The one with the largest element comes along
    and counts nothing, but what is not finite there is in no sample either.
    """
    n = max(1, TRIED // rows.shape[1])
    if len(rows) <= n:
        return rows.contiguous(), of_rows
    up_to = of_rows.cumsum(0)
    steps = (torch.arange(n, dtype=up_to.dtype, device=up_to.device) + 0.5) / n
    picked = torch.searchsorted(up_to, steps * up_to[-1]).clamp_max(len(rows) - 1)
    largest = torch.linalg.vector_norm(rows, torch.inf, dim=1).argmax()
    counts = torch.cat([(up_to[-1] / n).expand(n), up_to.new_zeros(1)])
    return rows[torch.cat([picked, largest[None]])].contiguous(), counts
