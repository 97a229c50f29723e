"""Attention over keys and values in pages, against torch's; and what the cache takes.

``python -m benchmarks.attention [--lengths 1024 8192 32768] [--quick]``. Decode: one new
token, as in each layer of a model: the copies of keys and values taken in turn are the layers of
one pool, more than any cache holds, and a sample goes over all of them once. Pages are scattered,
as after some use.
Between the rounds the read stream of machine.c passes; shares are of its best in the same round.
Each format is first compared with attention in float64 of the same stored numbers.
Prompts: all tokens are new, of one layer; what is multiplied is half a square.
Memory: anonymous bytes that a cache of 8192 tokens adds to a process of its own.
"""

import argparse
import gc
import itertools
import json
import math
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import DynamicCache, LlamaConfig

from benchmarks import machine, memory_child, shapes, timing
from gpu_poor import isa, ops
from gpu_poor.kv_cache import FORMATS, PagedKVCache, PagePool

#: (query heads, heads of keys and values, head dim): of Llama-3-8B, and of TinyLlama.
HEADS = ((32, 8, 128), (32, 4, 64))
LENGTHS = (1024, 8192, 32768)
#: And of GPT-2 large, for prompts.
PROMPT_HEADS, PROMPTS = ((20, 20, 64), *HEADS), (512, 2048)
SDPA = {"SDPA fp32": torch.float32, "SDPA bf16": torch.bfloat16}
#: All copies together have so many bytes at least, and so many times the L3 cache.
COLD_BYTES, COLD_CACHES = 256 << 20, 4
#: Largest difference from float64, of the largest output: all arithmetic is float32.
TOLERANCE = 1e-5
#: Of int8, whose queries and weights have 16 bits. A weight is off by up to 2^-16 of the largest of
#: its chunk, at random, so a result by 2^-16 / sqrt(3) times what the largest weight is of their
#: root mean square: of scores with a deviation up to 1.2, as here, exp(3 * 1.2 - 1.2^2) = 9, and of
#: the values' scales 1.5. What the queries add is less. And 4 for the largest of many.
TOLERANCE_INT8 = 4 * 9 * 1.5 * 2.0**-16 / 3**0.5
#: How a cache of MEMORY_TOKENS is kept; those of transformers are plain tensors.
CACHES = ("pages fp32", "pages bf16", "pages fp16", "pages int8", "dynamic fp32", "dynamic fp16")
MEMORY_TOKENS, MEMORY_HEADS, MEMORY_BYTES = 8192, 8, 256 << 20


def config(layers: int, heads: int, kv_heads: int, d: int) -> LlamaConfig:
    return LlamaConfig(
        num_hidden_layers=layers, num_attention_heads=heads, num_key_value_heads=kv_heads,
        head_dim=d, hidden_size=heads * d,
    )  # fmt: skip


def copies(n_bytes: int) -> int:
    """How many of so many bytes no cache holds."""
    l3 = Path("/sys/devices/system/cpu/cpu0/cache/index3/size")
    cached = 1024 * int(l3.read_text().strip().rstrip("K")) if l3.exists() else 0
    return max(2, math.ceil(max(COLD_BYTES, COLD_CACHES * cached) / n_bytes))


def filled(form: str, heads: tuple[int, int, int], length: int, block: Tensor) -> PagedKVCache:
    """One sequence of random keys and values, its pages in random places."""
    one = PagePool(config(1, *heads), form, kv_memory="1GB")
    n = copies(one.bytes_of(length))
    cache = PagedKVCache(config(n, *heads), format=form, kv_memory=n * one.bytes_of(length))
    pool = cache.pool
    if form == "int8":
        pool.arena.random_(-127, 128)
        pool.scales.uniform_(0.005, 0.02)
    else:
        shapes.fill(pool.arena, block.to(pool.arena.dtype), 0)
    cache.reserve(length, 1)
    cache.advance(length)
    pages = len(cache.sequences.rows[0])
    cache.sequences.table[0, :pages] = torch.randperm(pages, dtype=torch.int32)
    return cache


def paged(cache: PagedKVCache, q: Tensor, i: int) -> Tensor:
    """Layer i's attention of one token, q ``[1, 1, H, D]``."""
    layer = cache.layers[i]
    return ops.paged_attention(q, layer.pages, layer.scales, cache.block_table, cache.lengths)


def verify(name: str, cache: PagedKVCache, q: Tensor) -> float:
    """The difference of the last layer from float64 over the same stored numbers.

    Of one token, or of all that are stored.

    Raises:
        RuntimeError: it is more than rounding.
    """
    i, layer = len(cache.layers) - 1, cache.layers[-1]
    k, v = ops.paged_gather(layer.pages, layer.scales, cache.block_table, layer.stored)
    y = F.scaled_dot_product_attention(
        q.double().transpose(1, 2), k.double(), v.double(),
        is_causal=q.shape[1] > 1, enable_gqa=True,
    ).transpose(1, 2)  # fmt: skip
    error = float((paged(cache, q, i) - y).abs().max() / y.abs().max())
    if not error <= (TOLERANCE_INT8 if name == "int8" else TOLERANCE):
        raise RuntimeError(f"{name}: {error:.1e} of the largest output away from float64")
    return error


