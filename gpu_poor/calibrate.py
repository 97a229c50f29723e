"""Quantizing with calibration data, block by block, on the activations of one block at a time.

Two streams of hidden states go through the decoder: what the float model computes, and what the
model quantized so far does. In each block the linears are taken in the order in which they run;
those that read the same tensor together. Their inputs in both streams become statistics
(:class:`gpu_poor.strategies.Inputs`), the strategy rounds the weights, and the quantized stream
goes on with them. The model itself is not touched. Only the hidden states of the calibration data
and one layer's statistics are held at a time; a block's inputs are computed again rather than kept.
"""

import copy
import sys
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn
from tqdm import tqdm

from gpu_poor import memory, ops
from gpu_poor.chains import find_chains
from gpu_poor.folds import Decided, Fold, folds_for, tied_modules
from gpu_poor.modules import evaluating, not_finite, put
from gpu_poor.nn.base import Stored, quantize_rows
from gpu_poor.nn.linear import INPUT_SCALE
from gpu_poor.ops.common import correction_dtype
from gpu_poor.plan import Plan, Target, block_list
from gpu_poor.resume import WorkFolder, fingerprint
from gpu_poor.strategies import Inputs, Recipe

#: Tokens that go through a block at once.
BATCH_TOKENS = 4096
#: Texts are cut into rows of so many tokens.
CALIBRATION_LENGTH = 512


@torch.no_grad()
@torch.autocast("cpu", enabled=False)  # statistics and factorizations are in float32
def calibrate(
    model: nn.Module,
    plan: Plan,
    recipe: Recipe,
    rows: list[Tensor],
    activation: str,
    progress: bool | None = None,
    work_folder: str | Path | None = None,
) -> Decided:
    """Choose the numbers of the linears in the decoder's blocks.

    Args:
        rows: token ids, int64 ``[1, T]`` each.
        activation: the mode in which the quantized stream runs.
        work_folder: keep finished blocks there, and go on after those that are there already.

    Raises:
        ValueError: the model is no decoder of blocks, or its activations are not finite; the
            message names the layer.
    """
    names = block_list(model)
    blocks = list(model.get_submodule(names))
    done = Decided(n_tokens=sum(row.numel() for row in rows))
    done.uncalibrated = [
        t.name for t in plan.targets if t.name.startswith(f"{names}.") and not t.is_linear
    ]
    folds = folds_for(model, plan, recipe, done)
    with evaluating(model):
        stream = _capture(model, blocks, rows)
        tied = tied_modules(plan)
        work = [_BlockWork(model, f"{names}.{i}", plan, tied) for i in range(len(blocks))]
        bar = tqdm(
            total=sum(w.n_weights for w in work),
            desc="calibrating",
            unit=" weights",
            unit_scale=True,
            disable=not (sys.stderr.isatty() if progress is None else progress),
        )
        streams, first, folder = {"exact": stream.exact, "quantized": stream.quantized}, 0, None
        if work_folder is not None:
            job = fingerprint(model, plan, recipe, rows, activation)
            folder = WorkFolder(work_folder, job)
            first = done.resumed = folder.load(plan, folds, done, streams)
        with bar:
            bar.update(sum(w.n_weights for w in work[:first]))
            for i, block_work in enumerate(work[first:], start=first):
                last = i + 1 == len(work)
                block_work.run(stream, i, recipe, folds, activation, done, bar, last)
                if folder is not None:
                    targets = block_work.targets.values()
                    folder.save(i, targets, done, block_work.name, streams)
    return done


# -- the two streams ---------------------------------------------------------------------------


@dataclass
class _Stream:
    """The hidden states before a block, and what else each block is called with."""

    exact: list[Tensor]
    quantized: list[Tensor]
    #: ``{shape of a batch of tokens: for each block (args, kwargs)}``; texts make no difference.
    calls: dict[tuple, list[tuple[tuple, dict]]]

    def call(self, block: nn.Module, i: int, hidden: Tensor) -> Tensor:
        args, kwargs = self.calls[tuple(hidden.shape[:2])][i]
        out = block(hidden, *args, **kwargs)
        return out if isinstance(out, Tensor) else out[0]


