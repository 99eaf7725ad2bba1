"""What the results page says of students of the converted model, from records of score_student.py."""

import dataclasses
import json
import re
from pathlib import Path

import figures
import numpy as np
import pytest
import results
import students
import students_section
from pydantic import ValidationError

from spiking_mamba.common.records import read_records
from spiking_mamba.evaluation.outcomes import write_outcomes
from spiking_mamba.evaluation.statistics import kept_share, paired_gap
from spiking_mamba.reports.document import Heading, to_markdown
from tests.helpers.commands import ROOT
from tests.helpers.student_records import CONFIG, MAIN, about_records, record, spiking

RECORDS = ROOT / "docs/results/smollm2"
# of every record that is on the page the file of its items
ITEMS = {r["name"]: r.get("items", f"{r['name']}.npz") for r in read_records(RECORDS / "students.jsonl")}


@pytest.fixture
def about(tmp_path):
    return about_records(tmp_path)


def test_numbers_are_those_of_the_records():
    student = students.Student(spiking("s63", 1.05, 0.62), CONFIG)
    measures = {name: measure(student) for name, measure in students.MEASURES.items()}
    assert measures["six"] == pytest.approx(100 * sum(0.38 + 0.01 * n for n in range(6)) / 6)
    assert measures["kept"] == pytest.approx(93)
    assert measures["tokens"] == 22
    # a multiplication and addition of fp32 takes 4.6 pJ at 45 nm, an addition 0.9
    assert measures["projections"] == pytest.approx(4.6 / 0.9 / 1.05)
    assert (
        1
        < measures["decoding"]
        < measures["whole_model"]
        < measures["with_neurons"]
        < measures["projections"]
    )
    dense = students.Student(record("teacher"), CONFIG)
    assert students.MEASURES["projections"](dense) is None
    assert students.MEASURES["int8"](dense) is None  # it was not scored in 8 bits
    assert students.MEASURES["fp32"](dense) == pytest.approx(measures["whole_model"] * measures["fp32"])
    rounded = students.Student(record("w8a8", weights=8, activations=8), CONFIG)
    assert students.MEASURES["fp32"](rounded) is None
    four = students.Student(record("w4a8", weights=4, activations=8), CONFIG)
    assert students.MEASURES["int8"](four) == students.MEASURES["int8"](rounded)  # priced as of 8 bits
    # at int8 a multiplication and addition takes 0.3 pJ, an addition of 32 bits 0.1: a count of 1 is cheaper
    assert measures["int8"] < students.MEASURES["int8"](rounded)


