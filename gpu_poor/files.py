"""Files: which names mean one, and writing them so that none is ever half written."""

import os
from collections.abc import Callable
from pathlib import Path


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
