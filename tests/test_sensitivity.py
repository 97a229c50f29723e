"""The predicted cost of a format: against autograd, against measured KL, and without a trace."""

import copy
import math

import numpy as np
import pytest
import torch
from conftest import VOCAB, make_model, tokens
from torch import nn

from gpu_poor import assets, metrics, sensitivity
from gpu_poor.formats import FORMATS, find
from gpu_poor.plan import make_plan
from gpu_poor.samples import token_rows

FORMS = list(FORMATS.values())


def rows_of(length: int = 17) -> list[torch.Tensor]:
    return list(tokens(length=length).split(1))


def labels_of(model, rows) -> list[torch.Tensor]:
    """The labels that fisher draws."""
    generator = torch.Generator().manual_seed(sensitivity.SEED)
    with torch.no_grad():
        ps = [model(input_ids=ids).logits[0].float().softmax(-1) for ids in rows]
    return [torch.multinomial(p, 1, generator=generator) for p in ps]


@pytest.mark.parametrize("name", ["llama-tied", "gpt2", "mixtral"])
def test_fisher_is_the_squared_gradients_of_autograd(name):
    model = make_model(name)
    rows = rows_of()
    units = sensitivity.units(make_plan(model))
    found = sensitivity.fisher(model, units, rows)
    weights = {key: w for unit in units for key, w in unit.weights.items()}
    squares = {key: 0.0 for key in weights}
    for ids, labels in zip(rows, labels_of(model, rows), strict=True):
        log_p = model(input_ids=ids).logits[0].log_softmax(-1).gather(-1, labels).sum()
        gradients = torch.autograd.grad(log_p, [w.parameter for w in weights.values()])
        for (key, weight), gradient in zip(weights.items(), gradients, strict=True):
            squares[key] = squares[key] + weight.as_rows(gradient).double().square()
    for key, square in squares.items():
        expected = square / (2 * 17)
        for actual, dim in ((found[key].rows, -1), (found[key].columns, -2)):
            bound = 1e-4 * float(expected.sum(dim).max())
            assert torch.allclose(actual, expected.sum(dim), rtol=1e-3, atol=bound)
    # A tied table is one unit, and the gradients of both of its uses are in it.
    assert sum(len(unit.targets) for unit in units) - len(units) == (name != "mixtral")


@pytest.mark.parametrize("name", ["gpt2", "mixtral"])  # transposed, and experts
def test_losses_are_the_formula(name):
    model = make_model(name)
    units = sensitivity.units(make_plan(model))
    information = sensitivity.fisher(model, units, rows_of())
    for unit in units:
        expected = np.zeros(len(FORMS))
        relative = np.zeros(len(FORMS))
        for key, weight in unit.weights.items():
            fisher = information[key]
            matrices = [(weight.rows, fisher.rows, fisher.columns)]
            if weight.rows.dim() == 3:
                matrices = list(zip(weight.rows, fisher.rows, fisher.columns, strict=True))
            for w, r, c in matrices:
                for i, form in enumerate(FORMS):
                    w = w.contiguous()
                    back = form.dequantize(*form.quantize(w), tuple(w.shape), torch.float32)
                    square = (back.double() - w.double()).square().numpy()
                    product = np.outer(r.numpy(), c.numpy()) / max(float(c.sum()), 1e-300)
                    expected[i] += 0.5 * (square * product).sum()
                    relative[i] += square.sum() / float(weight.rows.double().square().sum())
        np.testing.assert_allclose(sensitivity.losses(unit, FORMS, information), expected, 1e-4)
        np.testing.assert_allclose(sensitivity.losses(unit, FORMS), relative, 1e-4)


def test_a_sample_of_rows_is_like_all_of_them(monkeypatch):
    """Rows that count very differently and err very differently, as those of an embedding do."""
    model = nn.Sequential(nn.Linear(64, 4000, bias=False))
    weight = model[0].weight.data
    weight *= torch.logspace(-1, 1, 4000)[torch.randperm(4000)][:, None]
    (unit,) = sensitivity.units(make_plan(model))
    ((key, _),) = unit.weights.items()
    information = {key: sensitivity.Fisher((4000, 64), weight.device)}
    information[key].rows += torch.logspace(0, -6, 4000)
    information[key].columns += torch.rand(64)
    for known in (information, None):
        exact = sensitivity.losses(unit, FORMS, known)
        with monkeypatch.context() as patch:
            patch.setattr(sensitivity, "TRIED", 64 * 400)
            seen: list = []
            sensitivity.losses(unit, FORMS[:1], known, lambda r, f, seen=seen: seen.append(r) or r)
            assert seen[0].shape == (401, 64)
            assert float(seen[0].abs().max()) == float(weight.abs().max())
            sampled = sensitivity.losses(unit, FORMS, known)
        np.testing.assert_allclose(sampled, exact, rtol=0.15)


