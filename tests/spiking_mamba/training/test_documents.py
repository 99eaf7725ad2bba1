"""Documents packed in one row start afresh in every training, so that no state leaks from one to the next."""

from itertools import pairwise

import datasets
import pytest
import torch
from torch.nn import functional as F
from transformers import AutoTokenizer

from spiking_mamba import SpikingMambaForCausalLM, data
from spiking_mamba.model.checkpoint import load_dense
from spiking_mamba.training.arguments import training_arguments
from spiking_mamba.training.distillation import DistillationSettings, DistillationTrainer, distill
from spiking_mamba.training.distillation_loss import DistillationLoss
from spiking_mamba.training.pretraining import PretrainingSettings, PretrainingTrainer, pretrain
from spiking_mamba.training.rows import collate
from tests.helpers.tiny import INTEGER, LEAKY, tiny_model, tokens

END = 0


def row(*documents):
    """Documents of ids as `tokenize` packs them: end-of-text between them, not before."""
    ids = [token for document in documents for token in (END, *document)][1:]
    return {"input_ids": ids}


def document(length, seed):
    return (1 + tokens(1, length, seed=seed)[0] % 60).tolist()  # without an end-of-text token


def test_numbers_of_documents():
    batch = collate([row([5, 6], [7], [8, 9]), row([5, 6, 7, 8, 9, 5, 6])], end_of_text=END)
    assert batch["input_ids"].tolist() == [[5, 6, 0, 7, 0, 8, 9], [5, 6, 7, 8, 9, 5, 6]]
    assert batch["seq_idx"].tolist() == [[0, 0, 1, 1, 2, 2, 2], [0] * 7]
    assert batch["seq_idx"].dtype == torch.int32
    assert "seq_idx" not in collate([row([5, 6])])


def arguments(folder):
    return training_arguments(folder, {"max_steps": 1, "bf16": False, "disable_tqdm": True}, seed=0)


def loss_of_the_last(trainer, rows, length, end):
    """The loss of the last ``length`` tokens of the rows, and the gradient's length."""
    batch = collate(rows, end)
    batch["labels"][:, :-length] = -100
    trainer.model.zero_grad()
    loss = trainer.compute_loss(trainer.model, batch)
    loss.backward()
    gradient = torch.stack([p.grad.norm() for p in trainer.model.parameters() if p.grad is not None]).norm()
    return torch.stack([loss.detach(), gradient])


@pytest.mark.parametrize("kind", ["pretraining", "token", "sequence"])
def test_the_loss_of_a_document_does_not_depend_on_what_stands_before_it(kind, tmp_path):
    last = document(9, seed=1)
    alone, *packed = (
        [row(*before, last)]
        for before in ([[]], [document(11, 2)], [document(11, 3)], [document(4, 4), [5] * 6])
    )
    teacher = tiny_model(tie_word_embeddings=True)
    if kind == "pretraining":
        trainer = PretrainingTrainer(model=tiny_model().train(), args=arguments(tmp_path))
    else:
        neuron = {"token": INTEGER, "sequence": LEAKY}[kind]
        student = SpikingMambaForCausalLM.from_dense(teacher, neuron=neuron, membrane=kind, threshold=0.7)
        loss = DistillationLoss(hidden=0.5, cross_entropy=0.1)
        trainer = DistillationTrainer(student.train(), teacher, loss=loss, args=arguments(tmp_path))
    expected = loss_of_the_last(trainer, alone, len(last), END)
    for rows in packed:
        found = loss_of_the_last(trainer, rows, len(last), END)
        torch.testing.assert_close(found, expected, rtol=2e-4, atol=1e-6)
        leaking = loss_of_the_last(trainer, rows, len(last), None)
        assert (leaking - expected)[0].abs() > 1e-3


