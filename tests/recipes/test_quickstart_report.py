"""The quickstart's report, from results written by hand."""

import copy
import json
import math
import re
import warnings
from pathlib import Path

import numpy as np
import pytest

from spiking_mamba import SpikingMambaConfig
from spiking_mamba.reports import quickstart as report
from spiking_mamba.spikes.energy import energy_of_rates
from tests.helpers.pages import Page

ROOT = Path(__file__).parents[2]
LAYERS, LEVELS = 14, 17
NEURON = {"class": "neurons.SILIFNode", "args": {"max_spike_count": 8}}


def scores(*values):
    tasks = zip(("arc_easy", "piqa", "sciq"), (0.25, 0.5, 0.25), values, strict=True)
    return {
        task: {"acc": acc, "acc_stderr": math.sqrt(acc * (1 - acc) / 99), "chance": chance, "n": 100}
        for task, chance, acc in tasks
    }


def priced(mean_abs, nonzero):
    """By hand, of the teacher's 5,992,448 weights in projections, 10,752 neurons of 8 micro-steps, 2,531,664
    other MACs and 12,544 additions; traffic by what the package makes of the means."""
    weights, inputs = 5_992_448, 10_752
    config = SpikingMambaConfig.from_pretrained(ROOT / "recipes/quickstart/teacher", neuron=NEURON)
    whole = energy_of_rates(config, mean_abs, nonzero)
    rest = 4.6 * 2_531_664 + 0.9 * 12_544
    spiking, dense = 0.9 * (mean_abs * weights + 8 * inputs), 4.6 * weights
    assert whole["model"]["fp32"]["gain"] == pytest.approx((dense + rest) / (spiking + rest))
    return {
        "fp32": 4.6 / 0.9 / mean_abs,
        "fp16": 1.5 / 0.4 / mean_abs,
        "int8": 3.0 / mean_abs,
        "with_neurons": dense / spiking,
        "quantised": 3.0 / mean_abs,
        "quantised_sparse": 3.0 * nonzero / mean_abs,
        "whole_model": whole["model"]["fp32"]["gain"],
        "decoding": whole["with_memory"]["decode"]["fp32"]["gain"],
    }


def compared(kl, agreement):
    return {"kl": kl, "top1_agreement": agreement}


@pytest.fixture
def results():
    """Of a run, made up."""
    random = np.random.default_rng(0)
    rows = {}
    for layer in range(LAYERS):
        for name in ("in_proj", "out_proj"):
            distance = np.abs(np.arange(LEVELS) - LEVELS // 2)
            histogram = (1e7 * np.exp(-distance * random.uniform(1.0, 3.0))).astype(int)
            rows[f"backbone.layers.{layer}.mixer.{name}"] = {"histogram": histogram.tolist()}
    return {
        "teacher": {"perplexity": 48.621, "zero_shot": scores(0.26, 0.56, 0.52)},
        "before": {"perplexity": 101.04, "zero_shot": scores(0.28, 0.52, 0.50)} | compared(0.7312, 0.5049),
        "after": {"perplexity": 57.699, "zero_shot": scores(0.29, 0.51, 0.53)} | compared(0.1429, 0.7851),
        "gap_closed": math.log(101.04 / 57.699) / math.log(101.04 / 48.621),
        "spikes": {"mean_abs": 0.8596, "nonzero_share": 0.5604, "projections": rows},
        "energy": priced(0.8596, 0.5604),
        "levels": LEVELS,
        "held_out": "wikipedia-passages",
        "held_out_tokens": 51000,
        "prompt": "The city of",
        "sample": "The city of *Rome* <is> a _place_.",
        "log": [{"step": 25 * i, "kl": 0.7 / i} for i in range(1, 17)] + [{"step": 400, "seconds": 1.0}],
        "seed": 0,
        "seconds": 390.4,
        "device": "2 CPU threads",
        "versions": {"torch": "2.14.1", "lm-eval": "0.4.13"},
    }


def test_the_readmes_tables_are_those_of_the_recorded_run():
    results = json.loads((ROOT / "docs/results/quickstart.json").read_text())
    readme = (ROOT / "README.md").read_text()
    nats = [results[model]["nll_per_token"] for model in ("before", "after", "teacher")]
    assert results["gap_closed"] == pytest.approx((nats[0] - nats[1]) / (nats[0] - nats[2]))
    assert report.summary(results) in re.findall(r"```text\n(.*?)\n```", readme, re.S)
    assert f"took {results['seconds'] / 60:.0f} minutes after the installation" in readme
    scores = results["teacher"]["zero_shot"].items()
    clear = [task for task, of in scores if of["acc"] - of["chance"] > 3 * of["acc_stderr"]]
    assert clear == ["sciq"]  # "SciQ alone lies more than three standard errors above chance"


def test_what_is_said_of_the_predictions(results):
    lines = report.summary(results).splitlines()
    cells = [[cell.strip() for cell in line.split("|")[1:-1]] for line in lines[3:5]]
    assert cells == [
        ["KL to the teacher, nats a token", "", "0.731", "0.143", ""],
        ["same likeliest token as it", "", "50.5%", "78.5%", ""],
    ]
    # ln(101.04 / 57.699) of ln(101.04 / 48.621)
    assert "Distillation closed 77% of the gap in nats a token." in lines


def test_both_reports_have_the_terminals_tables(results, tmp_path):
    before = copy.deepcopy(results)
    summary = report.write_report(tmp_path, results)
    assert results == before
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "report.html", "report.md", "report.png", "results.json"
    ]  # fmt: skip
    assert json.loads((tmp_path / "results.json").read_text()) == results
    quality, closed, costs = summary.split("\n\n")
    text = (tmp_path / "report.md").read_text()
    assert text.startswith("# Distilling a spiking Mamba2\n\nMeasured: ")
    assert f"\n\n## Quality\n\n{quality}\n\n{closed}\n\n## Costs\n\n{costs}\n\n" in text
    assert text.count("](report.png)") == 1
    page = Page(tmp_path / "report.html")
    for table, lines in zip(page.tables, (quality, costs), strict=True):
        header, _, *rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in lines.splitlines()]
        assert table == [header, *rows]
    for said in (closed, results["sample"], "51000 tokens of wikipedia-passages", "390 s", "torch 2.14.1"):
        assert said in page.text
    assert len(page.pictures()) == 4
    assert min(page.letters()) >= 9
    assert page.said() == {
        "Measured": "a spiking student of 17 levels, distilled from a dense Mamba2 in 400 steps, "
        "on 51,000 tokens of wikipedia-passages and 3 zero-shot tasks.",
        "Keeps": "a perplexity of 57.70 against the teacher's 48.62 (101.04 before distillation); "
        "the teacher's likeliest next token in 78.5% of all places; 44.3% accuracy against 44.7%, "
        "the tasks' mean.",
        "Costs": "energy against the teacher's, estimated from counted operations (at 45 nm, fp32): "
        + "; ".join(
            f"{name} {results['energy'][key]:.2f} times less"
            for name, key in (
                ("projections with their neurons", "with_neurons"),
                ("the whole model", "whole_model"),
                ("decoding, memory traffic included,", "decoding"),
                (
                    "hypothetically at int8, projections against a network that skips zeros",
                    "quantised_sparse",
                ),
            )
        )
        + ".",
    }
    once = (tmp_path / "report.html").read_bytes()
    report.write_report(tmp_path, results)
    assert (tmp_path / "report.html").read_bytes() == once


