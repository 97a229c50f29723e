"""Linears that another linear alone reads, channel by channel: where a factor can move, too.

    down(act(gate x) * up x) = (W_down diag(f)) (act(gate x) * (diag(1 / f) W_up) x)

Which pairs allow it is tried out on the block itself: a source is divided, and the model may not
notice. That finds up -> down of gated MLPs, v -> o of attention without grouped heads, and fc1 ->
fc2 around a ReLU, and needs no table of architectures.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from gpu_poor.modules import hooked
from gpu_poor.plan import Target

#: Largest deviation that still is rounding, of the largest value: a wrong pair misses by far more.
TOLERANCE = 1e-3


@dataclass
class Chain:
    """The linear whose rows are divided, and the one whose columns are multiplied."""

    source: str
    linear: str

    def apply(self, source: nn.Module, factors: Tensor) -> None:
        """Divide the bias of the source; its weight is divided before it is rounded."""
        if (bias := source.bias) is not None:
            divided = (bias.detach().float() / factors).to(bias.dtype)
            source.bias = nn.Parameter(divided, bias.requires_grad)


def find_chains(
    twin: nn.Module,
    order: list[str],
    readers: set[str],
    targets: dict[str, Target],
    run: Callable[[], Tensor],
) -> list[Chain]:
    """The chains of one block, no source and no linear in two of them.

    Args:
        twin: the block in float, with modules of its own; as it was afterwards.
        order: the linears of the block as they run, by names within it.
        readers: those whose columns may be multiplied.
        targets: of these linears.
        run: the output of the twin on some input.
    """
    found, taken = [], set()
    for i, linear in enumerate(order):
        if linear not in readers:
            continue
        k = targets[linear].rows()["weight"].shape[1]
        for source in reversed(order[:i]):
            n = targets[source].rows()["weight"].shape[0]
            if n == k and source not in taken and _is_exact(twin, source, linear, targets, run):
                found.append(Chain(source, linear))
                taken.add(source)
                break
    return found


def _is_exact(twin, source: str, linear: str, targets: dict[str, Target], run) -> bool:
    k = targets[linear].rows()["weight"].shape[1]
    factors = torch.arange(k).remainder(3).float().exp2()
    seen: list[Tensor] = []
    modules = twin.get_submodule(source), twin.get_submodule(linear)
    before = [dict(module._parameters) for module in modules]
    try:
        look = modules[1].register_forward_pre_hook(lambda module, args: seen.append(args[0]))
        with hooked([look]):
            expected = run()
            _scale(modules[0], targets[source], 1 / factors[:, None])
            _scale(modules[1], targets[linear], factors)
            Chain(source, linear).apply(modules[0], factors)
            got = run()
    finally:
        for module, parameters in zip(modules, before, strict=True):
            module._parameters.update(parameters)
    if len(seen) != 2:  # it runs more than once
        return False
    return _close(seen[1].float() * factors, seen[0].float()) and _close(got, expected)


def _scale(module: nn.Module, target: Target, factors: Tensor) -> None:
    weight = module.weight.detach().clone()
    target.kind.to_rows(module, "weight", weight).mul_(factors)
    module.weight = nn.Parameter(weight, False)


def _close(a: Tensor, b: Tensor) -> bool:
    largest = float(b.abs().max())
    return largest > 0 and float((a - b).abs().max()) <= TOLERANCE * largest