def contenders(heads: tuple[int, int, int], length: int) -> dict[str, dict]:
    """name -> ``call`` over all copies, their number, bytes of one; of ours the error as well."""
    n_heads, kv_heads, d = heads
    block, found = torch.randn(1 << 22), {}
    q = torch.randn(1, 1, n_heads, d)
    for form in FORMATS:
        cache = filled(form, heads, length, block)
        n = len(cache.layers)
        found[f"pages {form}"] = {
            "call": lambda cache=cache, n=n: [paged(cache, q, i) for i in range(n)],
            "copies": n,
            "bytes": length * cache.pool.token_bytes // n,
            "error": verify(form, cache, q),
        }
    for name, dtype in SDPA.items():
        n_bytes = 2 * kv_heads * length * d * dtype.itemsize
        stored = torch.empty(copies(n_bytes), 2, 1, kv_heads, length, d, dtype=dtype)
        shapes.fill(stored, block.to(dtype), 0)
        query = q.transpose(1, 2).to(dtype)
        found[name] = {
            "call": lambda query=query, stored=stored: [
                F.scaled_dot_product_attention(query, k, v, enable_gqa=True) for k, v in stored
            ],
            "copies": len(stored),
            "bytes": n_bytes,
        }
    return found


def speed(heads: tuple, length: int, stream: machine.Stream, rounds: int) -> list[dict]:
    """Rows of one shape and length."""
    found = contenders(heads, length)
    rate: list[float] = []
    calls: dict[str, Callable] = {"stream": lambda: rate.append(1e9 * stream.best())}
    samples = timing.interleave(calls | {n: c["call"] for n, c in found.items()}, rounds)
    del samples["stream"], rate[:-rounds]  # those before the first round
    per_call = {n: [s / found[n]["copies"] for s in values] for n, values in samples.items()}
    rows = []
    for name, seconds in per_call.items():
        row = {key: value for key, value in found[name].items() if key != "call"}
        rates = [row["bytes"] / s for s in seconds]
        rows.append(row | {
            "name": name, "heads": heads[0], "kv_heads": heads[1], "head_dim": heads[2],
            "length": length, "seconds": timing.summary(seconds),
            "gb_s": timing.summary(rates)["median"] / 1e9,
            "of_stream": timing.summary(timing.ratios(rates, rate)),
            "over_sdpa_fp32": timing.summary(timing.ratios(per_call["SDPA fp32"], seconds)),
        })  # fmt: skip
    return rows


# -- prompts -----------------------------------------------------------------------------------


def prompts(heads: tuple[int, int, int], tokens: int, rounds: int) -> list[dict]:
    """Rows of one shape and length, causal."""
    n_heads, kv_heads, d = heads
    q, k, v = (torch.randn(1, tokens, n, d) for n in (n_heads, kv_heads, kv_heads))
    calls, errors = {}, {}
    for form in FORMATS:
        cache = PagedKVCache(config(1, *heads), format=form, kv_memory="1GB")
        fill(cache, k.transpose(1, 2), v.transpose(1, 2), 1)
        calls[f"pages {form}"] = lambda cache=cache: paged(cache, q, 0)
        errors[f"pages {form}"] = verify(form, cache, q)
    for name, dtype in SDPA.items():
        inputs = [t.transpose(1, 2).to(dtype) for t in (q, k, v)]
        calls[name] = lambda inputs=inputs: F.scaled_dot_product_attention(
            *inputs, is_causal=True, enable_gqa=True
        )
    samples = timing.interleave(calls, rounds)
    flops = 2 * n_heads * d * tokens * (tokens + 1)
    return [
        {
            "name": name, "heads": n_heads, "kv_heads": kv_heads, "head_dim": d, "tokens": tokens,
            "seconds": timing.summary(seconds),
            "gflop_s": timing.summary([flops / s / 1e9 for s in seconds])["median"],
            "over_sdpa_fp32": timing.summary(timing.ratios(samples["SDPA fp32"], seconds)),
        } | ({"error": errors[name]} if name in errors else {})
        for name, seconds in samples.items()
    ]  # fmt: skip


# -- memory ------------------------------------------------------------------------------------


def fill(cache, k: Tensor, v: Tensor, layers: int) -> None:
    """Store keys and values ``[1, heads, T, D]`` in every layer of an empty cache."""
    if not isinstance(cache, PagedKVCache):
        for i in range(layers):
            cache.update(k, v, i)
        return
    # Not update(), which gathers all of them again unless the model's attention is ours.
    cache.reserve(k.shape[2], batch=1)
    for layer in cache.layers:
        ops.paged_append(layer.pages, layer.scales, k.transpose(1, 2), v.transpose(1, 2),
                         cache.block_table, cache.lengths)  # fmt: skip
    cache.advance(k.shape[2])


