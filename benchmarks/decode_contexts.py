"""Decode after long contexts, what each measure brings, and a token's timeline: of decode.py.

Over context length: a cache that holds random keys and values, then tokens through ``generate``.
The ablation goes through ``generate`` whole, prompt included. All ways of a shape take turns.
"""

import copy
import gc
from collections.abc import Callable
from itertools import chain

import torch
from torch import nn
from transformers import DynamicCache, GenerationConfig

import gpu_poor
from benchmarks import shapes, timing
from benchmarks.attention import fill
from benchmarks.peers.runner import Clock, TransformersRunner, model_bytes
from gpu_poor.attention import use_flash_attention_if_available
from gpu_poor.kv_cache import PagedKVCache, PagePool, use_paged_kv_cache_if_available

CONTEXTS = (128, 512, 1024, 1984, 4096, 8192)
#: Positions that a shape is given instead of its own: rotary ones reach any length.
POSITIONS = {"tinyllama-1.1b": 16384}


def add_arguments(parser) -> None:
    parser.add_argument("--context-shapes", nargs="*", default=["gpt2", "tinyllama-1.1b"])
    parser.add_argument("--contexts", type=int, nargs="+", default=CONTEXTS)
    parser.add_argument("--context-tokens", type=int, default=16, help="generated after each")
    parser.add_argument("--ablation-shapes", nargs="*", default=["gpt2-large", "tinyllama-1.1b"])
    parser.add_argument("--ablation-context", type=int, default=1024)
    parser.add_argument("--timeline-shapes", nargs="*", default=["tinyllama-1.1b"])


def make_quick(args) -> None:
    args.context_shapes = args.ablation_shapes = args.timeline_shapes = ["tiny-llama"]
    args.contexts, args.ablation_context, args.context_tokens = [128, 512], 128, 4


def within(shape: str, context: int, tokens: int) -> int:
    """The context, or the longest that leaves room for the tokens."""
    positions = POSITIONS.get(shape, shapes.config(shape).max_position_embeddings)
    return min(context, positions - tokens)


# -- speed over context length -----------------------------------------------------------------


def seconds_after(model: nn.Module, cache, context: int, tokens: int) -> float:
    """Seconds a token after ``context`` of them, all but the last in the cache, which is cut back
    to that; the first token is not counted."""
    ids = torch.zeros(1, context, dtype=torch.int64)
    options = GenerationConfig(
        max_new_tokens=tokens + 1, do_sample=False, use_cache=True, pad_token_id=0,
        eos_token_id=None,
    )  # fmt: skip
    clock = Clock()
    model.generate(
        ids, attention_mask=torch.ones_like(ids), past_key_values=cache, generation_config=options,
        streamer=clock,
    )  # fmt: skip
    cache.crop(context - 1 - cache.get_seq_length())
    return (clock.times[-1] - clock.times[1]) / tokens


def _filled(cache, config, tokens: int):
    heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    d = config.hidden_size // config.num_attention_heads
    k, v = torch.randn(2, 1, heads, tokens, d)
    fill(cache, k, v, config.num_hidden_layers)
    return cache


@torch.inference_mode()
def over_context(shape: str, args) -> list[dict]:
    """Rows of one shape: context, way, seconds a token."""
    models = {"int8": gpu_poor.quantize(shapes.build(shape), 8, verbose=False, fuse=True),
              "fp32": shapes.build(shape)}  # fmt: skip
    for model in models.values():
        model.config.max_position_embeddings = POSITIONS.get(
            shape, model.config.max_position_embeddings
        )

    def pages(model, form: str, context: int) -> PagedKVCache:
        one = PagePool(model, form, kv_memory="1GB")
        longest = one.bytes_of(context + args.context_tokens + 1)
        return PagedKVCache(model, format=form, kv_memory=longest)

    made: dict[str, tuple[nn.Module, Callable]] = {
        "transformers fp32": (models["fp32"], lambda model, _: DynamicCache(config=model.config)),
        "int8, dynamic cache": (models["int8"], lambda model, _: DynamicCache(config=model.config)),
        "int8, fp16 pages": (models["int8"], lambda model, n: pages(model, "fp16", n)),
        "int8, int8 pages": (models["int8"], lambda model, n: pages(model, "int8", n)),
    }
    rows = []
    lengths = {within(shape, context, args.context_tokens + 1) for context in args.contexts}
    for context in sorted(lengths):
        caches = {
            name: _filled(make(model, context), model.config, context - 1)
            for name, (model, make) in made.items()
        }
        samples: dict[str, list[float]] = {name: [] for name in made}
        for r in range(args.rounds + 1):
            for name in list(made)[:: 1 if r % 2 == 0 else -1]:
                samples[name].append(
                    seconds_after(made[name][0], caches[name], context, args.context_tokens)
                )
        del caches
        gc.collect()
        measured = {name: seconds[1:] for name, seconds in samples.items()}  # the first: warm-up
        for name, seconds in measured.items():
            over = timing.ratios(measured["transformers fp32"], seconds)
            rows.append({"shape": shape, "context": context, "name": name,
                         "seconds": timing.summary(seconds),
                         "over_fp32": timing.summary(over)})  # fmt: skip
            print(f"{shape} after {context} tokens, {name}: "
                  f"{1 / rows[-1]['seconds']['median']:.1f} tokens/s", flush=True)  # fmt: skip
    return rows


