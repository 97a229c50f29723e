"""The checkpoints of tests/fixtures/foreign: other libraries wrote them (make_foreign.py)."""

from pathlib import Path

import torch

import gpu_poor

FOREIGN = Path(__file__).parent / "fixtures" / "foreign"
NAMES = sorted(path.name.split(".")[0] for path in FOREIGN.glob("*.expected.safetensors"))


def foreign(name: str) -> Path:
    folder = FOREIGN / name
    return folder if folder.is_dir() else FOREIGN / f"{name}.gguf"


def load(name: str | Path, **options):
    """A fixture in float32, so that nothing but its weights is rounded."""
    path = foreign(name) if isinstance(name, str) else name
    if path.name == "gptq-act-order":
        options = {"requantize": "int8"} | options
    return gpu_poor.load(path, **({"dtype": torch.float32, "activation": "a32"} | options))


@torch.no_grad()
def answer(model, ids) -> torch.Tensor:
    return model(ids).logits
