"""The teacher's card: every number traced to a record, those of the shipped one too."""

import json
import math
import re
import shutil
import string
from pathlib import Path

import card
import pytest
import torch
from huggingface_hub import ModelCard
from matplotlib.image import imread

from spiking_mamba.common.files import file_sha256
from spiking_mamba.data.text import load_text
from spiking_mamba.data.tokens import train_tokenizer
from spiking_mamba.model.checkpoint import load_dense
from spiking_mamba.model.tokenizer import load_tokenizer
from tests.helpers.tiny import tiny_model

ROOT = Path(__file__).parents[2]
SHIPPED = ROOT / "recipes/quickstart/teacher"
TEMPLATE = (ROOT / "recipes/teacher/card.md").read_text()


def cells(line):
    return [cell.strip() for cell in line.strip().split("|")[1:-1]]


def table(text, first):
    """The rows of the table whose header starts with ``first``."""
    lines = text.splitlines()
    start = next(i for i, line in enumerate(lines) if cells(line)[:1] == [first])
    rows = []
    for line in lines[start + 2 :]:
        if not line.startswith("|"):
            break
        rows.append(cells(line))
    return rows


# fields that stand side by side, each a paragraph or nothing
PARAGRAPHS = {
    "curve": r"(?:\n!\[[^\n]*\n)?",
    "losses": r"(?:\nAt the end [^|]*?\.\n)?",
    "further": r"(?:\nTrained further .*?\n)?",
}


def fields_of(text):
    """What stands in a card where the template has a field; fails if the rest is not the template's."""
    pattern = ""
    for literal, name, _, _ in string.Formatter().parse(TEMPLATE):
        pattern += re.escape(literal)
        if name:
            known = f"(?P<{name}>" in pattern
            pattern += f"(?P={name})" if known else f"(?P<{name}>{PARAGRAPHS.get(name, '.*?')})"
    found = re.fullmatch(pattern, ModelCard(text).text, flags=re.DOTALL)
    assert found, "not the template's text"
    return found.groupdict()


# --- from records written by hand ---


@pytest.fixture(scope="module")
def tokenizer():
    return train_tokenizer(load_text("openwebtext-passages")["text"][:100], vocab_size=512)


HARDWARE = {"device": "NVIDIA H9", "cpu": "a cpu", "gpu": "NVIDIA H9"}


def training_record():
    return {
        "command": "torchrun train.py",
        "date": "2026-01-02T03:04:05+00:00",
        "hardware": HARDWARE,
        "versions": {"torch": "2.99.1"},
        "gpus_or_processes": 3,
        "parameters": 1_234_567,
        "corpus_tokens": 2_000_000,
        "tokens_seen": 5_000_000,
        "epochs": 2.5,
        "settings": {"seed": 7, "save_dtype": "float16", "training": {"max_steps": 50}},
        "data_sha256": {"runs/corpus/train.jsonl": "c" * 64},
    }


def corpus_records():
    source = {"package": "a-book", "version": "1.2", "licence": "MIT", "documents": 17, "tokens": 1_999_111}
    files = {"train.jsonl": {"sha256": "c" * 64}}
    return {
        "corpus/manifest.json": {"settings": {"overlap": 11}, "sources": {"a-book": source}, "files": files},
        "corpus/ngram.json": {"order": 4, "held_out.jsonl": {"bits_per_byte": 1.6}},
    }


def evaluation_record(weights, command, tasks, texts):
    provenance = {
        "command": command,
        "date": "2026-02-03T00:00:00+00:00",
        "hardware": HARDWARE,
        "settings": {"length": 32},
    }
    model = {
        "name": "small",
        "weights_sha256": weights,
        "dtype": "float32",
        "tasks": tasks,
        "perplexity": texts,
    }
    return {"provenance": provenance, "models": [model]}


