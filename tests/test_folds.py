"""Folding leaves the float function as it is, for every architecture."""

import copy
import threading
from functools import partial

import pytest
import torch
from conftest import MODELS, logits, make_model, tokens
from helpers import assert_equal
from torch import nn

from gpu_poor import quantize
from gpu_poor.chains import Chain, find_chains
from gpu_poor.folds import find_folds, gain_offset, norms
from gpu_poor.plan import block_list, make_plan

#: ``{architecture: (offset, for each norm of a block the linears behind it)}``: all by hand.
QKV = ("q_proj", "k_proj", "v_proj")
GATE_UP = ("gate_proj", "up_proj")
LLAMA = (0.0, {"input_layernorm": QKV, "post_attention_layernorm": GATE_UP})
FOLDS = {
    "gpt2": (0.0, {"ln_1": ("c_attn",), "ln_2": ("c_fc",)}),
    "llama": LLAMA,
    "llama-tied": LLAMA,
    "qwen3": LLAMA,
    # The router and the experts read the second norm, which thus stays alone.
    "qwen3-moe": (0.0, {"input_layernorm": QKV}),
    "mixtral": (0.0, {"input_layernorm": QKV}),
    "opt": (0.0, {"self_attn_layer_norm": QKV, "final_layer_norm": ("fc1",)}),
    "gpt-neox": (0.0, {"input_layernorm": ("query_key_value",),
                       "post_attention_layernorm": ("dense_h_to_4h",)}),
    "olmo": (0.0, {}),  # its norms have no weights
    "gemma2": (1.0, {"input_layernorm": QKV, "pre_feedforward_layernorm": GATE_UP}),
    "phi3": (0.0, {"input_layernorm": ("qkv_proj",),
                   "post_attention_layernorm": ("gate_up_proj",)}),
    # One norm for attention and MLP.
    "falcon": (0.0, {"input_layernorm": ("query_key_value", "dense_h_to_4h")}),
    "bloom": (0.0, {"input_layernorm": ("query_key_value",),
                    "post_attention_layernorm": ("dense_h_to_4h",)}),
    # Norms after the residual, which is read again; behind the last one is BERT's head.
    "bert": (0.0, {}),
    "bart": (0.0, {}),
}  # fmt: skip


def randomise(model):
    """Gains and biases as training leaves them; fresh ones are 1 and 0."""
    with torch.no_grad():
        for _, norm in norms(model):
            norm.weight.add_(torch.randn_like(norm.weight) / 4)
            if getattr(norm, "bias", None) is not None:
                norm.bias.add_(torch.randn_like(norm.bias) / 4)
        for module in model.modules():
            if isinstance(module, nn.Linear) and module.bias is not None:
                module.bias.add_(torch.randn_like(module.bias) / 10)
    return model


def multiply(plan, name, factors):
    """The columns of a float linear."""
    target = next(t for t in plan.targets if name in t.names)
    target.rows()["weight"].data.mul_(factors)


def random_factors(k, seed=0):
    return torch.rand(k, generator=torch.Generator().manual_seed(seed)).mul(6).sub(3).exp2()


def test_every_architecture_is_listed():
    assert FOLDS.keys() == MODELS.keys()


def test_find_folds(model_name):
    model = make_model(model_name)
    offset, expected = FOLDS[model_name]
    folds = find_folds(model, make_plan(model))
    blocks = block_list(model)
    n_blocks = len(model.get_submodule(blocks))
    found = {}
    for fold in folds:
        assert fold.offset == offset
        assert fold.norm.startswith(f"{blocks}.")
        _, i, norm = fold.norm.removeprefix(blocks).split(".", 2)
        found.setdefault(norm, []).append((int(i), {n.rpartition(".")[2] for n in fold.linears}))
    assert found.keys() == expected.keys()
    for norm, linears in expected.items():
        assert found[norm] == [(i, set(linears)) for i in range(n_blocks)]


def test_folding_leaves_the_function(model_name):
    model = randomise(make_model(model_name))
    folded = copy.deepcopy(model)
    plan = make_plan(folded)
    for i, fold in enumerate(find_folds(folded, plan)):
        norm = folded.get_submodule(fold.norm)
        factors = random_factors(len(norm.weight), i)
        for name in fold.linears:
            multiply(plan, name, factors)
        fold.apply(norm, factors)
        assert not torch.equal(norm.weight, model.get_submodule(fold.norm).weight)
    before, after = logits(model), logits(folded)
    assert (after - before).abs().max() <= 1e-4 * before.abs().max()


