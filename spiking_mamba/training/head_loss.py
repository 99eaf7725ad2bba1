"""KL and cross-entropy over a large vocabulary, from hidden states, a piece of the tokens at a time.

The logits of 16,000 tokens over 50,000 words are 3 GB in float32, and a KL with its gradient wants half a
dozen such tensors. Here they never exist at once: every piece's logits are made, used for the loss and for
its gradient with respect to the hidden states, and thrown away, so nothing is computed twice either.
"""

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

__all__ = ["head_loss"]

# Logits made at a time, 128 MB in float32, of which about six such tensors live at once. A batch that has
# fewer is one piece. Compiled, there is one such tensor, in the autocast dtype, and GPUs like it larger.
_LOGITS_AT_A_TIME = 2**25
_COMPILED_LOGITS_AT_A_TIME = 2**28


def _piece(
    logits: torch.Tensor,
    targets: torch.Tensor | None,
    teacher_logits: torch.Tensor | None,
    kl: float,
    cross_entropy: float,
    temperature: float,
    with_gradient: bool,
) -> tuple[dict[str, torch.Tensor], torch.Tensor | None]:
    """The sums over a piece's tokens, and their weighted sum's gradient to its logits ``[n, vocab_size]``.

    Works in place on float32 tensors of its own where it is not compiled.
    """
    dtype, gradient = logits.dtype, None
    logits, sums = logits.float(), {}
    if targets is not None:
        log_p = F.log_softmax(logits, dim=-1)
        sums["ce"] = -log_p.gather(1, targets[:, None]).sum()
        if with_gradient and torch.compiler.is_compiling():  # a comparison fuses, a scattered write does not
            hit = torch.arange(logits.shape[1], device=logits.device) == targets[:, None]
            gradient = (log_p.exp() - hit.float()) * cross_entropy
        elif with_gradient:
            minus = -torch.ones_like(targets, dtype=log_p.dtype)[:, None]
            gradient = log_p.exp_().scatter_add_(1, targets[:, None], minus).mul_(cross_entropy)
    if teacher_logits is not None:
        log_q = F.log_softmax(teacher_logits.float().div_(temperature), dim=-1)
        if (
            torch.compiler.is_compiling()
        ):  # in place, torch 2.11 would divide before the loss above reads them
            logits = logits / temperature
        else:
            logits.div_(temperature)
        log_p = F.log_softmax(logits, dim=-1)
        q = log_q.exp()
        sums["kl"] = temperature**2 * (log_q.sub_(log_p).mul_(q)).sum()
        if with_gradient:
            difference = log_p.exp_().sub_(q).mul_(kl * temperature)
            gradient = difference if gradient is None else gradient.add_(difference)
    return sums, None if gradient is None else gradient.to(dtype)


@functools.cache
def _compiled_piece() -> Callable[..., Any]:
    return torch.compile(_piece)


class _HeadLoss(torch.autograd.Function):
    """The gradient is taken in the forward pass, for a loss of which the weights are known there."""

    @staticmethod
    def forward(
        ctx, hidden, weight, teacher, targets, kl, cross_entropy, temperature, with_gradient, compiles
    ):
        own_gradient, weight_gradient = (needed and with_gradient for needed in ctx.needs_input_grad[:2])
        device = hidden.device.type
        dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else weight.dtype
        matrix = weight.to(dtype)
        if teacher is not None:
            teacher_hidden, teacher_matrix = teacher[0], teacher[1].to(dtype)
        sums = {name: hidden.new_zeros((), dtype=torch.float32) for name in ("kl", "ce")}
        hidden_grad = torch.zeros_like(hidden) if own_gradient else None
        weight_grad = torch.zeros_like(weight, dtype=torch.float32) if weight_gradient else None
        size = max(1, (_COMPILED_LOGITS_AT_A_TIME if compiles else _LOGITS_AT_A_TIME) // len(weight))
        of_piece = _compiled_piece() if compiles else _piece
        with torch.autocast(device, enabled=False):
            for start in range(0, len(hidden), size):
                piece = slice(start, start + size)
                own = hidden[piece].to(dtype)
                others = None
                if teacher is not None:
                    others = F.linear(teacher_hidden[piece].to(dtype), teacher_matrix)
                terms, gradient = of_piece(
                    F.linear(own, matrix),
                    None if targets is None else targets[piece],
                    others,
                    kl,
                    cross_entropy,
                    temperature,
                    with_gradient,
                )
                for name, value in terms.items():
                    sums[name] += value
                if hidden_grad is not None:
                    hidden_grad[piece] = gradient @ matrix
                if weight_grad is not None and gradient is not None:
                    weight_grad += gradient.T @ own
        ctx.dtypes = hidden.dtype, weight.dtype
        ctx.save_for_backward(hidden_grad, weight_grad)
        loss = kl * sums["kl"] + cross_entropy * sums["ce"]
        ctx.mark_non_differentiable(sums["kl"], sums["ce"])
        return loss, sums["kl"], sums["ce"]

    @staticmethod
    @once_differentiable
    def backward(ctx, grad, *_):
        gradients = [
            None if saved is None else (saved * grad).to(dtype)
            for saved, dtype in zip(ctx.saved_tensors, ctx.dtypes, strict=True)
        ]
        return *gradients, *[None] * 7


def head_loss(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    *,
    teacher: tuple[torch.Tensor, torch.Tensor] | None = None,
    targets: torch.Tensor | None = None,
    kl: float = 1.0,
    cross_entropy: float = 1.0,
    temperature: float = 1.0,
    compiles: bool = False,
) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """``kl * KL + cross_entropy * CE``, both averaged over tokens, from the hidden states before the head.

    ``KL(teacher || student)`` is multiplied by the temperature squared, so that gradients keep their size
    (Hinton et al., arXiv 1503.02531). Logits are made in the autocast dtype, or else in the weight's, and
    turned to float32 for every softmax. Gradients go to ``hidden`` and ``weight``, as far as they require
    them; there is no second derivative.

    Args:
        hidden: ``[N, hidden_size]``. weight: ``[vocab_size, hidden_size]``.
        teacher: its hidden states and its head's weight, for the KL.
        targets: ``[N]`` next tokens, for the cross-entropy.
        kl, cross_entropy: the weights of both terms.
        temperature: of both softmaxes of the KL.
        compiles: run what is done with the logits through ``torch.compile``.

    Returns:
        The loss, 0 for no tokens, and its parts ``kl`` and ``ce``, without gradients.
    """
    loss, *sums = _HeadLoss.apply(
        hidden, weight, teacher, targets, kl, cross_entropy, temperature, torch.is_grad_enabled(), compiles
    )
    tokens = max(1, len(hidden))
    wanted = {"kl": teacher, "ce": targets}
    parts = {
        name: total / tokens
        for (name, given), total in zip(wanted.items(), sums, strict=True)
        if given is not None
    }
    return loss / tokens, parts
