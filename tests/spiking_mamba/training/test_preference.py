"""DPO and KTO against formulas written by hand, what is trained, and what is measured."""

import copy
import json
import math

import datasets
import pytest
import torch

from spiking_mamba import SpikingMambaForCausalLM
from spiking_mamba.common.errors import RunError
from spiking_mamba.data.preferences import Preference
from spiking_mamba.evaluation.preferences import (
    compare,
    completion_log_probs,
    evaluate_preferences,
    preference_scores,
)
from spiking_mamba.reports.preferences import summary
from spiking_mamba.training.preference import (
    METHODS,
    PreferenceSettings,
    SpikingDPOTrainer,
    SpikingKTOTrainer,
    _with_sgc,
    optimise,
    pair_rows,
)
from spiking_mamba.training.run import finish_run
from tests.helpers.tiny import INTEGER, tiny_model, tokens

trl = pytest.importorskip("trl")

BETA = 0.3


def preferences(count=8, seed=0):
    """Pairs of unequal lengths."""
    found = []
    for index in range(count):
        ids = tokens(3, 12, seed=100 * seed + index).tolist()
        found.append(Preference(ids[0][: 3 + index % 4], (ids[1][: 2 + index % 5], ids[2][: 1 + index % 3])))
    return found


@pytest.fixture(scope="module")
def tokenizer():
    """Of as many entries as the tiny models know; the trainers only ask for its special tokens."""
    import tokenizers
    from transformers import PreTrainedTokenizerFast

    vocabulary = {"<|endoftext|>": 0} | {chr(i + 64): i for i in range(1, 61)}
    model = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocabulary, unk_token="<|endoftext|>"))
    model.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    special = dict.fromkeys(("eos_token", "bos_token", "pad_token", "unk_token"), "<|endoftext|>")
    return PreTrainedTokenizerFast(tokenizer_object=model, **special)


@pytest.fixture
def make(tokenizer, tmp_path):
    def make(method, model, rows, **options):
        training = {
            "max_steps": 4, "per_device_train_batch_size": 4, "bf16": False, "logging_steps": 1,
            "save_strategy": "no", "disable_tqdm": True, "learning_rate": 1e-2,
        } | options.pop("training", {})  # fmt: skip
        objective = {"beta": BETA} | options.pop("objective", {})
        settings = PreferenceSettings(
            "", str(tmp_path / "run"), method, training=training, objective=objective
        )
        return METHODS[method].trainer(
            model,
            args=settings.make_arguments(),
            train_dataset=pair_rows(rows, method),
            processing_class=tokenizer,
            **options,
        )

    return make


def moved(model):
    """``model`` with a policy that is no longer the reference."""
    with torch.no_grad():
        generator = torch.Generator().manual_seed(3)
        for name, parameter in model.named_parameters():
            if parameter.requires_grad and "weight" in name:
                parameter += 0.02 * torch.randn(parameter.shape, generator=generator)
    return model


# --- the losses by hand ---


def log_prob(model, prompt, completion):
    """Of one completion, from the logits of a forward pass of its own, without padding."""
    logits = model(torch.tensor([prompt + completion])).logits[0].log_softmax(-1)
    return sum(logits[len(prompt) + i - 1, token] for i, token in enumerate(completion))


def dpo_by_hand(policy, reference, rows):
    losses = []
    for row in rows:
        chosen, rejected = (
            log_prob(policy, row["prompt_ids"], row[name])
            - log_prob(reference, row["prompt_ids"], row[name]).detach()
            for name in ("chosen_ids", "rejected_ids")
        )
        losses.append(-torch.log(1 / (1 + torch.exp(-BETA * (chosen - rejected)))))
    return sum(losses) / len(losses)


def kto_by_hand(policy, reference, rows, wanted=1.0, unwanted=1.0):
    """Eq. 7 of arXiv 2402.01306; z0 from each prompt with the completion of the row before it."""

    def ratio(prompt, completion):
        return log_prob(policy, prompt, completion) - log_prob(reference, prompt, completion).detach()

    divergences = [ratio(row["prompt_ids"], rows[i - 1]["completion_ids"]) for i, row in enumerate(rows)]
    z0 = max(0.0, sum(d.item() for d in divergences) / len(rows))
    losses = []
    for row in rows:
        reward = ratio(row["prompt_ids"], row["completion_ids"])
        gain = BETA * (reward - z0) if row["label"] else BETA * (z0 - reward)
        losses.append((wanted if row["label"] else unwanted) * (1 - 1 / (1 + torch.exp(-gain))))
    return sum(losses) / len(losses)


