"""What the tests of the cache in pages have in common."""

import torch
from conftest import make_model

from gpu_poor.kv_cache import use_paged_kv_cache_if_available

NEW = 8


def generate(model, ids, **options):
    """Greedy, a fixed number of tokens; without the prompt."""
    options = dict(max_new_tokens=NEW, do_sample=False, pad_token_id=0) | options
    if "assistant_model" not in options:
        options["min_new_tokens"] = options["max_new_tokens"]
    mask = options.pop("attention_mask", torch.ones_like(ids))
    return model.generate(ids, attention_mask=mask, **options)[:, ids.shape[1] :]


def paged(name, format="fp32", page_size=16, kv_memory="20MB", **changes):
    model = make_model(name, **changes)
    return use_paged_kv_cache_if_available(model, format, kv_memory, page_size)


def free(model) -> bool:
    model._gp_kv_pool.allocator.check()
    return model._gp_kv_pool.allocator.n_held == 0


class Boom(Exception):
    pass
