"""The zero-shot sets: what the package holds is what the stock tasks ask."""

import dataclasses
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from spiking_mamba.common.errors import DataError
from spiking_mamba.data import benchmarks
from spiking_mamba.data.benchmarks import BENCHMARK_SETS, digest
from spiking_mamba.evaluation.tasks import describe, zero_shot_tasks

# split that the stock task evaluates and its rows, as the hub's dataset cards publish them
HUB = {
    "hellaswag": ("validation", 10042),
    "piqa": ("validation", 1838),
    "arc_easy": ("test", 2376),
    "arc_challenge": ("test", 1172),
    "boolq": ("validation", 3270),
    "winogrande": ("validation", 1267),
    "lambada_openai": ("test", 5153),
    "sciq": ("test", 1000),
    "openbookqa": ("test", 500),
    "copa": ("validation", 100),
}


@pytest.mark.parametrize("name", HUB)
def test_items_are_the_stock_ones(name):
    benchmark = BENCHMARK_SETS[name]
    items = benchmarks.load_items(name)[benchmark.split]
    assert benchmark.hub == HUB[name]
    assert len(items) == HUB[name][1]
    assert benchmark.split == ("validation" if name == "sciq" else HUB[name][0])
    assert bool(benchmark.note) == (name in ("sciq", "lambada_openai"))
    if name.startswith("arc") or name == "openbookqa":
        choices = [item["text"] for item in items["choices"]]
        assert sum(1 / len(c) for c in choices) / len(choices) == pytest.approx(benchmark.chance, abs=1e-4)
        assert all(item["answerKey"] in item["choices"]["label"] for item in items)
    if name == "boolq":
        assert all(" -- " in passage for passage in items["passage"])
        assert sum(items["label"]) == 2033


def test_the_recipe_shows_the_same_table():
    readme = (Path(__file__).parents[3] / "recipes/evaluate/README.md").read_text()
    rows = re.findall(r"^\| (\w+) \| (\w+) \| (\d+) \| (\w+) \| (\d+) \| `(\w+)` \|", readme, re.MULTILINE)
    assert {row[0]: row[1:] for row in rows} == {
        name: (b.split, str(b.rows), b.hub[0], str(b.hub[1]), b.sha256[:12])
        for name, b in BENCHMARK_SETS.items()
    }


@pytest.mark.parametrize("change", [{"rows": 99}, {"sha256": "0" * 64}])
def test_other_items_are_refused(change, monkeypatch):
    copa = BENCHMARK_SETS["copa"]
    monkeypatch.setitem(BENCHMARK_SETS, "copa", dataclasses.replace(copa, **change))
    with pytest.raises(DataError) as error:
        zero_shot_tasks("copa")
    assert f"100 rows with sha256 {copa.sha256}" in str(error.value)
    assert f"{change.get('rows', 100)} rows with sha256 {change.get('sha256', copa.sha256)}" in str(
        error.value
    )


def test_digest():
    # printf '{"a":"é","b":[1]}\n"x"\n' | sha256sum
    assert digest([{"b": [1], "a": "é"}, "x"]) == (
        "3ac14f19cb273d751839051e33f20cf7e2d2245a1b6eb3cba8c0353027592cd5"
    )
    assert digest(["x", {"b": [1], "a": "é"}]) != digest([{"b": [1], "a": "é"}, "x"])


def test_prompts():
    """As lm-eval publishes them."""
    tasks = zero_shot_tasks(["arc_easy", "openbookqa", "boolq", "winogrande", "lambada_openai"])
    prompts = {name: task.doc_to_text(task.eval_docs[0]) for name, task in tasks.items()}
    assert prompts["arc_easy"] == (
        "Question: Which statement best explains why photosynthesis is the foundation of most food webs?"
        "\nAnswer:"
    )
    assert prompts["openbookqa"].startswith("A person wants to start saving money so that they can afford")
    assert prompts["boolq"].startswith("Ethanol fuel -- All biomass goes through")
    assert prompts["boolq"].endswith("\nQuestion: does ethanol take more energy make that produces?\nAnswer:")
    winogrande = tasks["winogrande"]
    assert winogrande.doc_to_choice(winogrande.eval_docs[0])[1].endswith("than Maria so Maria")
    passage = tasks["lambada_openai"]
    assert prompts["lambada_openai"].endswith("a confident grin, I don't care about")
    assert passage.doc_to_target(passage.eval_docs[0]) == " signs"


def test_describe():
    [task] = zero_shot_tasks("sciq").values()
    found = describe(task, "packages")
    assert found["source"] == "packages"
    assert (found["split"], found["rows"]) == ("validation", 1000)
    assert "validation" in found["note"]
    # what is computed of a data set from the hub is what was pinned for the same rows
    assert describe(task, "hub") | {"source": "packages", "note": found["note"]} == found


def test_names():
    assert list(zero_shot_tasks(["piqa", "copa", "piqa"])) == ["piqa", "copa"]
    with pytest.raises(DataError, match="Did you mean hellaswag"):
        zero_shot_tasks(["helaswag"])
    with pytest.raises(DataError, match="'packages' or 'hub'"):
        zero_shot_tasks(["piqa"], data="web")
    with pytest.raises(DataError, match="No task was named"):
        zero_shot_tasks([])


def test_an_unreachable_hub_is_a_clear_error(tmp_path):
    code = (
        "import sys\nfrom spiking_mamba.evaluation import zero_shot_tasks\n"
        "from spiking_mamba.data.packages import DataError\n"
        "try:\n    zero_shot_tasks(['copa'], data='hub')\n"
        "except DataError as error:\n    print(error)\n"
    )
    offline = {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "HF_HOME": str(tmp_path)}

    done = subprocess.run(
        [sys.executable, "-c", code], env={**os.environ, **offline}, capture_output=True, text=True
    )
    assert "Could not load copa from the hub" in done.stdout, done.stderr
    assert "data: packages" in done.stdout
