"""gpu-poor, 8 or 4 bits, as quantize() does it by default.

On request ``int8-a8`` and the like, and ``int8-a8-avx2``: as on a machine without AVX-512.
"""

import re

from torch import nn

from benchmarks.peers import runner

LABELS = {"int8": "**gpu-poor int8**", "int4": "**gpu-poor int4**"}
REQUIREMENTS = ()
NOTE = ""
#: Our kernels, torch's own and those of its libraries.
AVX2 = {
    "GPU_POOR_ISA": "avx2", "ATEN_CPU_CAPABILITY": "avx2", "ONEDNN_MAX_CPU_ISA": "AVX2",
    "MKL_ENABLE_INSTRUCTIONS": "AVX2",
}  # fmt: skip


def environment(variant: str) -> dict[str, str]:
    return AVX2 if variant.endswith("-avx2") else {}


def layers(model: nn.Module) -> list[dict]:
    """What became of every tensor: groups of names that differ only in their layer's number."""
    from gpu_poor.nn import QuantizedModule

    groups: dict[tuple, dict] = {}
    seen = set()
    for name, module in model.named_modules():
        quantized = isinstance(module, QuantizedModule)
        for key, tensor in (*module._parameters.items(), *module._buffers.items()):
            if tensor is None or tensor.numel() == 0 or key in module._non_persistent_buffers_set:
                continue
            shared = tensor.data_ptr() in seen
            seen.add(tensor.data_ptr())
            int8 = quantized and key.removesuffix("_scale") in module.weight_names
            pattern = re.sub(r"\.\d+\.", ".*.", f"{name}.{key}")
            group = groups.setdefault(
                (pattern, tuple(tensor.shape), shared),
                {"name": pattern, "shape": list(tensor.shape), "count": 0, "bytes": 0,
                 "dtype": str(tensor.dtype).removeprefix("torch."), "int8": int8, "shared": shared,
                 "module": type(module).__name__},
            )  # fmt: skip
            group["count"] += 1
            group["bytes"] += 0 if shared else tensor.nbytes
    return list(groups.values())


def setup(shape: str, threads: int, variant: str):
    from gpu_poor import quantize

    model, before = runner.float_model(shape)
    bits, _, activation = variant.removesuffix("-avx2").partition("-")
    options = {"activation": activation} if activation else {}
    model = quantize(model, bits=int(bits.removeprefix("int")), verbose=False, **options)
    session = runner.TransformersRunner(model, before)
    session.details = {"receipt": model.gpu_poor_receipt.to_dict(), "layers": layers(model)}
    return session
