"""What spikes cost, as a term of a loss: their gradient is that of the neurons' surrogate."""

import torch
from torch import distributed

from spiking_mamba.model.modeling import SpikingMambaForCausalLM

__all__ = ["mean_spike_size", "over_processes"]


def mean_spike_size(
    model: SpikingMambaForCausalLM, accumulations: torch.Tensor | None, mask: torch.Tensor | None = None
) -> torch.Tensor:
    """Mean ``|s|``, weighted by output width as in ``SpikeCounts.mean_abs``; a float32 scalar.

    Args:
        accumulations: of the model's output, ``[B, L]``.
        mask: ``[B, L]`` bool, which tokens count; None: all.

    Raises:
        ValueError: the model has no neurons, or its output was made without ``output_accumulations``.
    """
    projections = model.projections().values()
    if accumulations is None or not projections:
        raise ValueError(
            "The spikes' size needs a spiking model's output, made with output_accumulations=True."
        )
    weight = sum(p.in_features * p.out_features for p in projections)
    if mask is None:
        return accumulations.mean() / weight
    return (accumulations * mask).sum() / mask.sum().clamp(min=1) / weight


def over_processes(size: torch.Tensor) -> torch.Tensor:
    """The mean of all processes' values, with the gradient of this process's own; a scalar.

    Processes average their gradients, so that the mean's whole gradient is what the optimiser gets, and a
    hinge of it is one hinge, not one for each process. The host does not wait.
    """
    if not (distributed.is_available() and distributed.is_initialized()):
        return size
    mean = size.detach().clone()
    distributed.all_reduce(mean)
    return size + (mean / distributed.get_world_size() - size.detach())
