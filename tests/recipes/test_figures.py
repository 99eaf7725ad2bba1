"""No number is typed: pages written by hand say what the records say."""

import json
from pathlib import Path

import figures
import pytest

from tests.helpers.commands import run

ROOT = Path(__file__).parents[2]
KNOWN = {"gain": 4.3081, "tokens": 75.5, "over": 4.1464}
ABOUT = figures.Page(
    figures=["gains {gain:.2f}x after {tokens:.0f}M", "stands {over:+.1f} %"],
    others=[{"text": r"D = \d+", "source": "a setting"}],
)
PAGE = "It gains 4.31x\nafter 76M tokens at D = 64,\nand stands +4.1 % `x = 3` [there](page.md#4)\n"


def value(name, form):
    return f"{KNOWN[name]:{form}}"


def test_the_pages_are_those_of_the_records():
    done = run(ROOT / "recipes/ablate/figures.py", ROOT / "recipes/ablate/figures.yaml")
    assert done.returncode == 0, done.stderr


def test_a_page_that_says_what_is_recorded():
    assert figures.examine(PAGE, ABOUT, value) == (PAGE, [])


@pytest.mark.parametrize(
    ("old", "new", "said"),
    [
        ("4.31x", "4.77x", "4.77 should be 4.31"),
        ("+4.1 %", "+2.8 %", "+2.8 should be +4.1"),
        ("tokens", "tokens, 9.8x at best,", "9.8 comes from nowhere"),
        ("tokens", "tokens (714 ms)", "714 comes from nowhere"),
        ("D = 64", "D", "is not in the page: 'D ="),
    ],
)
def test_a_typed_number(old, new, said):
    page = PAGE.replace(old, new)
    renewed, (wrong,) = figures.examine(page, ABOUT, value)
    assert said in wrong
    if "should be" in said:
        assert renewed == PAGE


@pytest.mark.parametrize("page", [PAGE.replace("gains", "wins"), PAGE + PAGE])
def test_a_sentence_that_is_gone_or_there_twice(page):
    with pytest.raises(ValueError, match="times in the page, not once"):
        figures.examine(page, ABOUT, value)


def test_a_source_is_needed():
    with pytest.raises(ValueError, match="source"):
        figures.Page(others=[{"text": r"D = \d+", "source": ""}])


def test_what_was_printed_stands_word_for_word():
    page = PAGE + "A step takes 402 ms.\n"
    about = figures.Page(
        figures=ABOUT.figures,
        others=ABOUT.others,
        printed=[{"source": "a run", "lines": ["A step takes 402 ms."]}],
    )
    assert figures.examine(page, about, value) == (page, [])
    _, wrong = figures.examine(page.replace("402", "204"), about, value)
    assert len(wrong) == 2
    assert any("204 comes from nowhere" in each for each in wrong)


def test_recorded_speeds_are_held_cell_by_cell():
    table = "\n| work | ms |\n| --- | ---: |\n| node | **0.27** |\n"
    speeds = {"Neurons#1": {"header": ["work", "ms"], "rows": [["node", "0.27"]]}}
    assert figures.examine(PAGE + table, ABOUT, value, speeds) == (PAGE + table, [])
    _, (wrong,) = figures.examine(PAGE + table.replace("0.27", "0.17"), ABOUT, value, speeds)
    assert "0.17 comes from nowhere" in wrong


def test_blocks_of_text_are_read_and_code_is_not():
    page = PAGE + "```text\nratio 9.9\n```\n```python\nx = 8.8\n```\n\n    indented 7.7\n\nand 6.6 more\n"
    _, wrong = figures.examine(page, ABOUT, value)
    assert [each.split()[0] for each in wrong] == ["9.9", "6.6"]


