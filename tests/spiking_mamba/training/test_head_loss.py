"""The loss from hidden states in pieces: against plain logits, in time-honoured autograd, and its memory."""

import pytest
import torch
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from spiking_mamba.training import head_loss as module
from spiking_mamba.training.arguments import autocast, training_arguments
from spiking_mamba.training.head_loss import head_loss
from spiking_mamba.training.pretraining import PretrainingTrainer
from tests.helpers.tiny import tiny_model, tokens

TOKENS, WIDTH, VOCABULARY = 37, 12, 101


def plain(hidden, weight, teacher, targets, kl, cross_entropy, temperature):
    """The same loss from whole logits, by autograd."""
    logits = F.linear(hidden, weight).float()
    total = logits.sum() * 0
    if teacher is not None:
        with torch.no_grad():
            other = F.linear(*teacher).float()
        own, other = (F.log_softmax(z / temperature, -1) for z in (logits, other))
        total = total + kl * temperature**2 * F.kl_div(own, other, reduction="sum", log_target=True)
    if targets is not None:
        total = total + cross_entropy * F.cross_entropy(logits, targets, reduction="sum")
    return total / max(1, len(hidden))


def problem(dtype=torch.float32, trained=True, tokens=TOKENS):
    generator = torch.Generator().manual_seed(3)
    hidden, theirs = torch.randn(2, tokens, WIDTH, generator=generator)
    weight, other = torch.randn(2, VOCABULARY, WIDTH, generator=generator)
    targets = torch.randint(VOCABULARY, (tokens,), generator=generator)
    hidden = hidden.to(dtype).requires_grad_()
    weight = weight.to(dtype).requires_grad_(trained)
    return hidden, weight, (theirs.to(dtype), other.to(dtype)), targets


def gradients(loss, *tensors):
    return torch.autograd.grad(3.0 * loss, [t for t in tensors if t.requires_grad])


TERMS = {
    "kl": (1.0, 0.0, 1.0),
    "temperature": (0.7, 0.0, 2.5),
    "both": (0.7, 0.3, 2.0),
    "cross-entropy": (0.0, 1.0, 1.0),
}


@pytest.mark.parametrize("trained", [True, False])
@pytest.mark.parametrize("rows", [1, 5, TOKENS - 1, TOKENS, 1000])
@pytest.mark.parametrize("terms", TERMS.values(), ids=TERMS)
def test_value_and_gradients_equal_the_plain_formula(terms, rows, trained, monkeypatch):
    monkeypatch.setattr(module, "_LOGITS_AT_A_TIME", rows * VOCABULARY)
    kl, cross_entropy, temperature = terms
    hidden, weight, teacher, targets = problem(trained=trained)
    teacher, targets = teacher if kl else None, targets if cross_entropy else None
    weights = {"kl": kl, "cross_entropy": cross_entropy, "temperature": temperature}
    loss, parts = head_loss(hidden, weight, teacher=teacher, targets=targets, **weights)
    wanted = plain(hidden, weight, teacher, targets, **weights)
    torch.testing.assert_close(loss, wanted, rtol=1e-6, atol=1e-6)
    assert set(parts) == {name for name, t in (("kl", teacher), ("ce", targets)) if t is not None}
    assert not any(part.requires_grad for part in parts.values())
    assert loss.item() == pytest.approx(
        kl * parts.get("kl", torch.zeros(())).item() + cross_entropy * parts.get("ce", torch.zeros(())).item()
    )
    for own, other in zip(gradients(loss, hidden, weight), gradients(wanted, hidden, weight), strict=True):
        assert own.abs().max() > 1e-3
        torch.testing.assert_close(own, other, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("rows", [5, 1000])
def test_gradients_in_double(rows, monkeypatch):
    monkeypatch.setattr(module, "_LOGITS_AT_A_TIME", rows * VOCABULARY)
    hidden, weight, teacher, targets = problem(torch.float64, tokens=11)
    direction = torch.randn(hidden.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)

    def value(step):
        with torch.no_grad():
            shifted = hidden + step * direction
            return plain(shifted, weight, teacher, targets, 0.7, 0.3, 2.0).item()

    loss, _ = head_loss(
        hidden, weight, teacher=teacher, targets=targets, kl=0.7, cross_entropy=0.3, temperature=2.0
    )
    (gradient,) = torch.autograd.grad(loss, hidden)
    numeric = (value(1e-3) - value(-1e-3)) / 2e-3
    assert (gradient * direction).sum().item() == pytest.approx(numeric, rel=1e-3)


@pytest.mark.parametrize("trained", [True, False])
def test_under_bf16_autocast(trained):
    """The same products in bf16 and softmaxes in float32 as plain autograd under autocast."""
    hidden, weight, teacher, targets = problem(trained=trained)
    with torch.autocast("cpu", torch.bfloat16):
        loss, _ = head_loss(hidden, weight, teacher=teacher, targets=targets, temperature=2.0)
        wanted = plain(hidden, weight, teacher, targets, 1.0, 1.0, 2.0)
    assert loss.dtype is torch.float32
    assert loss.item() == pytest.approx(wanted.item(), rel=1e-6)
    own, other = gradients(loss, hidden, weight), gradients(wanted, hidden, weight)
    exact = plain(hidden, weight, teacher, targets, 1.0, 1.0, 2.0)
    for a, b, c in zip(own, other, gradients(exact, hidden, weight), strict=True):
        assert a.dtype is torch.float32
        assert (a - b).abs().max() <= 0.01 * c.abs().max()
        assert (a - c).norm() <= 1.1 * (b - c).norm()  # no further from float32 than autograd is


def test_without_tokens_and_without_gradients():
    hidden, weight, teacher, targets = problem(tokens=0)
    loss, _ = head_loss(hidden, weight, teacher=teacher, targets=targets)
    assert loss.item() == 0.0
    loss.backward()
    assert not weight.grad.any()
    hidden, weight, teacher, targets = problem()
    with torch.no_grad():
        quiet, _ = head_loss(hidden, weight, teacher=teacher, targets=targets)
    assert not quiet.requires_grad
    assert quiet.item() == head_loss(hidden, weight, teacher=teacher, targets=targets)[0].item()


def tensors(tree):
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, torch.Tensor)]


