"""Files: which names mean one, and writing them so that none is ever half written."""

import json
import os
from collections.abc import Callable, Iterable
from pathlib import Path

import torch
from torch import Tensor


def is_missing(name: str | Path) -> bool:
    """Whether a name means a place on this machine, where nothing is.

    "gpt2" and "org/name" may be repositories on the hub, which is asked for minutes where there is
    no network; a Path, "/x", "./x", "../x", "~/x", "x/", "x/y/z", and "x/y" where there is a folder
    x, are none.
    """
    text = os.fspath(name)
    parts = Path(text).parts
    local = (
        isinstance(name, Path)
        or os.path.isabs(text)
        or text.startswith((".", "~"))
        or text.endswith(("/", os.sep))
        or len(parts) > 2
        or (len(parts) == 2 and Path(parts[0]).is_dir())
    )
    return local and not os.path.exists(os.path.expanduser(text))


def replace_whole(path: Path, write: Callable[[str], object]) -> None:
    """Have ``write`` write a file of another name, which then takes the place of ``path``.

    If it fails, ``path`` is what it was; a process that is killed leaves ``.<name>.<process id>``.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        write(str(temporary))
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


#: What safetensors calls the dtypes of hidden states.
DTYPES = {
    torch.bfloat16: "BF16",
    torch.float16: "F16",
    torch.float32: "F32",
    torch.float64: "F64",
}


def write_safetensors(
    path: str | Path, names: list[str], tensors: Iterable[Tensor], metadata: dict[str, str]
) -> None:
    """Write a safetensors file of float tensors that are never in memory together.

    Args:
        tensors: of the names, in order; they are gone through twice.
    """
    header, end = {"__metadata__": metadata}, 0
    for name, tensor in zip(names, tensors, strict=True):
        start, end = end, end + tensor.nbytes
        shape, dtype = list(tensor.shape), DTYPES[tensor.dtype]
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [start, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with open(path, "wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for tensor in tensors:
            flat = tensor.detach().cpu().contiguous().view(-1)
            file.write(memoryview(flat.view(torch.uint8).numpy()))
