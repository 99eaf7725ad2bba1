"""Choosing among runs by one half of the questions, from runs written by hand."""

import json
import shutil

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
        "held_out": str(folder / "held_out.jsonl"), "training": rate(2e-4), "seed": 0,
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
        write(folder, "slow", tune=2, report=4, training=rate(1e-4)),
        write(folder, "good", tune=4, report=1, training=rate(2e-4)),
        write(folder, "dear", tune=7, report=5, training=rate(4e-4), ratio=1.051),
    ]
    done = choose(made, folder / "c.jsonl")
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
    lines = [line for line in done.stdout.splitlines() if " DPO, 3 steps, lr 0.000" in line]
    assert [line.rstrip(" |").endswith("%") for line in lines] == [True, False, True]


def test_seeds_are_one_candidate_and_models_are_chosen_for_apart(folder):
    other = folder / "other"
    shutil.copytree(folder / "model", other)
    made = [
        # the best single run, of the worse settings
        *(write(folder, f"a{n}", t, 5, training=rate(1e-4), seed=n) for n, t in enumerate((5, 1, 1))),
        *(write(folder, f"b{n}", t, r, training=rate(2e-4), seed=n) for n, t, r in ((0, 3, 1), (1, 3, 4))),
        # one seed of these costs too little to be refused, both together do not
        *(write(folder, f"c{n}", 5, 5, x, training=rate(4e-4), seed=n) for n, x in enumerate((1.02, 1.2))),
        write(folder, "o", 1, 2, training=rate(1e-4), model=str(other)),
    ]
    done = choose(made, folder / "seeds.jsonl")
    assert done.returncode == 0, done.stderr
    records = {record["run"]: record for record in read_records(folder / "seeds.jsonl")}
    assert {name for name, record in records.items() if record["chosen"]} == {"b0", "b1", "o"}
    lines = {line.split("|")[2].strip()[-6:]: line for line in done.stdout.splitlines() if "DPO" in line}
    gains = [0.5 * n / HALVES.count("report") for n in (1, 4)]
    half = 12.706 * abs(gains[1] - gains[0]) / 2  # t of one degree of freedom; sd / sqrt(2) of two values
    mean = sum(gains) / 2
    assert f"{mean:+.3f} ({mean - half:+.3f} to {mean + half:+.3f}), +-" in lines["0.0002"]
    assert [cell.strip() for cell in lines["0.0004"].split("|")[-3:-1]] == ["", ""]
    assert "+10.6%" in lines["0.0004"]  # the root of 1.02 x 1.2

    shutil.rmtree(folder / "b0")  # as recorded, it still counts
    again = choose(made, folder / "seeds.jsonl")
    assert again.returncode == 0, again.stderr
    assert again.stdout == done.stdout
    assert {r["run"]: r for r in read_records(folder / "seeds.jsonl")} == records


def test_one_run_is_not_two_seeds(folder):
    made = [write(folder, name, 2, 2, training=rate(3e-4)) for name in ("one", "two")]
    done = choose(made, folder / "none.jsonl")
    assert done.returncode == 1
    assert "one, two: two have the same settings and seed" in done.stderr
    assert not (folder / "none.jsonl").exists()


def rate(learning_rate):
    return {"max_steps": 3, "learning_rate": learning_rate}


def choose(runs, results):
    listed = ", ".join(map(str, runs))
    return run(RECIPE, ROOT / "recipes/rl/choose.yaml", f"runs=[{listed}]", f"results={results}")


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
