"""What a batch teaches: mixers their attention layer's answers, or a whole student another model's logits."""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from llama import Llama

from spiking_mamba import SpikingMambaForCausalLM
from spiking_mamba.model.block import SpikingMambaMixer
from spiking_mamba.training.head_loss import head_loss
from spiking_mamba.training.spike_penalty import mean_spike_size, share_of_nonzero

__all__ = ["LayerMatching", "LogitMatching", "SpikeMatching", "Teacher", "autocast"]


def autocast(ids: torch.Tensor) -> torch.autocast:
    """bfloat16 on CUDA, nothing cached: a graph replays what it saw."""
    device = ids.device.type
    return torch.autocast(device, torch.bfloat16, device == "cuda", cache_enabled=False)


def relative_error(mixer: SpikingMambaMixer, h: torch.Tensor, a: torch.Tensor) -> torch.Tensor:
    """``sum (mixer(h) - a)^2 / sum a^2`` of ``[B, L, C]`` without position 0, attention's sink."""
    wanted = a[:, 1:].float()
    return (mixer(h)[:, 1:].float() - wanted).square().sum() / wanted.square().sum()


@functools.cache
def _compiled_error() -> Callable[..., torch.Tensor]:
    return torch.compile(relative_error)


class LayerMatching:
    """Every mixer by itself learns what its attention layer answers to the source's own inputs.

    Calling it with ids ``[B, L]`` adds to the mixers' gradients and returns the error of every layer.
    """

    def __init__(self, source: Llama, mixers: Sequence[SpikingMambaMixer], compiles: bool) -> None:
        self.source, self.mixers = source, mixers
        self.error = _compiled_error() if compiles else relative_error

    def __call__(self, ids: torch.Tensor) -> torch.Tensor:
        errors = []
        with torch.no_grad():
            for mixer, (_, h, a) in zip(self.mixers, self.source.run(ids), strict=True):
                with torch.enable_grad():
                    with autocast(ids):
                        error = self.error(mixer, h, a)
                    error.backward()
                errors.append(error.detach())
        return torch.stack(errors)


class LogitMatching:
    """The mixers together learn the source's logits: ``KL(source || student)``.

    A mean over all tokens but each row's first.

    Calling it with ids ``[B, L]`` adds to the mixers' gradients and returns the KL as a tensor of one.

    Args:
        piece: rows whose logits are made at a time; it divides B.
    """

    def __init__(self, source: Any, student: SpikingMambaForCausalLM, compiles: bool, piece: int) -> None:
        self.source, self.student, self.compiles, self.piece = source, student, compiles, piece
        student.compile_blocks(compiles)

    def __call__(self, ids: torch.Tensor) -> torch.Tensor:
        with autocast(ids):
            found = self.student.backbone(ids, use_cache=False).last_hidden_state
        loss, gradient = self._kl(ids, found)
        found.backward(gradient)
        return loss[None]

    def _kl(self, ids: torch.Tensor, hidden: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """The KL, and its gradient to the student's last hidden states."""
        with torch.no_grad():
            wanted = self.source.hidden_states(ids)[:, 1:]
        with autocast(ids):
            leaf = hidden.detach().requires_grad_()
            losses = [
                self._piece(own[:, 1:], others)
                for own, others in zip(leaf.split(self.piece), wanted.split(self.piece), strict=True)
            ]
            loss = torch.stack(losses).mean()
        loss.backward()
        assert leaf.grad is not None
        return loss.detach(), leaf.grad

    def _piece(self, own: torch.Tensor, others: torch.Tensor) -> torch.Tensor:
        weight: Any = self.student.lm_head.weight
        loss, _ = head_loss(
            own.flatten(0, 1),
            weight,
            teacher=(others.flatten(0, 1), self.source.head),
            cross_entropy=0.0,
            compiles=self.compiles,
        )
        return loss


class Teacher:
    """A dense model as a teacher: its last hidden states and its head."""

    def __init__(self, model: SpikingMambaForCausalLM, compiles: bool = False) -> None:
        self.model = model.eval().requires_grad_(False)
        model.compile_blocks(compiles)

    @property
    def head(self) -> torch.Tensor:
        """``[V, C]``."""
        return self.model.lm_head.weight

    def hidden_states(self, ids: torch.Tensor) -> torch.Tensor:
        """``[B, L] -> [B, L, C]``, behind the last norm."""
        with autocast(ids):
            return self.model.backbone(ids, use_cache=False).last_hidden_state


class SpikeMatching(LogitMatching):
    """A student learns a teacher's logits, and to spike no more than it may.

    ``KL + w max(0, cost - limit)``, means over all tokens but each row's first, which is of another size than
    all others.

    Calling it with ids ``[B, L]`` adds to the student's gradients and returns, detached, the loss, the KL,
    the mean |s| and the share of non-zero counts, both by output width; the first two of a dense student.

    Args:
        size, zeros: the limit of the mean |s|, and of the share of non-zero counts, each with its weight; a
            limit of None penalises nothing. The hinge is this process's batch's.
    """

    def __init__(
        self,
        source: Any,
        student: SpikingMambaForCausalLM,
        compiles: bool,
        piece: int,
        size: tuple[float | None, float] = (None, 0.0),
        zeros: tuple[float | None, float] = (None, 0.0),
    ) -> None:
        super().__init__(source, student, compiles, piece)
        self.limits = size, zeros
        self.spikes = student.config.neuron is not None

    def __call__(self, ids: torch.Tensor) -> torch.Tensor:
        # with a gradient of its own, the first block is compiled as the others are
        embedded = self.student.backbone.embeddings(ids).detach().requires_grad_()
        with autocast(ids):
            output = self.student.backbone(
                inputs_embeds=embedded, use_cache=False, output_accumulations=self.spikes
            )
        found = output.last_hidden_state
        kl, gradient = self._kl(ids, found)
        if not self.spikes:
            found.backward(gradient)
            return torch.stack([kl, kl])
        costs = [
            mean_spike_size(self.student, output.accumulations[:, 1:]),
            share_of_nonzero(self.student, output.fetches[:, 1:]),
        ]
        penalty = kl.new_zeros(())
        for cost, (limit, weight) in zip(costs, self.limits, strict=True):
            if limit is not None and weight:
                penalty = penalty + weight * (cost - limit).clamp(min=0)
        if penalty.requires_grad:
            torch.autograd.backward([found, penalty], [gradient, None])
        else:
            found.backward(gradient)
        return torch.stack([kl + penalty, kl, *costs]).detach()
