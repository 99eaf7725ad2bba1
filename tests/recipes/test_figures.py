"""No number is typed: pages written by hand say what the records say."""

import subprocess
import sys
from pathlib import Path

import figures
import pytest

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
    command = [sys.executable, ROOT / "recipes/ablate/figures.py", ROOT / "recipes/ablate/figures.yaml"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=240)
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
    page = PAGE + "```text\nratio 9.9\n```\n```python\nx = 8.8\n```\n\n    indented 7.7\n"
    _, (wrong,) = figures.examine(page, ABOUT, value)
    assert "9.9 comes from nowhere" in wrong