@pytest.mark.parametrize("reference", ["copy", "precomputed"])
@pytest.mark.parametrize("neuron", [None, INTEGER])
@pytest.mark.parametrize("method", ["dpo", "kto"])
def test_the_loss_and_its_gradients_by_hand(method, neuron, reference, make):
    model = tiny_model(neuron=neuron)
    frozen = copy.deepcopy(model)
    weights = {"desirable_weight": 1.5, "undesirable_weight": 0.7} if method == "kto" else {}
    trainer = make(
        method, model, preferences(4), reference=reference, freeze_embeddings=False, objective=weights,
        training={"per_device_train_batch_size": 8 if method == "kto" else 4},
    )  # fmt: skip
    moved(model)
    rows = list(trainer.train_dataset)
    batch = trainer._prepare_inputs(trainer.data_collator(rows))
    model.train()
    trainer.compute_loss(model, batch).backward()
    loss = trainer.compute_loss(model, batch).item()
    found = {name: p.grad.clone() for name, p in model.named_parameters()}
    model.zero_grad()
    by_hand = (
        dpo_by_hand(model, frozen, rows) if method == "dpo" else kto_by_hand(model, frozen, rows, 1.5, 0.7)
    )
    by_hand.backward()
    assert loss == pytest.approx(by_hand.item(), abs=1e-5)
    at_start = {"dpo": math.log(2), "kto": 0.55}[method]
    assert abs(loss - at_start) > 1e-3  # the policy has moved, or this would compare constants
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(found[name], parameter.grad, atol=1e-5, rtol=1e-4, msg=name)
    assert sum(grad.abs().sum() for grad in found.values()) > 0.1


def test_rows_of_kto_pair_within_a_step(make):
    trainer = make("kto", tiny_model(), preferences(8))
    rows = trainer.train_dataset
    assert sum(rows["label"]) == 8
    for start in range(0, 16, 4):
        step = rows[start : start + 4]
        assert step["KL_completion_ids"] == [step["completion_ids"][i - 1] for i in range(4)]
    assert (
        len(set(rows["label"][:8])) == 2
    )  # wanted ones first, as trl makes of pairs, would teach in two halves


# --- what is trained ---


def separable(count, seed):
    """The chosen completion says token 7, the rejected one token 9, and otherwise the same."""
    found = []
    for index in range(count):
        ids = tokens(2, 6, seed=1000 * seed + index).tolist()
        found.append(Preference(ids[0], ([7, *ids[1][:2]], [9, *ids[1][:2]])))
    return found


@pytest.mark.parametrize("neuron", [None, INTEGER])
@pytest.mark.parametrize("method", ["dpo", "kto"])
def test_it_learns_a_separable_preference(method, neuron, make):
    model, held_out = tiny_model(neuron=neuron), separable(60, seed=2)
    before = evaluate_preferences(copy.deepcopy(model), held_out, None)
    trainer = make(
        method, model, separable(64, seed=1), training={"max_steps": 60, "per_device_train_batch_size": 16}
    )
    trainer.train()
    after = evaluate_preferences(model, held_out, None)
    assert before["accuracy"]["sum"]["average"] < 0.8
    assert after["accuracy"]["sum"]["average"] > 0.9
    assert compare(before, after)["accuracy"]["sum"]["average"]["low"] > 0.1
    assert (after["mean_abs"] is None) == (neuron is None)


@pytest.mark.parametrize("neuron", [None, INTEGER])
def test_where_nothing_is_held_out_no_number_is_made_up(neuron):
    measured = evaluate_preferences(tiny_model(neuron=neuron), None, None)
    assert set(measured.values()) == {None}
    results = {"before": measured, "after": measured, "change": compare(measured, measured)}
    assert summary(results).startswith("Nothing was measured")


@pytest.mark.parametrize("frozen", [True, False])
def test_what_moves_and_what_is_logged(frozen, make):
    model = tiny_model(neuron=INTEGER)
    before = copy.deepcopy(model.state_dict())
    trainer = make("dpo", model, preferences(8), freeze_embeddings=frozen)
    trainer.train()
    same = {name for name, weight in model.state_dict().items() if torch.equal(weight, before[name])}
    assert same == ({"backbone.embeddings.weight"} if frozen else set())
    reference = trainer.accelerator.unwrap_model(trainer.ref_model)
    assert all(torch.equal(weight, before[name]) for name, weight in reference.state_dict().items())
    rows = [row for row in trainer.state.log_history if "loss" in row]
    assert all(row["mean_abs_spike"] > 0 and row["sgc_lambda"] == 0 for row in rows)
    assert rows[0]["loss"] == pytest.approx(math.log(2), abs=1e-6)
    assert not trainer.args.gradient_checkpointing


def test_a_dense_model_logs_no_spikes(make):
    trainer = make("dpo", tiny_model(), preferences(8))
    trainer.train()
    assert "mean_abs_spike" not in trainer.state.log_history[0]