def test_another_rounding_is_asked_for_every_row():
    model = make_model("llama")
    unit = sensitivity.units(make_plan(model))[0]
    zeros = sensitivity.losses(unit, FORMS, None, lambda rows, form: torch.zeros(rows.shape))
    assert zeros == pytest.approx([1.0] * len(FORMS), rel=1e-5)


@pytest.mark.parametrize("source", ["samples", "own text"])
def test_predictions_are_what_is_measured(stories, source):
    """One module at a time, some of every kind and format, on a real model."""
    model, tokenizer = stories
    text = assets.valid_text()[:12000]
    reference = metrics.record(model, text, tokenizer, n_tokens=2048)
    if source == "samples":
        rows = token_rows(model, assets.calib_text()[:20000], tokenizer, n_tokens=4096)
    else:
        rows = sensitivity.own_text(model)
    units = sensitivity.units(make_plan(model))
    information = sensitivity.fisher(model, units, rows)
    model = copy.deepcopy(model)
    predicted, measured = [], []
    for unit in sensitivity.units(make_plan(model))[::3]:
        index = [u.name for u in units].index(unit.name)
        for form in map(find, ("int8", "int4_g32_asym", "int4_g128")):
            predicted += sensitivity.losses(units[index], [form], information)
            ((_, weight),) = unit.weights.items()
            before = weight.rows.clone()
            weight.rows.copy_(sensitivity.nearest(before, form))
            measured.append(metrics.evaluate(model, reference).kl_mean)
            weight.rows.copy_(before)
    ranks = [torch.tensor(values).argsort().argsort().double() for values in (predicted, measured)]
    assert float(torch.corrcoef(torch.stack(ranks))[0, 1]) > 0.95
    ratios = [math.log(p / m) for p, m in zip(predicted, measured, strict=True)]
    assert abs(sum(ratios) / len(ratios)) < math.log(1.3)
    assert max(map(abs, ratios)) < math.log(2)


# -- the model stays as it was ------------------------------------------------------------------


def state(model) -> list:
    """Everything about a model that looking at it could change."""
    modules = [
        (m.training, vars(m).get("forward"), *(len(getattr(m, h)) for h in hooks))
        for hooks in [("_forward_hooks", "_forward_pre_hooks", "_backward_hooks")]
        for m in model.modules()
    ]
    hooked = [p._post_accumulate_grad_hooks or {} for p in model.parameters()]
    return [modules, [len(h) for h in hooked], [p.requires_grad for p in model.parameters()]]


def grads(model) -> list:
    return [p.grad for p in model.parameters()]


def trained(name: str) -> nn.Module:
    """A model in the middle of something: some of it frozen, in training, with a gradient."""
    model = make_model(name, attention_dropout=0.5).train()
    model.get_input_embeddings().weight.requires_grad_(False)
    model.lm_head.eval()
    next(iter(model.get_decoder().layers[0].parameters())).grad = None
    last = list(model.parameters())[-2]
    last.grad = torch.ones_like(last)
    layer = model.get_decoder().layers[1]
    layer.forward = layer.forward  # as libraries do that wrap it
    return model


def test_nothing_is_left_behind():
    model = trained("llama")
    units = sensitivity.units(make_plan(model))
    before, held, rng = state(model), grads(model), torch.get_rng_state()
    weights = {k: v.clone() for k, v in model.state_dict().items()}
    with torch.inference_mode():  # whatever mode the caller is in
        first = sensitivity.fisher(model, units, sensitivity.own_text(model, 2, 20))
    assert state(model) == before
    assert all(a is b for a, b in zip(grads(model), held, strict=True))
    assert all(torch.equal(v, weights[k]) for k, v in model.state_dict().items())
    assert torch.equal(rng, torch.get_rng_state())
    again = sensitivity.fisher(model.eval(), units, sensitivity.own_text(model, 2, 20))
    assert all(torch.equal(first[k].rows, again[k].rows) for k in first)  # no dropout either