def test_an_unknown_error_and_a_task_without_chance(results):
    for model in ("teacher", "before", "after"):
        results[model]["zero_shot"] = {"lambada": {"acc": 0.5, "acc_stderr": None, "chance": None, "n": 1}}
    line = report.summary(results).splitlines()[5]
    assert [cell.strip() for cell in line.split("|")[1:-1]] == ["lambada, 1 items", *["0.500 ± ?"] * 3, ""]


@pytest.mark.parametrize("layers", [1, LAYERS, 48])
def test_the_picture(results, tmp_path, drawn, layers):
    rows = list(results["spikes"]["projections"].values())
    results["spikes"]["projections"] = {
        f"backbone.layers.{layer}.mixer.{name}": rows[layer % len(rows)]
        for layer in range(layers)
        for name in ("in_proj", "out_proj")
    }
    report.write_report(tmp_path, results)
    drawn.check()
    (figure,) = drawn.figures
    overview, losses, spikes, other = (part.axes[0] for part in figure.subfigs)
    assert losses.lines[0].get_xydata().tolist() == [
        [row["step"], row["kl"]] for row in results["log"] if "kl" in row
    ]
    shares = spikes.images[0].get_array()
    assert shares.shape == other.images[0].get_array().shape == (layers, LEVELS)
    histogram = rows[0]["histogram"]
    np.testing.assert_allclose(shares[0].filled(0), np.array(histogram) / sum(histogram))
    shown = ("with_neurons", "whole_model", "decoding", "quantised_sparse")
    ratios = [57.699 / 48.621, (0.29 + 0.51 + 0.53) / (0.26 + 0.56 + 0.52)]
    ratios += [1 / results["energy"][name] for name in shown]
    assert [bar.get_width() for bar in overview.patches] == pytest.approx([math.log2(r) for r in ratios])


def test_shift_and_add_is_told_where_it_is_known(results):
    assert "shift-and-add" not in report.summary(results)
    results["energy"]["shift_and_add"] = 0.66
    assert report.summary(results).splitlines()[-1].split("|")[1:3] == [
        f" {'against the same integers by shift-and-add':<63} ", " 0.66x "
    ]  # fmt: skip


def test_a_student_that_never_spikes(results, tmp_path, drawn):
    results["energy"] = dict.fromkeys(results["energy"], math.inf)
    for row in results["spikes"]["projections"].values():
        row["histogram"] = [0] * (LEVELS // 2) + [1000] + [0] * (LEVELS // 2)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert report.write_report(tmp_path, results).count("infinite") == 7
    drawn.check()
    assert drawn.text_of("report.png").count("none at all") == 4
    assert "14 of 14 layers silent" in drawn.text_of("report.png")