def contexts(args) -> list[dict]:
    return [row for shape in args.context_shapes for row in over_context(shape, args)]


# -- ablation ----------------------------------------------------------------------------------


def twin(model: nn.Module) -> nn.Module:
    """Another model of the same weights, which can run in another way."""
    shared = {id(t): t for t in chain(model.parameters(), model.buffers())}
    return copy.deepcopy(model, shared)


def variants(shape: str) -> dict[str, nn.Module]:
    """Name -> model; those of the same bits share their weights."""
    int8, int4 = (
        gpu_poor.quantize(shapes.build(shape), bits, verbose=False, fuse=False) for bits in (8, 4)
    )
    flash = use_flash_attention_if_available

    def paged(model):
        return use_paged_kv_cache_if_available(model, "int8", kv_memory="2GB")

    fuse = gpu_poor.fuse
    return {
        "fp32": shapes.build(shape),
        "bf16": shapes.build(shape, torch.bfloat16),
        "int8, unfused": int8,
        "int8, unfused, flash": flash(twin(int8)),
        "int8, unfused, flash, int8 KV": paged(flash(twin(int8))),
        "int8": fuse(twin(int8)),
        "int8, flash": flash(fuse(twin(int8))),
        "int8, flash, int8 KV": paged(flash(fuse(twin(int8)))),
        "int4": fuse(int4),
        "int4, flash, int8 KV": paged(flash(fuse(twin(int4)))),
    }


def ablated(shape: str, args) -> list[dict]:
    """Rows of one shape: memory and speed of each variant, at one context."""
    tokens = args.tokens
    context = min(within(shape, args.ablation_context, tokens + 1), args.ablation_context)
    models = variants(shape)
    runners = {name: TransformersRunner(model, 0) for name, model in models.items()}
    samples: dict[str, list[tuple[float, float]]] = {name: [] for name in models}
    for r in range(1 + max(1, args.rounds // 2)):  # the first: warm-up; prompts take their time
        for name in list(models)[:: 1 if r % 2 == 0 else -1]:
            samples[name].append(runners[name].generate(context, tokens + 1))
    measured = {name: list(zip(*rounds[1:], strict=True)) for name, rounds in samples.items()}
    rows = []
    for name, (first, decode) in measured.items():
        row = {"shape": shape, "context": context, "name": name,
               "weight_bytes": model_bytes(models[name]),
               "kv_bytes": gpu_poor.memory.kv_cache_bytes(models[name], context + tokens),
               "first_token_s": timing.summary(first),
               "seconds": timing.summary(decode)}  # fmt: skip
        for key, i in (("first_token_over_fp32", 0), ("over_fp32", 1)):
            row[key] = timing.summary(timing.ratios(measured["fp32"][i], measured[name][i]))
        row["smaller"] = _bytes(rows[0] if rows else row) / _bytes(row)
        rows.append(row)
        print(f"{shape}, {context} tokens, {name}: {row['smaller']:.2f} x smaller, "
              f"{row['over_fp32']['median']:.2f} x as fast as fp32", flush=True)  # fmt: skip
    return rows


def _bytes(row: dict) -> int:
    return row["weight_bytes"] + row["kv_bytes"]


def ablation(args) -> list[dict]:
    return [row for shape in args.ablation_shapes for row in ablated(shape, args)]


# -- timeline ----------------------------------------------------------------------------------


def timeline(args) -> list[dict]:
    """``gpu_poor.profile`` of the fused int8 model, and of the same one unfused: its parts."""
    results = []
    for shape in args.timeline_shapes:
        model = gpu_poor.quantize(shapes.build(shape), 8, verbose=False, fuse=True)
        for way in ("fused", "unfused"):
            found = gpu_poor.profile(model, verbose=False)
            print(f"{shape} {way}\n{found}", flush=True)
            results.append({"shape": shape, "way": way, **found.to_dict()})
            gpu_poor.unfuse(model)
    return results