@pytest.fixture
def records(tmp_path):
    """Of the shipped student on a text, and of a table of speeds."""
    document = {
        "student": str(ROOT / "recipes/quickstart/student"),
        "text": "runs/corpus/held_out.jsonl",
        "length": 512,
        "documents": [[100, 300.0, 304.0], [100, 300.0, 304.0]],
        "tokens": 200,
        "kl": 0.125,
        "top1": 0.75,
        "spikes": {"mean_abs": 1.0, "nonzero_share": 0.6, "signed_digits": 0.7},
    }
    speed = {
        "table": "Neurons#1",
        "header": ["work", "ours", "time / theirs"],
        "rows": [["T=1", "0.5", "1.5"]],
    }
    tasks = {
        "hellaswag": {"n": 250, "chance": 0.25, "metrics": {"acc_norm": {"value": 0.376, "stderr": 0.03}}}
    }
    (tmp_path / "documents.jsonl").write_text(json.dumps(document) + "\n")
    (tmp_path / "speeds.jsonl").write_text(json.dumps(speed) + "\n")
    (tmp_path / "teacher").mkdir()
    (tmp_path / "teacher/tasks.json").write_text(json.dumps({"models": [{"tasks": tasks}]}))
    rows = [
        {"site": None, "value": None, "fraction": 0.0, "perplexity": {"sotu": {"perplexity": 20.0}}},
        {"site": "out_proj", "value": 1.0, "fraction": 0.001, "perplexity": {"sotu": {"perplexity": 50.0}}},
    ]
    (tmp_path / "teacher/outliers-all.json").write_text(json.dumps({"rows": rows}))
    return figures.Records({}, tmp_path)


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("{held_out_512.over:+.2f} % over {held_out_512.documents:.0f}", "+4.08 % over 2"),  # exp(0.04)
        ("{held_out_512.low:+.2f} to {held_out_512.high:+.2f}", "+4.08 to +4.08"),
        ("{held_out_512.kl:.3f} nats, {held_out_512.top1:.1f} %", "0.125 nats, 75.0 %"),
        ("{held_out_512.projections:.2f}x, {held_out_512.shift_and_add:.2f}", "5.11x, 0.70"),
        ("{speed Neurons#1 / T=1 / ours:.1f} ms", "0.5 ms"),
        ("{speed Neurons#1 / T=1 / time / theirs:.1f}", "1.5"),
        ("{ratio Neurons#1 / T=1 / time / theirs over T=1 / ours:.1f}", "3.0"),
        (
            "{task teacher / hellaswag / acc_norm:.3f} of {task teacher / hellaswag / items:.0f}",
            "0.376 of 250",
        ),
        ("{task teacher / hellaswag / acc_norm error:.3f}", "0.030"),
        ("{task teacher / hellaswag / chance:.2f}", "0.25"),
        ("{outliers all / out_proj / 1 / 0.001 / sotu:.1f} times", "2.5 times"),
        ("{cost 32 int8 mac:.1f} and {cost 8 int8 ac:.2f}, {cost 32 fp32 gain:.2f}", "0.3 and 0.03, 5.11"),
    ],
)
def test_what_records_say(records, text, told):
    assert records.filled(text) == told


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("{held_out_512.better:.2f}", "is none of teacher, student"),
        ("{elsewhere_256.over:.2f}", "documents.jsonl has held_out_512"),
        ("{speed Neurons#2 / T=1 / ours:.2f}", "no table of speeds 'Neurons#2': Neurons#1"),
        ("{speed Neurons#1 / T=2 / ours:.2f}", "has no 'T=2'"),
        ("{gain[frontier::none]:.2f}", "no row 'frontier::none'"),
        ("{task student / hellaswag / acc:.2f}", "no 'hellaswag' of 'student': teacher"),
        ("{outliers all / in_proj / 1 / 0.001 / sotu:.1f}", "No such row of outliers 'all' on 'sotu': all"),
        ("{outliers none / out_proj / 1 / 0.001 / sotu:.1f}", "No such row of outliers 'none'"),
        ("{held_out_512.over}", "must have a form"),
    ],
)
def test_what_no_record_says(records, text, said):
    with pytest.raises(ValueError, match=said):
        records.filled(text)
    assert records.filled_if_recorded("{elsewhere_256.over:.2f}") == ""
