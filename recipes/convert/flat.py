"""All mixers' parameters in two tensors, a row for each mixer.

One all-reduce, one norm and one optimiser step then serve eighty million numbers in nine hundred tensors, and
their addresses never change, which a CUDA graph asks for.
"""

from collections.abc import Sequence

import torch
from torch import nn

__all__ = ["FlatParameters"]

_ALIGNMENT = 64  # numbers: where a compiled kernel may expect a tensor to begin


class FlatParameters:
    """Makes the parameters of modules, all alike, views into ``matrices`` and ``vectors``.

    Args:
        modules: alike in names and shapes; they keep their parameters' values.

    Attributes:
        matrices: ``[modules, n]`` float32, all parameters of two dimensions, which weight decay shrinks.
        vectors: ``[modules, m]`` float32, the others. Both carry their gradient as ``.grad``.
    """

    def __init__(self, modules: Sequence[nn.Module]) -> None:
        self.modules = list(modules)
        parts = {name: parameter for name, parameter in self.modules[0].named_parameters()}
        for module in self.modules:
            if {name: p.shape for name, p in module.named_parameters()} != {
                n: p.shape for n, p in parts.items()
            }:
                raise ValueError("The modules are not alike.")
        self.matrices = self._gather([name for name, p in parts.items() if p.ndim == 2])
        self.vectors = self._gather([name for name, p in parts.items() if p.ndim != 2])

    def _gather(self, names: list[str]) -> nn.Parameter:
        first = dict(self.modules[0].named_parameters())
        starts, end = {}, 0
        for name in names:
            starts[name] = end
            end += -(-first[name].numel() // _ALIGNMENT) * _ALIGNMENT
        device = first[names[0]].device
        flat = nn.Parameter(torch.zeros(len(self.modules), end, device=device))
        flat.grad = torch.zeros_like(flat)
        for row, module in enumerate(self.modules):
            for name, parameter in module.named_parameters():
                if name in starts:
                    place = slice(starts[name], starts[name] + parameter.numel())
                    view = flat.data[row, place].view(parameter.shape)
                    view.copy_(parameter.data)
                    parameter.data = view
                    parameter.grad = flat.grad[row, place].view(parameter.shape)
        return flat

    def tensors(self) -> list[nn.Parameter]:
        """Both flat parameters."""
        return [self.matrices, self.vectors]

    def clear_gradients(self) -> None:
        """Set every gradient to zero, in place."""
        for flat in self.tensors():
            flat.grad.zero_()

    def gradient_norms(self) -> torch.Tensor:
        """The norm of every module's gradient, ``[modules]``."""
        return sum(flat.grad.square().sum(1) for flat in self.tensors()).sqrt()

    def clip_gradients(self, limit: float, each: bool) -> torch.Tensor:
        """Scale gradients down to a norm of ``limit``: ``each`` module's by itself, or all by their common
        norm. Returns that norm, or the mean of the modules' norms, as it was before."""
        norms = self.gradient_norms()
        norm = norms if each else norms.square().sum().sqrt().expand_as(norms)
        scale = (limit / norm.clamp(min=limit))[:, None]
        for flat in self.tensors():
            flat.grad.mul_(scale)
        return norm.mean()