def test_powers_of_two_leave_every_bit():
    model = randomise(make_model("llama"))
    folded = copy.deepcopy(model)
    plan = make_plan(folded)
    for fold in find_folds(folded, plan):
        norm = folded.get_submodule(fold.norm)
        factors = torch.arange(len(norm.weight)).remainder(7).float().sub(3).exp2()
        for name in fold.linears:
            multiply(plan, name, factors)
        fold.apply(norm, factors)
    assert_equal(logits(folded), logits(model))


def test_one_half_alone_changes_the_function():
    """What the tests above would not see if nothing were folded."""
    for half in ("norm", "linears"):
        model = make_model("llama")
        before, plan = logits(model), make_plan(model)
        fold = find_folds(model, plan)[0]
        factors = random_factors(128)
        if half == "norm":
            fold.apply(model.get_submodule(fold.norm), factors)
        else:
            for name in fold.linears:
                multiply(plan, name, factors)
        assert (logits(model) - before).abs().max() > 1e-2 * before.abs().max()


def test_applying_replaces_parameters_and_keeps_what_they_are():
    model = make_model("gpt2").bfloat16()
    fold = find_folds(model, make_plan(model))[0]
    norm = model.get_submodule(fold.norm)
    old = norm.weight.requires_grad_(False)
    value = old.clone()
    fold.apply(norm, torch.full((120,), 2.0))
    assert_equal(old, value)
    assert norm.weight.dtype == torch.bfloat16 and not norm.weight.requires_grad
    assert_equal(norm.weight, value / 2)


def test_a_linear_left_in_float_bars_its_norm():
    model = make_model("llama")
    plan = make_plan(model, exclude="model.layers.0.self_attn.k_proj")
    found = {fold.norm for fold in find_folds(model, plan)}
    assert "model.layers.0.input_layernorm" not in found
    assert {"model.layers.0.post_attention_layernorm", "model.layers.1.input_layernorm"} <= found


def test_tied_linears_bar_their_norms():
    model = make_model("llama")
    first, second = model.model.layers
    second.mlp.up_proj.weight = first.mlp.up_proj.weight
    found = {fold.norm for fold in find_folds(model, make_plan(model))}
    assert not any("post_attention" in name for name in found) and len(found) == 2


class Reads(nn.Module):
    """Something else reads the norm's output, or a view of it."""

    def __init__(self, how):
        super().__init__()
        self.table, self.norm, self.linear = (
            nn.Embedding(9, 16),
            nn.LayerNorm(16),
            nn.Linear(16, 16),
        )
        self.slice = nn.Linear(8, 16)
        self.how, self.config = how, object()

    def forward(self, input_ids, use_cache=False):
        x = self.norm(self.table(input_ids))
        if self.how == "slice":
            return self.slice(x[..., :8])
        if self.how == "in place":
            x.add_(1)
        if self.how == "linear again":
            return self.linear(self.linear(x).tanh())
        y = self.linear(x)
        if self.how == "residual":
            return y + x
        if self.how == "view":
            return y + x.view(-1, 16)[0]
        return y


@pytest.mark.parametrize("how", ["residual", "view", "slice", "in place", "linear again", "alone"])
def test_other_readers_spoil_a_norm(how):
    model = Reads(how)
    folds = find_folds(model, make_plan(model))
    assert [fold.norm for fold in folds] == (["norm"] if how == "alone" else [])


def test_a_model_that_cannot_be_traced_says_so():
    class Odd(nn.Module):
        def __init__(self):
            super().__init__()
            self.norm, self.linear, self.config = nn.LayerNorm(8), nn.Linear(8, 8), object()

        def forward(self, input_ids, use_cache=False):
            raise KeyError("no data")

    model = Odd()
    with pytest.raises(RuntimeError, match="Odd cannot be run without data.*no data"):
        find_folds(model, make_plan(model))


def test_a_model_that_cannot_be_copied_is_quantized_unsmoothed():
    model = make_model("llama")
    model.lock = threading.Lock()
    model.model.layers[0].input_layernorm.weight.data[3] = 40
    quantize(model, verbose=False)
    remarks = model.gpu_poor_receipt.remarks
    assert any("left the norms alone: LlamaForCausalLM cannot be copied" in r for r in remarks)


