"""transformers in bfloat16: half the bytes, and oneDNN's AMX where the CPU has it."""

import torch

from benchmarks.peers import runner

LABELS = {"": "transformers bf16"}
REQUIREMENTS = ()
NOTE = ""


def setup(shape: str, threads: int, variant: str):
    return runner.TransformersRunner(*runner.float_model(shape, torch.bfloat16))
