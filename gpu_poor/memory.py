"""Where the memory of a model is: bytes of its tensors, pages of its process, and giving back.

A checkpoint loaded by transformers lies in file pages (RssFile), what ``quantize`` allocates in
anonymous ones (RssAnon), so a figure of memory names which of the two it means.
"""

import ctypes
import math
import mmap
import re
import sys
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor, nn

from gpu_poor.nn import QuantizedEmbedding, QuantizedExperts, QuantizedModule, kind_of

#: What a unit of bytes stands for.
UNITS = {"B": 1} | {
    f"{letter}{i}B": base**power
    for power, letter in enumerate("KMGT", start=1)
    for i, base in (("", 1000), ("i", 1024))
}
#: Where a model keeps the pool that use_paged_kv_cache_if_available made.
KV_POOL = "_gp_kv_pool"
#: Of sizes, in bytes: what is reckoned with fits 64 bits.
LARGEST = 2**62

#: The classes of :func:`by_class`, in the order of a receipt.
CLASSES = ("linear", "embedding", "shared lm_head", "experts", "other")


def address(tensor: Tensor) -> tuple:
    """Where a tensor starts. Not its storage: a mapped file may be one storage."""
    if tensor.device.type == "meta" or tensor.numel() == 0 or tensor.layout is not torch.strided:
        return ("id", id(tensor))
    return (str(tensor.device), tensor.data_ptr())


def identity(tensor: Tensor | None) -> tuple:
    """Equal for tensors that are the same numbers in the same memory: one weight, when tied."""
    if tensor is None:
        return ()
    if tensor.layout is not torch.strided:
        return address(tensor)
    return (*address(tensor), tensor.dtype, tensor.shape, tensor.stride())


def persistent_tensors(model: nn.Module) -> Iterator[tuple[str, nn.Module, str, Tensor]]:
    """``(module name, module, tensor name, tensor)`` of all parameters and persistent buffers.

    Each memory once, under the first module that has it.
    """
    seen = set()
    for module_name, module in model.named_modules():
        tensors = dict(module._parameters)
        hidden = module._non_persistent_buffers_set
        tensors |= {k: v for k, v in module._buffers.items() if k not in hidden}
        for name, tensor in tensors.items():
            if tensor is not None and identity(tensor) not in seen:
                seen.add(identity(tensor))
                yield module_name, module, name, tensor


def parameter_bytes(model: nn.Module) -> int:
    """Bytes of all parameters and persistent buffers, shared memory counted once."""
    return sum(tensor.nbytes for *_, tensor in persistent_tensors(model))


def by_class(model: nn.Module, as_float: torch.dtype | None = None) -> dict[str, int]:
    """:func:`parameter_bytes` split over :data:`CLASSES`.

    With ``as_float`` the sizes that the model would have if its quantized weights were of that
    dtype.

    "linear", "embedding" and "experts" are the weights and scales of quantized modules, or of the
    float modules that could be; "shared lm_head" is an embedding's memory that a linear uses too;
    "other" is the rest: norms, biases, what stayed in float.
    """
    users: dict[str, set] = {"linear": set(), "embedding": set()}
    for module in model.modules():
        if (kind := class_of(module)) in users:
            users[kind].add(identity(module.weight))
    shared = users["linear"] & users["embedding"]
    total = dict.fromkeys(CLASSES, 0)
    for _, module, name, tensor in persistent_tensors(model):
        kind = class_of(module)
        weights = weight_names(module)
        if name not in (module.storage() if isinstance(module, QuantizedModule) else weights):
            kind = "other"
        elif kind in users and identity(module.weight) in shared:
            kind = "shared lm_head"
        if as_float is not None and isinstance(module, QuantizedModule) and kind != "other":
            numel = math.prod(module.shapes[name]) if name in weights else 0
            total[kind] += numel * as_float.itemsize
        else:
            total[kind] += tensor.nbytes
    return total


def class_of(module: nn.Module) -> str:
    """The entry of :data:`CLASSES` that the weights of a module, quantized or float, belong to."""
    kind = type(module) if isinstance(module, QuantizedModule) else kind_of(module)
    if kind is None:
        return "other"
    if issubclass(kind, QuantizedEmbedding):
        return "embedding"
    return "experts" if issubclass(kind, QuantizedExperts) else "linear"


