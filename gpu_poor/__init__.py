"""gpu-poor: one line makes a Hugging Face model four times smaller and faster on a CPU.

    from gpu_poor import quantize
    model = quantize(model)

Importing this package needs torch, tqdm and safetensors. If transformers is installed, the
quantizer "gpu-poor" registers itself as soon as transformers is used (gpu_poor/hf_hook.py), so
that ``from_pretrained`` reads a quantized folder.
"""

import importlib
from importlib.metadata import PackageNotFoundError, version

from gpu_poor import hf_hook, isa, memory, nn, ops
from gpu_poor.quantize import dequantize, quantize
from gpu_poor.receipt import Receipt, receipt

try:
    __version__ = version("gpu-poor")
except PackageNotFoundError:  # a source tree on sys.path, not installed
    __version__ = "0+unknown"

__all__ = [
    "GpuPoorConfig",
    "Receipt",
    "__version__",
    "dequantize",
    "evaluate",
    "isa",
    "load",
    "memory",
    "metrics",
    "nn",
    "ops",
    "quantize",
    "receipt",
]

#: Public names whose module is imported on first use: hf needs transformers.
_LAZY = {"GpuPoorConfig": "hf", "load": "hf", "evaluate": "metrics", "metrics": None}


def __getattr__(name: str):
    if name not in _LAZY:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    home = importlib.import_module(f"gpu_poor.{_LAZY[name] or name}")
    return home if _LAZY[name] is None else getattr(home, name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


hf_hook.install()