def evaluation_records(weights):
    accuracy = {"value": 0.4321, "stderr": 0.0213}
    both = {"acc": accuracy, "acc_norm": {"value": 0.5, "stderr": None}}
    texts = {
        "held_out.jsonl": {"perplexity": 18.126, "bits_per_byte": 1.2, "tokens": 4321},
        "other": {"perplexity": 99.994, "bits_per_byte": 2.3456, "tokens": 99},
    }
    whole = {"n": 123, "data": {"rows": 123, "split": "test"}, "drawn": None, "main": "acc"}
    piqa = {"piqa": whole | {"metrics": both, "chance": 0.5}}
    copa = {"copa": whole | {"metrics": {"acc": accuracy}, "chance": None}}
    return {
        "tasks.json": evaluation_record(weights, "evaluate.py tasks", piqa, texts),
        "more.json": evaluation_record(weights, "evaluate.py more", copa, {}),
    }


def further_record(weights, tokens, after):
    return {
        "row": "control, 50M",
        "seed": 0,
        "status": "done",
        "depends": {"teacher": {"model.safetensors": weights}, "data": "c" * 64},
        "settings": {"neuron": None, "length": 64, "training": {"learning_rate": 2e-4}},
        "before": {"perplexity": 17.126},
        "tokens": tokens,
        "after": {"perplexity": after},
    }


class Records(dict):
    """Records by the files that they are in, and the card's settings."""

    def save(self, folder):
        for name, content in self.items():
            (folder / name).parent.mkdir(exist_ok=True)
            (folder / name).write_text(json.dumps(content))


@pytest.fixture
def records(tokenizer, tmp_path, monkeypatch):
    folder = tmp_path / "model"
    model = tiny_model(vocab_size=512, bos_token_id=0, eos_token_id=0, pad_token_id=0)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    weights = file_sha256(folder / "model.safetensors")
    runs = ((5_000_000, 18.0), (1_000_000, 17.5), (1_000_000, 17.7))
    log = [{"step": step, "loss": 5 - step / 25} for step in range(5, 51, 5)]
    log += [{"step": step, "eval_loss": 5 - step / 50} for step in range(10, 51, 10)]
    found = Records({"model/training.json": training_record(), "run/log.json": log})
    found |= corpus_records() | evaluation_records(weights)
    found |= {f"further{i}.jsonl": further_record(weights, *run) for i, run in enumerate(runs)}
    found.save(tmp_path)
    found.settings = {
        "model": str(folder),
        "run": str(tmp_path / "run"),
        "corpus": str(tmp_path / "corpus"),
        "evaluation": [str(tmp_path / "tasks.json"), str(tmp_path / "more.json")],
        "lambada": str(tmp_path / "lambada.json"),
        "further": [f"{tmp_path}/further{i}.jsonl#control, 50M#0" for i in range(3)],
        "samples": 2,
    }

    class Task:
        eval_docs = ({"text": "the quick brown fox jumps over the lazy dog " * 8},)

    monkeypatch.setattr(card, "zero_shot_tasks", lambda names: {names[0]: Task})
    return found


def write(records):
    return card.write(card.CardSettings(**records.settings)).read_text()


def test_which_items_were_asked():
    def task(n, drawn=None):
        return {"n": n, "data": {"rows": 1000}, "drawn": drawn}

    drawn = {"seed": 3, "of": 1000, "sources": {}, "items": []}
    assert card.items_text({"piqa": task(1000)}) == "of all items of each set."
    assert "`limit_seed=3`" in card.items_text({"piqa": task(5, drawn), "copa": task(1000)})
    old = card.items_text({"piqa": {"n": 5, "data": {"rows": 1000}}, "copa": task(5, drawn)})
    assert old == (
        "of the first items of each set where there are more;\n"
        "those of copa are drawn (`limit_seed=3`), of each source its share."
    )
    assert "are all ActivityNet's" in card.items_text({"hellaswag": task(250)})
    assert "ActivityNet" not in card.items_text({"hellaswag": task(250, drawn)})


