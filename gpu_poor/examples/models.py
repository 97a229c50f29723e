"""Find a model by name for the demo: the packaged one, a folder, the hub, or random weights."""

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

import gpu_poor
from gpu_poor import assets
from gpu_poor.files import is_missing

PACKAGED = "stories260k"
HUB = "model hub"
COMMAND = "python -m gpu_poor.examples.demo"  # in a checkout and with a wheel

#: Published configurations, for when there is no network: (n_layer, n_embd, n_head) of GPT-2.
GPT2_SHAPES = {
    "distilgpt2": (6, 768, 12),
    "gpt2": (12, 768, 12),
    "gpt2-medium": (24, 1024, 16),
    "gpt2-large": (36, 1280, 20),
}


@dataclass
class Loaded:
    """A float32 causal LM, its tokenizer (None with random weights) and where it came from."""

    model: nn.Module
    tokenizer: object | None
    source: str

    @property
    def is_random(self) -> bool:
        return self.tokenizer is None


def load_float(name_or_path: str, random_weights: bool = False) -> Loaded:
    """Load a causal LM in float32.

    Args:
        name_or_path: "stories260k" (in the package), a local folder, or a name on the hub.
        random_weights: if the name is one of :data:`GPT2_SHAPES` and cannot be downloaded, build
            it from its published configuration with random weights: right for memory and speed,
            worthless for quality.

    Raises:
        OSError: no such folder and no download, or not a float model; the message says what to
            do.
        ImportError: transformers is not installed.
    """
    with gpu_poor._needs_transformers("the demo"):
        from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

    path, source = _find(name_or_path)
    try:
        # First and alone: without a network it fails, after the hub's retries, once and not twice.
        config = AutoConfig.from_pretrained(path)
        is_quantized = bool(getattr(config, "quantization_config", None))
        if not is_quantized:
            tokenizer = AutoTokenizer.from_pretrained(path)
            model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
    except OSError as error:
        if source != HUB:
            raise
        if random_weights and name_or_path in GPT2_SHAPES:
            return Loaded(random_gpt2(name_or_path), None, "random weights")
        raise OSError(_advice(name_or_path)) from error
    if is_quantized:
        raise OSError(
            f"{name_or_path!r} is quantized already; give the float original, which is what the "
            "demo quantizes and compares with"
        )
    return Loaded(model.eval(), tokenizer, source)


def _find(name_or_path: str) -> tuple[str, str]:
    """What to hand to from_pretrained, and in words where that is. Raises OSError."""
    path = Path(name_or_path)
    if name_or_path == PACKAGED:
        return assets.STORIES260K, "in the package"
    if path.is_file():
        raise OSError(f"{name_or_path!r} is a file; give the folder of a model")
    if path.is_dir():
        if not (path / "config.json").is_file():
            raise OSError(f"{name_or_path!r} is no folder of a model: no config.json in it")
        return name_or_path, "local folder"
    if is_missing(name_or_path):
        raise OSError(f"{name_or_path!r}: there is no such folder")
    return name_or_path, HUB


def random_gpt2(name: str) -> nn.Module:
    """A GPT-2 of the published shape with random weights, the same ones every time."""
    from transformers import GPT2Config, GPT2LMHeadModel

    n_layer, n_embd, n_head = GPT2_SHAPES[name]
    config = GPT2Config(n_layer=n_layer, n_embd=n_embd, n_head=n_head)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return GPT2LMHeadModel(config).eval()


def _advice(name: str) -> str:
    known = name in GPT2_SHAPES
    return (
        f"{name!r} is no local folder and could not be downloaded. Either\n"
        f"  - give the folder of a model you have: {COMMAND} /path/to/folder\n"
        f"  - connect to the network and try again\n"
        + (
            f"  - measure memory and speed only, on random weights: "
            f"{COMMAND} {name} --random-weights\n"
            if known
            else f"  - use a name whose shape is known ({', '.join(GPT2_SHAPES)}) with "
            f"--random-weights\n"
        )
        + f"  - use the small model in the package: {COMMAND} {PACKAGED}"
    )
