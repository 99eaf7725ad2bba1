"""Zero-shot tasks against log-likelihoods worked out by hand; perplexity against known models."""

import copy
import json
import logging
import math
import random
import socket
import statistics
from types import SimpleNamespace

import datasets
import numpy as np
import pytest
import torch
from transformers import Mamba2Config, Mamba2ForCausalLM

from spiking_mamba.common.errors import DataError
from spiking_mamba.data import benchmarks
from spiking_mamba.data.benchmarks import CHANCE
from spiking_mamba.data.text import load_text
from spiking_mamba.data.tokens import count_bytes, tokenize, train_tokenizer
from spiking_mamba.evaluation.harness import SpikingMambaLM
from spiking_mamba.evaluation.scoring import kl_and_agreement, perplexity, score, zero_shot
from spiking_mamba.evaluation.tasks import describe, draw_items, zero_shot_tasks


@pytest.fixture(scope="module")
def text():
    return load_text("openwebtext-passages")


@pytest.fixture(scope="module")
def tokenizer(text):
    return train_tokenizer(text["text"])


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    config = Mamba2Config(
        vocab_size=4096,
        hidden_size=32,
        num_hidden_layers=2,
        num_heads=4,
        head_dim=16,
        state_size=8,
        n_groups=1,
        chunk_size=16,
        initializer_range=0.5,  # far from uniform, so that scores differ
    )
    return Mamba2ForCausalLM(config)


@pytest.fixture(scope="module")
def hellaswag():
    [task] = zero_shot_tasks("hellaswag").values()
    return SimpleNamespace(eval_docs=task.eval_docs, config=task.config)  # which lm-eval makes at every look


@pytest.fixture
def no_network(monkeypatch):
    def refuse(_, address):
        raise AssertionError(f"connects to {address}")

    monkeypatch.setattr(socket.socket, "connect", refuse)


def log_likelihood(model, tokenizer, context, continuation):
    """In nats, with plain torch. Spaces between the two belong to the second; no context is end-of-text."""
    spaces = context[len(context.rstrip()) :]
    context, continuation = context.rstrip(), spaces + continuation
    prefix = tokenizer(context)["input_ids"] or [tokenizer.eos_token_id]
    ids = prefix + tokenizer(context + continuation)["input_ids"][len(tokenizer(context)["input_ids"]) :]
    model.eval()
    with torch.no_grad():
        scores = model(torch.tensor([ids])).logits[0].log_softmax(-1)
    return sum(scores[i - 1, ids[i]].item() for i in range(len(prefix), len(ids)))


def test_all_tasks_build_and_score(model, tokenizer, no_network, tmp_path, monkeypatch, caplog):
    monkeypatch.chdir(tmp_path)
    model.train()
    model.backbone.layers[0].eval()  # a frozen part
    modes = [module.training for module in model.modules()]
    generators = random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist()
    with caplog.at_level(logging.INFO):
        tasks = zero_shot_tasks(list(CHANCE))
        scores = zero_shot(model, tokenizer, tasks, limit=8)

    assert list(scores) == list(CHANCE)
    for task, found in scores.items():
        assert set(found) == {"acc", "acc_stderr", "acc_norm", "acc_norm_stderr", "chance", "n"}
        assert found["n"] == 8
        assert found["chance"] == CHANCE[task]
        assert 0 <= found["acc"] <= 1
        assert (found["acc_norm"] is None) == (task in ("boolq", "winogrande", "lambada_openai", "copa"))

    # COPA once more, by hand.
    connectors, right = {"cause": "because", "effect": "therefore"}, 0
    for item in benchmarks.load_items("copa")["validation"].select(draw_items(tasks["copa"], 8)["items"]):
        context = item["premise"].strip()[:-1] + " " + connectors[item["question"]]
        # Two spaces: the stock task puts one before each choice, lm-eval another between context and choice.
        choices = ["  " + c[0].lower() + c[1:] for c in (item["choice1"], item["choice2"])]
        scored = [log_likelihood(model, tokenizer, context, choice) for choice in choices]
        right += scored.index(max(scored)) == item["label"]
    assert scores["copa"]["acc"] == right / 8

    for module, mode in zip(model.modules(), modes, strict=True):
        module.training = mode  # log_likelihood changed them
    zero_shot(model, tokenizer, zero_shot_tasks(["copa"]), limit=2)
    assert [module.training for module in model.modules()] == modes
    assert generators == (
        random.getstate(),
        np.random.get_state()[1].tolist(),
        torch.get_rng_state().tolist(),
    )
    assert list(tmp_path.iterdir()) == []
    assert not [r for r in caplog.records if r.name.startswith("lm_eval")]


