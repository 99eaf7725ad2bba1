"""A teacher's own text: in its words, the same again after an interruption, and bad settings refused."""

import json

import pytest

from spiking_mamba.model.tokenizer import load_tokenizer
from tests.helpers.commands import ROOT, run

RECIPE, TEACHER = ROOT / "recipes/distill", ROOT / "recipes/quickstart/teacher"


@pytest.fixture
def arguments(tmp_path):
    text = tmp_path / "text.txt"
    text.write_text(
        "\n\n".join(f"The river of year {i} came to the sea beside the old town." for i in range(60))
    )
    own = [f"data={text}", "tokens=200", "passage=8", "length=24", "batch_size=4"]
    return [RECIPE / "own_text.py", RECIPE / "own_text.yaml", *own, f"output={tmp_path / 'own.jsonl'}"]


def texts(path):
    return [json.loads(line)["text"] for line in path.read_text().splitlines()]


def test_passages_go_on_and_an_interruption_changes_nothing(arguments, tmp_path):
    done = run(*arguments)
    assert done.returncode == 0, done.stderr
    whole, given = tmp_path / "own.jsonl", (tmp_path / "text.txt").read_text()
    found, tokenizer = texts(whole), load_tokenizer(TEACHER)
    # 200 tokens are 3 parts of 4 rows, and a row is one document or, where one ended within, several
    assert len(found) >= 12
    assert sum(len(tokenizer(text)["input_ids"]) for text in found) <= 3 * 4 * 24
    assert not any("<|endoftext|>" in text for text in found)
    begun = [text for text in found if text[:12] in given]
    assert len(begun) >= 6  # others begin with a passage's last words
    assert not any(text in given for text in begun if len(tokenizer(text)["input_ids"]) > 16)
    assert [path.name for path in tmp_path.iterdir() if "parts" in path.name] == []

    parts = tmp_path / "again.jsonl.parts"
    again = [*arguments[:-1], f"output={tmp_path / 'again.jsonl'}"]
    assert run(*again, "tokens=100").returncode == 0  # one part and a half, so two of them
    lines = (tmp_path / "again.jsonl").read_text().splitlines(keepends=True)
    assert whole.read_text().startswith("".join(lines))

    # Ctrl-C after its first part: what is there is kept, the rest comes out alike
    (tmp_path / "again.jsonl").unlink()
    stopped = run("-c", INTERRUPTED, *arguments[1:-1], f"output={tmp_path / 'again.jsonl'}")
    assert stopped.returncode == 130
    assert stopped.stderr == f"interrupted: {parts} keeps 1 of 3 parts; the same command goes on.\n"
    assert sorted(path.name for path in parts.iterdir()) == ["000000.jsonl", "settings.json"]
    assert "begun with other settings" in run(*again, "seed=1").stderr
    assert run(*again).returncode == 0
    assert (tmp_path / "again.jsonl").read_bytes() == whole.read_bytes()
    assert not parts.exists()

    other = run(*arguments)
    assert other.returncode != 0
    assert "there already" in other.stderr


INTERRUPTED = f"""
import os, runpy, signal, sys
signal.signal(signal.SIGINT, signal.default_int_handler)  # what a shell puts in the background ignores it
sys.argv[0] = {str(RECIPE / "own_text.py")!r}
made = runpy.run_path(sys.argv[0])
write_part = made["write_part"]
def once(settings, part, *others):
    return write_part(settings, part, *others) if part < 1 else os.kill(os.getpid(), signal.SIGINT)
made["write"].__globals__["write_part"] = once
made["main"]()
"""


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ("passage=24", "must lie between"),
        ("tokens=0", "at least 1"),
        ("temperature=0", "must be a number above 0"),
        ("temperature=.inf", "must be a number above 0"),
        ("teacher=runs/no/such", "no checkpoint folder"),
        ("data=nosuch.txt", "nosuch.txt"),
        ("output=own.txt", ".jsonl file"),
        ("tokns=3", "did you mean 'tokens'"),
    ],
)
def test_bad_settings(arguments, wrong, said, tmp_path):
    done = run(*arguments, wrong)
    assert done.returncode != 0
    assert said in done.stderr
    assert "Traceback" not in done.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["text.txt"]


def test_parts_of_somebody_else_stay(arguments, tmp_path):
    parts = tmp_path / "own.jsonl.parts"
    parts.mkdir()
    (parts / "precious").touch()
    done = run(*arguments)
    assert "was not written by this recipe" in done.stderr
    assert [path.name for path in parts.iterdir()] == ["precious"]
