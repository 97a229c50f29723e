"""Which kernels run: the instruction sets this CPU offers, and a way to cap them.

The extension picks the fastest implementation of every kernel once, at import. The environment
variable ``GPU_POOR_ISA`` caps the choice at one this CPU has, and :func:`cap` does so for a block
of code; one it lacks is an error, so that no figure is mistaken for another's. The names, slowest
first, are ``torch`` (no kernel of ours: plain torch ops, what other devices use), ``ref`` (plain
C, the specification) and the CPU's own features: ``avx2``, ``avx512_vnni``, ``amx``.
"""

import os
from collections.abc import Iterator
from contextlib import contextmanager

import torch  # noqa: F401 - its libraries must be loaded before the extension's

try:
    from gpu_poor import _gpu_poor_C as _C
except ImportError as error:  # pragma: no cover - exercised by an install without a compiler
    raise ImportError(
        "gpu_poor's compiled extension is missing. From a checkout run `make dev`; "
        f"otherwise reinstall the wheel. ({error})"
    ) from error

TORCH = "torch"
#: Every implementation there is, on this CPU or another; csrc/impls.h lists them too.
KNOWN = (TORCH, "ref", "avx2", "avx512_vnni", "amx")
_force_torch = False


def available() -> tuple[str, ...]:
    """Names accepted by :func:`cap` on this CPU, slowest first."""
    return (TORCH, *_C.available())


def current() -> str:
    """The fastest instruction set in use (after any cap)."""
    return TORCH if _force_torch else _C.isa()


def kernels() -> dict[str, str]:
    """For each kernel the implementation that runs, e.g. ``{"int8_linear": "amx"}``."""
    return dict.fromkeys(_C.kernels(), TORCH) if _force_torch else _C.kernels()


unchanged = _C.unchanged
alone = _C.alone


def uses_torch() -> bool:
    """True while the plain torch path is forced."""
    return _force_torch


def set_cap(name: str) -> None:
    """Use nothing faster than ``name``.

    Raises:
        ValueError: the name is unknown, or this CPU (or its kernel) does not offer it.
    """
    global _force_torch
    if name not in available():
        # Not the next slower one: who asks for an instruction set wants to know that it ran.
        if name in KNOWN:
            raise ValueError(
                f"GPU_POOR_ISA: this CPU has no {name}, or its kernel does not offer it; "
                f"available: {', '.join(available())}"
            )
        raise ValueError(f"GPU_POOR_ISA: {name!r} is not one of {', '.join(available())}")
    _force_torch = name == TORCH
    if not _force_torch:
        _C.set_isa(name)


@contextmanager
def cap(name: str) -> Iterator[None]:
    """Cap the instruction set inside a ``with`` block. Process-wide, so not for threads."""
    before = current()
    set_cap(name)
    try:
        yield
    finally:
        set_cap(before)


if os.environ.get("GPU_POOR_ISA"):
    set_cap(os.environ["GPU_POOR_ISA"])