def test_what_was_held_out():
    assert card.held_out_text({"drawn_by": "document"}) == "Corpus documents are held out whole."
    assert "others may be in training" in card.held_out_text({})


def test_every_number_is_that_of_a_record(records, drawn):
    text = write(records)
    found = fields_of(text)
    log, training = records["run/log.json"], records["model/training.json"]
    expected = {
        "millions": "1.2", "layers": "2", "width": "32", "state": "8", "vocabulary": "512",
        "saved": "float16", "dtype": "float32", "order": "4", "overlap": "11", "length": "32",
        "evaluated": "2026-02-03 on a cpu",
        "commands": "    evaluate.py tasks\n    evaluate.py more", "command": training["command"],
        "processes": "3", "hardware": "NVIDIA H9", "seed": "7", "torch": "2.99.1", "date": "2026-01-02",
        "seen": "5", "epochs": "2.5", "corpus": "2.0", "steps": "50", "step_tokens": "100,000",
        "count": "2", "last": "1", "top_p": "0.95", "temperature": "0.8",
        "items": "of all items of each set.",
    }  # fmt: skip
    assert {name: found[name] for name in expected} == expected
    kept = json.loads(Path(records.settings["lambada"]).read_text())
    assert table(text, "text") == [
        ["held-out documents", "18.13", "1.200", "1.600", "25.0%"],
        ["other", "99.99", "2.346", "-", "-"],
        ["LAMBADA", f"{kept['perplexity']:.2f}", f"{kept['bits_per_byte']:.3f}", "-", "-"],
    ]
    assert table(text, "set") == [
        ["piqa", "123", "0.432 ± 0.021", "0.500", "0.500"],
        ["copa", "123", "0.432 ± 0.021", "", "-"],
    ]
    heads = {each.dataset_name: each for each in ModelCard(text).data.eval_results}
    assert (
        heads["piqa"].metric_name == "acc, 95% interval 0.390 to 0.474, 123 items"
    )  # 0.4321 -+ 1.96 * 0.0213
    assert (heads["held-out documents"].metric_value, len(heads)) == (18.126, 5)
    assert table(text, "package") == [["a-book 1.2", "MIT", "17", "1,999,111"]]
    assert table(text, "further passes") == [
        ["0", "0", "-", "-", "17.13"],
        ["0.5", "1.0", "0.0002", "2", "17.60"],
        ["2.5", "5.0", "0.0002", "1", "18.00"],
    ]
    assert "rows of 64 tokens" in found["further"]
    # of the log: the last losses, and held-out documents 10 steps of 100,000 tokens before
    assert (log[9], log[-1], log[-2]) == (
        {"step": 50, "loss": 3.0}, {"step": 50, "eval_loss": 4.0}, {"step": 40, "eval_loss": 4.2}
    )  # fmt: skip
    words = " ".join(found["losses"].split())
    assert words == (
        "At the end the loss is 3.000 nats a token on the corpus and 4.000 on held-out documents; "
        "1 million tokens before, 4.200."
    )
    drawn.check()
    (curve,) = drawn.figures
    corpus, held = curve.axes[0].lines
    assert corpus.get_xydata().tolist() == [[0.1 * row["step"], row["loss"]] for row in log if "loss" in row]
    assert held.get_ydata().tolist() == [row["eval_loss"] for row in log if "eval_loss" in row]
    assert "](curve.png)" in found["curve"]


def test_lambada_and_samples_are_those_of_the_weights(records):
    """Against losses and draws made here, token by token."""
    found = fields_of(write(records))
    folder = Path(records.settings["model"])
    model, tokenizer = load_dense(folder).eval(), load_tokenizer(folder)
    (document,) = card.zero_shot_tasks(["lambada_openai"])["lambada_openai"].eval_docs
    ids = tokenizer(document["text"])["input_ids"] + [tokenizer.eos_token_id]
    rows = torch.tensor(ids[: len(ids) // 32 * 32]).view(-1, 32)
    with torch.no_grad():
        logits = model(rows).logits[:, :-1].double()
    loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), rows[:, 1:].flatten())
    kept = json.loads(Path(records.settings["lambada"]).read_text())
    assert kept["perplexity"] == pytest.approx(math.exp(loss), rel=1e-4)
    assert found["samples"] == "\n\n".join(card.sample(model, tokenizer, seed) for seed in (0, 1))
    # it is computed once
    kept["perplexity"] = 1234.5
    Path(records.settings["lambada"]).write_text(json.dumps(kept))
    assert table(write(records), "text")[-1][1] == "1234.50"


