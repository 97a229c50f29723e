"""gpu-poor: one line makes a Hugging Face model four times smaller and faster on a CPU.

    from gpu_poor import quantize
    model = quantize(model)

Importing this package needs torch, tqdm and safetensors. If transformers is installed, the
quantizer "gpu-poor" registers itself as soon as transformers is used (gpu_poor/hf_hook.py), so
that ``from_pretrained`` reads a quantized folder.
"""

import importlib as _importlib
import importlib.metadata as _metadata
from contextlib import contextmanager as _contextmanager

from gpu_poor import hf_hook, isa, memory, nn, ops
from gpu_poor.fusion import explain, fuse, unfuse
from gpu_poor.hybrid import make_it_work_hybrid
from gpu_poor.memory_plan import MemoryPlan
from gpu_poor.planner import plan, plan_memory
from gpu_poor.profile import Profile, profile
from gpu_poor.quantize import dequantize, quantize
from gpu_poor.receipt import Receipt, receipt

try:
    __version__ = _metadata.version("gpu-poor")
except _metadata.PackageNotFoundError:  # a source tree on sys.path, not installed
    __version__ = "0+unknown"

__all__ = [
    "GpuPoorConfig",
    "MemoryPlan",
    "Profile",
    "QuantizedModel",
    "Receipt",
    "__version__",
    "assets",
    "dequantize",
    "evaluate",
    "explain",
    "export",
    "fuse",
    "isa",
    "load",
    "make_it_work_hybrid",
    "memory",
    "metrics",
    "nn",
    "ops",
    "plan",
    "plan_memory",
    "profile",
    "quantize",
    "receipt",
    "unfuse",
]

#: Public names whose module is imported on first use: hf needs transformers.
_LAZY = {
    "GpuPoorConfig": "hf",
    "QuantizedModel": "quantization",
    "assets": None,
    "evaluate": "metrics",
    "export": "exporters",
    "load": "hf",
    "metrics": None,
}


@_contextmanager
def _needs_transformers(what: str):
    """Around imports of transformers, which is no hard dependency: say how to get it."""
    try:
        yield
    except ImportError as error:
        if (error.name or "").partition(".")[0] != "transformers":
            raise
        raise ImportError(
            f'{what} needs transformers: pip install "gpu-poor[hf]" ({error})', name=error.name
        ) from error


def __getattr__(name: str):
    if name not in _LAZY:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    with _needs_transformers(f"gpu_poor.{name}"):
        home = _importlib.import_module(f"gpu_poor.{_LAZY[name] or name}")
    return home if _LAZY[name] is None else getattr(home, name)


def __dir__() -> list[str]:
    """The public names: not what this file imports, nor modules behind them."""
    return sorted({*__all__, *(name for name in globals() if name.startswith("__"))})


hf_hook.install()
