"""What several passes do to the modules of a model."""

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager

from torch import nn
from torch.utils.hooks import RemovableHandle


class Holder:
    """Base of what holds a model as ``.model`` and stands for it: see :func:`unwrap`."""

    model: nn.Module


def unwrap(model: "nn.Module | Holder") -> nn.Module:
    """The model in a :class:`gpu_poor.quantization.QuantizedModel`; anything else as it is.

    A function that takes a model calls this first, so that it takes both.
    """
    return model.model if isinstance(model, Holder) else model


def checked(model, function: str) -> nn.Module:
    """:func:`unwrap` of what must be a model.

    Raises:
        TypeError: it isn't one; the message says what ``function`` takes.
    """
    model = unwrap(model)
    if not isinstance(model, nn.Module):
        raise TypeError(f"{function} takes a model, got {type(model).__name__}")
    return model


def put(model: nn.Module, name: str, module: nn.Module) -> None:
    """Replace the submodule ``name``."""
    parent, _, child = name.rpartition(".")
    setattr(model.get_submodule(parent), child, module)


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Without dropout; each module is in its own mode again afterwards.

    Flags only: ``eval()`` may be a module's own, and do more than can be undone here.
    """
    modes = [(module, module.training) for module in model.modules()]
    try:
        for module, _ in modes:
            module.training = False
        yield
    finally:
        for module, mode in modes:
            module.training = mode


@contextmanager
def hooked(handles: Iterable[RemovableHandle]) -> Iterator[None]:
    """With these hooks, which are removed afterwards; all of them, if one cannot be set."""
    held: list[RemovableHandle] = []
    try:
        for handle in handles:
            held.append(handle)
        yield
    finally:
        for handle in held:
            handle.remove()


class Reached(Exception):
    """Raised by a hook that has seen what it was set for: nothing after it is of interest."""


@contextmanager
def forwards(functions: dict[nn.Module, Callable]) -> Iterator[None]:
    """With these functions as the ``forward`` of their modules."""
    before = {module: vars(module).get("forward") for module in functions}
    try:
        for module, function in functions.items():
            module.forward = function
        yield
    finally:
        for module, own in before.items():
            vars(module).pop("forward", None)
            if own is not None:
                module.forward = own


def not_finite(name: str) -> ValueError:
    """The error for a parameter with a NaN or an infinity."""
    return ValueError(f"{name} is not finite: it holds a NaN or an infinity")
