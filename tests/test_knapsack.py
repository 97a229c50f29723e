"""The knapsack against every combination there is, and its bound where that is too many."""

import itertools
import random

import pytest

from gpu_poor import knapsack


def instance(seed: int, n_groups: int, n_options: int) -> list[list[tuple[int, float]]]:
    """Options like formats of matrices: more bytes for less loss, and some that make no sense."""
    rng = random.Random(seed)
    groups = []
    for _ in range(n_groups):
        numel, weight = rng.choice([64, 96, 200]), 10 ** rng.uniform(-4, 0)
        options = []
        for _ in range(n_options):
            bits = rng.uniform(4, 16)
            options.append((round(numel * bits), weight * 4**-bits * rng.uniform(0.5, 2)))
        groups.append(options)
    return groups


def best(groups, budget: int) -> float:
    sums = [(sum(s for s, _ in c), sum(v for _, v in c)) for c in itertools.product(*groups)]
    return min(loss for size, loss in sums if size <= budget)


def span(groups) -> tuple[int, int]:
    sizes = [[size for size, _ in options] for options in groups]
    return sum(map(min, sizes)), sum(map(max, sizes))


@pytest.mark.parametrize("seed", range(20))
def test_is_the_best_of_all_combinations(seed):
    groups = instance(seed, n_groups=6, n_options=5)
    least, most = span(groups)
    for part in (0.0, 0.03, 0.3, 0.5, 0.8, 1.0, 2.0):
        budget = least + int(part * (most - least))
        found = knapsack.choose(groups, budget)
        chosen = [options[i] for options, i in zip(groups, found.indices, strict=True)]
        assert found.size == sum(size for size, _ in chosen) <= budget
        assert found.loss == sum(loss for _, loss in chosen)
        assert found.loss == pytest.approx(best(groups, budget), rel=1e-12)
        assert found.bound == found.loss


def test_a_threshold_would_be_worse():
    # Per byte the second group gains more, but only the first one's step uses the budget.
    groups = [[(10, 8.0), (20, 1.0)], [(10, 5.0), (14, 2.0)], [(10, 5.0), (14, 2.0)]]
    assert knapsack.choose(groups, 40).indices == [1, 0, 0]
    assert knapsack.choose(groups, 38).indices == [0, 1, 1]


def test_cut_short_the_bound_still_holds(monkeypatch):
    groups = instance(3, n_groups=40, n_options=8)
    least, most = span(groups)
    for part in (0.1, 0.3, 0.6):
        budget = least + int(part * (most - least))
        full = knapsack.choose(groups, budget)
        with monkeypatch.context() as patch:
            patch.setattr(knapsack, "STATES", 4)
            short = knapsack.choose(groups, budget)
        assert short.bound <= full.loss <= short.loss
        assert short.loss <= full.loss * 1.05
        assert full.bound == pytest.approx(full.loss, rel=1e-3)


def test_nothing_to_choose():
    assert knapsack.choose([], 0).indices == []
    assert knapsack.choose([[(5, 1.0)]], 5).indices == [0]
    with pytest.raises(ValueError, match="smallest choice takes 5, the budget is 4"):
        knapsack.choose([[(5, 1.0)]], 4)


def test_ties_take_the_first_and_the_smallest():
    assert knapsack.choose([[(4, 0.0), (2, 0.0), (2, 0.0)]], 9).indices == [1]
