"""HOW the numbers of a quantized weight are chosen, in one registry; WHAT is stored is a format's.

Two kinds of strategy exist, and a recipe has at most one of each:

- a :class:`Rounding` turns rows of a weight into what a format stores;
- a :class:`Smoothing` multiplies columns of a weight by factors and divides what the layer reads
  by them, so that the float model computes the same: in the norm or linear before it
  (gpu_poor/folds.py, gpu_poor/chains.py), or else in the layer itself, as its input scale.

Adding one is one file and one ``register``.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import ClassVar, NamedTuple

import torch
from torch import Tensor

from gpu_poor.formats import Format


class Numbers(NamedTuple):
    """What a format stores for a weight."""

    weight: Tensor
    scale: Tensor


@dataclass
class Inputs:
    """What calibration has seen of the inputs x of a layer, in the model quantized so far.

    Args:
        gram: mean of ``x x^T``, float32 ``[K, K]``; None unless a strategy needs it.
        drift: mean of ``(x' - x) x^T``, float32 ``[K, K]``; x' is the input of the same layer in
            the float model. None unless a strategy needs it.
        absmax: largest ``|x|`` of each channel, float32 ``[K]``.
        n_tokens: how many x there were.
    """

    gram: Tensor | None
    drift: Tensor | None
    absmax: Tensor
    n_tokens: int
    #: What a rounding has made of the Gram matrix, for the next linear that reads x.
    factored: dict = field(default_factory=dict, repr=False)

    def divided_by(self, factors: Tensor) -> "Inputs":
        """Those of the same layer once its inputs are divided by ``factors``, ``[K]``."""
        outer = torch.outer(factors, factors)
        gram, drift = (None if x is None else x / outer for x in (self.gram, self.drift))
        return Inputs(gram, drift, self.absmax / factors, self.n_tokens)


class Strategy:
    """Base of both kinds."""

    name: ClassVar[str]
    #: Whether it needs :class:`Inputs`, and so calibration data.
    needs_inputs: ClassVar[bool] = False
    #: Whether these must have the Gram matrix.
    needs_gram: ClassVar[bool] = False
    #: Whether these must have the drift, which takes the float model's activations as well.
    needs_drift: ClassVar[bool] = False


class Rounding(Strategy):
    """Chooses the numbers of a weight."""

    def quantize(self, rows: Tensor, form: Format, inputs: Inputs | None = None) -> Numbers:
        """Contiguous float rows ``[N, K]`` in a format; scales are NaN where rows are not finite.

        Raises:
            ValueError: the inputs are of no use; the caller adds of which layer.
        """
        raise NotImplementedError


class Smoothing(Strategy):
    """Chooses factors for the columns of the weights that read one tensor.

    It is the output of a norm, or, with calibration data only, of anything.
    """

    #: Whether factors are kept in the layer where nothing before it can be divided by them.
    keep: bool = False

    def factors(
        self, gain: Tensor, rows: list[Tensor], inputs: Inputs | None, forms: list[Format]
    ) -> Tensor | None:
        """Positive float32 ``[K]``, or None to leave all as it is.

        Args:
            gain: what the norm multiplies each channel by, float32 ``[K]``; ones if it is none.
            rows: the weights ``[N, K]`` that read it; empty while a checkpoint is streamed.
            inputs: what calibration has seen of the tensor, if the strategy needs it.
            forms: the formats of ``rows``.
        """
        raise NotImplementedError


def column_absmax(rows: list[Tensor]) -> Tensor:
    """The largest ``|w|`` in each column of several weights, float32 ``[K]``."""
    return torch.stack([matrix.abs().amax(0).float() for matrix in rows]).amax(0)


def even_out(factors: Tensor, usable: Tensor) -> Tensor | None:
    """Factors of geometric mean 1, within what float16 norms bear; 1 where not ``usable``.

    One factor common to all columns changes no rounding, and would only shift the scales.
    """
    if not bool(usable.any()):
        return None
    log = factors.log2()
    log = (log - log[usable].mean()).clamp(-LIMIT_LOG2, LIMIT_LOG2)
    return torch.where(usable, log, 0.0).exp2()


#: Factors stay within 2 to this, up and down.
LIMIT_LOG2 = 10.0


STRATEGIES: dict[str, type[Strategy]] = {}


def register(cls: type[Strategy]) -> type[Strategy]:
    """Class decorator: make a strategy known under its name."""
    STRATEGIES[cls.name] = cls
    return cls


class Recipe(NamedTuple):
    """The strategies of one quantization."""

    rounding: Rounding
    smoothing: Smoothing | None

    @property
    def needs_inputs(self) -> bool:
        return any(part is not None and part.needs_inputs for part in self)

    @property
    def needs_gram(self) -> bool:
        return any(part is not None and part.needs_gram for part in self)

    @property
    def needs_drift(self) -> bool:
        return any(part is not None and part.needs_drift for part in self)

    @property
    def keeps(self) -> bool:
        """Whether linears may keep an input scale.

        Not if both parts go by the Gram matrix: a search under it finds nothing that rounding under
        it would not (docs/methods.md).
        """
        both = self.smoothing is not None and self.smoothing.needs_gram and self.rounding.needs_gram
        return self.smoothing is not None and self.smoothing.keep and not both

    @property
    def names(self) -> list[str]:
        return [part.name for part in reversed(self) if part is not None]


#: A name, an instance, or several of them; None: the default.
Strategies = str | Strategy | Sequence[str | Strategy] | None


def recipe(strategies: Strategies, calibrated: bool) -> Recipe:
    """What ``strategies`` stands for.

    Args:
        calibrated: whether there is calibration data, which decides the default.

    Raises:
        ValueError: a name is unknown, or there are two strategies of a kind.
    """
    if strategies is None:
        strategies = DEFAULTS[calibrated]
    elif isinstance(strategies, str | Strategy):
        strategies = [strategies]
    found: dict[type, Strategy] = {}
    for each in strategies:
        if isinstance(each, str) and each in STRATEGIES:
            each = STRATEGIES[each]()
        if not isinstance(each, Strategy) or each.name not in STRATEGIES:
            known = ", ".join(STRATEGIES)
            raise ValueError(f"strategy must be one of {known}, or several, got {each!r:.80}")
        kind = Smoothing if isinstance(each, Smoothing) else Rounding
        if kind in found:
            raise ValueError(
                f"strategy: {found[kind].name} and {each.name} exclude one another: both are "
                f"a {kind.__name__.lower()}"
            )
        found[kind] = each
    rounding = found.get(Rounding) or STRATEGIES[DEFAULTS[calibrated][1]]()
    return Recipe(rounding, found.get(Smoothing))


#: Without and with calibration data (docs/methods.md has the figures).
DEFAULTS = {False: ("equalize", "mse"), True: ("equalize", "gptq")}
