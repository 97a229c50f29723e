"""blocks: a decoder block by block is the model, or it is refused; each block has its own call."""

import pytest
import torch
from conftest import VOCAB, make_model, tokens
from helpers import assert_equal
from torch import nn

from gpu_poor.blocks import Blocks


@torch.no_grad()
def by_block(model, ids):
    blocks = Blocks(model, ids[:1])
    hidden = blocks.enter(ids)
    for i in range(len(blocks.modules)):
        hidden = blocks.run(i, hidden)
    return blocks.leave(ids, hidden)


def test_the_logits_are_those_of_the_model(model_name):
    model, ids = make_model(model_name), tokens(3, 40)
    with torch.no_grad():
        expected = model(ids, use_cache=False).logits
    assert_equal(by_block(model, ids), expected)
    with torch.no_grad():
        assert_equal(model(ids, use_cache=False).logits, expected)
    assert not any("forward" in vars(m) or m._forward_pre_hooks for m in model.modules())


def test_blocks_of_two_kinds_of_attention_have_calls_of_their_own():
    """Gemma 2 alternates: what a sliding block is called with is wrong for a full one."""
    model, ids = make_model("gemma2", sliding_window=8, num_hidden_layers=4), tokens(2, 40)
    assert set(model.config.layer_types) == {"sliding_attention", "full_attention"}
    with torch.no_grad():
        expected = model(ids, use_cache=False).logits
        assert_equal(by_block(model, ids), expected)
        blocks = Blocks(model, ids)
        hidden = blocks.enter(ids)
        right = blocks.run(1, hidden)
        calls = blocks.calls[tuple(ids.shape)]
        calls[1] = calls[0]
        assert (blocks.run(1, hidden) - right).abs().max() > 1e-3


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(32, 32)

    def forward(self, hidden_states, extra=None):
        out = hidden_states + self.linear(hidden_states)
        return out if extra is None else out + extra


class Decoder(nn.Module):
    def __init__(self, n=3):
        super().__init__()
        self.embed = nn.Embedding(VOCAB, 32)
        self.layers = nn.ModuleList(Block() for _ in range(n))

    def forward(self, input_ids, use_cache=False):
        x = self.embed(input_ids)
        for i, layer in enumerate(self.layers):
            x = self.step(i, layer, x, input_ids)
        return x


class ValueResidual(Decoder):
    """Later blocks read what the first one has answered, which the first block's call hides."""

    def step(self, i, layer, x, input_ids):
        if i == 0:
            self.first = layer(x)
            return self.first
        return layer(x, self.first)


class Between(Decoder):
    def step(self, i, layer, x, input_ids):
        return layer(x) * 1.5


class Twice(Decoder):
    def step(self, i, layer, x, input_ids):
        return layer(layer(x))


@pytest.mark.parametrize(
    "kind, message",
    [
        (ValueResidual, "read more of a text than hidden states"),
        (Between, "do more than pass hidden states on"),
        (Twice, "does not run its blocks once each, in order"),
    ],
)
def test_what_is_no_chain_of_blocks_is_refused(kind, message):
    model = kind()
    with pytest.raises(ValueError, match=message), torch.no_grad():
        Blocks(model, tokens(1, 12))
    assert not any("forward" in vars(m) or m._forward_pre_hooks for m in model.modules())


def test_a_later_text_that_changes_a_call_is_noticed():
    """All ids of the text that blocks are tried out on are the same, and hide it."""

    class Odd(Decoder):
        def step(self, i, layer, x, input_ids):
            return layer(x, None if i == 0 else (input_ids % 2)[..., None].float())

    with torch.no_grad():
        blocks = Blocks(Odd(), torch.full((1, 5), 4))
        blocks.enter(torch.full((1, 7), 4))
        with pytest.raises(ValueError, match="read more of a text"):
            blocks.enter(torch.full((1, 7), 5))
