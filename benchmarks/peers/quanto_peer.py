"""optimum-quanto, qint8 weights. https://github.com/huggingface/optimum-quanto"""

import torch

from benchmarks.peers import runner

LABELS = {"": "optimum-quanto int8"}
REQUIREMENTS = ("optimum-quanto==0.2.7",)
NOTE = "its README promises accelerated int8 on CUDA only; it skips Conv1D"


def setup(shape: str, threads: int, variant: str):
    from optimum.quanto import freeze, qint8, quantize

    model, before = runner.float_model(shape, torch.bfloat16)
    start = runner.model_bytes(model)
    quantize(model, weights=qint8)
    freeze(model)
    return runner.TransformersRunner(model, before, given=start)