def test_compensation_is_annealed_and_not_in_the_reference(make):
    model = _with_sgc(tiny_model(neuron=INTEGER), {"mode": "blend", "schedule": "linear", "lam": 0.8})
    trainer = make("dpo", model, preferences(8))
    plain = make("dpo", tiny_model(neuron=INTEGER), preferences(8))
    batch = trainer._prepare_inputs(trainer.data_collator(list(trainer.train_dataset)[:4]))
    torch.testing.assert_close(
        trainer.compute_ref_log_probs(trainer.ref_model, batch),
        plain.compute_ref_log_probs(plain.ref_model, batch),
    )
    trainer.train()
    found = [row["sgc_lambda"] for row in trainer.state.log_history if "sgc_lambda" in row]
    assert found == pytest.approx([0.8, 0.6, 0.4, 0.2])


def test_gradient_checkpointing_trains_alike(make):
    weights = []
    for checkpointing in (False, True):
        model = tiny_model(neuron=INTEGER)
        make("dpo", model, preferences(8), training={"gradient_checkpointing": checkpointing}).train()
        weights.append(model.state_dict())
    for name in weights[0]:
        torch.testing.assert_close(weights[0][name], weights[1][name], msg=name)


def test_nothing_is_sent(make, monkeypatch):
    sent = []
    monkeypatch.setattr("trl.trainer.base_trainer.send_telemetry", lambda *args, **kwargs: sent.append(args))
    make("dpo", tiny_model(), preferences(4))
    make("kto", tiny_model(), preferences(4))
    assert not sent


def test_only_pairs_for_dpo():
    labelled = [Preference([1], ([2],), True)]
    with pytest.raises(RunError, match="DPO needs pairs"):
        pair_rows(labelled, "dpo")
    assert pair_rows(labelled, "kto")["label"] == [True]


# --- what is measured ---


def test_log_probabilities_and_scores_by_hand():
    model = tiny_model(neuron=INTEGER)
    rows = preferences(7)
    for index, row in enumerate(rows):
        row.task, row.item = ("a", index // 2) if index < 4 else ("b", index)
    flat = [(row.prompt, completion) for row in rows for completion in row.completions]
    by_hand = [float(log_prob(model, *row)) for row in flat]
    assert completion_log_probs(model, flat, batch_size=3).tolist() == pytest.approx(by_hand, abs=1e-4)
    for kind in ("sum", "per_token"):
        wins = []
        for row, pair in zip(rows, zip(by_hand[::2], by_hand[1::2], strict=True), strict=True):
            lengths = [len(c) if kind == "per_token" else 1 for c in row.completions]
            wins.append(float(pair[0] / lengths[0] > pair[1] / lengths[1]))
        expected = {"a": [(wins[0] + wins[1]) / 2, (wins[2] + wins[3]) / 2], "b": wins[4:]}
        assert preference_scores(model, rows)[kind] == expected


def test_scores_tell_length_from_likelihood():
    """A uniform model prefers the shorter completion by the sum, and neither by the token."""
    model = tiny_model(tie_word_embeddings=False)
    with torch.no_grad():
        model.lm_head.weight.zero_()
    scores = preference_scores(model, [Preference([1], ([2], [3, 4])), Preference([1], ([2, 3], [4]))])
    assert scores == {"sum": {"all": [1.0, 0.0]}, "per_token": {"all": [0.0, 0.0]}}


def test_nan_is_an_error():
    model = tiny_model()
    with torch.no_grad():
        model.backbone.norm_f.weight[0] = math.nan
    with pytest.raises(FloatingPointError, match="NaN"):
        preference_scores(model, preferences(2))


# --- whole runs ---


@pytest.fixture
def student(tokenizer, tmp_path):
    return finish_run(tiny_model(neuron=INTEGER), tokenizer, tmp_path, "student")


def words(ids):
    return " ".join(chr(64 + i) for i in ids)


def write_pairs(path, found):
    rows = [
        {"prompt": words(p.prompt)}
        | {name: f" {words(ids)}" for name, ids in zip(("chosen", "rejected"), p.completions, strict=True)}
        for p in found
    ]
    path.write_text("\n".join(map(json.dumps, rows)))
    return str(path)


@pytest.fixture
def fields(student, tmp_path):
    return {
        "model": str(student),
        "output": str(tmp_path / "run"),
        "data": write_pairs(tmp_path / "train.jsonl", separable(64, seed=1)),
        "held_out": write_pairs(tmp_path / "held_out.jsonl", separable(40, seed=2)),
        "length": 24,
        "text": None,
        "training": {
            "max_steps": 20, "per_device_train_batch_size": 16, "learning_rate": 1e-2, "bf16": False,
            "disable_tqdm": True, "save_steps": 10,
        },
    }  # fmt: skip


@pytest.mark.parametrize("method", ["dpo", "kto"])
def test_a_whole_run(method, fields, tmp_path):
    results = optimise(PreferenceSettings(**fields, method=method))
    gain = results["change"]["accuracy"]["sum"]["average"]
    assert gain["items"] == 40
    assert gain["low"] > 0.1
    assert results["rows"]["kept"] == 64
    assert results["before"]["perplexity"] is None
    assert results["after"]["mean_abs"] > 0
    assert json.loads((tmp_path / "run/results.json").read_text()) == json.loads(json.dumps(results))
    assert not (tmp_path / "run/README.md").exists()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"objective": {"betta": 0.1}}, "did you mean 'beta'"),
        ({"objective": {"max_length": 9}}, "Unknown key 'max_length'"),
        ({"method": "ppo"}, "must be 'dpo' or 'kto'"),
        ({"reference": "none"}, "'copy' or 'precomputed'"),
        ({"training": {"per_device_train_batch_size": 65}}, "64 rows, fewer than one batch of 65"),
        ({"sgc": {"mode": "mix"}}, "mode"),
        ({"model": "nowhere/at/all"}, "no checkpoint folder"),
        ({"bad_rows": "ignore"}, "'skip' or 'refuse'"),
    ],
)  # fmt: skip
def test_bad_settings_write_nothing(change, message, fields, tmp_path):
    with pytest.raises(ValueError, match=message):
        optimise(PreferenceSettings(**{"method": "dpo"} | fields | change))
    assert not (tmp_path / "run").exists()


