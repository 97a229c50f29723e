"""What every contender does once it is set up: generate from random prompts, and be timed.

A runner has ``bytes`` (of weights, as kept in memory), ``bytes_before`` (of the float model it came
from), ``note``, ``round(plan)`` giving seconds per measurement, and ``close()``.
"""

import time
from dataclasses import dataclass

import torch
from transformers import GenerationConfig, PreTrainedModel

from benchmarks import shapes


@dataclass(frozen=True)
class Plan:
    """One round: prefills (one new token each), then a decode after a short prompt."""

    prompts: tuple[int, ...] = (128, 512)
    decode_prompt: int = 16
    decode_tokens: int = 32


class Clock:
    """A streamer for ``generate`` that notes when the prompt and each new token arrive."""

    def __init__(self):
        self.times: list[float] = []

    def put(self, value: torch.Tensor) -> None:
        self.times.append(time.perf_counter())

    def end(self) -> None:
        pass


def storages(tensor: torch.Tensor):
    """The plain tensors inside a tensor: itself, or what a wrapper subclass holds."""
    if hasattr(tensor, "__tensor_flatten__"):
        for name in tensor.__tensor_flatten__()[0]:
            yield from storages(getattr(tensor, name))
    else:
        yield tensor


def model_bytes(model: torch.nn.Module) -> int:
    """Bytes of parameters and buffers, shared ones once."""
    seen = {}
    for tensor in (*model.parameters(), *model.buffers()):
        for plain in storages(tensor):
            seen[plain.data_ptr()] = plain.numel() * plain.element_size()
    return sum(seen.values())


class TransformersRunner:
    """Times a transformers model through ``generate``, greedy, batch 1, key-value cache on."""

    def __init__(
        self, model: PreTrainedModel, bytes_before: int, extra_bytes: int = 0, given: int = 0
    ):
        """``given``: bytes of the model handed to a quantizer, to notice one that did nothing."""
        self.model = model.eval()
        self.bytes_before = bytes_before
        self.bytes = model_bytes(model) + extra_bytes
        self.note = ""
        if given and self.bytes > 0.97 * given:
            self.note = f"not smaller: it was given {given / 1e6:.0f} MB, and said nothing"

    @torch.inference_mode()
    def generate(self, prompt: int, new: int) -> tuple[float, float]:
        """Seconds to the first token and per further token."""
        generator = torch.Generator().manual_seed(prompt)
        vocabulary = self.model.config.vocab_size
        tokens = torch.randint(0, vocabulary, (1, prompt), generator=generator)
        options = GenerationConfig(
            max_new_tokens=new, do_sample=False, use_cache=True, pad_token_id=0, eos_token_id=None
        )
        clock, mask = Clock(), torch.ones_like(tokens)
        start = time.perf_counter()
        self.model.generate(tokens, attention_mask=mask, generation_config=options, streamer=clock)
        first, last = clock.times[1], clock.times[-1]
        return first - start, (last - first) / max(1, new - 1)

    def round(self, plan: Plan) -> dict[str, float]:
        seconds = {f"prefill_{p}": self.generate(p, 1)[0] for p in plan.prompts}
        seconds["decode"] = self.generate(plan.decode_prompt, plan.decode_tokens + 1)[1]
        return seconds

    @torch.inference_mode()
    def linears(self, rounds: int = 5) -> float:
        """Seconds all matrix modules of one decode step take by themselves: the rest of a step is
        attention, norms and the Python between the modules."""
        work = []
        for module in self.model.modules():
            weight = getattr(module, "weight", None)
            if not isinstance(weight, torch.Tensor) or weight.dim() != 2:
                continue
            name = type(module).__name__
            if "Embedding" in name:
                continue
            width = weight.shape[0] if name == "Conv1D" else weight.shape[1]
            dtype = weight.dtype if weight.dtype.is_floating_point else self.model.dtype
            work.append((module, torch.randn(1, 1, width, dtype=dtype)))
        best = float("inf")
        for _ in range(rounds):
            start = time.perf_counter()
            for module, x in work:
                module(x)
            best = min(best, time.perf_counter() - start)
        return best

    def close(self) -> None:
        self.model = None


def float_model(shape: str, dtype: torch.dtype = torch.float32) -> tuple[PreTrainedModel, int]:
    """The random float model of a shape, and its bytes in float32."""
    model = shapes.build(shape, dtype)
    return model, sum(p.numel() for p in model.parameters()) * 4
