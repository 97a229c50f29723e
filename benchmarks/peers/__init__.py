"""Peers: one file each, one interface, each measured in its own process.

A peer module has

* ``LABELS``: variant -> the name shown in tables ("" is the only or default variant);
* ``REQUIREMENTS``: pip requirements, installed without dependencies into .peers/<module> (torch and
  transformers are those of the running environment, the same for all);
* ``NOTE``: one sentence of what is fair or unfair about the comparison, "" for none;
* ``setup(shape, threads, variant) -> runner``: see runner.py;
* optionally ``install(folder)`` for what pip alone cannot do, and ``environment(variant)``: what a
  variant's process has set from its start.

``python -m benchmarks.peers list | install NAME... | run`` (see __main__.py).
"""

import importlib
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
#: Ignored by git; removing it removes every peer.
FOLDER = ROOT / ".peers"

#: Those that run unless others are asked for.
DEFAULT = (
    "torch_fp32", "torch_bf16", "gpu_poor", "torch_dynamic", "torchao", "bitsandbytes",
    "quanto", "hqq", "llama_cpp",
)  # fmt: skip
MODULES = (*DEFAULT, "llama_cpp_avx2")


def folder(module: str) -> Path:
    """Where a peer's own packages and builds are."""
    return FOLDER / module


def load(module: str):
    """Import a peer's file, with its packages on the path after those of the environment."""
    if module not in MODULES:
        raise ValueError(f"unknown peer {module!r}: one of {', '.join(MODULES)}")
    if folder(module).exists():
        sys.path.append(str(folder(module)))
    return importlib.import_module(f"benchmarks.peers.{module}_peer")


def contenders(names: tuple[str, ...] = DEFAULT) -> dict[str, str]:
    """``module`` or ``module:variant`` -> label.

    Args:
        names: modules, each with all its variants in LABELS, or single ones as ``module:variant``.
    """
    found = {}
    for name in names:
        module, _, asked = name.partition(":")
        labels = load(module).LABELS
        for variant in (asked,) if asked else labels:
            key = f"{module}:{variant}" if variant else module
            found[key] = labels.get(variant, f"{module} {variant}")
    return found


def environment(name: str) -> dict[str, str]:
    """What the process of ``module:variant`` has set; of an unknown one nothing: it says so."""
    module, _, variant = name.partition(":")
    own = getattr(load(module), "environment", None) if module in MODULES else None
    return own(variant) if own else {}


def install(module: str) -> None:
    """Download and build one peer. pip's output goes to the terminal."""
    peer = load(module)
    target = folder(module)
    if peer.REQUIREMENTS:
        subprocess.run(
            [sys.executable, "-m", "pip", "install", "--quiet", "--upgrade", "--no-deps",
             "--target", str(target), *peer.REQUIREMENTS],
            check=True,
        )  # fmt: skip
    if hasattr(peer, "install"):
        target.mkdir(parents=True, exist_ok=True)
        peer.install(target)
