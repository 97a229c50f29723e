"""The multiple-choice knapsack: one option from each group, the least loss within a budget.

    minimise sum loss[g][choice_g]   subject to   sum size[g][choice_g] <= budget

Exact where it can be, and with a proven gap where not. Groups are added one at a time to a list of
partial choices none of which is both larger and worse than another (Nemhauser and Ullmann, 1969). A
partial choice is dropped once the linear relaxation of the groups still to come (Sinha and
Zoltners, 1979) shows that it cannot beat the best full choice known. Of more than STATES the least
promising are dropped too, and the best of their bounds is what the result is compared with.
"""

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

#: Partial choices kept. 560 groups of 10 options need fewer, and take a second.
STATES = 8192

#: ``(size, loss)``
Option = tuple[int, float]


@dataclass(frozen=True)
class Choice:
    """One option for each group.

    ``bound`` is proven: no choice within the budget has a smaller loss. It is ``loss`` itself where
    the choice is known to be the best one, up to rounding.
    """

    indices: list[int]
    size: int
    loss: float
    bound: float


class Useful(NamedTuple):
    """An option that no other one of its group beats; ``index`` is that in the group."""

    index: int
    size: int
    loss: float


def choose(groups: list[list[Option]], budget: int) -> Choice:
    """The options with the least loss whose sizes add up to at most ``budget``.

    Args:
        groups: the options of each group; sizes and losses >= 0.

    Raises:
        ValueError: even the smallest options are larger than the budget.
    """
    useful = [_useful(options) for options in groups]
    least = sum(options[0].size for options in useful)
    if least > budget:
        raise ValueError(f"the smallest choice takes {least}, the budget is {budget}")
    # The groups with most at stake first: what follows then changes little, and bounds are tight.
    order = sorted(range(len(groups)), key=lambda g: useful[g][-1].loss - useful[g][0].loss)
    useful = [useful[g] for g in order]
    chosen, bound = _search(useful, budget - least)
    indices = [0] * len(groups)
    for g, options, position in zip(order, useful, chosen, strict=True):
        indices[g] = options[position].index
    picked = [options[i] for options, i in zip(groups, indices, strict=True)]
    loss = sum(loss for _, loss in picked)
    return Choice(indices, sum(size for size, _ in picked), loss, min(bound, loss))


def _search(groups: list[list[Useful]], spare: int) -> tuple[list[int], float]:
    """Positions of the best options, and a bound of the loss of those that were not looked at."""
    relaxed = [_Relaxation(groups[i:]) for i in range(len(groups) + 1)]
    chosen = relaxed[0].greedy(spare)
    best = sum(options[position].loss for options, position in zip(groups, chosen, strict=True))
    left, loss = torch.tensor([spare]), torch.tensor([0.0], dtype=torch.float64)
    bound, steps = float("inf"), []
    for options, rest in zip(groups, relaxed[1:], strict=True):
        sizes = torch.tensor([option.size - options[0].size for option in options])
        losses = torch.tensor([option.loss for option in options], dtype=torch.float64)
        left = (left[:, None] - sizes).flatten()
        loss = (loss[:, None] + losses).flatten()
        at_best = loss + rest.loss(left)
        keep = _undominated(left, loss, at_best < best)
        if len(keep) > STATES:
            keep = keep[at_best[keep].argsort()]
            bound = min(bound, float(at_best[keep[STATES]]))
            keep = keep[:STATES]
        steps.append((keep // len(options), keep % len(options)))
        left, loss = left[keep], loss[keep]
    if not len(loss):  # nothing beats the greedy choice
        return chosen, bound
    state, chosen = int(loss.argmin()), []
    spare = int(left[state])
    for parents, positions in reversed(steps):
        chosen.append(int(positions[state]))
        state = int(parents[state])
    return _fill(groups, chosen[::-1], spare), bound


def _useful(options: list[Option]) -> list[Useful]:
    """The options that no other one beats, the smallest first."""
    found: list[Useful] = []
    for index, option in sorted(enumerate(options), key=lambda each: each[1]):
        if not found or option[1] < found[-1].loss:
            found.append(Useful(index, *option))
    return found


def _undominated(left: Tensor, loss: Tensor, keep: Tensor) -> Tensor:
    """Indices of the partial choices to keep that no other one beats in both."""
    index = keep.nonzero()[:, 0]
    index = index[loss[index].argsort(stable=True)]
    index = index[left[index].argsort(stable=True, descending=True)]
    if len(index) < 2:
        return index
    losses = loss[index]
    better = losses[1:] < losses.cummin(0).values[:-1]
    return index[torch.cat([torch.tensor([True]), better])]


class _Relaxation:
    """The knapsack of some groups with parts of options allowed: its loss bounds from below.

    From its smallest option a group moves along the lower convex hull of its options, and all
    groups' moves are made in order of the loss they save per size.
    """

    def __init__(self, groups: list[list[Useful]]):
        self.groups = groups
        self.moves = []
        for g, options in enumerate(groups):
            hull = _hull(options)
            for a, b in zip(hull, hull[1:], strict=False):
                size = options[b].size - options[a].size
                gain = options[a].loss - options[b].loss
                self.moves.append((gain / size, size, gain, g, b))
        self.moves.sort(key=lambda move: -move[0])
        sizes = torch.tensor([0, *(move[1] for move in self.moves)])
        gains = torch.tensor([0.0, *(move[2] for move in self.moves)], dtype=torch.float64)
        self.sizes = sizes.cumsum(0)
        self.losses = sum(options[0].loss for options in groups) - gains.cumsum(0)

    def loss(self, spare: Tensor) -> Tensor:
        """The bound for what may be spent beyond the smallest options; inf where negative."""
        right = torch.searchsorted(self.sizes, spare, right=True).clamp_min(1)
        left = right - 1
        right = right.clamp_max(len(self.sizes) - 1)
        width = (self.sizes[right] - self.sizes[left]).clamp_min(1)
        part = ((spare - self.sizes[left]) / width).clamp(0, 1)
        loss = self.losses[left] + part * (self.losses[right] - self.losses[left])
        return torch.where(spare < 0, float("inf"), loss)

    def greedy(self, spare: int) -> list[int]:
        """Positions of whole options: the moves in their order while they fit, then any that do."""
        chosen = [0] * len(self.groups)
        stuck = set()
        for _, size, _, g, position in self.moves:
            if g not in stuck and size <= spare:
                chosen[g] = position
                spare -= size
            else:
                stuck.add(g)
        return _fill(self.groups, chosen, spare)


def _fill(groups: list[list[Useful]], chosen: list[int], spare: int) -> list[int]:
    """Spend what is left, each time on the larger option that saves most."""
    while True:
        best = (0.0, 0, 0, 0)
        for g, (options, now) in enumerate(zip(groups, chosen, strict=True)):
            for position in range(now + 1, len(options)):
                size = options[position].size - options[now].size
                gain = options[now].loss - options[position].loss
                if size <= spare:
                    best = max(best, (gain, g, position, size))
        if not best[0]:
            return chosen
        _, g, position, size = best
        chosen[g] = position
        spare -= size


def _hull(options: list[Useful]) -> list[int]:
    """Positions of the options on the lower convex hull."""
    hull: list[int] = []
    for position, c in enumerate(options):
        while len(hull) > 1:
            a, b = options[hull[-2]], options[hull[-1]]
            if (b.loss - a.loss) * (c.size - a.size) < (c.loss - a.loss) * (b.size - a.size):
                break
            hull.pop()
        hull.append(position)
    return hull
