"""All parameters of modules that are alike, mixers, say, in two tensors, a row for each module.

One all-reduce, one norm and one optimiser step then serve eighty million numbers in nine hundred tensors, and
their addresses never change, which a CUDA graph asks for.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from rounding import rounded
from torch import nn

__all__ = ["FlatParameters", "LowRankParameters", "Together", "load_state"]

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
        self.matrices, self.places = self._gather(list(inputs))
        self.vectors, _ = self._gather([name for name, p in parts.items() if p.ndim != 2])
        if bits:
            for name, count in inputs.items():
                if count % group or _ALIGNMENT % group:
                    raise ValueError(f"Groups of {group} do not divide the {count} inputs of {name}.")
            self._rounded = torch.compile(rounded, dynamic=False) if compiles else rounded
            self.used = torch.zeros_like(self.matrices.data)
            self._show(self.used, self.places)
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

    def groups(self, weight_decay: float) -> list[dict[str, Any]]:
        """They as an optimiser's groups: what has two dimensions decays."""
        return [
            {"params": [self.matrices], "weight_decay": weight_decay},
            {"params": [self.vectors], "weight_decay": 0.0},
        ]

    def state(self) -> dict[str, torch.Tensor]:
        """What :meth:`restore` takes."""
        return {"matrices": self.matrices.data, "vectors": self.vectors.data}

    def restore(self, state: dict[str, Any]) -> None:
        """Take up what was kept."""
        with torch.no_grad():
            for name, tensor in self.state().items():
                tensor.copy_(state[name])
        self.round()

    def collect(self) -> None:
        """Make gradients of what is trained out of the modules': they are that here."""

    def clear_gradients(self) -> None:
        """Set every gradient to zero, in place."""
        for flat in self.tensors():
            flat.grad.zero_()

    def gradient_norms(self) -> torch.Tensor:
        """The norm of every module's gradient, ``[modules]``."""
        return sum(flat.grad.square().sum(1) for flat in self.tensors()).sqrt()

    def clip_gradients(self, limit: float, each: bool) -> torch.Tensor:
        """Scale gradients down to a norm of ``limit``.

        ``each`` module's by itself, or all by their common norm. Returns that norm, or the mean of the
        modules' norms, as it was before.
        """
        norms = self.gradient_norms()
        norm = norms if each else norms.square().sum().sqrt().expand_as(norms)
        self.scale_gradients((limit / norm.clamp(min=limit))[:, None])
        return norm.mean()

    def scale_gradients(self, scale: torch.Tensor) -> None:
        """Multiply all by one number, or each module's by its own, ``[modules, 1]``."""
        for flat in self.tensors():
            flat.grad.mul_(scale)


