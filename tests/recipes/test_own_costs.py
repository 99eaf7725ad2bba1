"""A user's own table of costs, from the command line of recipes/evaluate to every table and picture."""

import json
import math
import sys
from pathlib import Path

import pytest
import torch

from spiking_mamba import SpikingMambaConfig, SpikingMambaForCausalLM
from spiking_mamba.commands import evaluate as recipe
from spiking_mamba.data.text import load_text
from spiking_mamba.data.tokens import train_tokenizer
from spiking_mamba.reports.figures import short
from tests.helpers.pages import Page

ROOT = Path(__file__).parents[2]
OWN = "my chip, <b>8</b> bit"
MAC, AC = 0.05, 0.008
LAYERS = 2


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory):
    root = tmp_path_factory.mktemp("checkpoints")
    tokenizer = train_tokenizer(load_text("openwebtext-passages")["text"][:100], vocab_size=512)
    shape = {"vocab_size": 512, "hidden_size": 32, "num_hidden_layers": LAYERS, "num_heads": 4}
    shape |= {"head_dim": 16, "state_size": 8, "n_groups": 1, "chunk_size": 16, "initializer_range": 0.3}
    torch.manual_seed(0)
    teacher = SpikingMambaForCausalLM(SpikingMambaConfig(**shape))
    student = SpikingMambaForCausalLM.from_dense(teacher, neuron={"class": "neurons.SILIFNode"})
    for name, model in (("teacher", teacher), ("student", student)):
        model.save_pretrained(root / name)
        tokenizer.save_pretrained(root / name)
    return root


@pytest.fixture
def evaluated(checkpoints, tmp_path, monkeypatch, drawn):
    """The recipe's results and page, with pictures looked at while they were drawn."""
    costs = tmp_path / "chip.yaml"
    costs.write_text(f"{OWN!r}: {{mac: {MAC}, ac: {AC}, byte: 5.0, width: 1}}\n")
    output = tmp_path / "run"
    arguments = [
        f"models=[{checkpoints}/teacher, {checkpoints}/student]", "reference=teacher", f"costs={costs}",
        f"output={output}", "limit=2", "length=32", "tasks=[copa]", "corpora=[openwebtext-passages]",
    ]  # fmt: skip
    yaml_file = str(ROOT / "recipes/evaluate/evaluate.yaml")
    monkeypatch.setattr(sys, "argv", ["evaluate.py", yaml_file, *arguments])
    monkeypatch.setattr(recipe, "keep_freed_memory", lambda: None)
    monkeypatch.setattr(recipe, "quiet", lambda: None)
    recipe.main()
    return json.loads((output / "results.json").read_text()), Page(output / "report.html")


def test_a_users_costs_reach_every_table_and_picture(evaluated, drawn):
    results, page = evaluated
    student = results["models"][1]
    mean_abs, energy = student["spikes"]["mean_abs"], student["energy"]
    gain = MAC / (AC * mean_abs)
    assert results["groups"]["student"][f"gain_{OWN}"]["mean"] == pytest.approx(gain)

    # every table of energy has a row of its own for it, beside those of the built-in ones
    rows = [row for table in page.tables for row in table if row[0] == f"student, {OWN} (hypothetical)"]
    builtin = [row for table in page.tables for row in table if row[0] == "student, fp32"]
    assert len(rows) == len(builtin) == 8
    with_neurons = energy["projections_with_neurons"][OWN]["gain"]
    assert [row[6] for row in rows[:2]] == [f"{with_neurons:.2f}x", f"{gain:.2f}x"]
    assert with_neurons < gain
    assert page.row(OWN)[1:] == ["0.05", "0.008", "0.05", "5", "1"]
    assert f"Given by the user: {OWN}." in page.text

    # every picture of energy shows it, says its name, and that it is hypothetical
    assert sorted(drawn.names) == [
        "gaps.png", "layer_energy-student.png", "overview.png", "spikes-student.png", "tasks.png"
    ]  # fmt: skip
    drawn.check()
    assert f"{OWN} table, hypothetical" in drawn.text_of("layer_energy-student.png")
    assert "fp32 table" in drawn.text_of("layer_energy-student.png")
    assert "fp32 table, hypothetical" not in drawn.text_of("layer_energy-student.png")
    overview = drawn.text_of("overview.png").split("\n")
    assert {f"whole model, {short(OWN, 12)}*", "whole model, fp32", "times teacher; * hypothetical"} <= {
        *overview
    }
    told = [picture.attrib["aria-label"] for picture in page.pictures()]
    with_neurons = f"projections with neurons, {short(OWN, 12)}*: {with_neurons:.2f} times less"
    assert with_neurons in told[0]
    assert f"Energy per token by layer, in_proj, {OWN} table, hypothetical: student" in told
    assert f"operation counts at the tables fp32, {OWN}, compute only" in page.text

    (axes,) = drawn.figures[drawn.names.index("overview.png")].axes
    gains = [
        row[t]["gain"]
        for t in ("fp32", OWN)
        for row in (energy["projections_with_neurons"], energy["model"], energy["with_memory"]["decode"])
    ]
    drawn_bars = [bar.get_width() for bar in axes.patches][-7:-1]  # the last is a quantised network's
    assert drawn_bars == pytest.approx([-math.log2(gain) for gain in gains])


def test_the_bars_of_every_layer(evaluated, drawn):
    """Heights are accumulations and multiply-accumulates of that layer times the user's costs."""
    student = evaluated[0]["models"][1]
    panels = drawn.figures[drawn.names.index("layer_energy-student.png")].axes
    picojoules = {"pJ": 1.0, "nJ": 1e3, "µJ": 1e6}
    costs = {"fp32": (4.6, 0.9), OWN: (MAC, AC)}
    places = [(table, side) for table in costs for side in ("in_proj", "out_proj")]
    for panel, (table, side) in zip(panels, places, strict=True):
        assert panel.get_title("left").replace("\n", " ").startswith(f"{side}, {table} table")
        scale = picojoules[panel.get_ylabel().split()[0]]
        rows = [row for name, row in student["spikes"]["projections"].items() if name.endswith(side)]
        mac, ac = costs[table]
        dense = [row["dense_macs"] / row["tokens"] * mac for row in rows]
        spiking = [row["accumulations"] / row["tokens"] * ac for row in rows]
        heights = [scale * bar.get_height() for bar in panel.patches]
        assert heights == pytest.approx([*dense, *spiking])
