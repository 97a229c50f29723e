"""Memory as the system sees it. ``python -m benchmarks.memory [--scratch DIR]``.

For each shape: what a process with the int8 model holds above the same process without one, against
the model's bytes: quantized in memory, and loaded from a saved folder. Then quantization while
loading and its peak; and a Llama-7B shape, 13.5 GB on disk, quantized and used by a process that
may have 9.5 GB. Weights are random; artefacts are deleted.
"""

import argparse
import json
import os
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM

from benchmarks import machine, shapes

ROOT = Path(__file__).resolve().parents[1]
SHAPES = ("distilgpt2", "gpt2", "gpt2-medium", "gpt2-large", "tinyllama-1.1b")
STREAMED = ("gpt2-large", "tinyllama-1.1b")
LIMIT_BYTES = int(9.5e9)
SHARD_BYTES = 1_000_000_000


def forget(path: Path) -> None:
    """Drop a file from the page cache. Cached pages are charged to the process that wrote them, so
    the limited one would otherwise read 13.5 GB that its limit does not see."""
    descriptor = os.open(path, os.O_RDONLY)
    os.fsync(descriptor)
    os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
    os.close(descriptor)


def write_checkpoint(shape: str, folder: Path, dtype: torch.dtype) -> dict[str, int]:
    """A sharded float checkpoint with random weights, never holding more than one shard.

    Returns ``checkpoint_bytes`` and ``largest_fp32``, the bytes of the largest tensor in float32.
    """
    config = shapes.config(shape)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    seen: set[int] = set()
    named = [
        (k, p.shape) for k, p in model.named_parameters() if not (id(p) in seen or seen.add(id(p)))
    ]
    block = shapes.random_block(dtype)
    shards: list[list] = [[]]
    size = 0
    for key, dims in named:
        n_bytes = dims.numel() * dtype.itemsize
        if size + n_bytes > SHARD_BYTES and shards[-1]:
            shards.append([])
            size = 0
        shards[-1].append((key, dims))
        size += n_bytes
    index, total = {}, 0
    for i, shard in enumerate(shards):
        name = f"model-{i + 1:05}-of-{len(shards):05}.safetensors"
        tensors = {}
        for j, (key, dims) in enumerate(shard):
            tensor = torch.empty(dims, dtype=dtype)
            if len(dims) > 1:
                shapes.fill(tensor, block, (i * 100 + j) * 7919)
            else:
                tensor.fill_(0.0 if key.endswith("bias") else 1.0)
            tensors[key] = tensor
            index[key] = name
            total += tensor.numel() * dtype.itemsize
        save_file(tensors, folder / name, metadata={"format": "pt"})
        del tensors
        forget(folder / name)
    (folder / "model.safetensors.index.json").write_text(
        json.dumps({"metadata": {"total_size": total}, "weight_map": index})
    )
    config.architectures = [type(model).__name__]
    config.dtype = dtype
    config.save_pretrained(folder)
    return {"checkpoint_bytes": total, "largest_fp32": 4 * max(d.numel() for _, d in named)}


# -- limits ------------------------------------------------------------------------------------


class Cgroup:
    """A child of our own memory cgroup (v1 or v2) with a limit; removed on exit.

    Raises OSError where cgroups are not ours to make.
    """

    def __init__(self, limit: int):
        mounts = {"v1": Path("/sys/fs/cgroup/memory"), "v2": Path("/sys/fs/cgroup")}
        own = {line.split(":", 2)[1]: line.split(":", 2)[2].strip()
               for line in Path("/proc/self/cgroup").read_text().splitlines()}  # fmt: skip
        self.version = "v1" if "memory" in own else "v2"
        path = own["memory" if self.version == "v1" else ""]
        self.folder = mounts[self.version] / path.lstrip("/") / f"gpu-poor-{os.getpid()}"
        self.folder.mkdir()
        try:
            v1 = self.version == "v1"
            self._write("memory.limit_in_bytes" if v1 else "memory.max", limit)
            if (self.folder / "memory.swap.max").exists():
                self._write("memory.swap.max", 0)
        except OSError:
            self.folder.rmdir()
            raise

    def _write(self, name: str, value: int) -> None:
        (self.folder / name).write_text(str(value))

    def enter(self) -> None:
        """In the child, before it becomes the limited program."""
        self._write("cgroup.procs", os.getpid())

    def peak(self) -> int | None:
        name = "memory.max_usage_in_bytes" if self.version == "v1" else "memory.peak"
        path = self.folder / name
        return int(path.read_text()) if path.exists() else None

    def remove(self) -> None:
        for _ in range(50):  # the kernel needs a moment after the last process is gone
            try:
                self.folder.rmdir()
                return
            except OSError:
                time.sleep(0.1)


