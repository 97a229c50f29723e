"""The hidden states of calibration data before a block, in float and in the model quantized so far.

Both go through the decoder block by block (gpu_poor/blocks.py); those of much data lie in temporary
files (gpu_poor/spill.py).
"""

from contextlib import suppress
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from gpu_poor.blocks import Answers, Blocks
from gpu_poor.modules import Reached, hooked
from gpu_poor.spill import Spilled

#: Tokens that go through a block at once.
BATCH_TOKENS = 4096
#: Tokens at most whose inputs in the two streams are compared. Half of 65536 cost 1 to 2 % of the
#: KL divergence at 4 bits, a quarter 4 to 8 % (stories260k, tinystories-656k).
DRIFT_TOKENS = 32768


@dataclass
class Stream:
    """The hidden states before a block, of the float model and of the one quantized so far."""

    blocks: Blocks
    exact: Spilled
    quantized: Spilled
    #: Of so many batches, one has its inputs in the two streams compared.
    every: int
    #: Of the finished parts of the block being quantized.
    answers: list[Answers] = field(default_factory=list)

    def call(self, block: nn.Module, i: int, hidden: Tensor, batch: int = 0) -> Tensor:
        for each in self.answers:
            each.start(batch)
        return self.blocks.run(i, hidden, block)


def enter(model: nn.Module, rows: list[Tensor]) -> Stream:
    """Run up to the first block."""
    every = -(-sum(row.numel() for row in rows) // DRIFT_TOKENS)
    stream = Stream(Blocks(model, rows[0]), Spilled(), Spilled(), every)
    for batch in _batches(rows):
        hidden = stream.blocks.enter(batch)
        if not bool(hidden.isfinite().all()):
            raise ValueError("the embeddings of the calibration data are not finite")
        stream.exact.append(hidden)
        stream.quantized.append(hidden)
    return stream


def _batches(rows: list[Tensor]) -> list[Tensor]:
    by_length: dict[int, list[Tensor]] = {}
    for row in rows:
        by_length.setdefault(row.shape[1], []).append(row)
    batches = []
    for length, group in by_length.items():
        size = max(1, BATCH_TOKENS // length)
        batches += [torch.cat(group[i : i + size]) for i in range(0, len(group), size)]
    return batches


def input_of(
    stream: Stream, i: int, block: nn.Module, name: str, hidden: Tensor, batch: int
) -> Tensor | None:
    """What a linear of the block reads, as rows ``[M, K]``; None if it does not run."""
    found: list[Tensor] = []

    def hook(module, args):
        found.append(args[0])
        raise Reached

    with suppress(Reached), hooked([block.get_submodule(name).register_forward_pre_hook(hook)]):
        stream.call(block, i, hidden, batch)
    return found[0].reshape(-1, found[0].shape[-1]) if found else None