def test_nothing_is_left_behind_by_an_error():
    model = trained("llama")
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight.fill_(3e38)
    units = sensitivity.units(make_plan(model))
    before, held = state(model), grads(model)
    with pytest.raises(ValueError, match=r"sequence 0 of.*model\.layers\.1\.mlp.* not finite"):
        sensitivity.fisher(model, units, rows_of())
    with pytest.raises(ValueError, match=r"own: the activations of model\.layers\.1\.mlp"):
        sensitivity.own_text(model)
    assert state(model) == before
    assert all(a is b for a, b in zip(grads(model), held, strict=True))


def test_blocks_are_computed_again_and_nothing_else_changes(monkeypatch):
    model = make_model("llama")
    units = sensitivity.units(make_plan(model))
    calls = []
    handle = model.model.layers[0].mlp.register_forward_pre_hook(lambda *_: calls.append(1))
    first = sensitivity.fisher(model, units, rows_of())
    assert len(calls) == 2 * 2  # two sequences, each forward and again on the way back
    handle.remove()
    monkeypatch.setattr(sensitivity, "checkpoint", lambda f, *a, use_reentrant, **k: f(*a, **k))
    kept = sensitivity.fisher(model, units, rows_of())
    for key in first:
        assert torch.allclose(first[key].rows, kept[key].rows, rtol=1e-4)


def test_what_no_token_reaches_counts_as_the_rest():
    model = make_model("llama")
    model.unused = nn.Linear(64, 64)
    units = sensitivity.units(make_plan(model))
    found = sensitivity.fisher(model, units, rows_of())
    ((key, _),) = next(unit for unit in units if unit.name == "unused").weights.items()
    others = [sums for k, sums in found.items() if k != key]
    numel = sum(len(s.rows) * len(s.columns) for s in others)
    mean = sum(float(s.rows.sum()) for s in others) / numel
    assert float(found[key].rows.sum()) == pytest.approx(64 * 64 * mean)
    assert float(found[key].columns.sum()) == pytest.approx(64 * 64 * mean)


def test_own_text_is_the_model_s_and_always_the_same(stories):
    model, tokenizer = stories
    rows = sensitivity.own_text(model, n_rows=3, length=40)
    assert [row.shape for row in rows] == [(1, 40)] * 3
    assert all(int(row[0, 0]) == model.config.bos_token_id for row in rows)
    again = sensitivity.own_text(model, n_rows=3, length=40)
    assert all(torch.equal(a, b) for a, b in zip(rows, again, strict=True))
    assert not torch.equal(rows[0], rows[1])
    # It is likelier than noise, about as likely as the model thinks that text is.
    noise = torch.randint(3, model.config.vocab_size, (1, 400))
    own = torch.cat([row[0] for row in sensitivity.own_text(model, 4, 128)])
    assert metrics.perplexity(model, own) < 20 < metrics.perplexity(model, noise[0])


def test_a_model_without_a_first_token_starts_anywhere():
    model = make_model("opt", bos_token_id=None)
    model.config.bos_token_id = None
    rows = sensitivity.own_text(model, n_rows=4, length=100)
    assert all(row.shape == (1, 64) for row in rows)  # its positions
    assert len({int(row[0, 0]) for row in rows}) > 1
    assert max(int(row.max()) for row in rows) < VOCAB


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_16_bit_models(dtype):
    model = make_model("llama")
    expected = sensitivity.fisher(model, sensitivity.units(make_plan(model)), rows_of())
    model = model.to(dtype)
    units = sensitivity.units(make_plan(model))
    found = sensitivity.fisher(model, units, rows_of())
    for (_, a), (_, b) in zip(expected.items(), found.items(), strict=True):
        assert float(b.rows.sum()) == pytest.approx(float(a.rows.sum()), rel=0.3)
    few = [form for form in FORMS if form.bits <= 8]  # 16 bits may hold these weights exactly
    assert all(loss > 0 for loss in sensitivity.losses(units[1], few, found))
