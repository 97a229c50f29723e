"""Checkpoints of other libraries, in our layers and kernels: a file for each of them.

Adding one is a file with a class under ``@register`` and its name in the import below.
docs/importers.md says what is exact, what is quantized again, and what is refused.
"""

from pathlib import Path

from torch import nn

from gpu_poor.importers import awq, bitsandbytes, compressed_tensors, gguf, gptq  # noqa: F401
from gpu_poor.importers.base import IMPORTERS, FolderSource, Source, read_json, register
from gpu_poor.importers.loading import assemble

__all__ = ["IMPORTERS", "FolderSource", "Source", "find", "load", "register"]


def find(path: str | Path) -> Source | None:
    """The source in a file or folder; None if it is none of the known libraries'.

    Raises:
        ValueError: it is of a known library, but damaged or of an unsupported variant.
    """
    path = Path(path)
    if path.is_file():
        importer = IMPORTERS.get(path.suffix.lower())
        return None if importer is None else importer(path)
    if path.suffix.lower() in IMPORTERS and not path.exists():
        raise ValueError(f"{path}: there is no such file")
    if not (path / "config.json").is_file():
        return None
    config = read_json(path / "config.json")
    settings = config.get("quantization_config") or config.get("compression_config")
    if settings is None and (path / "quantize_config.json").is_file():  # AutoGPTQ of old
        settings = {"quant_method": "gptq"} | read_json(path / "quantize_config.json")
    method = settings.get("quant_method") if isinstance(settings, dict) else None
    importer = IMPORTERS.get(method) if isinstance(method, str) else None
    return None if importer is None else importer(path, settings)


def load(source: Source, **options) -> nn.Module:
    """The model of a source; options of :func:`gpu_poor.importers.loading.assemble`."""
    model = assemble(source, **options)
    if (source.path / "generation_config.json").is_file():
        from transformers import GenerationConfig

        model.generation_config = GenerationConfig.from_pretrained(source.path)
    return model
