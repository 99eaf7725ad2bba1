"""TRL's SFTTrainer, offline: packed rows without padding learn what documents by themselves would."""

import copy

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast
from trl import SFTConfig, SFTTrainer

from tests.helpers.tiny import INTEGER, LEAKY, VOCABULARY, tiny_model, tokens

DOCUMENTS = [tokens(1, length, seed=length)[0].tolist() for length in (5, 9, 7, 12, 3, 8, 10, 6)]
MODELS = {
    "spiking": {"neuron": INTEGER, "threshold": 0.5},
    "sequence": {"neuron": LEAKY, "membrane": "sequence"},
}
WAYS = {
    "packed": {"packing": True, "max_length": 16},
    "padding_free": {"padding_free": True, "max_length": None},
    "padded": {"max_length": None},
}


def tokenizer():
    made = Tokenizer(models.WordLevel({str(i): i for i in range(VOCABULARY)}, unk_token="1"))
    made.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=made, pad_token="0", eos_token="2")


def trainer(model, folder, peft_config=None, **settings):
    settings = {"max_steps": 1, "learning_rate": 0.0, "per_device_train_batch_size": 8} | settings
    config = SFTConfig(
        folder, report_to=[], use_cpu=True, bf16=False, logging_steps=1, save_strategy="no",
        gradient_checkpointing=True, eos_token="2", disable_tqdm=True, **settings,
    )  # fmt: skip
    rows = Dataset.from_dict({"input_ids": DOCUMENTS})
    return SFTTrainer(
        copy.deepcopy(model),
        config,
        train_dataset=rows,
        processing_class=tokenizer(),
        peft_config=peft_config,
    )


def loss_of_documents(model):
    """The mean over all tokens that follow others, a document at a time, and its gradient's norm."""
    model = copy.deepcopy(model).train()
    count = sum(len(document) - 1 for document in DOCUMENTS)
    for document in DOCUMENTS:
        ids = torch.tensor([document])
        (model(ids, labels=ids).loss * (len(document) - 1) / count).backward()
    with torch.no_grad():
        losses = [
            model(ids, labels=ids).loss.item() * (ids.shape[1] - 1)
            for ids in (torch.tensor([document]) for document in DOCUMENTS)
        ]
    norm = torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None]).norm()
    return sum(losses) / count, norm.item()


@pytest.mark.parametrize("fields", MODELS.values(), ids=MODELS)
def test_packed_rows_learn_what_documents_would(fields, tmp_path):
    model = tiny_model(**fields)
    loss, norm = loss_of_documents(model)
    for name, settings in WAYS.items():
        trained = trainer(model, tmp_path, **settings)
        batch = next(iter(trained.get_train_dataloader()))
        if name != "padded":  # one row, whose positions begin again with every document
            assert batch["input_ids"].shape == (1, sum(map(len, DOCUMENTS)))
            assert int((batch["position_ids"] == 0).sum()) == len(DOCUMENTS)
        trained.train()
        entry = trained.state.log_history[0]
        assert entry["loss"] == pytest.approx(loss, abs=1e-5), name
        assert entry["grad_norm"] == pytest.approx(norm, rel=1e-4), name


def test_adapters_train_on_packed_rows(tmp_path):
    model = tiny_model(neuron=INTEGER, threshold=0.5)
    adapters = LoraConfig(r=4, target_modules=["in_proj", "out_proj"], task_type="CAUSAL_LM")
    trained = trainer(model, tmp_path, adapters, packing=True, max_length=16, max_steps=8, learning_rate=1e-2)
    trained.train()
    losses = [entry["loss"] for entry in trained.state.log_history if "loss" in entry]
    assert losses[-1] < 0.95 * losses[0]
    moved = {n: p for n, p in trained.model.named_parameters() if p.requires_grad}
    assert len(moved) == 2 * 2 * 2
    assert all("lora_" in name for name in moved)
