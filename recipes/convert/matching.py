"""What a batch teaches the mixers: each its attention layer's answers, or all together the logits."""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from llama import Llama

from spiking_mamba import SpikingMambaForCausalLM
from spiking_mamba.model.block import SpikingMambaMixer
from spiking_mamba.training.head_loss import head_loss

__all__ = ["LayerMatching", "LogitMatching"]


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
        errors, device = [], ids.device.type
        with torch.no_grad():
            for mixer, (_, h, a) in zip(self.mixers, self.source.run(ids), strict=True):
                with torch.enable_grad():
                    with torch.autocast(device, torch.bfloat16, device == "cuda", cache_enabled=False):
                        error = self.error(mixer, h, a)
                    error.backward()
                errors.append(error.detach())
        return torch.stack(errors)


class LogitMatching:
    """The mixers together learn the source's logits: ``KL(source || student)``, a mean over all tokens but
    each row's first.

    Calling it with ids ``[B, L]`` adds to the mixers' gradients and returns the KL as a tensor of one.

    Args:
        piece: rows whose logits are made at a time; it divides B.
    """

    def __init__(self, source: Llama, student: SpikingMambaForCausalLM, compiles: bool, piece: int) -> None:
        self.source, self.student, self.compiles, self.piece = source, student, compiles, piece
        student.compile_blocks(compiles)

    def __call__(self, ids: torch.Tensor) -> torch.Tensor:
        device = ids.device.type
        with torch.no_grad():
            wanted = self.source.hidden_states(ids)[:, 1:]
        with torch.autocast(device, torch.bfloat16, device == "cuda", cache_enabled=False):
            found = self.student.backbone(ids, use_cache=False).last_hidden_state
            leaf = found.detach().requires_grad_()
            losses = [
                self._piece(own[:, 1:], others)
                for own, others in zip(leaf.split(self.piece), wanted.split(self.piece), strict=True)
            ]
            loss = torch.stack(losses).mean()
        loss.backward()
        found.backward(leaf.grad)
        return loss.detach()[None]

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
