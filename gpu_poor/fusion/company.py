"""torch's own operators beside another process that holds a core.

Our loops notice it and go on alone (csrc/ops/stall.h). torch's do not: the choice among GPT-2's
50257 logits, too many for one of its threads, took 3.5 ms a token beside a busy process and
takes 0.6 ms alone.
"""

import contextlib
from collections.abc import Iterator
from contextvars import ContextVar

import torch

from gpu_poor import isa

#: torch's number of threads when :func:`followed` began; None: outside of it.
_usual: ContextVar[int | None] = ContextVar("_usual", default=None)


@contextlib.contextmanager
def followed() -> Iterator[None]:
    """Within, :func:`follow` may change torch's number of threads; it is set back at the end."""
    usual = torch.get_num_threads()
    token = _usual.set(usual)
    try:
        yield
    finally:
        _usual.reset(token)
        _set(usual)


def follow() -> None:
    """Within :func:`followed`: one thread for torch, too, while our loops have no more."""
    usual = _usual.get()
    if usual is not None:
        _set(1 if isa.alone() else usual)


def _set(threads: int) -> None:
    if torch.get_num_threads() != threads:
        torch.set_num_threads(threads)
