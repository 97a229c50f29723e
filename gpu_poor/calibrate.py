"""Quantizing with calibration data, block by block, on the activations of one block at a time.

Two streams of hidden states go through the decoder: what the float model computes, and what the
model quantized so far does. In each block the linears are taken in the order in which they run;
those that read the same tensor together. Their inputs in both streams become statistics
(:class:`gpu_poor.strategies.Inputs`), the strategy rounds the weights, and the quantized stream
goes on with them. The model itself is not touched. Only one layer's statistics are held at a time:
what a quantized block's linears read is computed again rather than kept, but for the answers of
its parts that are finished. Hidden states of much data lie in temporary files, and the weights of a
finished block are let go of if they lie in the checkpoint's.
"""

import copy
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn
from tqdm import tqdm

from gpu_poor import memory, ops
from gpu_poor.blocks import Answers
from gpu_poor.chains import find_chains
from gpu_poor.folds import Decided, Fold, folds_for, tied_modules
from gpu_poor.modules import evaluating, hooked, not_finite, put
from gpu_poor.nn.base import Stored, quantize_rows
from gpu_poor.nn.linear import INPUT_SCALE
from gpu_poor.ops.common import correction_dtype
from gpu_poor.plan import Plan, Target, block_list
from gpu_poor.progress import bar
from gpu_poor.resume import WorkFolder, fingerprint
from gpu_poor.spill import Spilled
from gpu_poor.strategies import Inputs, Recipe
from gpu_poor.streams import Stream, enter, input_of

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
    done = Decided(n_tokens=sum(row.numel() for row in rows))
    done.uncalibrated = [
        t.name for t in plan.targets if t.name.startswith(f"{names}.") and not t.is_linear
    ]
    folds = folds_for(model, plan, recipe, done)
    with evaluating(model):
        stream = enter(model, rows)
        tied, n_blocks = tied_modules(plan), len(stream.blocks.modules)
        work = [_BlockWork(model, f"{names}.{i}", plan, tied) for i in range(n_blocks)]
        streams, first, folder = {"exact": stream.exact, "quantized": stream.quantized}, 0, None
        if work_folder is not None:
            job = fingerprint(model, plan, recipe, rows, activation)
            folder = WorkFolder(work_folder, job)
            first = done.resumed = folder.load(plan, folds, done, streams)
        with bar("calibrating", " weights", progress, sum(w.n_weights for w in work)) as counter:
            counter.update(sum(w.n_weights for w in work[:first]))
            for i, block_work in enumerate(work[first:], start=first):
                last = i + 1 == len(work)
                block_work.run(stream, i, recipe, folds, activation, done, counter, last)
                memory.let_go(block_work.block)
                if folder is not None:
                    targets = block_work.targets.values()
                    folder.save(i, targets, done, block_work.name, streams)
    return done


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
        stream: Stream,
        i: int,
        recipe: Recipe,
        folds: list[Fold],
        activation: str,
        done: Decided,
        counter: tqdm,
        last: bool,
    ) -> None:
        """Round the block's linears, and take both streams through the block."""
        twin = self._twin()
        by_reader = {name: fold for fold in folds for name in fold.linears}
        reached = set()
        groups = self._groups(stream, i)
        chained = self._chain(stream, i, groups, recipe, by_reader, done)
        wanted = self._exact(stream, i, [group[0] for group in groups], recipe, last)
        for group in groups:
            factors, input_scale = chained.get(group[0]), None
            exact = wanted.pop(group[0], None)
            inputs = self._inputs(stream, i, twin, group[0], recipe, exact, factors)
            memory.trim()  # what the passes have freed: 400 MB of a TinyLlama's block, in pieces
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
                counter.update(target.module.weight.numel())
            self._keep_answers(stream, twin, group, reached)
        for name in self.targets.keys() - reached:
            done.unreached.append(f"{self.name}.{name}")
            counter.update(self.targets[name].module.weight.numel())
        for b, state in enumerate(stream.quantized if not last else ()):
            stream.quantized[b] = after = stream.call(twin, i, state, b)
            if not bool(after.isfinite().all()):
                raise ValueError(f"the activations after {self.name} are not finite")
        stream.answers.clear()

    def _keep_answers(
        self, stream: Stream, twin: nn.Module, group: list[str], reached: set[str]
    ) -> None:
        """Compute a part that has been finished by this group only once more.

        The attention then runs for two of the four groups of linears in a Llama's block, in place
        of all passes after its own.
        """
        if reached == self.targets.keys():
            return
        for part in {name.partition(".")[0] for name in group}:
            linears = {name for name in self.targets if name.startswith(f"{part}.")}
            if linears and linears <= reached:
                stream.answers.append(Answers(twin.get_submodule(part)))

    def _twin(self) -> nn.Module:
        """A copy of the block's modules, whose tensors are the block's own.

        Raises:
            ValueError: the block cannot be copied.
        """
        tensors = [*self.block.parameters(), *self.block.buffers()]
        try:
            return copy.deepcopy(self.block, {id(tensor): tensor for tensor in tensors})
        except Exception as error:  # what a user has attached to it: a lock, an open file
            raise ValueError(f"{self.name} cannot be copied to calibrate it: {error}") from error

    def _groups(self, stream: Stream, i: int) -> list[list[str]]:
        """The linears in the order in which they run; those that read one tensor together."""
        order: dict[str, Tensor] = {}

        def look(name: str, module: nn.Module, args: tuple) -> None:
            order.setdefault(name, args[0])

        with hooked(
            target.module.register_forward_pre_hook(partial(look, name))
            for name, target in self.targets.items()
        ):
            for state in stream.exact:  # the first one will do, but where there are experts
                stream.call(self.block, i, state)
                if order.keys() == self.targets.keys():
                    break
        groups: dict[tuple, list[str]] = {}
        for name, x in order.items():
            groups.setdefault(memory.identity(x), []).append(name)
        return list(groups.values())

    def _chain(
        self, stream: Stream, i: int, groups, recipe: Recipe, by_reader, done: Decided
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
        twin, found = self._twin(), {}
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

    def _exact(
        self, stream: Stream, i: int, names: list[str], recipe: Recipe, last: bool
    ) -> dict[str, Spilled]:
        """Take the float stream through the block.

        Returns:
            What these linears read meanwhile ``[M, K]``, for every ``every``-th batch; empty
            where one does not read all of the tokens, for the streams may differ in which.
        """
        if not recipe.needs_drift:
            names = []
        kept = {name: Spilled(in_memory=0) for name in names}
        for b, state in enumerate(stream.exact):
            looked_at = names if b % stream.every == 0 else []
            if last and not looked_at:
                continue
            missing, n_tokens = set(looked_at), state[..., 0].numel()

            def look(name, module, args, missing=missing, n_tokens=n_tokens) -> None:
                x = args[0].reshape(-1, args[0].shape[-1])
                if name in missing:
                    kept[name].append(x if len(x) == n_tokens else x[:0])
                missing.discard(name)

            with hooked(
                self.targets[name].module.register_forward_pre_hook(partial(look, name))
                for name in looked_at
            ):
                after = stream.call(self.block, i, state)
            for name in missing:
                kept[name].append(torch.empty(0))
            if not last:
                stream.exact[b] = after
        return kept

    def _inputs(
        self,
        stream: Stream,
        i: int,
        twin: nn.Module,
        name: str,
        recipe: Recipe,
        exact: Spilled | None = None,
        factors: Tensor | None = None,
    ) -> Inputs | None:
        """Statistics of what a linear of the twin reads.

        Args:
            exact: what it reads in the float model, as :meth:`_exact` returns it.
            factors: what that is to be divided by.

        Returns:
            None if it reads nothing: an expert that the quantized stream does not reach.
        """
        k = self.targets[name].rows()["weight"].shape[1]
        gram = torch.zeros(k, k) if recipe.needs_gram else None
        drift = torch.zeros(k, k) if exact is not None else None
        absmax, n, n_compared = torch.zeros(k), 0, 0
        dtype = correction_dtype()
        for b, quantized in enumerate(stream.quantized):
            x = input_of(stream, i, twin, name, quantized, b)
            if x is None or not len(x):
                continue
            n += x.shape[0]
            absmax = torch.maximum(absmax, ops.channel_stats(x)[0])
            if gram is not None:
                ops.gram_(gram, x)
            if drift is not None and b % stream.every == 0:
                wanted = exact[b // stream.every]
                if len(wanted) != len(x):
                    continue
                if factors is not None:
                    wanted = wanted / factors.to(wanted.dtype)
                n_compared += len(x)
                # The drift is small, and so is what bfloat16 loses of it.
                shift = (wanted - x).to(dtype)
                drift += shift.T @ x.to(dtype)
        if not n:
            return None
        if not bool(absmax.isfinite().all()):
            raise ValueError(f"the inputs of {self.name}.{name} are not finite")
        if gram is not None:
            gram.div_(n)
        if drift is not None:
            # Of tokens that could not be compared, an expert's, none is assumed.
            drift.div_(max(n_compared, n / stream.every))
        return Inputs(gram, drift, absmax, n)

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
