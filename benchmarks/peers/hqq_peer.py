"""HQQ, 8 bits, group 64. https://github.com/mobiusml/hqq"""

import torch

from benchmarks.peers import runner

LABELS = {"": "HQQ 8-bit"}
REQUIREMENTS = ("hqq==0.2.8.post1", "termcolor", "einops")
NOTE = "on a CPU it dequantizes and multiplies; it skips Conv1D"


def setup(shape: str, threads: int, variant: str):
    from hqq.core.quantize import BaseQuantizeConfig, HQQLinear
    from hqq.models.hf.base import AutoHQQHFModel

    model, before = runner.float_model(shape, torch.bfloat16)
    start = runner.model_bytes(model)
    AutoHQQHFModel.quantize_model(
        model,
        quant_config=BaseQuantizeConfig(nbits=8, group_size=64),
        compute_dtype=torch.bfloat16,
        device="cpu",
    )
    meta = 0  # scales and zeros live in plain dicts
    for module in model.modules():
        if isinstance(module, HQQLinear):
            tensors = [v for v in module.meta.values() if isinstance(v, torch.Tensor)]
            meta += sum(t.numel() * t.element_size() for t in tensors)
    return runner.TransformersRunner(model, before, extra_bytes=meta, given=start)
