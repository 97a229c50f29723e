"""torch.ao.quantization.quantize_dynamic, qint8: built into torch, deprecated by it.

https://docs.pytorch.org/docs/stable/generated/torch.ao.quantization.quantize_dynamic.html
"""

import torch

from benchmarks.peers import runner

LABELS = {"": "torch quantize_dynamic"}
REQUIREMENTS = ()
NOTE = "replaces nn.Linear only: GPT-2's Conv1D and every embedding stay float32, without a word"


def setup(shape: str, threads: int, variant: str):
    model, before = runner.float_model(shape)
    model = torch.ao.quantization.quantize_dynamic(model, {torch.nn.Linear}, dtype=torch.qint8)
    packed = 0  # the int8 weights live in opaque objects, neither parameters nor buffers
    for module in model.modules():
        if isinstance(module, torch.ao.nn.quantized.dynamic.Linear):
            weight = module.weight()
            packed += weight.numel() + 12 * weight.shape[0]  # scale float64, zero point int32
    return runner.TransformersRunner(model, before, extra_bytes=packed, given=before)
