"""The machine: its header for every result, its read-only memory stream and its int8 peaks.

``python -m benchmarks.machine --json out.json``. The loops are in machine.c, compiled here with the
system's gcc into a temporary folder (no -march=native: target attributes).
"""

import argparse
import ctypes
import functools
import json
import mmap
import os
import platform
import subprocess
import sys
import tempfile
import time
from importlib import metadata
from pathlib import Path

import torch

HERE = Path(__file__).resolve().parent
RESULTS = HERE / "results"

#: machine.c's enum loop, with the CPU flag each needs.
LOOPS = {"plain": (0, None), "avx2": (1, "avx2"), "avx512": (2, "avx512f"), "nta": (3, "avx512f")}
#: (loop, prefetch distance in bytes, streams) tried for the read stream; the best one counts.
CANDIDATES = [("plain", 0, 1)] + [
    (loop, distance, streams)
    for loop in ("avx2", "avx512", "nta")
    for distance in (0, 512, 1024, 2048, 4096, 8192)
    for streams in (1, 2, 4, 8)
    if distance or loop != "nta"
]
FEATURES = ("avx2", "fma", "f16c", "avx_vnni", "avx512f", "avx512bw", "avx512_vnni", "avx512_bf16",
            "amx_tile", "amx_int8", "amx_bf16")  # fmt: skip


@functools.cache
def _cpuinfo() -> dict[str, str]:
    """The first processor of /proc/cpuinfo; empty where there is none."""
    path = Path("/proc/cpuinfo")
    text = path.read_text().split("\n\n")[0] if path.exists() else ""
    pairs = (line.split(":", 1) for line in text.splitlines() if ":" in line)
    return {key.strip(): value.strip() for key, value in pairs}


def features() -> list[str]:
    """The instruction sets that matter here and that this CPU has."""
    flags = _cpuinfo().get("flags", "").split()
    return [name for name in FEATURES if name in flags]


def _output(*command: str) -> str:
    """First line a command prints, or ''. Only for the header: nothing depends on it."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, cwd=HERE, timeout=20)
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return done.stdout.strip().splitlines()[0] if done.returncode == 0 and done.stdout else ""


def _version(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return "absent"


def commit() -> tuple[str, bool]:
    """The checkout's commit and whether anything but results differs from it."""
    changed = subprocess.run(
        ["git", "status", "--porcelain", "-uno", "--", ":!benchmarks/results", ":!RESULTS.md",
         ":!README.md"],
        capture_output=True, text=True, cwd=HERE.parent,
    )  # fmt: skip
    return _output("git", "rev-parse", "HEAD")[:12], bool(changed.stdout.strip())


def header(threads: int) -> dict:
    """Everything a reader needs to judge a figure: hardware, versions, commit."""
    memory = Path("/proc/meminfo").read_text().split()[1] if Path("/proc/meminfo").exists() else 0
    governor = Path("/sys/devices/system/cpu/cpu0/cpufreq/scaling_governor")
    revision, dirty = commit()
    return {
        "cpu": _cpuinfo().get("model name", platform.processor()),
        "architecture": platform.machine(),
        "features": features(),
        "cores": len(os.sched_getaffinity(0)),
        "governor": governor.read_text().strip() if governor.exists() else "not visible",
        "ram_gb": round(int(memory) * 1024 / 1e9, 1),
        "system": f"{platform.system()} {platform.release().split('-')[0]}",
        "python": platform.python_version(),
        "gcc": _output("gcc", "-dumpfullversion"),
        "torch": torch.__version__,
        "transformers": _version("transformers"),
        "gpu_poor": _version("gpu-poor"),
        "threads": threads,
        "commit": revision,
        "dirty": dirty,
        "date": time.strftime("%Y-%m-%d"),
    }


@functools.cache
def library() -> ctypes.CDLL:
    """machine.c, compiled. Raises RuntimeError with gcc's message if it cannot be."""
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "machine.so"
        command = ["gcc", "-std=gnu11", "-O3", "-fno-tree-vectorize", "-fPIC", "-shared",
                   "-pthread", str(HERE / "machine.c"), "-o", str(out)]  # fmt: skip
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            raise RuntimeError(f"machine.c does not compile:\n{done.stderr}")
        lib = ctypes.CDLL(str(out))
    i64, i32, f64 = ctypes.c_int64, ctypes.c_int, ctypes.c_double
    lib.read_stream.argtypes = [ctypes.c_void_p, i64, i32, i64, i32, i32]
    lib.vnni_peak.argtypes = lib.amx_peak.argtypes = [i64, i32]
    lib.read_stream.restype = lib.vnni_peak.restype = lib.amx_peak.restype = f64
    lib.amx_request.restype = i64
    return lib


