"""Classification: the score at the last token of every sequence, however sequences lie in a batch."""

import copy
import json

import pytest
import torch
from peft import LoraConfig, TaskType, get_peft_model
from safetensors.torch import load_file, save_file
from torch.nn import functional as F
from transformers import AutoModelForSequenceClassification, Trainer, TrainingArguments

from spiking_mamba import (
    SpikingMambaForCausalLM,
    SpikingMambaForSequenceClassification,
    spike_driven,
)
from spiking_mamba.spikes import count_spikes
from tests.helpers.tiny import INTEGER, LEAKY, shake, tiny_config, tiny_model, tokens

MODELS = {"dense": {}, "spiking": {"neuron": INTEGER}, "sequence": {"neuron": LEAKY, "membrane": "sequence"}}
LENGTHS = (5, 9, 1, 7)


def classifier(num_labels=3, **fields):
    torch.manual_seed(0)
    return shake(SpikingMambaForSequenceClassification(tiny_config(num_labels=num_labels, **fields))).eval()


@pytest.fixture(params=MODELS.values(), ids=MODELS)
def model(request):
    return classifier(**request.param)


def documents():
    """Token ids of several lengths, none of them the padding's, which is 0."""
    return [tokens(1, length, seed)[0].clamp(min=1) for seed, length in enumerate(LENGTHS)]


def each_alone(model):
    """The scores of every document by itself, by the last hidden state and the weights."""
    with torch.no_grad():
        states = [model.backbone(ids[None]).last_hidden_state[0, -1] for ids in documents()]
        return torch.stack(states) @ model.score.weight.T


def padded(side):
    ids, mask = torch.zeros(4, 9, dtype=torch.long), torch.zeros(4, 9, dtype=torch.long)
    for row, document in enumerate(documents()):
        place = slice(0, len(document)) if side == "right" else slice(9 - len(document), 9)
        ids[row, place], mask[row, place] = document, 1
    return ids, mask


@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_on_either_side(model, side):
    ids, mask = padded(side)
    with torch.no_grad():
        found = model(ids, attention_mask=mask).logits
        assert (found - each_alone(model)).abs().max() <= 1e-5
        if side == "right":  # without a mask, the padding is told by its id
            assert torch.equal(model(ids).logits, found)
        embeds = model.backbone.embeddings(ids)
        assert torch.equal(model(inputs_embeds=embeds, attention_mask=mask).logits, found)


def test_a_real_token_with_the_id_of_padding_is_told_by_the_mask(model):
    ids = torch.cat([documents()[0], torch.zeros(1, dtype=torch.long)])[None]
    with torch.no_grad():
        expected = model.backbone(ids).last_hidden_state[:, -1] @ model.score.weight.T
        assert torch.allclose(model(ids, attention_mask=torch.ones_like(ids)).logits, expected, atol=1e-6)


def test_packed_rows(model):
    ids = torch.cat(documents())[None]
    ends = torch.tensor(LENGTHS).cumsum(0)
    packed = {
        "position_ids": torch.cat([torch.arange(length) for length in LENGTHS])[None],
        "seq_idx": torch.arange(4).repeat_interleave(torch.tensor(LENGTHS))[None],
        "cu_seq_lens_q": torch.cat([torch.zeros(1, dtype=torch.long), ends]),
    }
    expected = each_alone(model)
    with torch.no_grad():
        for name, value in packed.items():
            found = model(ids, **{name: value}).logits
            assert found.shape == (4, 3), name
            assert (found - expected).abs().max() <= 1e-5, name
        # two rows of two documents, the first with padding within and at its end
        rows = torch.zeros(2, 16, dtype=torch.long)
        mask, idx = torch.zeros_like(rows), torch.full_like(rows, -1)
        for number, (row, start) in enumerate([(0, 0), (0, 6), (1, 0), (1, 4)]):
            place = (row, slice(start, start + LENGTHS[number]))
            rows[place], mask[place], idx[place] = documents()[number], 1, number
        found = model(rows, attention_mask=mask, seq_idx=idx).logits
        assert (found - expected).abs().max() <= 1e-5


def test_a_row_of_padding_alone_keeps_its_place(model):
    ids = tokens(2, 4).clamp(min=1)
    mask = torch.tensor([[0, 0, 0, 0], [1, 1, 0, 0]])
    with torch.no_grad():
        found = model(ids, attention_mask=mask).logits
        assert found.shape == (2, 3)
        assert torch.allclose(found[1:], model(ids[1:, :2]).logits, atol=1e-5)