class _Reached(Exception):
    """The hook that was waited for has run: nothing after it is of interest."""


def _batches(rows: list[Tensor]) -> list[Tensor]:
    by_length: dict[int, list[Tensor]] = {}
    for row in rows:
        by_length.setdefault(row.shape[1], []).append(row)
    batches = []
    for length, group in by_length.items():
        size = max(1, BATCH_TOKENS // length)
        batches += [torch.cat(group[i : i + size]) for i in range(0, len(group), size)]
    return batches


def _capture(model: nn.Module, blocks: list[nn.Module], rows: list[Tensor]) -> _Stream:
    """Run up to the first block, and once for each shape of a batch through all of them."""
    calls: dict[tuple, list] = {}
    hidden: list[Tensor] = []
    seen: list[tuple[Tensor, tuple, dict]] = []
    whole = False

    def hook(module, args, kwargs):
        kwargs = dict(kwargs)
        state = args[0] if args else kwargs.pop("hidden_states", None)
        if not isinstance(state, Tensor) or state.dim() != 3:
            raise ValueError(
                f"{type(module).__name__} takes no hidden states [B, T, H]: cannot be calibrated"
            )
        seen.append((state, args[1:], kwargs))
        if not whole:
            raise _Reached

    handles = [block.register_forward_pre_hook(hook, with_kwargs=True) for block in blocks]
    try:
        for batch in _batches(rows):
            shape, device = tuple(batch.shape), next(model.parameters()).device
            whole = shape not in calls
            seen.clear()
            try:
                model(input_ids=batch.to(device), use_cache=False)
            except _Reached:
                pass
            if len(seen) != (len(blocks) if whole else 1):
                raise ValueError(
                    f"{type(model).__name__} does not run its blocks once each, in order: cannot "
                    "be calibrated block by block"
                )
            if whole:
                calls[shape] = [each[1:] for each in seen]
            elif not _same(seen[0][1:], calls[shape][0]):
                raise ValueError(
                    f"the blocks of {type(model).__name__} read more of a text than hidden states: "
                    "cannot be calibrated block by block"
                )
            hidden.append(seen[0][0])
    finally:
        for handle in handles:
            handle.remove()
    if not all(bool(state.isfinite().all()) for state in hidden):
        raise ValueError("the embeddings of the calibration data are not finite")
    return _Stream(list(hidden), list(hidden), calls)


def _same(a: object, b: object) -> bool:
    if isinstance(a, Tensor):
        return isinstance(b, Tensor) and torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(_same(a[key], b[key]) for key in a)
    if isinstance(a, tuple | list):
        return len(a) == len(b) and all(map(_same, a, b))
    return True


# -- one block ---------------------------------------------------------------------------------


class _BlockWork:
    """The linears of one block."""

    def __init__(self, model: nn.Module, name: str, plan: Plan, tied: set[int]):
        self.name = name
        self.block = model.get_submodule(name)
        #: ``{name within the block: target}``.
        self.targets = {
            target.name.removeprefix(f"{name}."): target
            for target in plan.targets
            if target.name.startswith(f"{name}.") and target.is_linear
        }
        self.tied = tied
        self.n_weights = sum(t.module.weight.numel() for t in self.targets.values())

    def run(
        self,
        stream: _Stream,
        i: int,
        recipe: Recipe,
        folds: list[Fold],
        activation: str,
        done: Decided,
        bar: tqdm,
        last: bool,
    ) -> None:
        """Round the block's linears, and take both streams through the block."""
        twin = _sharing_copy(self.block)
        by_reader = {name: fold for fold in folds for name in fold.linears}
        reached = set()
        groups = self._groups(stream, i)
        chained = self._chain(stream, i, groups, recipe, by_reader, done)
        for group in groups:
            factors, input_scale = chained.get(group[0]), None
            inputs = self._inputs(stream, i, twin, group[0], recipe, factors)
            if inputs is None:
                continue
            fold = by_reader.get(f"{self.name}.{group[0]}")
            if fold is not None and set(fold.linears) == {f"{self.name}.{n}" for n in group}:
                factors = self._smooth(twin, fold, group, recipe, inputs, done)
                if factors is not None:
                    inputs = inputs.divided_by(factors)
            elif group[0] not in chained:
                input_scale = self._input_scale(group, recipe, inputs)
                if input_scale is not None:
                    factors = input_scale.float().reciprocal()
                    inputs = inputs.divided_by(factors)
            reached |= set(group)
            for name in group:
                stored = self._round(name, recipe, inputs, factors, input_scale, done)
                target = self.targets[name]
                module = target.kind.from_float(target.module, {"weight": stored}, activation)
                if (source := done.sources.get(f"{self.name}.{name}")) is not None:
                    source[0].apply(module, source[1])
                put(twin, name, module)
                bar.update(target.module.weight.numel())
        for name in self.targets.keys() - reached:
            done.unreached.append(f"{self.name}.{name}")
            bar.update(self.targets[name].module.weight.numel())
        if last:
            return
        for states, block in ((stream.exact, self.block), (stream.quantized, twin)):
            for b, state in enumerate(states):
                states[b] = stream.call(block, i, state)
        if not all(bool(state.isfinite().all()) for state in stream.quantized):
            raise ValueError(f"the activations after {self.name} are not finite")

    def _groups(self, stream: _Stream, i: int) -> list[list[str]]:
        """The linears in the order in which they run; those that read one tensor together."""
        order: dict[str, Tensor] = {}

        def look(name: str, module: nn.Module, args: tuple) -> None:
            order.setdefault(name, args[0])

        handles = [
            target.module.register_forward_pre_hook(partial(look, name))
            for name, target in self.targets.items()
        ]
        try:
            for state in stream.exact:  # the first one will do, but where there are experts
                stream.call(self.block, i, state)
                if order.keys() == self.targets.keys():
                    break
        finally:
            for handle in handles:
                handle.remove()
        groups: dict[tuple, list[str]] = {}
        for name, x in order.items():
            groups.setdefault(memory.identity(x), []).append(name)
        return list(groups.values())

    def _chain(
        self, stream: _Stream, i: int, groups, recipe: Recipe, by_reader, done: Decided
    ) -> dict[str, Tensor | None]:
        """``{linear: factors}`` of the linears that read another one's output; None: no gain.

        Decided before the block is rounded, for it is the rows of the other that are divided.
        """
        if recipe.smoothing is None or not recipe.smoothing.needs_inputs:
            return {}
        order = [
            name
            for group in groups
            for name in group
            if id(self.targets[name].module) not in self.tied and len(self.targets[name].names) == 1
        ]
        readers = {
            group[0]
            for group in groups
            if len(group) == 1 and f"{self.name}.{group[0]}" not in by_reader
        }
        twin, found = _sharing_copy(self.block), {}
        run = partial(stream.call, twin, i, stream.exact[0])
        for chain in find_chains(twin, order, readers, self.targets, run):
            inputs = self._inputs(stream, i, twin, chain.linear, recipe)
            if inputs is None:
                continue
            target = self.targets[chain.linear]
            rows = target.rows()["weight"]
            gain = torch.ones(rows.shape[1])
            factors = recipe.smoothing.factors(gain, [rows], inputs, [target.form])
            found[chain.linear] = factors
            if factors is not None:
                done.sources[f"{self.name}.{chain.source}"] = chain, factors
        return found

    def _inputs(
        self,
        stream: _Stream,
        i: int,
        twin: nn.Module,
        name: str,
        recipe: Recipe,
        factors: Tensor | None = None,
    ) -> Inputs | None:
        """Statistics of what a linear of the twin reads: in the float model divided by factors.

        None if it reads nothing: an expert that the quantized stream does not reach.
        """
        k = self.targets[name].rows()["weight"].shape[1]
        gram, drift = torch.zeros(k, k), torch.zeros(k, k)
        absmax, n = torch.zeros(k), 0
        dtype = correction_dtype()
        for exact, quantized in zip(stream.exact, stream.quantized, strict=True):
            x = _input_of(stream, i, twin, name, quantized)
            if x is None or not len(x):
                continue
            n += x.shape[0]
            absmax = torch.maximum(absmax, ops.channel_stats(x)[0])
            if recipe.needs_gram:
                ops.gram_(gram, x)
                # The drift is small, and so is what bfloat16 loses of it.
                wanted = _input_of(stream, i, self.block, name, exact)
                if wanted is None or not len(x) == len(wanted) == exact[..., 0].numel():
                    continue  # an expert's: the streams may differ in the tokens that they send it
                if factors is not None:
                    wanted = wanted / factors.to(wanted.dtype)
                shift = (wanted - x).to(dtype)
                drift += shift.T @ x.to(dtype)
        if not n:
            return None
        if not bool(absmax.isfinite().all()):
            raise ValueError(f"the inputs of {self.name}.{name} are not finite")
        return Inputs(gram.div_(n), drift.div_(n), absmax, n)

    def _smooth(self, twin, fold: Fold, group, recipe: Recipe, inputs, done) -> Tensor | None:
        """Decide on factors; the norm of the quantized stream is divided by them."""
        norm = fold.norm.removeprefix(f"{self.name}.")
        if recipe.smoothing is None or norm == fold.norm:  # a norm outside of the block
            return None
        module = self.block.get_submodule(norm)
        rows = [self.targets[name].rows()["weight"] for name in group]
        forms = [self.targets[name].form for name in group]
        factors = recipe.smoothing.factors(fold.gain(module.weight), rows, inputs, forms)
        if factors is None:
            return None
        done.norms[fold.norm] = fold, factors
        fold.apply(twin.get_submodule(norm), factors)
        return factors

    def _input_scale(self, group: list[str], recipe: Recipe, inputs: Inputs) -> Tensor | None:
        """For linears that read what nothing before them can divide: what they multiply it by."""
        if not recipe.keeps:
            return None
        targets = [self.targets[name] for name in group]
        forms = [target.form for target in targets]
        shared = any(id(t.module) in self.tied or len(t.names) > 1 for t in targets)
        if shared or all(form.levels is None for form in forms):
            return None
        rows = [target.rows()["weight"] for target in targets]
        ones = torch.ones(rows[0].shape[1])
        factors = recipe.smoothing.factors(ones, rows, inputs, forms)
        return None if factors is None else factors.reciprocal().to(INPUT_SCALE)

    def _round(self, name, recipe: Recipe, inputs, factors, input_scale, done: Decided) -> Stored:
        target: Target = self.targets[name]
        key = memory.identity(target.module.weight)
        if key in done.stored:  # a weight that several blocks share
            return done.stored[key]
        rows = target.rows()["weight"]
        if (source := done.sources.get(f"{self.name}.{name}")) is not None:
            rows = rows / source[1][:, None].to(rows.dtype)
        try:
            stored = quantize_rows(rows, target.form, None, recipe.rounding, inputs, factors)
        except ValueError as error:
            raise ValueError(f"{self.name}.{name}: {error}") from error
        if not stored.is_finite():
            raise not_finite(f"{self.name}.{name}.weight")
        weight = nn.Parameter(stored.weight, requires_grad=False)
        stored = stored._replace(weight=weight, input_scale=input_scale)
        done.stored[key] = stored
        return stored


def _sharing_copy(block: nn.Module) -> nn.Module:
    """A copy of the modules whose tensors are the block's own."""
    tensors = [*block.parameters(), *block.buffers()]
    return copy.deepcopy(block, {id(tensor): tensor for tensor in tensors})


def _input_of(
    stream: _Stream, i: int, block: nn.Module, name: str, hidden: Tensor
) -> Tensor | None:
    """What a linear of the block reads, as rows ``[M, K]``; None if it does not run."""
    found: list[Tensor] = []

    def hook(module, args):
        found.append(args[0])
        raise _Reached

    handle = block.get_submodule(name).register_forward_pre_hook(hook)
    try:
        stream.call(block, i, hidden)
    except _Reached:
        pass
    finally:
        handle.remove()
    return found[0].reshape(-1, found[0].shape[-1]) if found else None
