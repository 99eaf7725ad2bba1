"""All mixers' parameters in two tensors, a row for each mixer.

One all-reduce, one norm and one optimiser step then serve eighty million numbers in nine hundred tensors, and
their addresses never change, which a CUDA graph asks for.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from rounding import rounded
from torch import nn

__all__ = ["FlatParameters", "load_state"]

_ALIGNMENT = 64  # numbers: where a compiled kernel may expect a tensor to begin


class FlatParameters:
    """Makes the parameters of modules, all alike, views into ``matrices`` and ``vectors``.

    Args:
        modules: alike in names and shapes; they keep their parameters' values, or those rounded.
        bits: to which modules see their matrices rounded, in groups of ``group`` inputs; 0: not at all.
        compiles: round by a compiled kernel.

    Attributes:
        matrices: ``[modules, n]`` float32, all parameters of two dimensions, which weight decay shrinks.
        vectors: ``[modules, m]`` float32, the others. Both carry their gradient as ``.grad``.

    Raises:
        ValueError: the modules are not alike, or a group does not divide a matrix's inputs.
    """

    def __init__(
        self, modules: Sequence[nn.Module], bits: int = 0, group: int = 32, compiles: bool = False
    ) -> None:
        self.modules = list(modules)
        self.bits, self.group = bits, group
        parts = {name: parameter for name, parameter in self.modules[0].named_parameters()}
        for module in self.modules:
            if {name: p.shape for name, p in module.named_parameters()} != {
                n: p.shape for n, p in parts.items()
            }:
                raise ValueError("The modules are not alike.")
        inputs = {name: p.shape[1] for name, p in parts.items() if p.ndim == 2}
        self.matrices, places = self._gather(list(inputs))
        self.vectors, _ = self._gather([name for name, p in parts.items() if p.ndim != 2])
        if bits:
            for name, count in inputs.items():
                if count % group or _ALIGNMENT % group:
                    raise ValueError(f"Groups of {group} do not divide the {count} inputs of {name}.")
            self._rounded = torch.compile(rounded, dynamic=False) if compiles else rounded
            self.used = torch.zeros_like(self.matrices.data)
            self._show(self.used, places)
            self.round()

    def _gather(self, names: list[str]) -> tuple[nn.Parameter, dict[str, slice]]:
        """Move parameters into one tensor with a gradient, and say where in its rows each lies."""
        first = dict(self.modules[0].named_parameters())
        places, end = {}, 0
        for name in names:
            places[name] = slice(end, end + first[name].numel())
            end += -(-first[name].numel() // _ALIGNMENT) * _ALIGNMENT
        flat = nn.Parameter(torch.zeros(len(self.modules), end, device=first[names[0]].device))
        flat.grad = torch.zeros_like(flat)
        for row, module in enumerate(self.modules):
            for name, parameter in module.named_parameters():
                if name in places:
                    flat.data[row, places[name]].copy_(parameter.data.flatten())
                    parameter.grad = flat.grad[row, places[name]].view(parameter.shape)
        self._show(flat.data, places)
        return flat, places

    def _show(self, flat: torch.Tensor, places: dict[str, slice]) -> None:
        """Make modules see a flat tensor's values."""
        for row, module in enumerate(self.modules):
            for name, parameter in module.named_parameters():
                if name in places:
                    parameter.data = flat[row, places[name]].view(parameter.shape)

    @torch.no_grad()
    def round(self) -> None:
        """Bring what modules see up to what has been learned: to be called after every change of it."""
        if self.bits:
            parts = self.matrices.data.view(-1, self.group)
            self.used.view(-1, self.group).copy_(self._rounded(parts, self.bits))

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


def load_state(modules: Sequence[nn.Module], path: str | Path) -> dict[str, Any]:
    """Give modules the parameters of a stage's ``state.pt`` as training saw them; returns its progress."""
    state = torch.load(path, map_location="cpu", weights_only=True)
    settings = state["progress"]["settings"]
    flat = FlatParameters(modules, settings.get("bits", 0), settings.get("group", 32))
    flat.matrices.data.copy_(state["matrices"])
    flat.vectors.data.copy_(state["vectors"])
    flat.round()
    return state["progress"]
