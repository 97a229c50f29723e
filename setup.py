# SPDX-License-Identifier: MIT
"""Builds ``gpu_poor._gpu_poor_C``: the C kernels and their operators against torch's stable ABI.

One flag set serves every file and every CPU: no ``-march``, no per-file flags, because each kernel
names its instruction set itself (``target`` attributes). ``Py_LIMITED_API`` and torch's stable ABI
make one wheel per platform for every Python >= 3.10 and torch >= 2.10. The rest of the project's
metadata is in pyproject.toml.
"""

import os
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext
from torch.utils.cpp_extension import include_paths, library_paths

os.chdir(Path(__file__).resolve().parent)
SOURCES = sorted(str(p) for suffix in ("c", "cpp") for p in Path("csrc").rglob(f"*.{suffix}"))
EXPORTS, LINUX = "csrc/exports.map", sys.platform == "linux"
HEADERS = sorted(str(p) for p in Path("csrc").rglob("*.h")) + ["setup.py"]


class BuildExt(build_ext):
    """Compiles the sources side by side, and only those older than themselves or any header."""

    def build_extensions(self):
        compile_one = self.compiler.compile

        def up_to_date(source, output_dir):
            target = Path(self.compiler.object_filenames([source], output_dir=output_dir)[0])
            inputs = [source, *HEADERS]
            fresh = target.exists() and all(
                os.path.getmtime(i) < target.stat().st_mtime for i in inputs
            )
            return str(target) if fresh and not self.force else None

        def compile_side_by_side(sources, output_dir=None, extra_postargs=(), **options):
            def one(source):
                done = up_to_date(source, output_dir)
                if done:
                    return [done]
                flags = list(extra_postargs or ())
                if source.endswith(".cpp"):  # -isystem: torch's headers are not ours to warn about
                    flags += [part for path in include_paths() for part in ("-isystem", path)]
                return compile_one([source], output_dir=output_dir, extra_postargs=flags, **options)

            with ThreadPoolExecutor(os.cpu_count()) as pool:
                return [o for objects in pool.map(one, sources) for o in objects]

        self.compiler.compile = compile_side_by_side
        super().build_extensions()


extension = Extension(
    "gpu_poor._gpu_poor_C",
    SOURCES,
    depends=[*HEADERS, EXPORTS],
    include_dirs=["csrc"],
    library_dirs=library_paths(),
    # No rpath: gpu_poor imports torch first, so these are loaded already.
    libraries=["torch", "torch_cpu"],
    define_macros=[
        ("Py_LIMITED_API", "0x030A0000"),
        ("TORCH_TARGET_VERSION", "0x020a000000000000"),
    ],
    extra_compile_args=[
        "-O3",
        "-fvisibility=hidden",
        # Every instruction set must round alike: a fused multiply-add only where we wrote one.
        "-ffp-contract=off",
        "-Wall",
        "-Wextra",
        "-Wno-psabi",
    ],
    # -s: no debug information in the wheel.
    extra_link_args=["-Wl,-s", f"-Wl,--version-script={EXPORTS}"] if LINUX else [],
    py_limited_api=True,
)

setup(
    ext_modules=[extension],
    cmdclass={"build_ext": BuildExt},
    options={"bdist_wheel": {"py_limited_api": "cp310"}},
)
