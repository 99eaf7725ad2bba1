"""How much a model depends on its largest activations: they are overwritten in front of its projections.

with replace_outliers(model, "in_proj", value=0.0, fraction=0.001):
    perplexity(model, rows)
"""

import math
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn

from spiking_mamba.model.configuration import BLOCK_TYPES, PROJECTIONS
from spiking_mamba.model.mlp import SpikingMambaMLP as MLP
from spiking_mamba.model.modes import hooked
from spiking_mamba.model.spike_fed import SpikeFed

__all__ = ["number_of_outliers", "overwrite_largest", "replace_outliers", "width_of"]

SCOPES = ("token", "tensor")


def number_of_outliers(fraction: float, size: int) -> int:
    """``ceil(fraction * size)``, where 7 % of 100 are 7, whatever binary fractions make of it."""
    return min(size, math.ceil(round(fraction * size, 6)))


def overwrite_largest(x: torch.Tensor, fraction: float, value: float, per: str = "token") -> torch.Tensor:
    """A copy of ``x`` whose entries of largest magnitude are ``value``.

    Args:
        x: activations ``[..., channels]``.
        fraction: how many, as a share of 1, rounded up (:func:`number_of_outliers`): of the channels of
            each token, or of all entries. Among entries of equal magnitude it is open which are taken.
        value: what they become, in the units of ``x``.
        per: 'token': every token loses as many channels; 'tensor': the largest of the whole tensor, so that
            what a token loses depends on the others of its batch, padding included.
    """
    if per == "token":
        count = number_of_outliers(fraction, x.shape[-1])
        return x.scatter(-1, x.abs().topk(count, dim=-1, sorted=False).indices, value)
    count = number_of_outliers(fraction, x.numel())
    largest = x.abs().flatten().topk(count, sorted=False).indices
    return x.flatten().index_fill(0, largest, value).view_as(x)


def _layers(model: nn.Module, block: str) -> list[SpikeFed]:
    return [m for m in model.modules() if isinstance(m, SpikeFed) and (block == "mlp") == isinstance(m, MLP)]


def width_of(model: nn.Module, site: str, block: str = "mamba") -> int:
    """How many channels a projection of :func:`replace_outliers` has."""
    return int(getattr(_layers(model, block)[0], site).in_features)


@contextmanager
def replace_outliers(
    model: nn.Module,
    site: str,
    value: float,
    fraction: float,
    per: str = "token",
    block: str = "mamba",
    first: int = 0,
) -> Iterator[None]:
    """Within the block, every forward pass of ``model`` feeds its projections :func:`overwrite_largest`.

    Args:
        model: dense or spiking; in a spiking one the activations are those in front of the neuron.
        site: 'in_proj' (u in arXiv 2510.04595) or 'out_proj' (y there), in every block of a kind.
        block: that kind, 'mamba', whose are u and y, or 'mlp'.
        first: places at the start of every row that are left as they are: a converted Transformer's first
            token, an attention sink, is larger than all others. Passes are of whole rows, not of a cache.
        value, fraction, per: see :func:`overwrite_largest`. A fraction of 0 changes nothing.

    Raises:
        ValueError: one of them is out of its range, or the model has no such projection.
    """
    if site not in PROJECTIONS:
        raise ValueError(f"site is {site!r}; it must be one of {', '.join(PROJECTIONS)}.")
    if per not in SCOPES:
        raise ValueError(f"per is {per!r}; it must be one of {', '.join(SCOPES)}.")
    if not 0.0 <= fraction <= 1.0:
        raise ValueError(f"fraction is {fraction}; it is a share, from 0 to 1.")
    if not math.isfinite(value):
        raise ValueError(f"value is {value}; it must be finite.")
    if block not in BLOCK_TYPES:
        raise ValueError(f"block is {block!r}; it must be one of {', '.join(BLOCK_TYPES)}.")
    encoders = [getattr(layer, layer.encoders[site]) for layer in _layers(model, block)]
    if not encoders:
        raise ValueError(
            f"The model has no {block} block with a projection {site} that spikes could feed; load it with "
            "load_model."
        )

    def overwrite(module: nn.Module, arguments: tuple) -> tuple:
        x, *others = arguments
        changed = overwrite_largest(x[:, first:], fraction, value, per)
        return torch.cat([x[:, :first], changed], 1), *others

    hooks = [encoder.register_forward_pre_hook(overwrite) for encoder in encoders if fraction > 0.0]
    with hooked(hooks):
        yield