def weight_names(module: nn.Module) -> tuple[str, ...]:
    """The names of the tensors of a module that are, or could be, quantized."""
    if isinstance(module, QuantizedModule):
        return module.weight_names
    kind = kind_of(module)
    return () if kind is None else kind.weights_of(module)


def size_of(text: str, units: dict[str, float] = UNITS) -> float | None:
    """ "500 MB" as bytes; None if that is not a number and one of the units, in any case."""
    parts = re.fullmatch(r"\s*(\d+\.?\d*|\.\d+)\s*([A-Za-z]+|%)\s*", text)
    factors = {name.upper(): factor for name, factor in units.items()}
    if parts is None or parts[2].upper() not in factors:
        return None
    return float(parts[1]) * factors[parts[2].upper()]


def available() -> int:
    """Bytes that can be allocated without swapping: of the system, and of our memory cgroups.

    Of a cgroup (v1 or v2, any of its parents) the limit less what is used, files that could be
    dropped not counted. Linux only.

    Raises:
        OSError: no ``/proc/meminfo`` on this system.
    """
    found = re.search(r"MemAvailable:\s+(\d+) kB", Path("/proc/meminfo").read_text())
    return min([int(found[1]) * 1024, *_cgroup_rooms(Path("/proc/self/cgroup"))])


#: Of memory cgroups: where they are mounted, the limit, and what is used.
_CGROUPS = {
    "": (Path("/sys/fs/cgroup"), "memory.max", "memory.current"),
    "memory": (
        Path("/sys/fs/cgroup/memory"),
        "memory.limit_in_bytes",
        "memory.usage_in_bytes",
    ),
}


def _cgroup_rooms(membership: Path) -> Iterator[int]:
    """Limit less use of each memory cgroup that this process is in; none that has no limit."""
    lines = membership.read_text().splitlines() if membership.exists() else []
    for line in lines:
        _, controllers, path = line.split(":", 2)
        for kind in set(controllers.split(",")) & _CGROUPS.keys():
            mount, limit_name, used_name = _CGROUPS[kind]
            group = mount / path.lstrip("/")
            # In a container our path may be the host's, which isn't mounted: its root is ours then.
            for folder in (group, *group.parents):
                try:
                    limit = (folder / limit_name).read_text().strip()
                    used = int((folder / used_name).read_text())
                    stat = (folder / "memory.stat").read_text()
                except (OSError, ValueError):
                    continue
                files = re.findall(r"^(?:total_)?inactive_file (\d+)$", stat, re.M)
                if limit.isdigit():  # not "max"
                    yield max(0, int(limit) - used + max(map(int, files), default=0))
                if folder == mount:
                    break


def rss() -> dict[str, int]:
    """Resident bytes of this process: ``{"anon": ..., "file": ..., "peak": ...}``.

    "anon" is the heap, "file" the resident pages of mapped files such as checkpoints, "peak" the
    largest sum of all so far. Linux only.

    Raises:
        OSError: no ``/proc/self/status`` on this system.
    """
    fields = {"RssAnon": "anon", "RssFile": "file", "VmHWM": "peak"}
    found = {}
    for line in Path("/proc/self/status").read_text().splitlines():
        key, _, value = line.partition(":")
        if key in fields:
            found[fields[key]] = int(value.split()[0]) * 1024
    return found


Ranges = list[tuple[int, int]]


def _mapped_files() -> Ranges:
    """Address ranges of this process that are pages of files; empty where that is unknown.

    Not those that are mapped to be shared, which other processes see: share_memory().
    """
    maps = Path("/proc/self/maps")
    if not maps.exists():
        return []
    found = (_file_range(line) for line in maps.read_text().splitlines())
    return [each for each in found if each is not None]


