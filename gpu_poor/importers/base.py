"""What an importer is: it names the model in somebody else's files, and reads one weight of it.

An importer of a folder (safetensors and config.json) subclasses :class:`FolderSource` and says how
a packed weight is unpacked; ``@register`` makes it known under the folder's ``quant_method``. One
of single files subclasses :class:`Source`. Everything in such a folder is data: names are looked up
in the model, no class or module that a config names is imported, and each tensor's shape and dtype
is checked against the model before it is read.
"""

import json
from collections.abc import Iterable
from pathlib import Path
from typing import ClassVar, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from gpu_poor import memory, ops
from gpu_poor.importers.grids import Grid

#: Folder importers by quant_method, and file importers by suffix; filled by :func:`register`.
IMPORTERS: dict[str, type["Source"]] = {}


def register(cls: type["Source"]) -> type["Source"]:
    """Class decorator: make an importer known under its name."""
    IMPORTERS[cls.name] = cls
    return cls


class Piece(NamedTuple):
    """One parameter as it was found.

    Args:
        values: a grid, or a float tensor.
        source: what it was, for the receipt.
        form: the format to quantize to where the grid fits none, or the values are no grid; None
            for a float tensor that stays as it is.
        reason: why quantizing again needs the caller's consent.
    """

    values: Grid | Tensor
    source: str
    form: str | None = None
    reason: str | None = None


class Source:
    """A checkpoint of another library.

    Raises:
        ValueError: on construction, a variant that is not supported; on reading, a tensor that is
            missing, of another shape or dtype than the model's, or damaged. Each names the file.
    """

    #: The quant_method in a config.json, or the suffix of a file.
    name: ClassVar[str]
    #: The model's transformers config, without anything about quantization.
    config = None
    path: Path
    #: The name of the base model within the model; set once the model is known.
    prefix = "model"

    def has(self, parameter: str) -> bool:
        """Whether there is anything for a parameter of the model."""
        raise NotImplementedError

    def read(self, parameter: str, shape: tuple[int, ...], rows: tuple[int, ...]) -> Piece:
        """The parameter ``[*shape]``; rows: its shape as rows ``[N, K]``, which grids have."""
        raise NotImplementedError

    def unread(self) -> list[str]:
        """The tensors that nobody has asked for."""
        raise NotImplementedError

    def error(self, message: str) -> ValueError:
        """A ValueError that names the checkpoint."""
        return ValueError(f"{self.path} ({self.name}): {message}")


class Tensors:
    """The tensors of the safetensors files of a folder, each checked before it is read."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.headers: dict[str, tuple[Path, torch.dtype, tuple[int, ...]]] = {}
        self.taken: set[str] = set()
        for file in self._files(folder):
            try:
                with safe_open(file, framework="pt") as opened:
                    for key in opened.keys():  # noqa: SIM118 - a safe_open is no dict
                        if key in self.headers:
                            other = self.headers[key][0].name
                            raise ValueError(f"{folder}: {key} is in {file.name} and in {other}")
                        found = opened.get_slice(key)
                        dtype = DTYPES.get(found.get_dtype())
                        self.headers[key] = (file, dtype, tuple(found.get_shape()))
            except SafetensorError as error:
                raise ValueError(f"{file} is truncated or corrupted: {error}") from error

    @staticmethod
    def _files(folder: Path) -> list[Path]:
        files = sorted(folder.glob("*.safetensors"))
        index = folder / "model.safetensors.index.json"
        if index.exists():
            named = read_json(index).get("weight_map")
            if not isinstance(named, dict) or not named:
                raise ValueError(f"{index}: no weight_map")
            names = {str(name) for name in named.values()}
            if missing := sorted(names - {file.name for file in files}):
                raise ValueError(f"{folder}: {missing[0]}, which {index.name} lists, is missing")
            files = [file for file in files if file.name in names]
        if not files:
            raise ValueError(f"{folder}: no .safetensors file (others could hold code to run)")
        return files

    def __contains__(self, name: str) -> bool:
        return name in self.headers

    def shape(self, name: str) -> tuple[int, ...]:
        """The shape of a tensor that is there."""
        return self.headers[name][2]

    def dtype(self, name: str) -> torch.dtype | None:
        """The dtype of a tensor that is there; None if it is none of torch's usual ones."""
        return self.headers[name][1]

    def take(
        self, name: str, dtypes: torch.dtype | Iterable[torch.dtype], shape: tuple[int | None, ...]
    ) -> Tensor:
        """Read a tensor; None in shape: any size.

        Raises:
            ValueError: it is missing, or of another dtype or shape.
        """
        if name not in self.headers:
            raise ValueError(f"{self.folder}: {name} is missing")
        file, dtype, found = self.headers[name]
        dtypes = (dtypes,) if isinstance(dtypes, torch.dtype) else tuple(dtypes)
        fits = len(found) == len(shape) and all(
            b in (None, a) for a, b in zip(found, shape, strict=True)
        )
        if dtype not in dtypes or not fits:
            wanted = " or ".join(short(dtype) for dtype in dtypes)
            raise ValueError(
                f"{file}: {name} is {short(dtype)} {list(found)}, expected {wanted} "
                f"[{', '.join('any' if size is None else str(size) for size in shape)}]"
            )
        self.taken.add(name)
        with safe_open(file, framework="pt") as opened:
            mapped = opened.get_tensor(name)
        copy = mapped.clone()  # or one small tensor keeps all of the file mapped
        memory.drop_file_pages(mapped)
        return copy

    def unread(self) -> list[str]:
        return sorted(set(self.headers) - self.taken)


