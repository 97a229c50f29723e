"""llama.cpp, built from the source inside the llama-cpp-python sdist, measured by its llama-bench.

One patch is needed. ggml configures the AMX tiles from a struct on the stack, and gcc 12 believes
_tile_loadconfig reads only 8 bytes of it, so the rest may be stored after the instruction: it then
crashes or computes garbage. ``install`` puts a compiler barrier in front, nothing else.

GGUF files carry random weights of the same shapes. llama-bench starts a process, loads and warms up
for every round; only its own timing of the tokens counts.
"""

import json
import subprocess
import sys
import tarfile
from pathlib import Path

from benchmarks import peers
from benchmarks.peers import gguf_files
from benchmarks.peers.runner import Plan

LABELS = {"f16": "llama.cpp F16", "q8_0": "llama.cpp Q8_0", "q4_0": "llama.cpp Q4_0"}
REQUIREMENTS = ("gguf==0.19.0",)
NOTE = (
    "built here with -DGGML_NATIVE=ON and a compiler barrier before its _tile_loadconfig, without "
    "which it crashes when built by gcc 12; a C++ program, no Python between its operations"
)
SDIST = "llama-cpp-python==0.3.36"
BARRIER = '    __asm__ volatile("" : : "r"(&tc) : "memory");\n'
LOADCONFIG = "    _tile_loadconfig(&tc);\n"
#: CMake options of this machine's instruction sets; of AVX2 and nothing newer.
NATIVE = {"GGML_NATIVE": True}
AVX2 = {"GGML_NATIVE": False} | {
    f"GGML_{name}": name in ("SSE42", "AVX", "AVX2", "BMI2", "FMA", "F16C")
    for name in ("SSE42", "AVX", "AVX2", "BMI2", "FMA", "F16C", "AVX_VNNI", "AVX512", "AVX512_VBMI",
                 "AVX512_VNNI", "AVX512_BF16", "AMX_TILE", "AMX_INT8", "AMX_BF16")
}  # fmt: skip
BUILD = {
    "GGML_OPENMP": True, "LLAMA_BUILD_COMMON": True, "LLAMA_BUILD_TOOLS": True,
    "LLAMA_OPENSSL": False, "LLAMA_BUILD_TESTS": False, "LLAMA_BUILD_EXAMPLES": False,
    "LLAMA_BUILD_SERVER": False, "LLAMA_BUILD_APP": False, "BUILD_SHARED_LIBS": False,
}  # fmt: skip


def source(folder: Path) -> Path:
    return folder / SDIST.replace("-", "_").replace("==", "-") / "vendor" / "llama.cpp"


def bench(folder: Path) -> Path:
    return source(folder) / "build" / "bin" / "llama-bench"


def install(folder: Path, instructions: dict[str, bool] = NATIVE) -> None:
    """Fetch the sdist, insert the barrier, build llama-bench alone (ten minutes on two cores)."""
    archive = folder / f"{source(folder).parents[1].name}.tar.gz"
    if not archive.exists():
        subprocess.run(
            [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--no-binary",
             ":all:", "--dest", str(folder), SDIST],
            check=True,
        )  # fmt: skip
    if not source(folder).exists():
        with tarfile.open(archive) as tar:
            tar.extractall(folder, filter="data")
    mmq = source(folder) / "ggml/src/ggml-cpu/amx/mmq.cpp"
    text = mmq.read_text()
    if text.count(LOADCONFIG) != 1:
        raise RuntimeError(f"{mmq}: expected one _tile_loadconfig; a newer llama.cpp?")
    if BARRIER not in text:
        mmq.write_text(text.replace(LOADCONFIG, BARRIER + LOADCONFIG))
    flags = [f"-D{name}={'ON' if on else 'OFF'}" for name, on in (BUILD | instructions).items()]
    subprocess.run(["cmake", "-B", "build", "-DCMAKE_BUILD_TYPE=Release", *flags],
                   cwd=source(folder), check=True)  # fmt: skip
    subprocess.run(["cmake", "--build", "build", "--target", "llama-bench", "-j2"],
                   cwd=source(folder), check=True)  # fmt: skip


class LlamaBench:
    """A runner (see runner.py) that calls llama-bench for each round."""

    note = ""

    def __init__(self, program: Path, model: Path, threads: int):
        self.program, self.model, self.threads = program, model, threads
        self.bytes, parameters = gguf_files.size(model)
        self.bytes_before = 4 * parameters

    def round(self, plan: Plan) -> dict[str, float]:
        done = subprocess.run(
            [str(self.program), "-m", str(self.model), "-t", str(self.threads), "-r", "1",
             "-p", ",".join(map(str, plan.prompts)), "-n", str(plan.decode_tokens), "-o", "json"],
            capture_output=True, text=True,
        )  # fmt: skip
        if done.returncode:
            last = (done.stderr.strip().splitlines() or [""])[-1]
            raise RuntimeError(f"llama-bench ended with status {done.returncode}: {last}")
        seconds = {}
        for row in json.loads(done.stdout):
            if row["n_gen"]:
                seconds["decode"] = row["avg_ns"] / row["n_gen"] / 1e9
            else:
                seconds[f"prefill_{row['n_prompt']}"] = row["avg_ns"] / 1e9
        return seconds

    def close(self) -> None:
        self.model.unlink(missing_ok=True)


def setup(shape: str, threads: int, variant: str, peer: str = "llama_cpp"):
    folder = peers.folder(peer)
    if not bench(folder).exists():
        raise FileNotFoundError(f"llama-bench is not built: benchmarks.peers install {peer}")
    model = folder / f"{shape}-{variant}.gguf"
    gguf_files.write(shape, variant, model)
    return LlamaBench(bench(folder), model, threads)