def test_losses_are_those_of_the_problem():
    ids, mask = padded("left")
    chosen, several = torch.tensor([0, 2, 1, 1]), (torch.arange(12).reshape(4, 3) % 2).float()
    for labels, num_labels, problem, loss in (
        (chosen, 3, "single_label_classification", F.cross_entropy),
        (several, 3, "multi_label_classification", F.binary_cross_entropy_with_logits),
        (several[:, 0], 1, "regression", lambda found, wanted: F.mse_loss(found[:, 0], wanted)),
    ):
        model = classifier(num_labels)
        output = model(ids, attention_mask=mask, labels=labels)
        assert model.config.problem_type == problem
        assert torch.allclose(output.loss, loss(output.logits, labels), atol=1e-6)
        assert model(ids, attention_mask=mask, labels=labels, return_dict=False)[0] == output.loss


def test_from_a_language_model(tmp_path, caplog):
    language = tiny_model(neuron=INTEGER, threshold=0.5)
    language.save_pretrained(tmp_path / "language")
    model = AutoModelForSequenceClassification.from_pretrained(tmp_path / "language", num_labels=4)
    assert type(model) is SpikingMambaForSequenceClassification
    assert model.score.weight.shape == (4, 32)
    assert model.score.weight.std() > 0
    for name, weight in language.backbone.state_dict().items():
        assert torch.equal(model.backbone.state_dict()[name], weight)

    model.save_pretrained(tmp_path / "classifier")
    again = AutoModelForSequenceClassification.from_pretrained(tmp_path / "classifier")
    ids = tokens(2, 6)
    with torch.no_grad():
        assert torch.equal(again(ids).logits, model.eval()(ids).logits)
    # its own checkpoint must be whole, and a language model's must be but for the head
    for folder, key in (("classifier", "score.weight"), ("language", "backbone.norm_f.weight")):
        weights = load_file(tmp_path / folder / "model.safetensors")
        weights.pop(key)
        save_file(weights, tmp_path / folder / "model.safetensors", metadata={"format": "pt"})
        with pytest.raises(ValueError, match=f"missing keys: {key}"):
            AutoModelForSequenceClassification.from_pretrained(tmp_path / folder)
    model.save_pretrained(tmp_path / "whole")
    with pytest.raises(ValueError, match=r"missing keys: lm_head.weight; unexpected keys: score.weight"):
        SpikingMambaForCausalLM.from_pretrained(tmp_path / "whole")
    assert json.loads((tmp_path / "whole" / "config.json").read_text())["architectures"] == [
        "SpikingMambaForSequenceClassification"
    ]


def test_trains_by_transformers_trainer(tmp_path):
    """Which of two tokens a sequence ends in: the loss falls, and is a mean over sequences."""
    model = classifier(2, neuron=INTEGER)
    rows = [
        {"input_ids": [5, 9, 3 + label], "labels": label, "attention_mask": [1, 1, 1]} for label in (0, 1) * 8
    ]
    settings = TrainingArguments(
        tmp_path, max_steps=12, per_device_train_batch_size=4, gradient_accumulation_steps=2,
        learning_rate=1e-2, report_to=[], use_cpu=True, logging_steps=1, save_strategy="no",
    )  # fmt: skip
    trainer = Trainer(copy.deepcopy(model), settings, train_dataset=rows)
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    batch = {key: torch.tensor([row[key] for row in rows]) for key in rows[0]}
    assert losses[0] == pytest.approx(model(**batch).loss.item(), abs=0.3)
    assert losses[-1] < 0.5 * losses[0]


def test_spikes_and_adapters():
    model = classifier(neuron=INTEGER)
    ids, mask = padded("right")
    with torch.no_grad(), count_spikes(model) as counts:
        expected = model(ids, attention_mask=mask).logits
        assert counts.mean_abs > 0
        assert torch.allclose(spike_driven(model)(ids, attention_mask=mask).logits, expected, atol=1e-5)
    adapted = get_peft_model(
        model, LoraConfig(r=4, target_modules=["in_proj", "out_proj"], task_type=TaskType.SEQ_CLS)
    )
    trained = {name for name, parameter in adapted.named_parameters() if parameter.requires_grad}
    assert sum("score" in name for name in trained) == 1
    adapted(ids, attention_mask=mask, labels=torch.tensor([0, 1, 2, 0])).loss.backward()
    assert all(p.grad is not None for p in adapted.parameters() if p.requires_grad)
    adapted.eval()
    with torch.no_grad():
        unmerged = adapted(ids, attention_mask=mask).logits
        merged = adapted.merge_and_unload()(ids, attention_mask=mask).logits
    assert (merged - unmerged).abs().max() <= 1e-5