@pytest.mark.parametrize("batch_size", [1, 5])
def test_log_likelihoods(model, tokenizer, batch_size):
    """Whatever the padding, lm-eval's number is the one worked out by hand."""
    from lm_eval.api.instance import Instance

    pairs = [
        ("The capital of France is", " Paris"),
        ("Question: why?\nAnswer:", " because a much longer answer makes for much padding, " * 3),
        ("", "An empty context"),
        ("a", " b"),
        ("word " * 50, "end"),
    ]
    requests = [Instance("loglikelihood", {}, pair, i) for i, pair in enumerate(pairs)]
    found = SpikingMambaLM(model, tokenizer, batch_size=batch_size).loglikelihood(requests, disable_tqdm=True)
    expected = [log_likelihood(model, tokenizer, *pair) for pair in pairs]
    torch.testing.assert_close([score for score, _ in found], expected, rtol=1e-5, atol=1e-4)


def test_a_score_by_hand(model, tokenizer):
    """LAMBADA's numbers, worked out from log-likelihoods of plain torch."""
    [task] = zero_shot_tasks("lambada_openai").values()
    texts = [doc["text"] for doc in task.eval_docs.select(draw_items(task, 6)["items"])]
    pairs = [(text[: text.rindex(" ")], text[text.rindex(" ") :]) for text in texts]
    by_hand = [log_likelihood(model, tokenizer, *pair) for pair in pairs]
    found = score(SpikingMambaLM(model, tokenizer, batch_size=4), task, limit=6)
    assert found["n"] == 6
    assert found["items"]["loglikelihood"] == pytest.approx(by_hand, abs=1e-3)
    assert found["items"]["acc"] == [0] * 6
    mean, spread = statistics.fmean(by_hand), statistics.stdev(by_hand)
    perplexity = found["metrics"]["perplexity"]
    assert perplexity["value"] == pytest.approx(math.exp(-mean), rel=1e-3)
    assert perplexity["stderr"] == pytest.approx(math.exp(-mean) * spread / math.sqrt(6), rel=1e-3)


def test_standard_errors(model, tokenizer):
    [task] = zero_shot_tasks("copa").values()
    lm = SpikingMambaLM(model, tokenizer)
    found = score(lm, task, limit=20)
    right = sum(found["items"]["acc"])
    assert 0 < right < 20
    share = right / 20
    assert found["metrics"]["acc"]["value"] == share
    assert found["metrics"]["acc"]["stderr"] == pytest.approx(math.sqrt(share * (1 - share) / 19))
    assert score(lm, task, limit=1)["metrics"]["acc"]["stderr"] is None


def test_padding_is_masked(model, tokenizer):
    masks = []
    hook = model.register_forward_pre_hook(
        lambda _, args, kwargs: masks.append(kwargs["attention_mask"]), with_kwargs=True
    )
    harness = SpikingMambaLM(model, tokenizer, batch_size=2)
    harness._model_call(torch.tensor([[0, 5, 0, 7], [9, 8, 0, 0], [0, 0, 0, 0]]))
    hook.remove()
    assert masks[0].tolist() == [[1, 1, 1, 1], [1, 1, 0, 0], [1, 0, 0, 0]]


class Constant(torch.nn.Module):
    """Gives every token the same logits."""

    def __init__(self, logits):
        super().__init__()
        self.logits = torch.nn.Parameter(torch.tensor(logits))

    def forward(self, input_ids, use_cache):
        assert not self.training
        return SimpleNamespace(logits=self.logits.expand(*input_ids.shape, -1))


