"""The records, tables, goals and the plot of formats x strategies x models."""

import json

import pytest
import torch

pytest.importorskip("transformers")

from conftest import make_model  # noqa: E402

from benchmarks import machine, report, report_goals  # noqa: E402
from benchmarks import report_tables as tables  # noqa: E402


def strategy_row(model, form, strategy, kl, variant="plain", bits=4.5):
    quality = {"kl_mean": kl, "kl_mean_se": kl / 50, "kl_p99": 9 * kl, "perplexity_ratio": 1.01,
               "top1": 0.9}  # fmt: skip
    return {"model": model, "variant": variant, "format": form, "strategy": strategy.split(),
            "seconds": 1.0, "calibration_tokens": 0, "bits_per_weight": bits, "remarks": [],
            "quality": quality}  # fmt: skip


STRATEGY_ROWS = [
    strategy_row("stories260k-llama", "int4_g64_asym", "absmax", 0.12),
    strategy_row("stories260k-llama", "int4_g64_asym", "equalize mse", 0.09),
    strategy_row("stories260k-llama", "int8", "equalize mse", 6e-4, bits=8.2),
    strategy_row("stories260k-llama", "int4_g32", "absmax", 0.15),
    strategy_row("stories260k-llama", "int8", "equalize mse", 1.1e-3, "outliers", 8.2),
    strategy_row("tinystories-656k-llama", "int4_g64_asym", "equalize mse", 0.05),
]


def test_every_case_is_measured_once_and_is_known():
    from benchmarks import strategies
    from gpu_poor.formats import FORMATS
    from gpu_poor.strategies import STRATEGIES, recipe

    cases = strategies.cases()
    assert len(cases) == len(set(cases))
    for variant, form, names in cases:
        assert variant in ("plain", "outliers") and form in FORMATS
        assert recipe(names, True).names == list(names) or len(names) == 1
    assert {name for *_, names in cases for name in names} == set(STRATEGIES)
    assert strategies.TEXTS.keys() == strategies.CALIBRATION.keys()
    assert strategies.needs_data(("awq", "mse")) and not strategies.needs_data(("equalize", "mse"))


def test_bits_per_weight_counts_scales_and_padding():
    from benchmarks.strategies import bits_per_weight
    from gpu_poor import quantize

    model = make_model("llama", hidden_size=128, intermediate_size=256)
    quantize(model, overrides={"model.layers": "int4_g64_asym"}, verbose=False)
    assert bits_per_weight(model) == 4.5
    model = make_model("llama", hidden_size=128, intermediate_size=256)
    quantize(model, overrides={"model.layers": "int4_g32_asym"}, verbose=False)
    assert bits_per_weight(model) == 5.0
    model = make_model("llama", intermediate_size=200)  # 8 more rows, and groups cut short
    quantize(model, overrides={"model.layers": "int4_g64_asym"}, verbose=False)
    assert 4.5 < bits_per_weight(model) < 4.9


def test_an_interrupted_run_goes_on(tmp_path):
    from benchmarks.strategies import earlier_rows

    path = tmp_path / "strategies.json"
    assert earlier_rows(path, 8) == []
    record = {"header": {"commit": machine.commit()[0]}, "n_tokens": 8, "complete": False,
              "rows": STRATEGY_ROWS}  # fmt: skip
    for changes, expected in (
        ({}, STRATEGY_ROWS),
        ({"complete": True}, []),
        ({"n_tokens": 9}, []),
        ({"header": {"commit": "another"}}, []),
    ):
        path.write_text(json.dumps(record | changes))
        assert earlier_rows(path, 8) == expected


def test_goals_of_low_bits():
    found = {goal: (measured, met) for goal, measured, met in
             report_goals.strategies({"rows": STRATEGY_ROWS})}  # fmt: skip
    assert found == {
        "mean KL, 4.5 bits without data, stories260k-llama ≤ 0.0850":
            ("0.0900 (int4_g64_asym, equalize + mse)", False),
        "mean KL, 4.5 bits without data, tinystories-656k-llama ≤ 0.0550":
            ("0.0500 (int4_g64_asym, equalize + mse)", True),
        "mean KL, 8 bits without data, outlier variants ≤ 1.2e-03":
            ("1.1e-03 (stories260k-llama)", True),
    }  # fmt: skip


