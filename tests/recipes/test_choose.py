"""Choosing among runs by one half of the questions, from runs written by hand."""

import json

import pytest

from spiking_mamba.common.records import read_records
from spiking_mamba.data.preferences import half_of, read_preferences
from spiking_mamba.data.tokens import train_tokenizer
from spiking_mamba.model.tokenizer import load_tokenizer
from tests.helpers.commands import ROOT, run

pytest.importorskip("trl")

RECIPE = ROOT / "recipes/rl/choose.py"
ROWS = [
    {"prompt": f"cats met {n // 2} owls", "chosen": " and ran", "rejected": f" and sat {n}", "item": n // 2}
    for n in range(40)
]
HALVES = [half_of(row) for row in ROWS[::2]]  # of the twenty questions


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("choose")
    (folder / "held_out.jsonl").write_text("\n".join(map(json.dumps, ROWS)))
    train_tokenizer([f"cats met {n} owls and ran and sat" for n in range(300)], 300).save_pretrained(
        folder / "model"
    )
    return folder


def write(folder, name, tune, report, ratio=1.01, **changes):
    """A run in which the first ``tune`` questions of one half and ``report`` of the other are learnt."""
    order = questions(folder)
    left, after = {"tune": tune, "report": report}, []
    for question in order:
        half = HALVES[question]
        left[half] -= 1
        after.append(1.0 if left[half] >= 0 else 0.5)
    settings = {
        "model": str(folder / "model"), "output": name, "method": "dpo", "held_out_items": None,
        "held_out": str(folder / "held_out.jsonl"), "training": {"max_steps": 3, "learning_rate": 2e-4},
    }  # fmt: skip

    def side(scores, perplexity):
        return {
            "scores": {kind: {"all": scores} for kind in ("sum", "per_token")},
            "perplexity": perplexity, "mean_abs": 0.5,
        }  # fmt: skip

    results = {
        "before": side([0.5] * 20, 10.0), "after": side(after, 10.0 * ratio),
        "change": {"perplexity_ratio": ratio}, "rows": {"kept": 1}, "held_out": {"kept": 40},
        "seconds": {"all": 1.0},
        "provenance": {"commit": "abc", "settings": settings | changes},
    }  # fmt: skip
    (folder / name).mkdir()
    (folder / name / "results.json").write_text(json.dumps(results))
    return folder / name


def questions(folder):
    """The questions in the order of a run's scores."""
    found, _ = read_preferences(
        str(folder / "held_out.jsonl"), "validation", load_tokenizer(folder / "model"), 128
    )
    return list(dict.fromkeys(p.item for p in found))


def test_one_half_chooses_and_the_other_reports(folder):
    made = [
        write(folder, "slow", tune=2, report=4),
        write(folder, "good", tune=4, report=1),
        write(folder, "dear", tune=7, report=5, ratio=1.051),
    ]
    runs = ", ".join(map(str, made))
    done = run(RECIPE, ROOT / "recipes/rl/choose.yaml", f"runs=[{runs}]", f"results={folder / 'c.jsonl'}")
    assert done.returncode == 0, done.stderr
    records = {record["run"]: record for record in read_records(folder / "c.jsonl")}
    sizes = {half: HALVES.count(half) for half in ("tune", "report")}
    assert sum(sizes.values()) == 20
    assert min(sizes.values()) >= 5
    for name, tune, report, chosen in (("slow", 2, 4, False), ("good", 4, 1, True), ("dear", 7, 5, False)):
        for half, learnt in (("tune", tune), ("report", report)):
            for kind in ("sum", "per_token"):
                found = records[name][half][kind]
                assert found["gain"] == pytest.approx(0.5 * learnt / sizes[half])
                assert found["items"] == sizes[half]
                assert found["low"] <= found["gain"] <= found["high"]
        assert records[name]["chosen"] is chosen
    lines = [line for line in done.stdout.splitlines() if line.startswith("| DPO, 3 steps, lr 0.0002")]
    assert [line.rstrip(" |").endswith("%") for line in lines] == [True, False, True]


@pytest.mark.parametrize("changes", [{"held_out_half": "tune"}, {"held_out_items": 9}])
def test_a_run_that_did_not_see_all_questions(folder, changes):
    made = write(folder, f"part-{next(iter(changes))}", 1, 1, **changes)
    done = run(RECIPE, ROOT / "recipes/rl/choose.yaml", f"runs=[{made}]", f"results={folder / 'none.jsonl'}")
    assert done.returncode == 1
    assert "must be run with held_out_half=null held_out_items=null" in done.stderr
    assert not (folder / "none.jsonl").exists()


def test_what_is_no_run(folder):
    done = run(RECIPE, ROOT / "recipes/rl/choose.yaml", f"runs=[{folder}]")
    assert done.returncode == 1
    assert "choose among finished runs" in done.stderr