def store(kind: str, d: int, layers: int, tokens: int):
    """A cache of random keys and values."""
    how, form = kind.split()
    wanted = config(layers, 4 * MEMORY_HEADS, MEMORY_HEADS, d)
    pages = how == "pages"
    cache = PagedKVCache(wanted, format=form, kv_memory="2GB") if pages else DynamicCache()
    k, v = torch.randn(2, 1, MEMORY_HEADS, tokens, d)
    dtype = torch.float32 if pages else FORMATS[form]
    fill(cache, k.to(dtype), v.to(dtype), layers)
    return cache


def memory_of(kind: str, d: int, layers: int, tokens: int) -> dict:
    """In a process of its own: anonymous bytes that a cache adds, and the bytes it should have."""
    store(kind, d, 1, 16)  # what any such process has done
    gc.collect()
    before = memory_child.resident()["anon"]
    cache = store(kind, d, layers, tokens)
    gc.collect()
    after = memory_child.resident()["anon"]
    pool = getattr(cache, "pool", None)
    size = FORMATS[kind.split()[1]].itemsize
    plain = layers * 2 * MEMORY_HEADS * tokens * d * size
    return {"rss": after - before, "bytes": pool.bytes_of(tokens) if pool else plain}


def memory(quick: bool) -> list[dict]:
    """Rows of each way to keep a cache, and head dim."""
    rows = []
    for d, kind in itertools.product((64, 128), CACHES):
        tokens = MEMORY_TOKENS
        layers = MEMORY_BYTES // (2 * MEMORY_HEADS * tokens * d * 2) // (4 if quick else 1)
        command = [sys.executable, "-m", "benchmarks.attention", "--child", kind, str(d),
                   str(layers), str(tokens)]  # fmt: skip
        # Freed tensors go back to the system: the cache counts, not what the heap keeps for later.
        done = subprocess.run(
            command, stdout=subprocess.PIPE, text=True, cwd=machine.HERE.parent, check=True,
            env=os.environ | {"MALLOC_MMAP_THRESHOLD_": str(1 << 16)},
        )  # fmt: skip
        facts = json.loads(done.stdout.splitlines()[-1])
        rows.append({"name": kind, "head_dim": d, "kv_heads": MEMORY_HEADS, "layers": layers,
                     "tokens": tokens, **facts})  # fmt: skip
    fp16 = {row["head_dim"]: row["rss"] for row in rows if row["name"] == "pages fp16"}
    for row in rows:
        row["smaller_than_fp16"] = fp16[row["head_dim"]] / row["rss"]
    return rows


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--lengths", nargs="+", type=int, default=LENGTHS)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--quick", action="store_true", help="1024 tokens, 3 rounds, small caches")
    parser.add_argument("--json", type=Path, help="default: benchmarks/results/attention.json")
    parser.add_argument("--child", nargs=4, help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    if args.child:
        kind, *numbers = args.child
        print(json.dumps(memory_of(kind, *map(int, numbers))))
        return 0
    if args.quick:
        args.lengths, args.rounds = [1024], 3
    stream = machine.Stream(machine.cold_buffer(1.1), args.threads)
    record = {"header": machine.header(args.threads), "isa": isa.current(), "complete": False,
              "stream_gb_s": max(stream.tune().values()), "rows": []}  # fmt: skip
    with torch.inference_mode():
        for heads, length in itertools.product(HEADS, args.lengths):
            for row in speed(heads, length, stream, args.rounds):
                record["rows"].append(row)
                print("{heads}/{kv_heads} heads of {head_dim}, {length}, {name}: ".format(**row)
                      + f"{1e6 * row['seconds']['median']:.0f} us, {row['gb_s']:.1f} GB/s, "
                      f"{row['of_stream']['median']:.1%} of the stream, "
                      f"{row['over_sdpa_fp32']['median']:.2f} x SDPA fp32", flush=True)  # fmt: skip
        del stream
        record["prompts"] = []
        for heads, tokens in itertools.product(PROMPT_HEADS, PROMPTS[: 1 if args.quick else None]):
            for row in prompts(heads, tokens, args.rounds):
                record["prompts"].append(row)
                print("{heads}/{kv_heads} heads of {head_dim}, a prompt of {tokens}, {name}: "
                      .format(**row) + f"{1e3 * row['seconds']['median']:.2f} ms, "
                      f"{row['gflop_s']:.0f} GFLOP/s, "
                      f"{row['over_sdpa_fp32']['median']:.2f} x SDPA fp32", flush=True)  # fmt: skip
    record["memory"] = memory(args.quick)
    for row in record["memory"]:
        print("{name}, heads of {head_dim}: ".format(**row) + f"{row['rss'] / 1e6:.1f} MB for "
              f"{row['bytes'] / 1e6:.1f}, {row['smaller_than_fp16']:.3f} x less than fp16",
              flush=True)  # fmt: skip
    record["complete"] = True
    machine.save(record, args.json, "attention.json")
    return 0


if __name__ == "__main__":
    sys.exit(main())