class Shifted(nn.LayerNorm):
    def forward(self, x):
        return super().forward(x) + 1


class Squared(nn.LayerNorm):
    def forward(self, x):
        return nn.functional.layer_norm(x, self.normalized_shape, self.weight.square(), self.bias)


@pytest.mark.parametrize(
    "norm, expected",
    [
        (nn.LayerNorm(8), 0.0),
        (nn.LayerNorm(8, bias=False), 0.0),
        (nn.RMSNorm(8), 0.0),
        (Shifted(8), None),
        (Squared(8), None),
        (nn.PReLU(8), None),
    ],
)
def test_gain_offset(norm, expected):
    before = copy.deepcopy(norm.state_dict())
    assert gain_offset(norm) == expected
    for name, value in norm.state_dict().items():
        assert_equal(value, before[name])


# -- from linear to linear ---------------------------------------------------------------------

GATED = {"mlp.up_proj": "mlp.down_proj"}
#: ``{architecture: {source: linear}}``. Attention has grouped heads, except where it is listed.
CHAINS = {
    "llama": GATED, "llama-tied": GATED, "qwen3": GATED, "gemma2": GATED,
    "olmo": GATED | {"self_attn.v_proj": "self_attn.o_proj"},
    "opt": {"self_attn.v_proj": "self_attn.out_proj", "fc1": "fc2"},  # a ReLU
    "bart": {"self_attn.v_proj": "self_attn.out_proj"},
    "bert": {"attention.self.value": "attention.output.dense"},
    # Fused projections, experts, a GELU: nothing.
    "gpt2": {}, "phi3": {}, "gpt-neox": {}, "falcon": {}, "bloom": {}, "mixtral": {},
    "qwen3-moe": {},
}  # fmt: skip


def block_calls(model, i):
    """A block, its linears in the order in which they run, and what it is called with."""
    name = f"{block_list(model)}.{i}"
    block = model.get_submodule(name)
    targets = {t.name.removeprefix(f"{name}."): t for t in make_plan(model).targets
               if t.name.startswith(f"{name}.") and t.is_linear}  # fmt: skip
    order, seen = [], []
    handles = [t.module.register_forward_pre_hook(lambda m, a, n=n: order.append(n))
               for n, t in targets.items()]  # fmt: skip
    handles.append(block.register_forward_pre_hook(
        lambda m, args, kwargs: seen.append((args, kwargs)), with_kwargs=True))  # fmt: skip
    ids = tokens()
    with torch.no_grad():
        model(ids, attention_mask=torch.ones_like(ids), use_cache=False)
    for handle in handles:
        handle.remove()
    args, kwargs = seen[0]

    def run(twin):
        out = twin(*args, **kwargs)
        return out if isinstance(out, torch.Tensor) else out[0]

    return block, list(dict.fromkeys(order)), targets, run


@torch.no_grad()
def test_find_chains(model_name):
    model = randomise(make_model(model_name))
    block, order, targets, run = block_calls(model, 1)
    before = {name: value.clone() for name, value in block.state_dict().items()}
    chains = find_chains(block, order, set(order), targets, lambda: run(block))
    assert {c.source: c.linear for c in chains} == CHAINS[model_name]
    for name, value in block.state_dict().items():
        assert_equal(value, before[name])


@torch.no_grad()
def test_chains_leave_the_function(model_name):
    if not CHAINS[model_name]:
        pytest.skip("has no chain")
    model = randomise(make_model(model_name))
    before = logits(model)
    for i in range(2):
        block, order, targets, run = block_calls(model, i)
        for chain in find_chains(block, order, set(order), targets, partial(run, block)):
            factors = random_factors(targets[chain.linear].rows()["weight"].shape[1], i)
            source = block.get_submodule(chain.source)
            source.weight.div_(factors[:, None])
            chain.apply(source, factors)
            block.get_submodule(chain.linear).weight.mul_(factors)
    assert (logits(model) - before).abs().max() <= 1e-4 * before.abs().max()


def test_a_chain_divides_the_bias():
    linear = nn.Linear(3, 2)
    value, weight = linear.bias.detach().clone(), linear.weight
    Chain("a", "b").apply(linear, torch.tensor([2.0, 4.0]))
    assert_equal(linear.bias.detach(), value / torch.tensor([2.0, 4.0]))
    assert linear.weight is weight