def limited(limit: int | None):
    """``(description, function for the child, Cgroup or None)`` of the best limit we may set."""
    if limit is None:
        return "none", None, None
    try:
        group = Cgroup(limit)
        return f"memory cgroup {group.version}", group.enter, group
    except (OSError, KeyError):
        return "RLIMIT_DATA", lambda: resource.setrlimit(resource.RLIMIT_DATA, (limit, limit)), None


def child(*arguments: str, limit: int | None = None) -> dict:
    """Run memory_child; its facts, or an ``error``."""
    how, enter, group = limited(limit)
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.memory_child", *arguments],
        capture_output=True, text=True, cwd=ROOT, preexec_fn=enter,
        env=os.environ | {"OMP_NUM_THREADS": "2"},
    )  # fmt: skip
    facts = {"limit": how, "limit_bytes": limit} if limit else {}
    if group:
        facts["cgroup_peak"] = group.peak()
        group.remove()
    if done.returncode:
        last = (done.stderr.strip().splitlines() or [""])[-1]
        return facts | {"error": f"ended with status {done.returncode}: {last[:300]}"}
    return facts | json.loads(done.stdout.strip().splitlines()[-1])


# -- the measurements ----------------------------------------------------------------------------


def above(facts: dict, baseline: dict, when: str = "resident") -> int:
    """Anonymous and weight-file bytes above the process without a model."""
    return sum(facts[when].values()) - sum(baseline[when].values())


def resting(shape: str, baseline: dict, scratch: Path) -> list[dict]:
    """The two rows of a shape: quantized in memory, and loaded from the folder that saves."""
    folder = scratch / "int8"
    rows = []
    for how in ("in_memory", "saved"):
        facts = child(how, shape, str(folder))
        row = {"shape": shape, "how": how, **facts}
        if "error" not in facts:
            row["above"] = above(facts, baseline)
            row["of_bytes"] = row["above"] / facts["bytes"]
        rows.append(row)
    shutil.rmtree(folder, ignore_errors=True)
    return rows


def streaming(shape: str, baseline: dict, scratch: Path, limit: int | None = None) -> dict:
    """Quantize a random bf16 checkpoint while loading it."""
    folder = scratch / "float"
    folder.mkdir()
    try:
        start = time.perf_counter()
        row = {"shape": shape, "how": "streamed", **write_checkpoint(shape, folder, torch.bfloat16)}
        row["write_s"] = time.perf_counter() - start
        row |= child("streamed", shape, str(folder), limit=limit)
    finally:
        shutil.rmtree(folder)
    if "error" not in row:
        row["above"] = above(row, baseline)
        row["of_bytes"] = row["above"] / row["bytes"]
        # The goal: at most 1.10 x the model and the largest tensor in float32. The total has the
        # mapped pages of the checkpoint in it, which the system takes back when it needs them.
        goal = 1.10 * row["bytes"] + row["largest_fp32"]
        row["peak_of_goal"], row["peak_anon_of_goal"] = (
            row[key] / goal for key in ("peak_total", "peak_anon")
        )
    return row


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--scratch", type=Path, help="folder for checkpoints; default: temporary")
    parser.add_argument("--shapes", nargs="+", default=SHAPES)
    parser.add_argument("--streamed", nargs="*", default=STREAMED)
    parser.add_argument("--big", default="llama-7b", help="the shape under the limit; '' for none")
    parser.add_argument("--limit-gb", type=float, default=LIMIT_BYTES / 1e9)
    parser.add_argument("--quick", action="store_true", help="tiny shapes")
    parser.add_argument("--json", help="default: benchmarks/results/memory.json")
    args = parser.parse_args(argv)
    if args.quick:
        args.shapes, args.streamed, args.big = ["distilgpt2"], ["tiny-llama"], "tiny-llama"
    record = {"header": machine.header(2), "rows": [], "streamed": [], "big": None}
    baseline = child("baseline")
    record["baseline"] = baseline
    if "error" in baseline:
        raise RuntimeError(baseline["error"])
    with tempfile.TemporaryDirectory(dir=args.scratch) as folder:
        scratch = Path(folder)
        for shape in args.shapes:
            record["rows"] += resting(shape, baseline, scratch)
            for row in record["rows"][-2:]:
                print("{shape} {how}: ".format(**row) + row.get("error", "")
                      + f"{row.get('of_bytes', 0):.3f} of its bytes")  # fmt: skip
        for shape in args.streamed:
            record["streamed"].append(streaming(shape, baseline, scratch))
            print(json.dumps(record["streamed"][-1]))
        if args.big:
            record["big"] = streaming(args.big, baseline, scratch, int(args.limit_gb * 1e9))
            print(json.dumps(record["big"]))
    machine.save(record, args.json, "memory.json")
    return 0


if __name__ == "__main__":
    sys.exit(main())
