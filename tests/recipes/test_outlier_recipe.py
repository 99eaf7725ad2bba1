"""The outlier study's command line, on checkpoints of two tiny layers."""

import copy
import importlib.util
import json
import math
import shutil
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import torch
from transformers import AutoTokenizer

from spiking_mamba import SpikingMambaConfig, SpikingMambaForCausalLM, data, evaluation
from spiking_mamba.evaluation.outliers import replace_outliers
from spiking_mamba.model.checkpoint import export, export_dense, load_model
from tests.helpers import commands

ROOT = Path(__file__).parents[2]
SCRIPT, YAML = ROOT / "recipes/ablate/outliers.py", ROOT / "recipes/ablate/outliers.yaml"
WORDS = "the quick brown fox jumps over a lazy dog while seven small mice watch from under an old tree"


@pytest.fixture(scope="module")
def text(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("text") / "text.txt"
    words = WORDS.split()
    documents = (" ".join(words[(i * j + j * j) % len(words)] for j in range(80)) for i in range(1, 400))
    path.write_text("\n\n".join(f"Story {i}: {document}" for i, document in enumerate(documents)))
    return path


@pytest.fixture(scope="module")
def checkpoints(text, tmp_path_factory) -> Path:
    """``dense`` and ``spiking``, with tokenizers."""
    folder = tmp_path_factory.mktemp("checkpoints")
    tokenizer = data.train_tokenizer(data.load_text(str(text))["text"], 300)
    torch.manual_seed(0)
    sizes = dict(hidden_size=32, num_hidden_layers=2, num_heads=4, head_dim=16, state_size=8, n_groups=1)
    config = SpikingMambaConfig(
        vocab_size=len(tokenizer), chunk_size=16, eos_token_id=0, initializer_range=0.3, **sizes
    )
    dense = SpikingMambaForCausalLM(config)
    spiking = SpikingMambaForCausalLM.from_dense(dense, neuron={"class": "neurons.SILIFNode"})
    export(dense, folder / "dense", tokenizer)
    export_dense(dense, folder / "mute")
    export(spiking, folder / "spiking", tokenizer)
    return folder


def arguments(model: Path, text: Path, output: Path, *more: str) -> list[str]:
    given = [f"model={model}", f"data={text}", f"output={output}", "length=32", "rows=6", "batch_size=2"]
    return [str(SCRIPT), str(YAML), *given, *more]


def run(*given) -> subprocess.CompletedProcess:
    return commands.run(*arguments(*given))


@pytest.fixture
def recipe():
    spec = importlib.util.spec_from_file_location("outliers_recipe", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_table(checkpoints, text, tmp_path):
    """A dense model on the command line; its numbers are those of the library."""
    output = tmp_path / "run"
    done = run(checkpoints / "dense", text, output, "fractions=[0.01, 0.1]", "tasks=[copa]", "limit=3")
    assert done.returncode == 0, done.stderr
    assert "in_proj = 1, 10 %" in done.stdout
    rows = json.loads((output / "results.json").read_text())["rows"]
    conditions = [(row["site"], row["value"], row["fraction"]) for row in rows]
    assert conditions == [(None, None, 0.0)] + [
        (site, value, fraction)
        for site in ("in_proj", "out_proj")
        for value in (0.0, 1.0)
        for fraction in (0.01, 0.1)
    ]
    assert [row["channels"] for row in rows[1:]] == [[1, 32], [4, 32]] * 2 + [[1, 64], [7, 64]] * 2
    model = load_model(checkpoints / "dense")
    tokenizer = AutoTokenizer.from_pretrained(checkpoints / "dense")
    held_out = data.tokenize(data.load_text(str(text), "held_out"), tokenizer, 32).shuffle(seed=0)
    held_out = held_out.select(range(6))
    for row in rows:
        with replace_outliers(model, row["site"] or "in_proj", row["value"] or 0.0, row["fraction"]):
            found = evaluation.perplexity(model, held_out, batch_size=2, progress=False)
        assert row["perplexity"][str(text)] == pytest.approx(found, rel=1e-5)
        assert row["zero_shot"]["copa"]["n"] == 3
    assert len({row["perplexity"][str(text)]["perplexity"] for row in rows}) == len(rows)
    report = (output / "report.md").read_text()
    assert report.count("\n| ") == 2 + len(rows)
    assert f"{rows[-1]['perplexity'][str(text)]['perplexity']:,.2f}" in report
    assert "7 of 64" in report
    assert "copa, acc %" in report
    assert (output / "perplexity.png").read_bytes().startswith(b"\x89PNG")


def test_a_killed_run_goes_on_where_it_was(checkpoints, text, tmp_path, recipe, monkeypatch, capsys):
    """A finished row is not measured again: what a marked one says stays."""
    output = tmp_path / "run"
    given = arguments(checkpoints / "spiking", text, output, "fractions=[0.05, 0.2]")
    path = output / "results.json"
    commands.run(*given, kill_when=path.is_file)
    results = json.loads(path.read_text())  # whole, whenever it was killed
    kept = results["rows"][:3]
    for row in kept:
        row["perplexity"][str(text)]["perplexity"] = 123.25
    path.write_text(json.dumps(results | {"rows": kept}))
    before = json.dumps(kept)

    monkeypatch.setattr(sys, "argv", given)
    with pytest.raises(SystemExit, match="resume=true"):
        recipe.main()
    monkeypatch.setattr(sys, "argv", [*given, "resume=true"])
    recipe.main()
    rows = json.loads(path.read_text())["rows"]
    assert len(rows) == 9
    assert json.dumps(rows[: len(kept)]) == before
    assert capsys.readouterr().out.count("/9  ") == 9 - len(kept)
    assert "123.25" in (output / "report.md").read_text()
    assert all(row["perplexity"][str(text)]["perplexity"] != 123.25 for row in rows[len(kept) :])


def test_ctrl_c_keeps_finished_rows(checkpoints, text, tmp_path, recipe, monkeypatch, capsys):
    given = arguments(checkpoints / "spiking", text, tmp_path / "run", "fractions=[0.05]")
    measure, calls = recipe.measure, []

    def interrupt(*others):
        calls.append(others)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return measure(*others)

    monkeypatch.setattr(recipe, "measure", interrupt)
    monkeypatch.setattr(sys, "argv", given)
    with pytest.raises(SystemExit) as end:
        recipe.main()
    assert end.value.code == 130
    said = f"interrupted: 2 of 5 rows are kept in {tmp_path / 'run'}; resume=true goes on."
    assert capsys.readouterr().err.splitlines()[-1] == said
    monkeypatch.setattr(sys, "argv", [*given, "resume=true"])
    recipe.main()
    assert len(calls) == 6


def test_only_whole_results_of_the_same_weights_are_continued(
    checkpoints, text, tmp_path, recipe, monkeypatch
):
    output, model = tmp_path / "run", tmp_path / "model"
    shutil.copytree(checkpoints / "dense", model)
    given = arguments(model, text, output, "fractions=[0.05]")
    monkeypatch.setattr(sys, "argv", given)
    recipe.main()
    monkeypatch.setattr(sys, "argv", [*given, "resume=true"])
    path = output / "results.json"
    whole = path.read_text()
    path.write_text(whole[:100])
    with pytest.raises(SystemExit, match=r"results.json is damaged: say overwrite=true"):
        recipe.main()
    assert path.read_text() == whole[:100]

    path.write_text(whole)
    trained = load_model(model)
    with torch.no_grad():
        trained.lm_head.weight += 0.01
    trained.save_pretrained(model)
    with pytest.raises(SystemExit, match="other weights"):
        recipe.main()
    assert path.read_text() == whole

    with torch.no_grad():
        trained.lm_head.weight[0] = math.nan
    trained.save_pretrained(model)
    monkeypatch.setattr(sys, "argv", [*given, "overwrite=true"])
    with pytest.raises(SystemExit, match="control: The model's logits are NaN"):
        recipe.main()
    assert not path.exists()


def test_a_tokenizer_must_be_named_where_there_is_none(
    checkpoints, text, tmp_path, recipe, monkeypatch, capsys
):
    """transformers would make one up for its own Mamba2, without a word in it."""
    given = arguments(checkpoints / "mute", text, tmp_path / "run", "fractions=0")
    monkeypatch.setattr(sys, "argv", given)
    with pytest.raises(SystemExit, match="holds no tokenizer"):
        recipe.main()
    foreign = AutoTokenizer.from_pretrained(checkpoints / "dense")
    foreign.add_tokens("unheard-of")
    foreign.save_pretrained(tmp_path / "foreign")
    monkeypatch.setattr(sys, "argv", [*given, f"tokenizer={tmp_path / 'foreign'}"])
    with pytest.raises(SystemExit, match="does not belong to the model"):
        recipe.main()
    assert not (tmp_path / "run").exists()
    monkeypatch.setattr(sys, "argv", [*given, f"tokenizer={checkpoints / 'dense'}"])
    recipe.main()


def test_equal_numbers_of_channels_are_measured_once(checkpoints, text, tmp_path, recipe, monkeypatch):
    calls = []
    measure = recipe.measure
    monkeypatch.setattr(recipe, "measure", lambda *given: calls.append(1) or measure(*given))
    fields = {"length": 32, "rows": 2, "sites": "in_proj", "values": 0, "fractions": [1e-4, 1e-3, 0.05]}
    settings = recipe.OutlierSettings(
        str(tmp_path / "run"), str(checkpoints / "spiking"), data=str(text), **fields
    )
    rows = recipe.run(settings)["rows"]
    assert len(calls) == 3  # the control, 1 channel, 2 channels
    assert [row["perplexity"] for row in rows[1:3]] == [rows[1]["perplexity"]] * 2
    assert rows[3]["perplexity"] != rows[1]["perplexity"]


def test_only_a_control(checkpoints, text, tmp_path, recipe):
    settings = recipe.OutlierSettings(
        str(tmp_path / "run"), str(checkpoints / "dense"), data=str(text), length=32, rows=2, fractions=0,
        per="tensor",
    )  # fmt: skip
    assert [row["fraction"] for row in recipe.run(settings)["rows"]] == [0.0]
    assert "control" in (tmp_path / "run/report.md").read_text()


@pytest.mark.parametrize("found", [[20, 30, math.inf, 19], [20, 30, 9e6, 19], [math.inf] * 4])
def test_the_picture_of_any_perplexities(found, tmp_path, recipe):
    conditions = [(None, None, 0.0), ("in_proj", 0.0, 0.1), ("in_proj", 0.0, 0.2), ("in_proj", 1.0, 0.1)]
    rows = [
        {"site": s, "value": v, "fraction": f, "perplexity": {"text": {"perplexity": p}}, "zero_shot": {}}
        for (s, v, f), p in zip(conditions, found, strict=True)
    ]
    before = copy.deepcopy(rows)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        recipe.draw(tmp_path / "picture.png", {"rows": rows})
    assert rows == before
    assert (tmp_path / "picture.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ("fraction=[0.1]", "did you mean 'fractions'"),
        ("fractions=[1.5]", "fractions must be a number or a list of numbers, got [1.5]"),
        ("fractions=[a]", "fractions must be a number or a list of numbers"),
        ("values=[true]", "values must be a number or a list of numbers"),
        ("sites=[u]", "sites must be a list, each 'in_proj' or 'out_proj'"),
        ("per=batch", "per must be 'token' or 'tensor'"),
        ("rows=0", "rows must be an integer of at least 1"),
        ("limit=-1", "limit must be an integer of at least 1"),
        ("model=/nowhere/model", "/nowhere/model"),
        ("tokenizer=/nowhere/model", "tokenizer="),
        ("data=wikipedia-leeds", "wikipedia-leads"),
        ("length=1000000", "tokens"),
        ("tasks=[picqa]", "piqa"),
    ],
)
def test_bad_input_is_one_line_and_leaves_nothing(
    checkpoints, text, tmp_path, recipe, monkeypatch, capsys, given, message
):
    output = tmp_path / "run"
    monkeypatch.setattr(sys, "argv", arguments(checkpoints / "dense", text, output, given))
    with pytest.raises(SystemExit) as stopped:
        recipe.main()
    assert message in capsys.readouterr().err + str(stopped.value.code)
    assert stopped.value.code != 0
    assert not output.exists()
