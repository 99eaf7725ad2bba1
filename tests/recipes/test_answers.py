"""Lengths of answers: against a loop of single forward passes, and what is refused."""

import json

import pytest
import torch

from spiking_mamba import event_driven
from spiking_mamba.data.preferences import CHAT_TEMPLATE
from spiking_mamba.model.checkpoint import load_model
from spiking_mamba.model.tokenizer import load_tokenizer
from tests.helpers.commands import ROOT, run

RECIPE = ROOT / "recipes/rl"
STUDENT = ROOT / "recipes/quickstart/student"
ASKED = ["The city lies on", "He was born in", "The river"]
TOKENS = 12


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """The quickstart's student as a model of chats, one that ends soon, and questions."""
    folder = tmp_path_factory.mktemp("answers")
    tokenizer = load_tokenizer(STUDENT)
    rows = [{"prompt": q, "chosen": f" {k}.", "rejected": " no."} for q in ASKED for k in range(2)]
    (folder / "pairs.jsonl").write_text("\n".join(map(json.dumps, rows)))
    tokenizer.save_pretrained(folder / "plain")
    load_model(STUDENT).save_pretrained(folder / "plain")
    tokenizer.chat_template = CHAT_TEMPLATE
    for name in ("chat", "brief"):
        model = load_model(STUDENT)
        if name == "brief":  # its likeliest token ends the text
            first = greedy(model, tokenizer, ASKED[0])[0]
            model.config.eos_token_id = model.generation_config.eos_token_id = [first]
        model.save_pretrained(folder / name)
        tokenizer.save_pretrained(folder / name)
    return folder


@torch.no_grad()
def greedy(model, tokenizer, question):
    """The likeliest tokens behind a question, each by a forward pass over all before."""
    made = event_driven(model)
    made.set_decoding("torch")
    chat = [{"role": "user", "content": question}]
    text = tokenizer.apply_chat_template(chat, add_generation_prompt=True, tokenize=False)
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    ends = made.generation_config.eos_token_id
    answer = []
    for _ in range(TOKENS):
        answer.append(int(made(torch.tensor([ids + answer]), use_cache=False).logits[0, -1].argmax()))
        if answer[-1] in (ends if isinstance(ends, list) else [ends]):
            break
    return answer


def answers(folder, models, *more):
    names = ",".join(str(folder / name) for name in models)
    changed = (f"models=[{names}]", f"data={folder / 'pairs.jsonl'}", f"results={folder / 'found.jsonl'}")
    about = ("half=null", "questions=3", f"tokens={TOKENS}", "threads=1")
    return run(RECIPE / "answers.py", RECIPE / "answers.yaml", *changed, *about, *more)


def test_lengths_are_those_of_greedy_answers(folder):
    done = answers(folder, ["chat", "brief"])
    assert done.returncode == 0, done.stderr
    chat, brief = (json.loads(line) for line in (folder / "found.jsonl").read_text().splitlines())
    tokenizer = load_tokenizer(folder / "chat")
    for record, name in ((chat, "chat"), (brief, "brief")):
        expected = [greedy(load_model(folder / name), tokenizer, question) for question in ASKED]
        assert record["tokens"] == [len(answer) for answer in expected]
    assert brief["tokens"][0] == 1
    assert brief["ended"][0] is True
    assert chat["change"]["gap"] == 0
    difference = sum(brief["tokens"]) / 3 - sum(chat["tokens"]) / 3
    assert brief["change"]["gap"] == pytest.approx(difference)
    assert f"{difference:+.1f} [" in done.stdout


@pytest.mark.parametrize(
    ("models", "change", "text"),
    [
        (["plain"], (), "no chat template"),
        (["chat"], ("questions=4",), "has 3 questions that are texts, not 4"),
        (["chat", "absent"], (), "absent"),
        ([], (), "models"),
    ],
)
def test_what_cannot_be_is_said_in_one_line(folder, models, change, text):
    done = answers(folder, models, *change)
    assert done.returncode != 0
    (line,) = [line for line in done.stderr.splitlines() if "error: " in line]
    assert text in line
    assert "Traceback" not in done.stderr
