"""The process that benchmarks/memory.py looks at: one model obtained one way, then measured.

``python -m benchmarks.memory_child HOW [SHAPE] [FOLDER]`` prints one JSON line. HOW: ``baseline``
(no model), ``in_memory`` (float32 model, quantize; saved to FOLDER if given), ``saved`` (an int8
FOLDER), ``streamed`` (a float FOLDER, quantized while loading).

Memory is RssAnon plus the resident pages of weight files, read here from /proc and not through the
package under test.
"""

import gc
import json
import sys
import threading
import time
from pathlib import Path

import torch
import transformers

import gpu_poor
from benchmarks import shapes


def resident() -> dict[str, int]:
    """Bytes now: ``anon`` (heap) and ``weights`` (pages of mapped .safetensors files)."""
    anon = weights = 0
    name = ""
    for line in Path("/proc/self/smaps").read_text().splitlines():
        first = line.split(" ", 1)[0]
        if not first.endswith(":"):  # a mapping's own line: addresses, permissions, ..., path
            name = line
        elif first == "Rss:" and ".safetensors" in name:
            weights += int(line.split()[1]) * 1024
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("RssAnon:"):
            anon = int(line.split()[1]) * 1024
    return {"anon": anon, "weights": weights}


class Peak:
    """The largest resident and anonymous bytes while a block runs, looked at every millisecond."""

    def __enter__(self):
        self.total = self.anon = 0
        self.running = True
        self.start = self._now()
        self.thread = threading.Thread(target=self._watch, daemon=True)
        self.thread.start()
        return self

    @staticmethod
    def _now() -> tuple[int, int]:
        _, pages, shared = map(int, Path("/proc/self/statm").read_text().split()[:3])
        return pages * 4096, (pages - shared) * 4096

    def _watch(self) -> None:
        while self.running:
            total, anon = self._now()
            self.total, self.anon = max(self.total, total), max(self.anon, anon)
            time.sleep(0.001)

    def __exit__(self, *_):
        self.running = False
        self.thread.join()

    def above_start(self) -> dict[str, int]:
        return {"peak_total": self.total - self.start[0], "peak_anon": self.anon - self.start[1]}


@torch.inference_mode()
def generate(model, new: int = 8) -> list[int]:
    tokens = torch.arange(1, 17)[None]
    out = model.generate(
        tokens, attention_mask=torch.ones_like(tokens), max_new_tokens=new, do_sample=False,
        pad_token_id=0, eos_token_id=None,
    )  # fmt: skip
    return out[0, tokens.shape[1] :].tolist()


def in_memory(shape: str, folder: str | None) -> tuple[object, dict]:
    model = shapes.build(shape)
    start = time.perf_counter()
    gpu_poor.quantize(model, verbose=False)
    seconds = time.perf_counter() - start
    if folder:
        model.save_pretrained(folder)
    return model, {"quantize_s": seconds}


def saved(folder: str) -> tuple[object, dict]:
    start = time.perf_counter()
    model = transformers.AutoModelForCausalLM.from_pretrained(folder)
    return model, {"load_s": time.perf_counter() - start}


def streamed(folder: str) -> tuple[object, dict]:
    config = gpu_poor.GpuPoorConfig(bits=8)
    with Peak() as peak:
        start = time.perf_counter()
        model = transformers.AutoModelForCausalLM.from_pretrained(
            folder, quantization_config=config
        )
        seconds = time.perf_counter() - start
    return model, {"load_s": seconds, **peak.above_start()}


def main() -> None:
    how, shape, folder = (*sys.argv[1:], None, None)[:3]
    torch.set_num_threads(2)
    # What any such process has done: threads started, modules imported, a first generation.
    warm = gpu_poor.quantize(shapes.build("tiny-gpt2"), verbose=False)
    generate(warm)
    del warm
    model, facts = None, {}
    if how == "in_memory":
        model, facts = in_memory(shape, folder)
    elif how == "saved":
        model, facts = saved(folder)
    elif how == "streamed":
        model, facts = streamed(folder)
    gc.collect()
    facts["resident_before_use"] = resident()
    if model is not None:
        facts["bytes"] = gpu_poor.memory.parameter_bytes(model)
        facts["by_class"] = gpu_poor.memory.by_class(model)
        start = time.perf_counter()
        facts["tokens"] = generate(model)
        facts["generate_s"] = time.perf_counter() - start
    gc.collect()
    facts["resident"] = resident()
    print(json.dumps(facts))


if __name__ == "__main__":
    main()