def prefer_huge_pages(tensor: Tensor) -> None:
    """Ask for pages of 2 MB where a tensor's memory is first written; no more than a wish."""
    if not hasattr(mmap, "MADV_HUGEPAGE"):
        return
    start = -(-tensor.data_ptr() // mmap.PAGESIZE) * mmap.PAGESIZE
    end = (tensor.data_ptr() + tensor.nbytes) // mmap.PAGESIZE * mmap.PAGESIZE
    if end > start:
        madvise = ctypes.CDLL(None).madvise
        madvise(ctypes.c_void_p(start), ctypes.c_size_t(end - start), mmap.MADV_HUGEPAGE)


def _unwritten_files() -> Ranges:
    """Those of :func:`_mapped_files` that this process has written nothing to."""
    smaps = Path("/proc/self/smaps")
    if not smaps.exists():
        return []
    ranges, written = [], {}
    for line in smaps.read_text().splitlines():
        key, *value = line.split(maxsplit=1)
        if not key.endswith(":"):  # a mapping's own line; what is said of it follows
            ranges.append(_file_range(line))
        elif key in ("Anonymous:", "Swap:") and value != ["0 kB"]:
            written[len(ranges) - 1] = True
    return [each for i, each in enumerate(ranges) if each is not None and i not in written]


def _file_range(line: str) -> tuple[int, int] | None:
    """Of a line of /proc/self/maps; None if it is no private mapping of a file."""
    addresses, permissions, _, _, inode, *_ = line.split(maxsplit=5)
    if inode == "0" or not permissions.endswith("p"):
        return None
    start, _, end = addresses.partition("-")
    return int(start, 16), int(end, 16)


def _lies_in(tensor: Tensor, ranges: Ranges) -> bool:
    if tensor.device.type != "cpu" or tensor.layout is not torch.strided or not tensor.numel():
        return False
    return any(low <= tensor.data_ptr() < high for low, high in ranges)


def is_in_file(tensor: Tensor) -> bool:
    """Whether a tensor lies in a mapped file."""
    return _lies_in(tensor, _mapped_files())


def in_files(model: nn.Module) -> bool:
    """Whether most of a model lies in mapped files, so that it need not fit in memory.

    As transformers loads safetensors, unless it has to convert the numbers to another dtype.
    """
    ranges = _mapped_files()
    tensors = [tensor for *_, tensor in persistent_tensors(model)] if ranges else []
    mapped = sum(tensor.nbytes for tensor in tensors if _lies_in(tensor, ranges))
    return mapped > sum(tensor.nbytes for tensor in tensors) / 2


def let_go(tensors: nn.Module | list[Tensor]) -> int:
    """:func:`drop_file_pages` of a module or of several tensors, wherever that loses nothing.

    They may be needed again, and are then read from the file again. A file that something has been
    written to in memory, such as by an optimizer, is left alone as a whole.

    Returns:
        How many bytes were let go.
    """
    if isinstance(tensors, nn.Module):
        tensors = [*tensors.parameters(), *tensors.buffers()]
    ranges = _mapped_files()
    tensors = [tensor for tensor in tensors if _lies_in(tensor, ranges)]
    if not tensors:
        return 0
    unwritten = _unwritten_files()
    return sum(drop_file_pages(tensor, unwritten) for tensor in tensors)


def drop_file_pages(tensor: Tensor, files: Ranges | None = None) -> int:
    """Let go of the resident pages of a mapped file that lie wholly within a tensor.

    For a tensor that has been read for the last time: the pages would stay resident, all of the
    checkpoint in the end. Whoever reads it again gets the file's content again, so it must not have
    been written to.

    Args:
        files: address ranges of mapped files; default: all of this process.

    Returns:
        How many bytes were let go; 0 for a tensor that is in no file, or is not contiguous.
    """
    if tensor.device.type != "cpu" or not tensor.is_contiguous():
        return 0
    page = mmap.PAGESIZE
    start = -(-tensor.data_ptr() // page) * page
    end = (tensor.data_ptr() + tensor.nbytes) // page * page
    files = _mapped_files() if files is None else files
    if end <= start or not any(low <= start and end <= high for low, high in files):
        return 0
    madvise = ctypes.CDLL(None, use_errno=True).madvise
    if madvise(ctypes.c_void_p(start), ctypes.c_size_t(end - start), mmap.MADV_DONTNEED):
        return 0
    return end - start


@torch.no_grad()
def leave_files(model: nn.Module) -> int:
    """Copy the float tensors of a model that lie in mapped files to the heap.

    Tensors loaded by transformers are views of the mapped checkpoint, and a single bias keeps the
    whole of it mapped and resident. Once the matrices are int8, the rest is better copied.

    Returns:
        How many bytes were copied.
    """
    ranges = _mapped_files()
    found = []
    for tensor in (*model.parameters(), *model.buffers()):
        strided = tensor.layout is torch.strided and tensor.device.type == "cpu"
        if not strided or not tensor.is_floating_point() or not tensor.numel():
            continue
        start = tensor.data_ptr()
        if any(low <= start < high for low, high in ranges):
            steps = zip(tensor.shape, tensor.stride(), strict=True)
            last = sum((size - 1) * stride for size, stride in steps)
            found.append((start, start + (last + 1) * tensor.itemsize, tensor))
    found.sort(key=lambda item: item[:2])
    copied = 0
    while found:  # what overlaps is copied as one, so that views go on sharing
        start, end, _ = found[0]
        views = []
        while found and found[0][0] < end:
            end = max(end, found[0][1])
            views.append(found.pop(0))
        _copy_together(start, end, views)
        copied += end - start
    return copied


def _copy_together(start: int, end: int, views: list[tuple[int, int, Tensor]]) -> None:
    """Move tensors that cover the addresses from start to end to one storage on the heap."""
    source = views[0][2].untyped_storage()
    offset = start - source.data_ptr()
    storage = source[offset : offset + end - start].clone()
    for first, _, tensor in views:
        at = (first - start) // tensor.itemsize
        view = torch.empty(0, dtype=tensor.dtype).set_(storage, at, tensor.shape, tensor.stride())
        tensor.data = view  # the same Parameter object: ties and optimizers hold it


def trim() -> bool:
    """Give freed heap pages back to the system (glibc's ``malloc_trim``).

    Without it a process that has quantized a model keeps the size of the float model.

    Returns:
        True if pages were given back; False if none were, or without glibc.
    """
    if not sys.platform.startswith("linux"):
        return False
    malloc_trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    return bool(malloc_trim is not None and malloc_trim(0))


#: How many tokens a layer of a kind keeps: the attribute of the config, None for all of them.
LAYER_TYPES = {
    "full_attention": None,
    "sliding_attention": "sliding_window",
    "chunked_attention": "attention_chunk_size",
}


def kv_cache_bytes(model: nn.Module, context: int) -> int:
    """Bytes of the keys and values of one sequence of ``context`` tokens.

    Of a model with a paged cache, whole pages of it. Else by formula from the config of a
    transformers model: layers x 2 x heads of keys x their size x tokens kept x itemsize of the
    model's dtype; a layer with a sliding window keeps no more than that.

    Raises:
        ValueError: there is no config, or no formula for its layers.
    """
    pool = getattr(model, KV_POOL, None)
    if pool is not None:
        return pool.bytes_of(context)
    config = getattr(model, "config", None)
    if not hasattr(config, "get_text_config"):
        raise ValueError(f"{type(model).__name__} has no config: the KV cache cannot be counted")
    config = config.get_text_config(decoder=True)
    kv_heads, head_dim = kv_shape(config)
    token = 2 * kv_heads * head_dim * model.dtype.itemsize
    return token * sum(_tokens_kept(config, context))


def kv_shape(config) -> tuple[int, int]:
    """Heads of the keys and values of each layer, and their size, from a text model's config."""
    heads = config.num_attention_heads
    kv_heads = getattr(config, "num_key_value_heads", None) or heads
    if config.model_type == "falcon":  # another name, and another rule
        grouped = config.new_decoder_architecture
        kv_heads = config.num_kv_heads if grouped or not config.multi_query else 1
    return kv_heads, getattr(config, "head_dim", None) or config.hidden_size // heads


def layer_windows(config) -> list[tuple[str, int | None]]:
    """Of each layer its kind in :data:`LAYER_TYPES`, and how many tokens it sees; None: all.

    Raises:
        ValueError: what a layer keeps is not its keys and values of tokens.
    """
    window = getattr(config, "sliding_window", None)
    if getattr(config, "use_sliding_window", True) is False:
        window = None
    one_kind = "full_attention" if window is None else "sliding_attention"
    layer_types = getattr(config, "layer_types", None) or [one_kind] * config.num_hidden_layers
    unknown = set(layer_types) - LAYER_TYPES.keys()
    if unknown or getattr(config, "kv_lora_rank", None):
        what = ", ".join(sorted(unknown)) or "multi-head latent attention"
        raise ValueError(f"the KV cache of {config.model_type} cannot be counted: {what}")
    limits = {
        kind: LAYER_TYPES[kind] and getattr(config, LAYER_TYPES[kind]) for kind in layer_types
    }
    return [(kind, limits[kind]) for kind in layer_types]


def _tokens_kept(config, context: int) -> list[int]:
    """How many of ``context`` tokens each layer keeps."""
    return [min(context, limit or context) for _, limit in layer_windows(config)]