class TestPerplexity:
    rows = datasets.Dataset.from_dict({"input_ids": [[0, 1, 2, 3], [3, 2, 1, 0], [1, 1, 1, 1]]})

    def test_uniform(self):
        result = perplexity(Constant([0.0] * 5), self.rows, batch_size=2, bytes=24, progress=False)
        assert result["perplexity"] == pytest.approx(5)
        assert result["tokens"] == 9
        assert result["bits_per_byte"] == pytest.approx(math.log2(5) * 12 / 24)

    def test_known(self):
        model = Constant([math.log(p) for p in (0.5, 0.25, 0.125, 0.125)]).train()
        bits = [2 + 3 + 3, 3 + 2 + 1, 2 + 2 + 2]
        result = perplexity(model, self.rows, progress=False)
        assert result["nll_per_token"] == pytest.approx(sum(bits) / 9 * math.log(2))
        assert model.training

    def test_labels(self):
        rows = self.rows.add_column("labels", [[0, 1, 2, 3], [3, 2, -100, -100], [-100] * 4])
        result = perplexity(Constant([0.0] * 5), rows, bytes=12, progress=False)
        assert result["tokens"] == 4
        assert result["bits_per_byte"] == pytest.approx(math.log2(5) * 6 / 12)

    def test_agrees_with_the_models_own_loss(self, model, tokenizer, text):
        rows = tokenize(text, tokenizer, 64).select(range(6))
        result = perplexity(model, rows, batch_size=4, bytes=count_bytes(rows, tokenizer), progress=False)
        ids = torch.tensor(rows["input_ids"][:])
        with torch.no_grad():
            loss = model.eval()(ids, labels=ids).loss.item()
        assert result["nll_per_token"] == pytest.approx(loss, rel=1e-5)
        assert result["tokens"] == 6 * 63

    def test_nan(self):
        class Broken(Constant):
            def forward(self, input_ids, use_cache):
                logits = super().forward(input_ids, use_cache).logits.clone()
                logits[(input_ids == 3).any(1) & (input_ids[:, 0] == 3), 1, 4] = math.nan
                return SimpleNamespace(logits=logits)

        model = Broken([0.0] * 5)
        with pytest.raises(FloatingPointError, match="row 1"):
            perplexity(model, self.rows, progress=False)
        assert model.training  # restored after an error too

    @pytest.mark.parametrize("rows", [[[0, 1], [1]], [[0], [1]]])
    def test_unusable_rows(self, rows):
        with pytest.raises(DataError, match="equally long"):
            perplexity(Constant([0.0] * 5), datasets.Dataset.from_dict({"input_ids": rows}), progress=False)

    def test_no_rows(self):
        for rows in (self.rows.select([]), datasets.Dataset.from_dict({"text": ["a"]})):
            with pytest.raises(DataError, match="input_ids"):
                perplexity(Constant([0.0] * 5), rows, progress=False)


# --- which items are asked ---


def names_of(task, items):
    return [source.partition("~")[0] for source in task.eval_docs.select(items)["source_id"]]


def test_items_are_drawn_by_a_seed_from_every_source(hellaswag):
    task = hellaswag
    whole = names_of(task, range(len(task.eval_docs)))
    assert whole == ["activitynet"] * 3243 + ["wikihow"] * 6799  # why the first ones are no sample
    drawn = draw_items(task, 250, seed=3)
    assert drawn == draw_items(task, 250, seed=3)
    assert drawn["items"] == sorted(set(drawn["items"]))
    assert len(drawn["items"]) == 250
    # 250 * 3243 / 10042 = 80.74
    assert drawn["sources"] == {"activitynet": 81, "wikihow": 169}
    assert names_of(task, drawn["items"]) == ["activitynet"] * 81 + ["wikihow"] * 169
    assert (drawn["seed"], drawn["of"]) == (3, 10042)
    assert set(draw_items(task, 100, seed=3)["items"]) < set(drawn["items"])
    other = draw_items(task, 250, seed=4)["items"]
    assert len(set(other) & set(drawn["items"])) < 30  # 6 by chance
    assert max(drawn["items"]) > 9000
    for limit in (None, 10042, 20000):
        assert draw_items(task, limit) is None


