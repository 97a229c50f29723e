"""Writing files so that none is ever half written."""

import os
from collections.abc import Callable
from pathlib import Path


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