#: What safetensors calls the dtypes that checkpoints are made of.
DTYPES = {
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "I32": torch.int32,
    "I64": torch.int64,
}


def short(dtype: torch.dtype | None) -> str:
    """A dtype without "torch."."""
    return "of an unknown dtype" if dtype is None else str(dtype).removeprefix("torch.")


def read_json(file: Path) -> dict:
    """A JSON object.

    Raises:
        ValueError: it is none, or no file.
    """
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise ValueError(f"{file} cannot be read: {error}") from error
    except ValueError as error:
        raise ValueError(f"{file} is no JSON: {error}") from error
    if not isinstance(found, dict):
        raise ValueError(f"{file} is no JSON object")
    return found


class FolderSource(Source):
    """A folder as transformers saves it, in which the weights of some modules are packed.

    Args:
        folder: with config.json and safetensors.
        settings: its quantization_config.
    """

    #: Buffers that old transformers saved and no model reads.
    IGNORED = (".rotary_emb.inv_freq", ".attn.masked_bias", ".attn.bias")

    def __init__(self, folder: Path, settings: dict):
        from transformers import AutoConfig

        self.path = Path(folder)
        self.settings = settings
        self.check_settings()
        try:
            self.config = AutoConfig.from_pretrained(folder, trust_remote_code=False)
        except Exception as error:  # a class for each thing that it can find wrong
            raise self.error(f"transformers refuses config.json: {error}") from error
        for key in ("quantization_config", "compression_config"):
            self.config.__dict__.pop(key, None)
        self.tensors = Tensors(self.path)

    # -- what a peer's importer says -----------------------------------------------------------

    def check_settings(self) -> None:
        """Raise ValueError for a variant that is not supported, from the config alone."""
        raise NotImplementedError

    def is_packed(self, module: str) -> bool:
        """Whether the tensors named ``module.*`` are a packed weight."""
        raise NotImplementedError

    def unpack(self, module: str, n: int, k: int) -> Piece:
        """The packed weight ``[n, k]`` of a module, named as in the files."""
        raise NotImplementedError

    # -- reading -------------------------------------------------------------------------------

    def _find(self, parameter: str) -> tuple[str, str] | None:
        """The name in the files, and the module's if its weight is packed."""
        for name in self._candidates(parameter):
            module = name.removesuffix(".weight")
            if module != name and self.is_packed(module):
                return name, module
            if name in self.tensors:
                return name, ""
        return None

    def _candidates(self, name: str) -> tuple[str, ...]:
        """A base model may have been saved on its own, without the prefix it has in others."""
        prefix = f"{self.prefix}."
        return (name, name.removeprefix(prefix), prefix + name)

    def has(self, parameter: str) -> bool:
        return self._find(parameter) is not None

    def read(self, parameter: str, shape: tuple[int, ...], rows: tuple[int, ...]) -> Piece:
        name, module = self._find(parameter)
        if module and len(rows) == 2:
            return self.unpack(module, *rows)
        value = self.tensors.take(name, ops.FLOATS, shape)
        return Piece(value, short(value.dtype))

    def unread(self) -> list[str]:
        return [name for name in self.tensors.unread() if not name.endswith(self.IGNORED)]

    def columns_setting(self, key: str, default: int) -> int:
        """How many columns share a scale; -1: the whole row."""
        value = self.settings.get(key, default)
        if type(value) is not int or (value < 1 and value != -1):
            raise self.error(f"{key} must be a number of columns or -1, got {value!r}")
        return value

    def setting(self, key: str, allowed: tuple, default=None) -> object:
        """A setting that must be one of a few values."""
        value = self.settings.get(key, default)
        if not any(type(value) is type(each) and value == each for each in allowed):
            known = ", ".join(repr(each) for each in allowed)
            raise self.error(f"{key} {value!r} is not supported; known: {known}")
        return value
