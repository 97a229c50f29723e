"""HOW the numbers of a quantized weight are chosen: see :mod:`gpu_poor.strategies.base`."""

from gpu_poor.strategies.absmax import Absmax
from gpu_poor.strategies.awq import Awq
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
from gpu_poor.strategies.equalize import Equalize
from gpu_poor.strategies.gptq import Gptq
from gpu_poor.strategies.hqq import Hqq
from gpu_poor.strategies.mse import MSE, Mse
from gpu_poor.strategies.smoothquant import SmoothQuant

__all__ = [
    "MSE",
    "STRATEGIES",
    "Absmax",
    "Awq",
    "Equalize",
    "Gptq",
    "Hqq",
    "Inputs",
    "Mse",
    "Recipe",
    "Rounding",
    "SmoothQuant",
    "Smoothing",
    "Strategies",
    "Strategy",
    "recipe",
    "register",
]