class LowRankParameters(FlatParameters):
    """As :class:`FlatParameters`, but a matrix is what it was plus ``B A`` of a low rank, which is trained.

    Args:
        modules: as there. rank: of the updates; 0: matrices stay as they are.
        generator: of A, on the CPU; B starts at 0.

    Attributes:
        factors: ``[modules, n]``, every matrix's A ``[rank, in]``, of variance 1 / rank, and B
            ``[out, rank]``.
    """

    def __init__(self, modules: Sequence[nn.Module], rank: int, generator: torch.Generator) -> None:
        super().__init__(modules)
        self.rank = rank
        self.base = self.matrices.data.clone()
        parameters = dict(self.modules[0].named_parameters())
        self.shapes = {name: parameters[name].shape for name in self.places}
        count = sum(rank * sum(shape) for shape in self.shapes.values())
        device = self.base.device
        self.factors = nn.Parameter(torch.zeros(len(self.modules), max(1, count), device=device))
        self.factors.grad = torch.zeros_like(self.factors)
        for a, _ in self.pairs(self.factors.data).values():
            a.copy_(torch.randn(a.shape, generator=generator) / max(1, rank) ** 0.5)

    def pairs(self, flat: torch.Tensor) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
        """Views of every matrix's A ``[modules, rank, in]`` and B ``[modules, out, rank]``."""
        factors, end = {}, 0
        for name, (out, inputs) in self.shapes.items():
            parts = []
            for shape in ((self.rank, inputs), (out, self.rank)):
                size = shape[0] * shape[1]
                parts.append(flat[:, end : end + size].unflatten(1, shape))
                end += size
            factors[name] = (parts[0], parts[1])
        return factors

    def _matrix(self, flat: torch.Tensor, name: str) -> torch.Tensor:
        return flat[:, self.places[name]].unflatten(1, self.shapes[name])  # [modules, out, in]

    @torch.no_grad()
    def round(self) -> None:
        """Show the modules the sums."""
        for name, (a, b) in self.pairs(self.factors.data).items():
            shown = self._matrix(self.matrices.data, name)
            shown.copy_(torch.baddbmm(self._matrix(self.base, name), b, a))

    @torch.no_grad()
    def collect(self) -> None:
        """Factors' gradients out of the matrices'."""
        gradients = self.pairs(self.factors.grad)
        for name, (a, b) in self.pairs(self.factors.data).items():
            whole = self._matrix(self.matrices.grad, name)
            gradients[name][0].copy_(b.transpose(1, 2) @ whole)
            gradients[name][1].copy_(whole @ a.transpose(1, 2))

    def clear_gradients(self) -> None:
        super().clear_gradients()
        self.matrices.grad.zero_()

    def tensors(self) -> list[nn.Parameter]:
        """What is trained."""
        return [self.factors, self.vectors]

    def groups(self, weight_decay: float) -> list[dict[str, Any]]:
        return [{"params": self.tensors(), "weight_decay": 0.0}]

    def state(self) -> dict[str, torch.Tensor]:
        return {"factors": self.factors.data, "vectors": self.vectors.data}


class Together:
    """Several kinds of modules' parameters as one, their gradients cut by one norm."""

    def __init__(self, parts: Sequence[FlatParameters]) -> None:
        self.parts = list(parts)

    def tensors(self) -> list[nn.Parameter]:
        """All that is trained."""
        return [tensor for part in self.parts for tensor in part.tensors()]

    def groups(self, weight_decay: float) -> list[dict[str, Any]]:
        """As an optimiser's groups."""
        return [group for part in self.parts for group in part.groups(weight_decay)]

    def state(self) -> dict[str, torch.Tensor]:
        """What :meth:`restore` takes."""
        return {f"{k}.{name}": t for k, part in enumerate(self.parts) for name, t in part.state().items()}

    def restore(self, state: dict[str, Any]) -> None:
        """Take up what was kept."""
        for k, part in enumerate(self.parts):
            part.restore({name: state[f"{k}.{name}"] for name in part.state()})

    def collect(self) -> None:
        """See :meth:`FlatParameters.collect`."""
        for part in self.parts:
            part.collect()

    def round(self) -> None:
        """See :meth:`FlatParameters.round`."""
        for part in self.parts:
            part.round()

    def clear_gradients(self) -> None:
        """See :meth:`FlatParameters.clear_gradients`."""
        for part in self.parts:
            part.clear_gradients()

    def clip_gradients(self, limit: float, each: bool = False) -> torch.Tensor:
        """Scale all down to a common norm of ``limit``; returns it as it was before."""
        if each:
            raise ValueError("Modules of several kinds are cut together.")
        norm = sum(part.gradient_norms().square().sum() for part in self.parts).sqrt()
        for part in self.parts:
            part.scale_gradients(limit / norm.clamp(min=limit))
        return norm


def load_state(modules: Sequence[nn.Module], path: str | Path) -> dict[str, Any]:
    """Give modules the parameters of a stage's ``state.pt`` as training saw them; returns its progress."""
    state = torch.load(path, map_location="cpu", weights_only=True)
    settings = state["progress"]["settings"]
    flat = FlatParameters(modules, settings.get("bits", 0), settings.get("group", 32))
    flat.restore(state)
    return state["progress"]