class Stream:
    """The read-only stream over one buffer, by the fastest loop found for a thread count."""

    def __init__(self, buffer: torch.Tensor, threads: int):
        self.buffer, self.threads = buffer, threads
        self.bytes = buffer.numel() * buffer.element_size()
        self.loop = ("plain", 0, 1)

    def gb_s(self, loop: tuple[str, int, int] | None = None) -> float:
        """GB/s of one pass now."""
        name, distance, streams = loop or self.loop
        seconds = library().read_stream(
            self.buffer.data_ptr(), self.bytes, LOOPS[name][0], distance, streams, self.threads
        )
        return self.bytes / seconds / 1e9

    def best(self, passes: int = 5) -> float:
        """GB/s of the best of some passes: the first meets torch's threads, which spin for a while
        after their last region."""
        return max(self.gb_s() for _ in range(passes))

    def tune(self, passes: int = 3) -> dict[str, float]:
        """Choose the fastest loop: all once, the five best again. Returns the GB/s of each."""
        flags = _cpuinfo().get("flags", "").split()
        usable = [c for c in CANDIDATES if LOOPS[c[0]][1] is None or LOOPS[c[0]][1] in flags]
        best = {c: self.gb_s(c) for c in usable}
        for candidate in sorted(best, key=best.get, reverse=True)[:5]:
            best[candidate] = max([best[candidate], *(self.gb_s(candidate) for _ in range(passes))])
        self.loop = max(best, key=best.get)
        return {"{} prefetch {} streams {}".format(*c): v for c, v in best.items()}


def cold_buffer(gigabytes: float, huge_pages: bool = False) -> torch.Tensor:
    """int8 buffer larger than any cache, its pages really there: values in [-127, 127]."""
    block = torch.randint(-127, 128, (1 << 24,), dtype=torch.int8)
    if huge_pages:
        memory = mmap.mmap(-1, int(gigabytes * 1e9))
        memory.madvise(mmap.MADV_HUGEPAGE)
        buffer = torch.frombuffer(memory, dtype=torch.int8)  # keeps the mapping alive
    else:
        buffer = torch.empty(int(gigabytes * 1e9), dtype=torch.int8)
    for start in range(0, buffer.numel(), block.numel()):
        piece = buffer[start : start + block.numel()]
        piece.copy_(block[: piece.numel()])
    return buffer


def peaks(threads: int) -> dict[str, float | None]:
    """TOPS of the register-only loops: VNNI and AMX, best of five; None where the CPU has none."""
    have, lib = features(), library()

    def best(function, n):
        return max(function(n, threads) for _ in range(5)) / 1e12

    amx = "amx_int8" in have and lib.amx_request() == 0
    return {
        "vnni_tops": best(lib.vnni_peak, 4_000_000) if "avx512_vnni" in have else None,
        "amx_tops": best(lib.amx_peak, 2_000_000) if amx else None,
    }


def measure(max_threads: int, gigabytes: float) -> dict:
    """The whole record: header, stream and peaks per thread count.

    ``read_gb_s`` is over ordinary pages, what torch gives a model's weights; huge pages apart.
    """
    buffer, huge = cold_buffer(gigabytes), cold_buffer(gigabytes, huge_pages=True)
    rows = []
    for threads in range(1, max_threads + 1):
        stream = Stream(buffer, threads)
        table = stream.tune()
        kinds = {name: max(v for k, v in table.items() if k.startswith(name)) for name in LOOPS
                 if any(k.startswith(name) for k in table)}  # fmt: skip
        rows.append({
            "threads": threads,
            "read_gb_s": max(table.values()),
            "loop": "{} prefetch {} streams {}".format(*stream.loop),
            "best_by_kind": kinds,
            "huge_pages_read_gb_s": max(Stream(huge, threads).tune().values()),
            **peaks(threads),
        })  # fmt: skip
    return {"header": header(max_threads), "buffer_gb": gigabytes, "rows": rows}


def saved(path: str | Path | None, default: str) -> dict:
    """What :func:`save` wrote, to go on from.

    Raises:
        SystemExit: it is of another machine.
    """
    record = json.loads((Path(path) if path else RESULTS / default).read_text())
    cpu, here = record["header"]["cpu"], _cpuinfo().get("model name", platform.processor())
    if cpu != here:
        raise SystemExit(f"{default} is of another machine: {cpu}")
    return record


def save(record: dict, path: str | Path | None, default: str) -> Path:
    """Write a record as JSON, to its place in benchmarks/results unless told otherwise."""
    out = Path(path) if path else RESULTS / default
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(json.dumps(record, indent=1) + "\n")
    print(f"wrote {out}", file=sys.stderr)
    return out


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", help="default: benchmarks/results/machine.json")
    parser.add_argument("--threads", type=int, default=2, help="measure 1..n threads")
    parser.add_argument("--quick", action="store_true", help="a smaller buffer (still > 1 GB)")
    args = parser.parse_args(argv)
    record = measure(args.threads, 1.1 if args.quick else 2.2)
    for row in record["rows"]:
        print(json.dumps(row))
    save(record, args.json, "machine.json")
    return 0


if __name__ == "__main__":
    sys.exit(main())
