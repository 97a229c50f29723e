"""HOW the numbers of a quantized weight are chosen: see :mod:`gpu_poor.strategies.base`."""

from gpu_poor.strategies import (  # noqa: F401 - they register
    absmax,
    awq,
    equalize,
    gptq,
    hqq,
    mse,
    smoothquant,
)
from gpu_poor.strategies.base import (
    STRATEGIES,
    Inputs,
    Recipe,
    Rounding,
    Smoothing,
    Strategies,
    Strategy,
    recipe,
    register,
)
from gpu_poor.strategies.mse import MSE

__all__ = [
    "MSE",
    "STRATEGIES",
    "Inputs",
    "Recipe",
    "Rounding",
    "Smoothing",
    "Strategies",
    "Strategy",
    "recipe",
    "register",
]