@pytest.mark.parametrize("limit", [1, 2, 3, 7])
def test_any_number_of_items(hellaswag, limit):
    drawn = draw_items(hellaswag, limit)
    assert len(drawn["items"]) == sum(drawn["sources"].values()) == limit


def test_what_is_scored_is_what_was_drawn(model, tokenizer):
    """Every item's score is the one that it has when all are asked."""
    [task] = zero_shot_tasks("copa").values()
    lm = SpikingMambaLM(model, tokenizer)
    whole = score(lm, task)
    assert whole["drawn"] is None
    assert whole["n"] == 100
    found = score(lm, task, limit=15, seed=1)
    items = found["drawn"]["items"]
    assert found["items"]["acc"] == [whole["items"]["acc"][number] for number in items]
    assert items == draw_items(task, 15, seed=1)["items"] != list(range(15))
    shares = zero_shot(model, tokenizer, {"copa": task}, limit=15, seed=1)["copa"]
    assert shares["acc"] == sum(found["items"]["acc"]) / 15


# --- how far a model's predictions are from another's ---


def test_divergence_by_hand(model, tokenizer):
    """Against plain Python, over two rows of which not all tokens count; the two models may change places."""
    torch.manual_seed(3)
    other = Mamba2ForCausalLM(model.config).eval()
    ids = [[5, 6, 7, 8, 9, 10], [11, 12, 13, 14, 15, 16]]
    labels = [ids[0], [*ids[1][:4], -100, -100]]
    rows = datasets.Dataset.from_dict({"input_ids": ids, "labels": labels})
    for one, reference in ((model, other), (other, model)):
        found = perplexity(one, rows, batch_size=1, progress=False, reference=reference)
        divergences, same = [], []
        for tokens, wanted in zip(ids, labels, strict=True):
            with torch.no_grad():
                logits = [m(torch.tensor([tokens])).logits[0].double() for m in (one, reference)]
            q, p = (each.log_softmax(-1) for each in logits)
            for place, label in enumerate(wanted[1:]):
                if label != -100:
                    pairs = zip(p[place].tolist(), q[place].tolist(), strict=True)
                    divergences.append(sum(math.exp(a) * (a - b) for a, b in pairs))
                    same.append(int(p[place].argmax()) == int(q[place].argmax()))
        assert len(divergences) == found["tokens"] == 8
        assert found["kl"] == pytest.approx(statistics.fmean(divergences), rel=1e-4)
        assert found["top1_agreement"] == statistics.fmean(same)
        alone = perplexity(one, rows, batch_size=1, progress=False)
        assert alone == {key: found[key] for key in alone}
    itself = perplexity(model, rows, progress=False, reference=model)
    assert (itself["kl"], itself["top1_agreement"]) == (pytest.approx(0, abs=1e-6), 1.0)


def test_another_vocabulary_cannot_be_compared(model):
    shape = model.config.to_dict() | {"vocab_size": model.config.vocab_size + 8}
    other = Mamba2ForCausalLM(Mamba2Config(**shape))
    rows = datasets.Dataset.from_dict({"input_ids": [[5, 6, 7]]})
    with pytest.raises(ValueError, match="of different sizes"):
        perplexity(model, rows, progress=False, reference=other)


def own_task(tmp_path, monkeypatch, **changes):
    """A task that comes from nowhere, six questions, as lm-eval loads it."""
    from lm_eval.tasks import TaskManager

    items = [
        {"question": f"{k} and {k}?", "choices": [str(n) for n in range(2 + k % 2)], "gold": k % 2}
        for k in range(6)
    ]
    (tmp_path / "items.jsonl").write_text("".join(json.dumps(item) + "\n" for item in items))
    own = {
        "task": "own_sums", "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(tmp_path / "items.jsonl")}},
        "test_split": "test", "output_type": "multiple_choice", "doc_to_text": "{{question}}",
        "doc_to_choice": "{{choices}}", "doc_to_target": "gold",
        "metric_list": [{"metric": "acc"}, {"metric": "acc_norm"}],
    } | changes  # fmt: skip

    class Manager:
        def load(self, specs):
            assert specs == ["own_sums"]
            return TaskManager(include_path=str(tmp_path), include_defaults=False).load([own])

    monkeypatch.setattr("spiking_mamba.evaluation.tasks._task_manager", lambda *_: Manager())
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    return zero_shot_tasks("own_sums", data="hub")["own_sums"]