def test_without_a_log_there_are_no_losses_and_the_curve_stays(records):
    write(records)
    path = Path(records.settings["model"]) / "curve.png"
    before = path.read_bytes()
    records.settings |= {"run": None, "further": []}
    found = fields_of(write(records))
    assert (found["losses"], found["further"]) == ("", "")
    assert "](curve.png)" in found["curve"]
    assert path.read_bytes() == before
    path.unlink()
    assert fields_of(write(records))["curve"] == ""


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda r: r["tasks.json"]["models"][0].update(weights_sha256="d" * 64),
            "tasks.json is no evaluation",
        ),
        (
            lambda r: r["more.json"]["models"].append(r["more.json"]["models"][0]),
            "more.json is no evaluation",
        ),
        (lambda r: r["corpus/manifest.json"]["files"]["train.jsonl"].update(sha256="d"), "is not the corpus"),
        (lambda r: r["further1.jsonl"]["depends"].update(data="d"), "further1.jsonl#control, 50M#0 is no"),
        (
            lambda r: r["further1.jsonl"]["depends"].update(teacher={}),
            "further1.jsonl#control, 50M#0 is no",
        ),
        (lambda r: r["further0.jsonl"].update(status="diverged"), "further0.jsonl#control, 50M#0 is no"),
        (lambda r: r["model/training.json"]["settings"].update(training={}), "max_steps"),
        (lambda r: r.update({"run/log.json": [{"step": 1, "loss": 2.0}]}), "held_out"),
        (lambda r: r.settings.update(evaluation=[]), "evaluation must be a name"),
        (lambda r: r.settings.update(further=[r.settings["further"][0] + "1"]), "There is no run"),
        (lambda r: r.settings.update(corpus="/nowhere"), "There is no /nowhere/manifest.json"),
    ],
)
def test_records_of_something_else_are_refused_and_nothing_is_written(records, tmp_path, change, message):
    change(records)
    records.save(tmp_path)
    with pytest.raises((ValueError, card.DataError), match=re.escape(message)):
        write(records)
    assert not (Path(records.settings["model"]) / "README.md").exists()
    assert not (Path(records.settings["model"]) / "curve.png").exists()


# --- the one that comes with the quickstart ---


def test_the_shipped_card_is_what_its_records_give(tmp_path, monkeypatch):
    """Written again from docs/results, all but the samples, which depend on torch's version."""
    folder = tmp_path / "teacher"
    folder.mkdir()
    for path in SHIPPED.iterdir():
        if path.name != "README.md":
            shutil.copy(path, folder)
    monkeypatch.chdir(ROOT)
    settings = card.parse_settings(card.CardSettings, ["recipes/teacher/card.yaml", f"model={folder}"])
    monkeypatch.setattr(card, "sample", lambda model, tokenizer, seed: "> ")
    again = card.write(settings).read_text()
    mine, theirs = (fields_of(text) for text in (again, (SHIPPED / "README.md").read_text()))
    assert theirs.pop("samples").count("\n\n> ") + 1 == settings.samples
    del mine["samples"]
    assert theirs == mine
    heads = [ModelCard(text).data.to_dict() for text in (again, (SHIPPED / "README.md").read_text())]
    assert heads[0] == heads[1]


def test_the_shipped_curve_can_be_read():
    assert imread(SHIPPED / "curve.png").shape[2] == 4