def by_document(model, ids):
    """Logits of a row ``[L]`` of ids, every document fed on its own: ``[L, vocabulary]``."""
    starts = [0, *(place for place, token in enumerate(ids) if token == END and place), len(ids)]
    parts = [torch.tensor([ids[a:b]]) for a, b in pairwise(starts)]
    with torch.no_grad():
        return torch.cat([model(part, use_cache=False).logits[0] for part in parts])


@pytest.fixture
def text(tmp_path):
    for name, start in (("train", 0), ("held", 500)):
        lines = [f"Document {i}: {i * 7} lazy dogs met {i % 13} foxes." for i in range(start, start + 120)]
        (tmp_path / f"{name}.txt").write_text("\n\n".join(lines))
    return tmp_path


@pytest.mark.parametrize("separate", [True, False])
def test_pretraining_keeps_documents_apart(separate, text):
    training = {"max_steps": 1, "eval_steps": 1, "per_device_train_batch_size": 4, "bf16": False}
    training |= {"per_device_eval_batch_size": 4, "disable_tqdm": True, "save_strategy": "no"}
    model = {"hidden_size": 32, "num_hidden_layers": 2, "state_size": 8, "chunk_size": 16, "head_dim": 16}
    settings = PretrainingSettings(
        str(text / "run"), str(text / "train.txt"), 48, vocab_size=300, held_out=str(text / "held.txt"),
        model=model, training=training, separate_documents=separate,
    )  # fmt: skip
    folder, log = pretrain(settings)
    trained, tokenizer = load_dense(folder), AutoTokenizer.from_pretrained(folder)
    assert tokenizer.eos_token_id == END
    rows = data.tokenize(data.load_text(settings.held_out), tokenizer, 48)["input_ids"][:]
    rows = rows[: len(rows) // 4 * 4]  # whole batches
    assert all(END in ids for ids in rows)
    apart = torch.stack([by_document(trained, ids) for ids in rows])
    with torch.no_grad():
        together = trained(torch.tensor(rows), use_cache=False).logits
    losses = [
        float(F.cross_entropy(logits[:, :-1].flatten(0, 1), torch.tensor(rows)[:, 1:].flatten()))
        for logits in (apart, together)
    ]
    (found,) = (entry["eval_loss"] for entry in log if "eval_loss" in entry)
    assert found == pytest.approx(losses[not separate], rel=1e-6)
    assert losses[0] != pytest.approx(losses[1], rel=1e-5)


@pytest.mark.parametrize("separate", [True, False])
def test_distillation_keeps_documents_apart(separate, tmp_path):
    """For teacher and student alike: the loss that is logged of the first step is that of the start."""
    teacher = tiny_model(tie_word_embeddings=True, eos_token_id=END)
    rows = [
        row(document(7, 1), document(6, 2), document(3, 3))["input_ids"],
        row(document(18, 4))["input_ids"],
    ]
    settings = DistillationSettings(
        teacher="", output=str(tmp_path / "run"), neuron=INTEGER, threshold=0.7, separate_documents=separate,
        training={"max_steps": 1, "per_device_train_batch_size": 2, "logging_steps": 1, "bf16": False},
    )  # fmt: skip
    _, log = distill(settings, teacher, rows=datasets.Dataset.from_dict({"input_ids": rows}))
    student = SpikingMambaForCausalLM.from_dense(teacher, neuron=INTEGER, threshold=0.7).eval()
    divergences = []
    for ids in rows:
        if separate:
            p, q = (by_document(model, ids) for model in (teacher, student))
        else:
            with torch.no_grad():
                p, q = (model(torch.tensor([ids]), use_cache=False).logits[0] for model in (teacher, student))
        p, q = p.log_softmax(-1)[:-1], q.log_softmax(-1)[:-1]
        divergences.append((p.exp() * (p - q)).sum(-1))
    (found,) = (entry["kl"] for entry in log if "kl" in entry)
    assert found == pytest.approx(float(torch.cat(divergences).mean()), rel=1e-5)
