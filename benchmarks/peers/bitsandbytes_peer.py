"""bitsandbytes LLM.int8() through transformers, on its CPU backend.

https://huggingface.co/docs/transformers/quantization/bitsandbytes . It only quantizes while loading
a checkpoint, so the random model is saved first.
"""

import tempfile

import torch

from benchmarks import shapes
from benchmarks.peers import runner

LABELS = {"": "bitsandbytes int8"}
REQUIREMENTS = ("bitsandbytes==0.50.2",)
NOTE = "embeddings and lm_head stay bfloat16 by its default"


def setup(shape: str, threads: int, variant: str):
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    with tempfile.TemporaryDirectory() as folder:
        model = shapes.build(shape, torch.bfloat16)
        before = sum(p.numel() for p in model.parameters()) * 4
        model.save_pretrained(folder)
        del model
        model = AutoModelForCausalLM.from_pretrained(
            folder,
            dtype=torch.bfloat16,
            device_map="cpu",
            quantization_config=BitsAndBytesConfig(load_in_8bit=True),
        )
    scales = sum(
        getattr(p, "SCB", None).numel() * 4
        for p in model.parameters()
        if getattr(p, "SCB", None) is not None
    )
    return runner.TransformersRunner(model, before, extra_bytes=scales)