def mass(doc, results):
    """How much of the probability is on the last choice, as truthfulqa_mc2 scores."""
    likelihoods = np.exp([result[0] for result in results])
    return {"acc": float(likelihoods[-1] / likelihoods.sum())}


def test_items_that_are_neither_right_nor_wrong(model, tokenizer, tmp_path, monkeypatch):
    metrics = [{"metric": "acc", "aggregation": "mean", "higher_is_better": True}]
    task = own_task(tmp_path, monkeypatch, process_results=mass, metric_list=metrics)
    scores = score(SpikingMambaLM(model, tokenizer), task, None, progress=False)
    assert all(0 < value < 1 for value in scores["items"]["acc"])
    assert statistics.mean(scores["items"]["acc"]) == pytest.approx(scores["metrics"]["acc"]["value"])


def test_metrics_that_no_item_has_are_refused(model, tokenizer, tmp_path, monkeypatch):
    metrics = [{"metric": "mcc"}]
    task = own_task(tmp_path, monkeypatch, metric_list=metrics)
    with pytest.raises(DataError, match="own_sums: mcc is no number of each item"):
        score(SpikingMambaLM(model, tokenizer), task, None, progress=False)


@pytest.mark.parametrize("limit", [0, -1])
def test_no_items_at_all(model, tokenizer, limit, tmp_path, monkeypatch):
    with pytest.raises(ValueError, match="limit must be at least 1"):
        score(SpikingMambaLM(model, tokenizer), own_task(tmp_path, monkeypatch), limit)


def test_references_that_say_nothing(model):
    rows = datasets.Dataset.from_dict({"input_ids": [[5, 6, 7]]})
    broken = copy.deepcopy(model)
    with torch.no_grad():
        broken.get_input_embeddings().weight[6] = math.nan
    with pytest.raises(FloatingPointError, match="reference's logits are NaN in row 0"):
        perplexity(model, rows, progress=False, reference=broken)
    for wrong in ({"batch_size": 0}, {"batch_size": -1}, {"bytes": 0}):
        with pytest.raises(ValueError, match="must be at least 1"):
            perplexity(model, rows, progress=False, **wrong)


def test_tokens_without_probability_add_no_divergence():
    logits = torch.tensor([[0.0, 1.0, -math.inf]])
    assert kl_and_agreement(logits, logits) == (0.0, 1)
    p, q = torch.tensor([0.5, 0.5]).log(), torch.tensor([0.25, 0.75]).log()
    kl, _ = kl_and_agreement(torch.tensor([[*q, -1.0]]), torch.tensor([[*p, -math.inf]]))
    full = torch.log_softmax(torch.tensor([*q, -1.0]), 0)
    assert kl == pytest.approx(float((0.5 * (math.log(0.5) - full[:2])).sum()), rel=1e-6)
    assert math.isinf(kl_and_agreement(logits, torch.zeros(1, 3))[0])


def test_a_task_of_lm_eval_without_an_entry_here(model, tokenizer, tmp_path, monkeypatch):
    task = own_task(tmp_path, monkeypatch)
    scores = score(SpikingMambaLM(model, tokenizer), task, None)
    assert (scores["n"], scores["main"]) == (6, "acc_norm")
    assert scores["chance"] == pytest.approx((1 / 2 + 1 / 3) / 2)
    assert 0 <= scores["metrics"]["acc"]["value"] <= 1
    assert set(scores["items"]["acc"]) <= {0, 1}
    about = describe(task, "hub")
    assert (about["rows"], about["note"], about["source"]) == (6, None, "hub")
    assert len(draw_items(task, 4)["items"]) == 4
    with pytest.raises(DataError, match="Unknown task 'own_sums'"):
        zero_shot_tasks("own_sums")
