"""A student beside its teacher, document by document, against sums written out."""

import json
import math
from pathlib import Path

import datasets
import documents
import numpy as np
import pytest
import torch

from spiking_mamba import SpikingMambaForCausalLM
from spiking_mamba.evaluation.scoring import perplexity
from tests.helpers.commands import run
from tests.helpers.tiny import INTEGER, tiny_model, tokens

ROOT = Path(__file__).parents[2]
END = 0


def test_a_document_ends_with_its_end_of_text():
    ids = np.array([[5, 6, END, 7], [8, END, END, 9]])
    assert documents.documents_of(ids, END).tolist() == [[0, 0, 0, 1], [1, 1, 2, 3]]


def test_sums_by_document():
    teacher = tiny_model()
    student = SpikingMambaForCausalLM.from_dense(teacher, neuron=INTEGER).eval()
    ids = tokens(5, 12)
    ids[0, 7], ids[2, 3] = END, END
    rows = datasets.Dataset.from_dict({"input_ids": ids.tolist()})
    found, spikes = documents.compare(teacher, student, rows, END, batch_size=2)
    assert found["tokens"] == 5 * 11 == sum(n for n, *_ in found["documents"])
    for column, model in ((1, teacher), (2, student)):
        whole = perplexity(model, rows, progress=False)["nll_per_token"]
        assert sum(row[column] for row in found["documents"]) / 55 == pytest.approx(whole, rel=1e-5)
    # by the definitions, a token at a time
    with torch.no_grad():
        p, q = (model(input_ids=ids).logits[:, :-1].double().softmax(-1) for model in (teacher, student))
    kl = (p * (p / q).log()).sum(-1).mean().item()
    assert found["kl"] == pytest.approx(kl, rel=1e-4)
    assert found["top1"] == pytest.approx((p.argmax(-1) == q.argmax(-1)).double().mean().item())
    owner = documents.documents_of(ids.numpy(), END)
    nats = -p.gather(-1, ids[:, 1:, None]).log().squeeze(-1).numpy()
    assert len(found["documents"]) == owner.max() + 1
    for number, (count, theirs, _) in enumerate(found["documents"]):
        mine = owner[:, 1:] == number
        assert (count, theirs) == (mine.sum(), pytest.approx(nats[mine].sum(), abs=1e-3))
    assert spikes.tokens == 60
    assert spikes.digit_accumulations <= spikes.accumulations


def test_the_interval_over_documents():
    random = np.random.default_rng(1)
    count = random.integers(50, 200, 400)
    theirs = count * random.normal(3.0, 0.5, 400)
    difference = random.normal(0.04, 0.05, 400)
    rows = np.stack([count, theirs, theirs + count * difference], 1).tolist()
    found = documents.perplexity_ratio(rows)
    mean = (count * difference).sum() / count.sum()
    assert found["over"] == pytest.approx(math.exp(mean) - 1)
    assert found["teacher"] == pytest.approx(math.exp(theirs.sum() / count.sum()))
    # the delta method for a ratio of sums
    error = math.sqrt(((count * (difference - mean)) ** 2).sum()) / count.sum()
    for end, sign in (("low", -1), ("high", 1)):
        assert math.log1p(found[end]) == pytest.approx(mean + sign * 1.96 * error, abs=0.1 * error)
    assert documents.perplexity_ratio(rows) == found
    assert found["documents"] == 400
    same = documents.perplexity_ratio([[10, 30.0, 30.0]] * 5)
    assert (same["low"], same["over"], same["high"]) == (0, 0, 0)


def test_the_command(tmp_path):
    text = tmp_path / "text.jsonl"
    passages = [
        f"The {word} lies on the river, and in {year} it had a market."
        for word in ("town", "city")
        for year in range(1900, 1906)
    ]
    text.write_text("".join(json.dumps({"text": passage}) + "\n" for passage in passages))
    results = tmp_path / "found.jsonl"
    command = [ROOT / "recipes/ablate/documents.py", ROOT / "recipes/ablate/documents.yaml"]
    command += [f"texts=[{text}]", "length=32", f"results={results}"]
    done = run(*command)
    assert done.returncode == 0, done.stderr
    (record,) = [json.loads(line) for line in results.read_text().splitlines()]
    ratio = documents.perplexity_ratio(record["documents"])
    assert f"student {ratio['student']:.3f}, {100 * ratio['over']:+.2f} %" in done.stdout
    assert 10 <= ratio["documents"] <= 12
    assert 0 < record["spikes"]["signed_digits"] <= record["spikes"]["mean_abs"]
    assert record["commit"]
    assert set(record["depends"]) == {"text", "teacher", "student"}
    wrong = run(*command, "texts=[]")
    assert wrong.returncode != 0
    assert "texts must be a name or a list of names" in wrong.stderr