def test_a_quantiser_whose_counts_are_multiplied_is_priced_as_integers_of_8_bits(tmp_path):
    """It takes what the teacher takes whose inputs were rounded, and fetches its update besides."""
    path = tmp_path / "students.jsonl"
    packed = {"model": "runs/packed"}
    rows = [spiking("levels", 6.5, 0.89) | packed, spiking("s63", 1.05, 0.62), record("a8", activations=8)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    found = students.of_file(path, CONFIG, multiplied=["levels"])
    for name in ("int8", "megabytes_int8", "fp32", "projections", "with_neurons"):
        assert students.measure(found["levels"], name) == students.measure(found["a8"], name), name
    more = [
        students.measure(found["levels"], name) - students.measure(found["a8"], name)
        for name in ("megabytes", "int8_decoding")
    ]
    assert more == pytest.approx([update_by_hand(), 24.96 * update_by_hand()])
    # of the projections' multiplications, 0.3 + 0.1 pJ each, those of zeros are spared
    spared = students.measure(found["levels"], "int8") - students.measure(found["levels"], "int8_skipping")
    assert spared == pytest.approx(0.11 * sum(weights_by_hand()) * 0.3, rel=0.05)
    assert students.measure(found["levels"], "mean_abs") == 6.5
    assert students.measure(found["s63"], "projections") > 1


def test_seeds_are_averaged_and_their_interval_is_student_s(about):
    """t of 2 degrees of freedom at 97.5%: 4.303."""
    rows = [spiking(f"s-{n}", 1.0 + 0.01 * n, 0.6) for n in range(3)]
    for row, share in zip(rows, (0.9, 0.91, 0.95), strict=True):
        row["kept"] = {"share": share, "low": 0, "high": 1}
    Path(about.records).write_text("".join(json.dumps(row) + "\n" for row in rows))
    about.seeds = {"s": ["s-0", "s-1", "s-2"], "lacking": ["s-0", "s-9"]}
    about.labels = {"s-0": "one", "s-1": "", "s-2": "", "s-9": "", "s": "student", "lacking": ""}
    about.findings = ["{s.kept:.2f} from {s.kept.low:.2f} to {s.kept.high:.2f}"]
    groups = {name: each for name, each in about.scored().items() if isinstance(each, students.Seeds)}
    assert list(groups) == ["s"]
    half = 4.30265 * np.std([90, 91, 95], ddof=1) / 3**0.5
    wanted = {
        "kept": 92,
        "kept.low": 92 - half,
        "kept.high": 92 + half,
        "kept.sd": np.std([90, 91, 95], ddof=1),
    }
    wanted |= {"mean_abs.text": 1.01}
    assert {n: students.measure(groups["s"], n) for n in wanted} == pytest.approx(wanted, abs=1e-4)
    assert students.measure(groups["s"], "ability") is None  # of none it is known
    text = to_markdown(students_section.section(about))
    assert f"92.00 from {92 - half:.2f} to {92 + half:.2f}" in text
    assert re.search(r"\| student, 3 +\| 92\.0", text)
    with pytest.raises(ValueError, match="kep"):
        students.measure(groups["s"], "kep.low")


def test_a_teacher_whose_inputs_are_rounded_is_a_rival(tmp_path):
    rows = [record("a8", activations=8), record("teacher", 0.1), spiking("s63", 1.05, 0.62)]
    path = tmp_path / "students.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert students.of_file(path, CONFIG)["s63"].teacher["name"] == "teacher"


def test_the_source_is_no_model_of_the_teacher_s_configuration(tmp_path):
    source = record("transformer", 0.1, ability=1.25, sets=["piqa"])
    del source["model"]
    rows = [source, record("teacher"), spiking("s63", 1.05, 0.62, ability=1.0, sets=["piqa"])]
    rows.append(spiking("others", 1.05, 0.62, ability=1.0, sets=["boolq"]))
    path = tmp_path / "students.jsonl"
    path.write_text("".join(json.dumps(each) + "\n" for each in rows))
    found = students.of_file(path, CONFIG)
    assert students.measure(found["transformer"], "fp32") is None
    assert students.measure(found["transformer"], "of_source") == 100
    assert students.measure(found["s63"], "of_source") == pytest.approx(80)
    assert students.measure(found["others"], "of_source") is None  # its ability is another sum
    assert students.measure(found["s63"], "below_all") == pytest.approx(2)  # points


def test_a_packed_student_s_tokens_are_those_of_its_log(tmp_path):
    packed = spiking("packed", 1.05, 0.62)
    del packed["progress"]
    path, log = tmp_path / "students.jsonl", tmp_path / "log.jsonl"
    path.write_text(json.dumps(packed) + "\n")
    log.write_text('{"tokens": 1000000, "seconds": 2.0}\n{"tokens": 3000000, "seconds": 6.5}\n')
    found = students.of_file(path, CONFIG, {"packed": str(log), "missing": str(log)})["packed"]
    assert [students.measure(found, name) for name in ("tokens", "seconds")] == [3, 6.5]
    without = students.of_file(path, CONFIG, {"packed": str(tmp_path / "none.jsonl")})["packed"]
    assert students.measure(without, "tokens") is None


def test_pages_may_name_a_student(about):
    found = figures.Records({}, ROOT / "docs/results", students.of_file(Path(about.records), CONFIG))
    text = "{student s63 / kept:.1f} of {student s63 / kept.high:.1f}"
    assert found.filled(text) == "93.0 of 95.0"
    assert found.filled_if_recorded("{student s41 / kept:.1f}") == ""
    with pytest.raises(ValueError, match="teacher has no kept"):
        found.filled("{student teacher / kept:.1f}")
    with pytest.raises(ValueError, match="keptt"):
        found.filled("{student s63 / keptt:.1f}")


def test_the_section(about):
    text = to_markdown(students_section.section(about))
    rows = {line.split("|")[1].strip(): line for line in text.splitlines() if line.startswith("| ")}
    assert "2.00 \\[1.50, 2.50\\]" in rows["student, 63%"] or "4.87" in rows["student, 63%"]
    assert [name for name in rows if "int8 †" in name]
    assert not [name for name in rows if "40%" in name]
    assert "Kept 93.0 % at 0.62." in text
    assert "Left out" not in text
    assert "one H200, 2026-12-01; commit aaaaaaa, bbbbbbb" in text
    accuracy = next(line for line in text.splitlines() if line.startswith("| student, 63%"))
    cells = [cell.strip() for cell in re.split(r"(?<!\\)\|", accuracy)[2:-1]]
    assert cells == ["40.50", "2.00 \\[1.50, 2.50\\]", "40.50", "93.0 \\[91.0, 95.0\\]", ""]
    texts = [line for line in text.splitlines() if line.startswith("| student, 63%")][1]
    assert [cell.strip() for cell in texts.split("|")[2:-1]] == ["0.100", "", "", "", "80.0", "40.00"]


def test_without_records_there_is_no_section(about, tmp_path):
    about.records = str(tmp_path / "none.jsonl")
    assert students_section.section(about) == []


def test_a_glance_stands_above_all_else(about):
    """What was not scored is said; what says no number stands as it is."""
    about.glance = [["", "student", "other"], ["kept", "{s63.kept:.1f}", "{s40.kept:.1f}"], ["", "4.78", ""]]
    about.source = "Of a paper."
    heading, table, source, *_ = students_section.section(about)
    assert isinstance(heading, Heading)
    assert (table.header, table.rows) == (about.glance[0], [["kept", "93.0", "not run"], ["", "4.78", ""]])
    assert source.text == "Of a paper."


def test_what_is_no_measure_is_named(about):
    about.findings = ["{s63.keptt:.1f}"]
    with pytest.raises(ValueError, match=r"keptt.*kept"):
        students_section.section(about)
    about.findings = ["{s64.kept:.1f}"]
    with pytest.raises(ValueError, match="s64"):
        students_section.section(about)


def test_the_page_takes_it(about, tmp_path):
    fields = {name: getattr(about, name) for name in ("title", "text", "records", "config", "labels")}
    page = tmp_path / "results.md"
    table = ROOT / "recipes/ablate/tables/dense.yaml"
    settings = results.ResultsSettings(
        tables=[str(table)], page=str(page), results=str(tmp_path), students=fields
    )
    results.write(settings)
    assert "## Students" in page.read_text()
    with pytest.raises((ValidationError, ValueError, TypeError)):
        results.ResultsSettings(tables=[str(table)], students=fields | {"lables": {}})
    assert Path(page).is_file()


def items(name):
    """What was right, by set, of the metric that counts."""
    with np.load(RECORDS / ITEMS[name]) as held:
        return {
            task: np.unpackbits(held[f"{task}/{benchmark.main}"])[: int(held[f"{task}/items"])]
            for task, benchmark in students.BENCHMARK_SETS.items()
            if f"{task}/items" in held
        }


@pytest.mark.parametrize("name", ITEMS)
def test_recorded_scores_are_those_of_their_items(name):
    (found,) = [record for record in read_records(RECORDS / "students.jsonl") if record["name"] == name]
    right, teacher = items(name), items("teacher")
    assert set(right) == set(found["tasks"])
    assert found["limit"] == 0
    for task, outcomes in right.items():
        scores = found["tasks"][task]
        assert scores[students.BENCHMARK_SETS[task].main] == pytest.approx(outcomes.mean(), abs=5.1e-5)
        assert scores["items"] == len(outcomes)
    guess, sets = found["guessing"], found["sets"]
    ability = sum(right[task].mean() - guess[task] for task in sets)
    assert found["ability"] == pytest.approx(ability, abs=5e-4)
    if name == "teacher":
        errors = {task: (right[task].mean() - guess[task]) / found["tasks"][task]["stderr"] for task in right}
        assert sorted(sets) == sorted(task for task, beyond in errors.items() if beyond >= 3)
        return
    kept = kept_share(*({task: side[task] for task in sets} for side in (teacher, right)), guess)
    assert found["kept"] == pytest.approx(kept, abs=2e-3)  # the ends: by another numpy's random numbers
    gap = paired_gap(*({task: side[task] for task in students.SOURCE_TASKS} for side in (teacher, right)))
    assert found["gap"]["gap"] == pytest.approx(100 * gap["gap"], abs=1e-4)
    for end in ("low", "high"):
        assert found["gap"][end] == pytest.approx(100 * gap[end], abs=0.05)


def test_older_records_are_in_the_table_as_they_were():
    found = {record["name"]: record for record in read_records(RECORDS / "students.jsonl")}
    source, packed = read_records(RECORDS / "scores.jsonl")
    for name, old in (("source", source), ("teacher", packed)):
        same = [key for key in old if key in ("tasks", "limit", "mean") or key.endswith(("_web", "_wiki"))]
        assert {key: found[name][key] for key in same} == {key: old[key] for key in same}
        assert found[name]["provenance"]["commit"] == old["commit"]


def test_the_shipped_page_has_the_section_of_its_records(monkeypatch):
    """As results.yaml words it: every number, and nothing that was typed."""
    monkeypatch.chdir(ROOT)
    settings = results.parse_settings(results.ResultsSettings, ["recipes/ablate/results.yaml"])
    blocks = students_section.section(students_section.About(**settings.students))
    text, page, at = to_markdown(blocks), Path("docs/results.md").read_text(), 0
    for block in blocks:  # pictures stand between them
        found = page.find(to_markdown([block]).strip(), at)
        assert found >= at
        at = found + 1
    assert "keep 92.1, 91.5 and 89.6 % of the converted teacher's ability" in " ".join(text.split())


def weights_by_hand():
    """Millions of the mixers' projections and of the MLPs'."""
    config = json.loads(Path(CONFIG, "config.json").read_text())
    width, gated, inner = config["hidden_size"], config["intermediate_size"], 2 * config["hidden_size"]
    projected = 2 * inner + 2 * config["n_groups"] * config["state_size"] + config["num_heads"]
    return 30 * (width * projected + inner * width) / 1e6, 30 * (width * 2 * gated + gated * width) / 1e6


def update_by_hand():
    """MB of the updates of rank 32, in 16 bits."""
    config = json.loads(Path(CONFIG, "config.json").read_text())
    width, gated = config["hidden_size"], config["intermediate_size"]
    return 30 * 2 * 32 * ((width + 2 * gated) + (gated + width)) / 1e6


def test_the_weights_that_a_token_fetches():
    """Four bits and a scale for 32 of the mixers as packed, Q4_1 of the MLPs; what they were rounded to."""
    mixers, mlps = weights_by_hand()
    w8a8 = record("w8a8", weights=8, activations=8)
    w4a8 = record("w4a8", weights=4, activations=8)
    spikes = spiking("s63", 1.05, 0.62) | {"model": "runs/packed"}
    whole = spikes | {"progress": {"settings": {"rank": None}}}
    packed = (mixers + mlps) * 0.31 + mixers / 16 + mlps / 8 + update_by_hand()
    dense = record("dense") | {"model": "state.pt", "progress": {"settings": {"rank": 32}}}
    for entry, megabytes in (
        (record("teacher"), mixers * 18 / 32 + mlps * 20 / 32),
        (dense, mixers * 18 / 32 + mlps * 20 / 32 + update_by_hand()),
        (w8a8, mixers + mlps),
        (w4a8, (mixers + mlps) * 18 / 32),
        (spikes, packed),
        (whole, mixers * (0.31 + 1 / 16) + mlps * 2 * 0.62),
        (spikes | {"weights": 8}, (mixers + mlps) * 0.62),
        (spikes | {"weights": 4}, (mixers + mlps) * (0.31 + 1 / 16)),
    ):
        found = students.measure(students.Student(entry, CONFIG), "megabytes")
        assert found == pytest.approx(megabytes), entry["name"]
    found = {name: students.Student(each, CONFIG) for name, each in (("8", w8a8), ("4", w4a8), ("s", spikes))}
    assert students.measure(found["s"], "megabytes_int8") == pytest.approx((mixers + mlps) * 0.62)
    spared = [
        students.measure(found["8"], "int8_decoding") - students.measure(found[k], "int8_decoding")
        for k in "4s"
    ]
    assert spared[0] == pytest.approx((mixers + mlps) * 14 / 32 * 24.96)  # pJ a byte
    assert spared[1] > (mixers + mlps) * 0.38 * 24.96  # and what the additions spare
    del spikes["model"]
    assert students.measure(students.Student(spikes, CONFIG), "megabytes") is None


def test_differences_are_over_the_same_items(tmp_path):
    """By numpy's own bootstrap, of the ability in per cent of the teacher's, 0.8 here."""
    random = np.random.default_rng(0)
    entry = {"sets": ["piqa", "sciq"], "ability": 0.72, "kept": {"share": 0.9}}
    right = {}
    for name, chance in (("one", 0.6), ("other", 0.4)):
        right[name] = {
            task: {metric: random.random(400) < chance for metric in ("acc", "acc_norm")}
            for task in (*MAIN, "sciq")
        }
        write_outcomes(tmp_path / f"{name}.npz", right[name])
    pair = (students.Student(record(name, **entry), CONFIG) for name in ("one", "other"))
    ability, six, _ = students_section.differences(*pair, tmp_path)
    parts = [right["one"][t]["acc"].astype(int) - right["other"][t]["acc"].astype(int) for t in entry["sets"]]
    draws = [sum(random.choice(part, 400).mean() for part in parts) / 0.008 for _ in range(2000)]
    wanted = (sum(part.mean() for part in parts) / 0.008, *np.quantile(draws, [0.025, 0.975]))
    assert list(map(float, re.findall(r"[-+][\d.]+", ability))) == pytest.approx(wanted, abs=0.6)
    means = [100 * (right["one"][t][m].mean() - right["other"][t][m].mean()) for t, m in MAIN.items()]
    assert float(six.split()[0]) == pytest.approx(np.mean(means), abs=0.051)


def test_what_small_changes_of_weights_did(about, tmp_path):
    base = {
        "model": "weights/x",
        "perplexity": 20.5,
        "kl": 0.0,
        "top1": 1.0,
        "teacher_kl": 0.15,
        "commit": "a" * 40,
    }
    lines = [
        base | {"changed": "nothing"},
        base | {"changed": "int8", "kl": 0.125, "top1": 0.75, "commit": None},
    ]
    about.perturbed, about.perturbed_text = str(tmp_path / "perturbed.jsonl"), "Weights moved."
    assert "Weights moved." not in to_markdown(students_section.section(about))
    (tmp_path / "perturbed.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    text = to_markdown(students_section.section(about))
    rows = [
        [cell.strip() for cell in line.split("|")[1:-1]] for line in text.splitlines() if "weights/x" in line
    ]
    assert rows == [
        ["weights/x", "nothing", "20.50", "", "", "0.150"],
        ["weights/x †", "int8", "20.50", "0.125", "75.0", "0.150"],
    ]
    assert text.index("Weights moved.") < text.index("perturb.yaml") < text.index("weights/x")


@pytest.mark.parametrize("key", ["made", "drawn", "multiplied", "seeds", "pairs"])
def test_a_misspelt_record_is_named(about, key):
    """Silently, a rival would be priced as if it added, or a finding would vanish."""
    given = {
        "made": {"w8a9": ""},
        "drawn": {"w8a9": ""},
        "multiplied": ["w8a9"],
        "seeds": {"teacher": ["w8a9"]},
    }
    given["pairs"] = [["w8a9", "teacher"]]
    with pytest.raises(ValueError, match="w8a9"):
        dataclasses.replace(about, **{key: given[key]})


def test_an_item_of_seeds_counts_as_the_share_of_them(tmp_path):
    scored = {"sets": ["piqa"], "ability": 0.5, "kept": {"share": 0.9}}
    right = {"one": [1, 1, 0, 0], "two": [1, 0, 0, 0]}
    for name, each in right.items():
        write_outcomes(
            tmp_path / f"{name}.npz", {"piqa": dict.fromkeys(("acc", "acc_norm"), np.array(each) > 0)}
        )
    group = students.Seeds("both", [students.Student(record(name, **scored), CONFIG) for name in right])
    assert students_section.items_of(group, tmp_path) == {"piqa": [1, 0.5, 0, 0]}
    assert students_section.items_of(group.students[0], tmp_path) == {"piqa": [1, 1, 0, 0]}


def test_no_record_has_a_path_of_a_machine():
    for path in RECORDS.glob("*.json*"):
        assert not re.search(r'"/|\s/[a-z]+/|=/', path.read_text()), path.name


def test_levels_cost_their_additions():
    """An input more and an output more of every projection, at 0.1 pJ an addition of int8."""
    plain, shifted = (
        students.Student(spiking("s63", 1.05, 0.62, **fields), CONFIG)
        for fields in ({}, {"shift_inputs": True})
    )
    config = json.loads(Path(CONFIG, "config.json").read_text())
    width, gated, inner = config["hidden_size"], config["intermediate_size"], 2 * config["hidden_size"]
    projected = 2 * inner + 2 * config["n_groups"] * config["state_size"] + config["num_heads"]
    numbers = 30 * ((width + projected) + (inner + width) + (width + 2 * gated) + (gated + width))
    more = students.measure(shifted, "int8") - students.measure(plain, "int8")
    assert more == pytest.approx(numbers * 0.1 / 1e6, rel=1e-3)