class Largest(TorchDispatchMode):
    """The number of elements of the largest tensor that any operation makes, views left out."""

    def __init__(self):
        super().__init__()
        self.elements = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **kwargs or {})
        given = {tensor.untyped_storage().data_ptr() for tensor in tensors((args, kwargs))}
        for tensor in tensors(result):
            if tensor.untyped_storage().data_ptr() not in given:
                self.elements = max(self.elements, tensor.numel())
        return result


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("trained", [True, False])
def test_whole_logits_never_exist(trained, autocast, monkeypatch):
    rows = 4
    monkeypatch.setattr(module, "_LOGITS_AT_A_TIME", rows * VOCABULARY)
    hidden, weight, teacher, targets = problem(trained=trained)
    with Largest() as largest, torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        loss, _ = head_loss(hidden, weight, teacher=teacher, targets=targets)
        loss.backward()
    assert rows * VOCABULARY <= largest.elements <= VOCABULARY * WIDTH < TOKENS * VOCABULARY
    with Largest() as largest:
        plain(hidden, weight, teacher, targets, 1.0, 1.0, 1.0).backward()
    assert largest.elements == TOKENS * VOCABULARY  # the counter sees them where they are
    assert (weight.grad is None) is not trained


def test_a_frozen_head_costs_no_gradient_of_its_size(monkeypatch):
    monkeypatch.setattr(module, "_LOGITS_AT_A_TIME", VOCABULARY)
    hidden, weight, teacher, _ = problem(trained=False)
    with Largest() as largest:
        head_loss(hidden, weight, teacher=teacher)[0].backward()
    assert largest.elements < VOCABULARY * WIDTH


@pytest.mark.parametrize("bf16", [False, True])
def test_pretraining_has_the_models_own_loss(bf16, tmp_path):
    model = tiny_model(tie_word_embeddings=True)
    arguments = training_arguments(tmp_path, {"bf16": bf16, "use_cpu": True}, seed=0)
    trainer = PretrainingTrainer(model, arguments)
    ids = tokens(3, 9)
    labels = ids.clone()
    labels[0, :4], labels[2] = -100, -100
    model.train()
    with autocast(trainer):
        wanted = model(ids, labels=labels).loss
        found = trainer.compute_loss(model, {"input_ids": ids, "labels": labels})
    assert found.item() == pytest.approx(wanted.item(), rel=1e-6)
    for own, other in zip(
        *(torch.autograd.grad(x, model.parameters()) for x in (found, wanted)), strict=True
    ):
        assert (own - other).norm() <= (0.02 if bf16 else 1e-5) * other.norm()


def test_compiled_pieces_are_no_different(monkeypatch):
    torch.compiler.reset()
    monkeypatch.setattr(module, "_COMPILED_LOGITS_AT_A_TIME", 16 * VOCABULARY)  # 16, 16 and 5 tokens
    for terms in (TERMS["both"], TERMS["cross-entropy"]):
        kl, cross_entropy, temperature = terms
        hidden, weight, teacher, targets = problem()
        results = []
        for compiles in (False, True):
            loss, parts = head_loss(
                hidden,
                weight,
                teacher=teacher if kl else None,
                targets=targets,
                kl=kl,
                cross_entropy=cross_entropy,
                temperature=temperature,
                compiles=compiles,
            )
            results.append((loss.detach(), *parts.values(), *gradients(loss, hidden, weight)))
        for plain_one, compiled in zip(*results, strict=True):
            torch.testing.assert_close(compiled, plain_one, rtol=1e-5, atol=1e-6)
