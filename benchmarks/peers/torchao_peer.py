"""torchao: int8 weight only, and int8 weights with dynamic int8 activations.

https://docs.pytorch.org/ao/stable/ . bfloat16 models, as its examples have them.
"""

import torch

from benchmarks.peers import runner

LABELS = {"weight_only": "torchao int8 weight-only", "dynamic": "torchao int8 dynamic"}
REQUIREMENTS = ("torchao==0.18.0",)
NOTE = "eager like every row here; its documentation recommends torch.compile, and skips Conv1D"


def setup(shape: str, threads: int, variant: str):
    from torchao.quantization import (
        Int8DynamicActivationInt8WeightConfig,
        Int8WeightOnlyConfig,
        quantize_,
    )

    model, before = runner.float_model(shape, torch.bfloat16)
    start = runner.model_bytes(model)
    config = {
        "weight_only": Int8WeightOnlyConfig,
        "dynamic": Int8DynamicActivationInt8WeightConfig,
    }[variant]
    quantize_(model, config())
    return runner.TransformersRunner(model, before, given=start)