def test_rivals_are_compared_at_as_many_bits():
    rows = STRATEGY_ROWS[:4]  # 0.09 at 4.5 bits, 6e-4 at 8.2; hollow and absmax do not count
    model = "stories260k-llama"
    assert report_goals.at_bits(rows, model, 4.5) == pytest.approx(0.09)
    assert report_goals.at_bits(rows, model, 8.2) == pytest.approx(6e-4)
    assert report_goals.at_bits(rows, model, 6.35) == pytest.approx((0.09 * 6e-4) ** 0.5)
    assert report_goals.at_bits(rows, "another", 4.5) is None
    record = {"rows": rows, "peers": [
        {"model": model, "peer": f"rival {kl}", "bits_per_weight": 4.5,
         "quality": rows[0]["quality"] | {"kl_mean": kl}} for kl in (0.1, 0.06)
    ]}  # fmt: skip
    *_, (goal, measured, met) = report_goals.strategies(record)
    assert "a rival's" in goal and measured == f"1.500x (rival 0.06, {model})" and not met
    text = tables.peer_weights(record)
    assert "| rival 0.1 | 4.50 |" in text and "0.90x" in text and "1.50x" in text
    assert tables.peer_weights({"rows": rows}) == tables.NOT_YET


def test_a_rival_rounds_the_blocks_and_nothing_else():
    from benchmarks.peer_weights import apply

    model = make_model("gpt2")  # Conv1D: rows are columns
    before = {name: value.clone() for name, value in model.state_dict().items()}
    seen = []

    def rounding(weight):
        seen.append(tuple(weight.shape))
        return weight / 2, 5 * weight.numel()

    assert apply(model, rounding) == 5.0
    assert seen == 2 * [(360, 120), (120, 120), (480, 120), (120, 480)]
    for name, value in model.state_dict().items():
        halved = ".h." in name and value.dim() == 2
        assert torch.equal(value, before[name] / 2 if halved else before[name]), name


def test_the_goals_are_of_the_defaults():
    from benchmarks import strategies
    from gpu_poor.strategies import recipe

    assert recipe(None, False).names == list(strategies.DATA_FREE)
    assert recipe(None, True).names == list(strategies.CALIBRATED)
    defaults = {" + ".join(s) for s in (strategies.DATA_FREE, strategies.CALIBRATED)}
    assert {strategy for _, strategy in report_goals.LOW_BITS} == defaults


def test_the_plot_shows_every_point_where_it_belongs():
    from xml.etree import ElementTree

    from benchmarks.plot import PANEL, svg

    text = svg(STRATEGY_ROWS)
    root = ElementTree.fromstring(text)
    assert svg(list(STRATEGY_ROWS)) == text
    panels = root.findall("{*}g")
    assert [panel[0].text for panel in panels] == ["stories260k-llama", "tinystories-656k-llama"]
    circles = panels[0].findall("{*}circle")
    assert len(circles) == 4 and len(panels[1].findall("{*}circle")) == 1  # no outlier variant
    at = {(c[0].text, c.get("stroke")): (float(c.get("cx")), float(c.get("cy"))) for c in circles}
    assert all(0 < x < PANEL[0] and 0 < y < PANEL[1] for x, y in at.values())
    grey, blue = "#8a8a8a", "#1f6fb4"
    assert at["int4_g64_asym", grey][0] == at["int4_g64_asym", blue][0] < at["int8", blue][0]
    # Upwards is worse: the axis points down.
    assert at["int4_g32", grey][1] < at["int4_g64_asym", grey][1] < at["int4_g64_asym", blue][1]
    assert at["int4_g64_asym", blue][1] < at["int8", blue][1]


def test_report_shows_the_strategies_of_another_machine(tmp_path):
    folder = tmp_path / "results"
    record = {"header": machine.header(2) | {"cpu": "Zeta 9"}, "n_tokens": 8, "complete": True,
              "rows": STRATEGY_ROWS}  # fmt: skip
    machine.save(record, folder / "zeta" / "strategies.json", "")
    arguments = ["--root", str(tmp_path), "--results", str(folder)]
    assert report.main(arguments) == 0
    text = (tmp_path / "RESULTS.md").read_text()
    assert "(results/quality.svg)" in text and (folder / "quality.svg").exists()
    assert "| stories260k-llama with outliers | int8 | equalize + mse | 8.20 |" in text
    assert text.index("| equalize + mse | 4.50 |") < text.index("| absmax | 4.50 |")  # best first
    assert "| cpu | Zeta 9 |" in text.partition("## Another machine")[0]
    (folder / "quality.svg").write_text("")
    assert report.main([*arguments, "--check"]) == 1
