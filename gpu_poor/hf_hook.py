"""Registers gpu_poor with transformers the moment transformers' quantizers are imported.

transformers finds third-party quantizers only if their module has been imported, and importing its
quantizers costs more than a second. So ``import gpu_poor`` leaves a finder behind that waits for
``transformers.quantizers.auto`` (which every ``from_pretrained`` imports) and then imports
:mod:`gpu_poor.hf`, which registers. If transformers is there already, that happens at once.
"""

import importlib.abc
import importlib.util
import sys
import warnings

TRIGGER = "transformers.quantizers.auto"


def install() -> None:
    """Register now if transformers' quantizers are imported, else as soon as they are."""
    if TRIGGER in sys.modules:
        _register()
    elif not any(isinstance(finder, _Finder) for finder in sys.meta_path):
        sys.meta_path.insert(0, _Finder())


def _register() -> None:
    """Import gpu_poor.hf. A transformers it cannot work with must still import: warn."""
    try:
        import gpu_poor.hf  # noqa: F401
    except ImportError as error:
        warnings.warn(f"gpu_poor did not register with transformers: {error}", stacklevel=2)


class _Finder(importlib.abc.MetaPathFinder):
    """Hands :data:`TRIGGER` to the ordinary finders and registers after it has run."""

    def find_spec(self, fullname, path, target=None):
        if fullname != TRIGGER:
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(fullname)
        if spec is not None and spec.loader is not None:
            execute = spec.loader.exec_module

            def exec_module(module):
                execute(module)
                _register()

            spec.loader.exec_module = exec_module
        return spec
