"""The student beside the quickstart's teacher is what its card says."""

import json
import re
from pathlib import Path

import datasets
import documents
import numpy as np
import pytest
import torch
from huggingface_hub import ModelCard
from huggingface_hub.utils import validate_repo_id
from transformers import AutoModelForCausalLM

from spiking_mamba import spike_driven
from spiking_mamba.common.files import file_sha256
from spiking_mamba.common.records import read_records
from spiking_mamba.evaluation.measuring import weights_sha256
from spiking_mamba.evaluation.scoring import perplexity
from spiking_mamba.model.checkpoint import load_dense, load_model
from spiking_mamba.model.tokenizer import load_tokenizer
from spiking_mamba.spikes.counting import count_spikes
from spiking_mamba.spikes.energy import projection_energy

ROOT = Path(__file__).parents[2]
STUDENT, TEACHER = (ROOT / "recipes/quickstart" / name for name in ("student", "teacher"))
CARD = (STUDENT / "README.md").read_text()


@pytest.fixture(scope="module")
def text():
    """``[2, 256]`` tokens of a page of this project, which nobody was trained on."""
    ids = load_tokenizer(STUDENT)((ROOT / "docs/energy.md").read_text())["input_ids"]
    return torch.tensor(ids[:512]).view(2, 256)


def test_both_fit_32_megabytes_and_share_a_tokenizer():
    assert sum(path.stat().st_size for folder in (STUDENT, TEACHER) for path in folder.iterdir()) <= 32e6
    assert (STUDENT / "tokenizer.json").read_bytes() == (TEACHER / "tokenizer.json").read_bytes()


def test_its_spikes_and_its_distance_from_the_teacher(text):
    student, teacher = load_model(STUDENT).eval(), load_dense(TEACHER).eval()
    rows = datasets.Dataset.from_dict({"input_ids": text.tolist()})
    with count_spikes(student) as spikes:
        mine = perplexity(student, rows, progress=False)["perplexity"]
    assert projection_energy(spikes)["fp32"] == pytest.approx(4.76, rel=0.1)  # on another text
    assert mine == pytest.approx(perplexity(teacher, rows, progress=False)["perplexity"], rel=0.15)


def test_fed_ternary_micro_steps_it_says_the_same(text):
    student = AutoModelForCausalLM.from_pretrained(STUDENT).eval()
    assert student.dtype == torch.float32  # in bfloat16 other sums, and other spikes
    with torch.no_grad():
        torch.testing.assert_close(
            spike_driven(student)(text[:1, :64]).logits, student(text[:1, :64]).logits, rtol=1e-3, atol=1e-3
        )


def test_the_card_has_the_numbers_of_its_run():
    runs = read_records(ROOT / "docs/results/frontier.jsonl")
    (run,) = [run for run in runs if (run["row"], run["seed"]) == ("4.76x, D=64, 75M tokens", 0)]
    assert f"{run['checks']['bf16']['perplexity']:.2f}" in CARD
    assert f"{run['after']['gain']['fp32']:.2f}x" in CARD
    assert run["depends"]["teacher"]["model.safetensors"] == file_sha256(TEACHER / "model.safetensors")


def test_the_cards_head_is_of_its_records():
    records = {record["text"]: record for record in read_records(ROOT / "docs/results/documents.jsonl")}
    assert {r["depends"]["student"] for r in records.values()} == {file_sha256(STUDENT / "model.safetensors")}
    record = records["runs/corpus/held_out.jsonl"]
    tokens, _, nats = np.asarray(record["documents"]).T
    mean = nats.sum() / tokens.sum()
    error = np.sqrt(((nats - mean * tokens) ** 2).sum()) / tokens.sum()  # of a ratio of sums, to first order
    (found,) = ModelCard(CARD).data.eval_results
    assert found.metric_value == pytest.approx(np.exp(mean), abs=1e-4)
    ends = re.match(r"perplexity, 95% interval ([\d.]+) to ([\d.]+), over 232 documents,", found.metric_name)
    for end, sign in zip(ends.groups(), (-1, 1), strict=True):
        assert np.log(float(end)) == pytest.approx(mean + sign * 1.96 * error, abs=0.1 * error)
    assert f"| perplexity | 17.10 | {found.metric_value:.2f} |" in CARD
    assert ModelCard(CARD).data.to_dict() == documents.head("student", [record]).to_dict()


@pytest.mark.parametrize("folder", [STUDENT, TEACHER])
def test_scores_are_of_the_weights_that_are_shipped_and_of_whole_sets(folder):
    (model,) = json.loads((ROOT / f"docs/results/{folder.name}/tasks.json").read_text())["models"]
    assert model["weights_sha256"] == weights_sha256(folder)
    tasks = model["tasks"]
    assert {name: task["n"] for name, task in tasks.items()} == {
        "hellaswag": 10042, "piqa": 1838, "arc_easy": 2376, "arc_challenge": 1172, "boolq": 3270,
        "winogrande": 1267, "lambada_openai": 5153, "sciq": 1000, "openbookqa": 500, "copa": 100,
    }  # fmt: skip
    for task in tasks.values():
        for metric, items in task["items"].items():
            if metric in ("acc", "acc_norm"):
                assert np.mean(items) == pytest.approx(task["metrics"][metric]["value"])
                assert len(items) == task["n"]


def test_what_the_card_says_of_differences_item_by_item():
    student, teacher = (
        json.loads((ROOT / f"docs/results/{name}/tasks.json").read_text())["models"][0]["tasks"]
        for name in ("student", "teacher")
    )

    def lost(task, metric):
        pair = (np.array(tasks[task]["items"][metric], dtype=float) for tasks in (teacher, student))
        each = np.subtract(*pair)
        return each.mean(), each.std(ddof=1) / np.sqrt(len(each))

    points, error = lost("boolq", "acc")
    nats, of_nats = lost("lambada_openai", "loglikelihood")
    words = re.sub(r"\s+", " ", CARD)
    assert f"loses {100 * points:.1f} ± {100 * error:.1f} points on BoolQ" in words
    assert f"{nats:.3f} ± {of_nats:.3f} nats a last word" in words
    both = (tasks["lambada_openai"]["metrics"]["perplexity"]["value"] for tasks in (student, teacher))
    assert "perplexity {:.0f}, the teacher's {:.0f}".format(*both) in words
    for task in student.keys() - {"boolq"}:
        mean, error = lost(task, student[task]["main"])
        assert abs(mean) < 2 * error


@pytest.mark.parametrize("folder", [STUDENT, TEACHER, *sorted((ROOT / "weights").iterdir())])
def test_the_hub_could_read_the_head_of_every_card(folder):
    card = ModelCard.load(folder / "README.md")  # raises for a head that is not right
    assert (card.data.license, card.data.language, card.data.model_name) == ("apache-2.0", "en", folder.name)
    if card.data.base_model is not None:
        validate_repo_id(card.data.base_model)
    results = card.data.eval_results
    assert sorted({each.metric_type for each in results}) == card.data.metrics
    assert len({each.unique_identifier for each in results}) == len(results)
    for each in results:
        assert re.search(r"\d (items|tokens|rows)\b", each.metric_name)
        if each.metric_type != "perplexity":
            low, high = map(float, re.search(r"interval ([\d.]+) to ([\d.]+)", each.metric_name).groups())
            assert low < each.metric_value < high
    assert card.text.startswith("# ")


def test_the_cards_code_runs(monkeypatch):
    monkeypatch.chdir(ROOT)
    (code,) = re.findall(r"```python\n(.*?)```", CARD, flags=re.DOTALL)
    exec(compile(code, "README.md", "exec"), {"__name__": "card"})
