"""Preferences of a file whose texts an evaluation reads are left out."""

import json

import datasets
import pytest

from spiking_mamba.common.errors import DataError
from spiking_mamba.data import preference_rows
from spiking_mamba.data.contamination import EvaluatedWords
from spiking_mamba.data.preferences import load_preferences, read_preferences
from spiking_mamba.data.tokens import train_tokenizer
from spiking_mamba.training.preference import PreferenceSettings

ASKED = "one two three four five six seven eight nine ten eleven twelve thirteen fourteen"
HELD_OUT = "every good boy deserves fudge and so do all of the girls of this town"
HEAD, _, TAIL = ASKED.partition(" eight")
GOOD = {"prompt": "the cat sat", "chosen": " on the mat", "rejected": " in the hat"}
BAD = [
    {"prompt": ASKED.upper(), "chosen": " a", "rejected": " b"},
    {"prompt": HEAD, "chosen": " b", "rejected": f" eight, {TAIL}!"},  # as it is read: over the border
    {"prompt": "x", "completion": f" so {HELD_OUT}", "label": True},
    {
        "chosen": [{"role": "user", "content": "Go on:"}, {"role": "assistant", "content": ASKED}],
        "rejected": [{"role": "user", "content": "Go on:"}, {"role": "assistant", "content": "no"}],
    },
]
NEAR = GOOD | {"prompt": ASKED.replace("seven", "7")}  # at most seven words in a row


@pytest.fixture(autouse=True)
def evaluated(monkeypatch):
    words = EvaluatedWords.of([("boolq", ASKED), ("passages", HELD_OUT)])
    monkeypatch.setattr(preference_rows, "evaluated_words", lambda: words)


def write(path, rows):
    path.write_text("\n".join(map(json.dumps, rows)))
    return str(path)


@pytest.mark.parametrize("kind", ["file", "hub"])
def test_rows_that_an_evaluation_reads(kind, tmp_path, monkeypatch):
    rows = [GOOD, *BAD, NEAR, {"prompt": None}, {"chosen": 5, "rejected": [1]}]
    source = write(tmp_path / "rows.jsonl", rows)
    if kind == "hub":
        rows, source = [GOOD, *BAD[:2], NEAR], "owner/name"
        monkeypatch.setattr(datasets, "load_dataset", lambda *_, **__: datasets.Dataset.from_list(rows))
    assert load_preferences(source, "train")[1] == {}
    kept, overlap = load_preferences(source, "train", decontaminate=True)
    assert list(kept) == [row for row in rows if row not in BAD]
    assert overlap == ({"boolq": 3, "passages": 1} if kind == "file" else {"boolq": 2})


def test_their_number_is_said(tmp_path):
    tokenizer = train_tokenizer(["the cat sat on the mat", ASKED] * 20, 300)
    path = write(tmp_path / "rows.jsonl", [GOOD, BAD[0], GOOD | {"prompt": "a"}])
    found, report = read_preferences(path, "train", tokenizer, 64, decontaminate=True)
    assert (len(found), report.read, report.overlap) == (2, 2, {"boolq": 1})
    assert "1 items removed that an evaluation asks" in str(report)
    with pytest.raises(DataError, match="all of its rows share 13 words"):
        read_preferences(write(tmp_path / "bad.jsonl", BAD[:1]), "train", tokenizer, 64, decontaminate=True)


@pytest.mark.parametrize("decontaminate", [True, False])
def test_the_recipe_trains_on_none_of_them_and_may_hold_them_out(decontaminate, tmp_path):
    tokenizer = train_tokenizer(["the cat sat on the mat", ASKED] * 20, 300)
    path = write(tmp_path / "rows.jsonl", [GOOD, BAD[0]])
    held_out = write(tmp_path / "held_out.jsonl", [GOOD, BAD[0]])
    settings = PreferenceSettings("m", str(tmp_path / "run"), "dpo", data=path, held_out=held_out)
    settings.decontaminate = decontaminate
    assert len(settings.read(tokenizer)[0]) == (1 if decontaminate else 2)
    assert len(settings.read_held_out(tokenizer)[0]) == 2