def test_a_dense_model_has_no_compensation():
    with pytest.raises(ValueError, match="no use for sgc"):
        _with_sgc(tiny_model(), {"mode": "blend"})


def test_what_is_trained_on_is_not_held_out(fields, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    others = {"output": "run", "method": "dpo"}
    for held_out in (fields["data"], "train.jsonl", "./train.jsonl"):
        with pytest.raises(ValueError, match="must not be what is trained on"):
            PreferenceSettings(**fields | others | {"held_out": held_out})
    same = {"data": "answer_preference", "held_out": "answer_preference", "split": "validation"}
    with pytest.raises(ValueError, match="must not be what is trained on"):
        PreferenceSettings(**fields | others | same)
    PreferenceSettings(**fields | others | same | {"split": "train"})
    PreferenceSettings(**fields | others | {"held_out": None})


def test_held_out_rows_are_pairs(fields, tmp_path):
    (tmp_path / "labelled.jsonl").write_text('{"prompt": "A", "completion": " B", "label": true}')
    with pytest.raises(RunError, match="must hold pairs"):
        optimise(PreferenceSettings(method="kto", **fields | {"held_out": str(tmp_path / "labelled.jsonl")}))


assert issubclass(SpikingDPOTrainer, trl.DPOTrainer)
assert issubclass(SpikingKTOTrainer, trl.KTOTrainer)


@pytest.mark.parametrize("loaded", [False, True])
def test_trls_own_trainer(loaded, tokenizer, tmp_path):
    """By a folder's name alone, and the reference by that of the model that was loaded."""
    folder = tmp_path / "model"
    tiny_model(neuron=INTEGER).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    assert "auto_map" not in json.loads((folder / "config.json").read_text())
    rows = [
        {"prompt": "A B", "chosen": " C D", "rejected": " E"},
        {"prompt": "C", "chosen": " B", "rejected": " A"},
    ]
    args = trl.DPOConfig(
        output_dir=str(tmp_path / "run"),
        max_steps=3,
        per_device_train_batch_size=2,
        learning_rate=1e-2,
        bf16=False,
        use_cpu=True,
        logging_steps=1,
        save_strategy="no",
        report_to=[],
        disable_tqdm=True,
    )
    model = SpikingMambaForCausalLM.from_pretrained(folder) if loaded else str(folder)
    trainer = trl.DPOTrainer(
        model=model, args=args, train_dataset=datasets.Dataset.from_list(rows), processing_class=tokenizer
    )
    trainer.train()
    losses = [row["loss"] for row in trainer.state.log_history if "loss" in row]
    assert losses[0] == pytest.approx(math.log(2), abs=1e-4)  # the model is its own reference at first
    assert losses[-1] < losses[0]
    assert trainer.model.config.neuron == INTEGER


def test_compensation_may_be_asked_for():
    settings = PreferenceSettings(model="none", output="none", method="dpo", sgc={"mode": "blend"})
    assert settings.sgc == {"mode": "blend"}
    with pytest.raises(ValueError, match="mode"):
        PreferenceSettings(model="none", output="none", method="dpo", sgc={"mode": "none"})
